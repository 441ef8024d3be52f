"""Compare models on the same rows: the paired difference, its interval, a test, and the rows that changed.

    python eval/compare.py outputs/eval/base.json outputs/eval/sft.json
    python eval/compare.py outputs/eval/base.json outputs/eval/sft.json outputs/eval/dpo.json --by task
    python eval/compare.py a.json b.json --column stopped --show 10 --output outputs/compare.json

Reads result files of any script in eval/. eval/README.md says how the numbers are made.
"""

import itertools
import json
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignment.compare import Difference, corrected, join, p_text, paired, sentence, verdict
from alignment.config import Parser, install_excepthook, with_underscores
from alignment.errors import InputError, nearest
from alignment.report import Result, check_free, read_result, write_text

COLOURS = {"better": "green", "worse": "red"}


def read_arguments(argv: list[str]) -> Namespace:
    """Return the command line."""
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("files", nargs="+", help="result files, the baseline first")
    add("--column", default="score", help="what to compare: score, exact, stopped, tokens, … [score]")
    add(
        "--pairs",
        choices=("all", "first"),
        default="all",
        help="every pair, or each file with the first [all]",
    )
    add("--by", default="", help="also compare within each value of this column, such as task or source")
    add("--common", action="store_true", help="compare the rows that both files hold, when they differ")
    add("--other_prompts", action="store_true", help="compare although the wording around the rows differs")
    add("--show", type=int, default=3, help="changed rows to show in each direction [3]")
    add("--seed", type=int, default=0, help="of the bootstrap and the permutations [0]")
    add("--output", help="write the comparison as JSON")
    add("--overwrite", action="store_true", help="replace that file")
    return parser.parse_args([with_underscores(word) for word in argv])


def read_all(paths: list[str]) -> dict[str, Result]:
    """Return name -> result; a file is called by its name, or by folder and name where that is not unique."""
    if len(paths) < 2:
        raise InputError("one result file has nothing to be compared with", fix="give two or more")
    results: dict[str, Result] = {}
    stems = [Path(path).stem for path in paths]
    for path, stem in zip(paths, stems, strict=True):
        name = stem if stems.count(stem) == 1 else f"{Path(path).parent.name}/{stem}"
        if name in results:
            raise InputError(f"{path} is given twice")
        results[name] = read_result(path)
    return results


def check_comparable(first: Result, second: Result, names: tuple[str, str], other_prompts: bool) -> list[str]:
    """Raise InputError when scores are of different kinds; return notes on settings that differ."""
    where = f"{names[0]} and {names[1]}"
    if (first.task, first.version) != (second.task, second.version):
        raise InputError(
            f"{first.task} v{first.version} and {second.task} v{second.version} score differently",
            where=where,
            fix="evaluate both with the same script and version",
        )
    if first.prompt_hash != second.prompt_hash and not other_prompts:
        raise InputError(
            "the rows were put to the models in different words (prompt_hash)",
            where=where,
            why="the difference would be that of the wording as well",
            fix="evaluate both with the same --system, …; or --other_prompts if the wording is your question",
        )
    keys = sorted(first.settings.keys() | second.settings.keys())
    settings = [(key, first.settings.get(key), second.settings.get(key)) for key in keys]
    return [f"{where} differ in {key}: {a} and {b}" for key, a, b in settings if a != b]


def column(rows: list[dict], name: str, where: str) -> list[float]:
    """Return one number per row; raises InputError when a row has none of this name."""
    for row in rows:
        if not isinstance(row.get(name), int | float):
            numbers = [key for key, value in row.items() if isinstance(value, int | float)]
            near = nearest(name, numbers)
            raise InputError(
                f"no number {name!r} in row {row['id']}",
                where=where,
                fix=f"--column {near}" if near else f"there are {', '.join(numbers)}",
            )
    return [float(row[name]) for row in rows]


def compare(pairs: list[tuple[dict, dict]], args: Namespace, where: str) -> Difference:
    """Return the difference of second minus first over the joined rows."""
    first, second = zip(*pairs, strict=True)
    return paired(column(list(first), args.column, where), column(list(second), args.column, where), seed=args.seed)


def table_of(differences: dict[tuple[str, ...], Difference], heads: list[str]) -> Table:
    """Return one line per comparison, in points (of 100) where scores are shares."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold")
    for head in ("rows", "first", "second", "difference [95 %]", "p", "rose/fell"):
        table.add_column(head, justify="right", no_wrap=head != "rows")
    table.add_column("second is", no_wrap=True)
    many = len(differences) > 1
    for names, d in differences.items():
        scale = 100 if max(abs(d.first), abs(d.second)) <= 1 else 1
        word = verdict(d)
        table.add_row(
            *map(escape, names),
            f"{d.rows:,}",
            f"{d.first * scale:.1f}",
            f"{d.second * scale:.1f}",
            f"{d.value * scale:+.1f} [{d.low * scale:+.1f}, {d.high * scale:+.1f}]",
            p_text(d.p_holm if many else d.p).removeprefix("p = ").removeprefix("p "),
            f"{d.up:,}/{d.down:,}",
            f"[{COLOURS.get(word, 'default')}]{'not shown' if word == 'no difference shown' else word}",
        )
    return table


def show_changed(console: Console, pairs: list, names: tuple[str, str], args: Namespace) -> None:
    """Print a few rows whose number rose and a few whose fell, with both answers."""
    for sign, verb in ((1, "rose"), (-1, "fell")):
        changed = [(a, b) for a, b in pairs if sign * (b[args.column] - a[args.column]) > 0]
        if changed and args.show:
            console.print(f"\n[bold]{len(changed):,} rows {verb}[/bold] from {names[0]} to {names[1]}:")
        for a, b in changed[: args.show]:
            question = " ".join(str(a.get("prompt", a["id"])).split())
            console.print(f"  {question[:300]}", style="italic", markup=False)
            if "answer" in a:
                console.print(f"    {'wanted':<12} {a['answer']}", markup=False)
            for name, row in zip(names, (a, b), strict=True):
                text = " ".join(str(row.get("text", row.get("prediction", ""))).split())[:200]
                console.print(f"    {name[:12]:<12} {text}  ({row[args.column]:g})", markup=False)


def main() -> None:
    """Read the files, compare them pair by pair and say what was found."""
    install_excepthook()
    args = read_arguments(sys.argv[1:])
    output = check_free(args.output, overwrite=args.overwrite) if args.output else None
    results = read_all(args.files)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    names = list(results)
    chosen = list(itertools.combinations(names, 2)) if args.pairs == "all" else [(names[0], n) for n in names[1:]]
    joined = {}
    for pair in chosen:
        first, second = (results[name] for name in pair)
        for note in check_comparable(first, second, pair, args.other_prompts):
            console.print(f"note: {note}", style="yellow")
        joined[pair] = join(first.rows, second.rows, names=pair, common=args.common)
    found = {pair: compare(rows, args, " and ".join(pair)) for pair, rows in joined.items()}
    found = dict(zip(found, corrected(list(found.values())), strict=True))
    console.print(f"[bold]{args.column}[/bold] of {', '.join(names)}")
    console.print(table_of(found, ["first", "second"]))
    for pair, difference in found.items():
        console.print("- " + sentence(difference, *pair), soft_wrap=False)
    console.print(f"  Interval: {next(iter(found.values())).interval}. Test: {next(iter(found.values())).test}.")
    if len(found) > 1:
        console.print(f"  p-values hold for all {len(found)} comparisons together (Holm).")
    for pair, rows in joined.items():
        if args.by:
            show_groups(console, rows, pair, args)
    show_changed(console, joined[chosen[-1]], chosen[-1], args)
    if output:
        write_text(output, json.dumps(as_json(found, joined, args), indent=1, ensure_ascii=False) + "\n")
        console.print(f"\nwritten: {output}")


def show_groups(console: Console, pairs: list, names: tuple[str, str], args: Namespace) -> None:
    """Print the comparison within each value of the column `--by`; groups of one row are only named."""
    groups: dict[str, list] = {}
    for a, b in pairs:
        if args.by not in a:
            raise InputError(f"rows have no column {args.by!r}", where=names[0], fix=f"one of {', '.join(a)}")
        groups.setdefault(str(a[args.by]), []).append((a, b))
    single = [name for name, rows in groups.items() if len(rows) < 2]
    found = {(n,): compare(rows, args, n) for n, rows in sorted(groups.items()) if len(rows) > 1}
    found = dict(zip(found, corrected(list(found.values())), strict=True))
    console.print(f"\n[bold]by {args.by}[/bold]: {names[0]} and {names[1]}, p-values corrected for the table (Holm)")
    console.print(table_of(found, [args.by]))
    if single:
        console.print(f"  one row only, not compared: {', '.join(single)}")


def as_json(found: dict, joined: dict, args: Namespace) -> dict:
    """Return the comparison for a file: numbers, verdicts, and the ids of the rows that changed."""
    comparisons = []
    for pair, difference in found.items():
        change = [(a["id"], b[args.column] - a[args.column]) for a, b in joined[pair]]
        comparisons.append(
            {"first": pair[0], "second": pair[1], "verdict": verdict(difference)}
            | {"sentence": sentence(difference, *pair), "difference": asdict(difference)}
            | {"rose": [i for i, c in change if c > 0], "fell": [i for i, c in change if c < 0]}
        )
    return {"schema": 1, "column": args.column, "files": args.files, "comparisons": comparisons}


if __name__ == "__main__":
    main()
