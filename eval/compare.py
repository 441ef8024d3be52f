"""Compare models on the same rows: the paired difference, its interval, a test, and the rows that changed.

    python eval/compare.py outputs/eval/base.json outputs/eval/sft.json
    python eval/compare.py outputs/eval/base.json outputs/eval/sft.json outputs/eval/dpo.json --by task
    python eval/compare.py a.json b.json --column stopped --show 10 --output outputs/compare.json
    python eval/compare.py outputs/eval/*/base.json outputs/eval/*/sft.json --target prompts

Reads result files of any script in eval/. Files of several tasks give a table with a line per task: what was trained
for (--target), and under it what was not, where a model may have forgotten. eval/README.md explains the numbers.
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

from alignment.compare import (
    Difference,
    corrected,
    draw_differences,
    join,
    p_text,
    paired,
    scale_of,
    sentence,
    verdict,
)  # fmt: skip
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
    add("--target", nargs="+", default=[], help="with several tasks: those that were trained for, shown apart")
    add("--common", action="store_true", help="compare the rows that both files hold, when they differ")
    add("--other_prompts", action="store_true", help="compare although the wording around the rows differs")
    add("--show", type=int, default=3, help="changed rows to show in each direction [3]")
    add("--seed", type=int, default=0, help="of the bootstrap and the permutations [0]")
    add("--output", help="write the comparison as JSON")
    add("--plot", help="draw the differences with their intervals (.png)")
    add("--overwrite", action="store_true", help="replace these files")
    return parser.parse_args([with_underscores(word) for word in argv])


def read_all(paths: list[str]) -> dict[str, dict[str, Result]]:
    """Return task -> model -> result; the same checkpoint has the same name in every task."""
    if len(paths) < 2:
        raise InputError("one result file has nothing to be compared with", fix="give two or more")
    found = {path: read_result(path) for path in paths}
    if len(found) < len(paths):
        raise InputError(f"{max(paths, key=paths.count)} is given twice")
    kinds = kinds_of(found)
    many = len(set(kinds.values())) > 1
    names = name_models(found) if many else name_files(paths)
    tasks: dict[str, dict[str, Result]] = {}
    for path, result in found.items():
        task = name_task(kinds[path], set(kinds.values()))
        if names[path] in tasks.setdefault(task, {}):
            raise InputError(f"two results of {names[path]} in {task}", where=path, fix="leave one of them out")
        tasks[task][names[path]] = result
    return tasks


def kinds_of(found: dict[str, Result]) -> dict[str, tuple[str, str]]:
    """Return path -> (task, data): files of one task that share a row have the same."""
    kinds: dict[str, tuple[str, str]] = {}
    for path, result in found.items():
        ids = {row["id"] for row in result.rows}
        same = (p for p in kinds if found[p].task == result.task and any(row["id"] in ids for row in found[p].rows))
        first = next(same, None)
        kinds[path] = kinds[first] if first else (result.task, result.data)
    return kinds


def name_files(paths: list[str]) -> dict[str, str]:
    """Return path -> the file's name, or folder and name where that is not unique."""
    stems = [Path(path).stem for path in paths]
    return {
        path: stem if stems.count(stem) == 1 else f"{Path(path).parent.name}/{stem}"
        for path, stem in zip(paths, stems, strict=True)
    }


def name_models(found: dict[str, Result]) -> dict[str, str]:
    """Return path -> name of the model: what all files of a checkpoint are called, or the folder they are in."""
    names = {}
    for path, result in found.items():
        mine = [Path(p) for p, r in found.items() if (r.model, r.run) == (result.model, result.run)]
        stems, folders = {p.stem for p in mine}, {p.parent.name for p in mine}
        names[path] = (
            stems.pop() if len(stems) == 1 else folders.pop() if len(folders) == 1 else Path(result.model).name
        )
    return names


def name_task(kind: tuple[str, str], kinds: set[tuple[str, str]]) -> str:
    """Return the task, or the name of its rows where several files have the same task."""
    alone = [other for other in kinds if other[0] == kind[0]]
    return kind[0] if len(alone) == 1 else Path(kind[1]).stem


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


def table_of(differences: dict[tuple[str, ...], Difference], heads: list[str], corrected_p: bool = False) -> Table:
    """Return one line per comparison, in points (of 100) where scores are shares."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold")
    for head in ("rows", "first", "second", "difference [95 %]", "p", "rose/fell"):
        table.add_column(head, justify="right", no_wrap=head != "rows")
    table.add_column("second is", no_wrap=True)
    many = len(differences) > 1 or corrected_p
    for names, d in differences.items():
        scale, word = scale_of(d), verdict(d)
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
    output, plot = (check_free(p, overwrite=args.overwrite) if p else None for p in (args.output, args.plot))
    tasks = read_all(args.files)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    if len(tasks) == 1:
        (results,) = tasks.values()
        comparisons = one_task(results, args, console)
    else:
        comparisons = many_tasks(tasks, args, console)
    if plot:
        drawn = {
            " ".join([c["first"], "→", c["second"], *([c["task"]] if "task" in c else [])]): Difference(
                **c["difference"]
            )
            for c in comparisons
        }
        draw_differences(drawn, plot)
        console.print(f"drawn: {plot}", soft_wrap=True)
    if output:
        content = {"schema": 1, "column": args.column, "files": args.files, "comparisons": comparisons}
        write_text(output, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        console.print(f"\nwritten: {output}")


def choose_pairs(names: list[str], args: Namespace) -> list[tuple[str, str]]:
    """Return the pairs of models to compare."""
    return list(itertools.combinations(names, 2)) if args.pairs == "all" else [(names[0], n) for n in names[1:]]


def joined_rows(results: dict[str, Result], pair: tuple[str, str], args: Namespace, console: Console) -> list:
    """Return the rows of two models side by side; print what else they differ in."""
    first, second = (results[name] for name in pair)
    notes = check_comparable(first, second, pair, args.other_prompts)
    for name in pair:
        found = results[name].contamination
        if found and found["found"]:
            verb = "overlaps" if found["found"] == 1 else "overlap"
            notes.append(f"{found['found']:,} of these {found['rows']:,} rows {verb} with the training data of {name}")
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    return join(first.rows, second.rows, names=pair, common=args.common)


def one_task(results: dict[str, Result], args: Namespace, console: Console) -> list[dict]:
    """Compare the models of one task, print it, and return it for a file."""
    names = list(results)
    if args.target:
        raise InputError("--target is for files of several tasks", where="--target", fix="leave it out")
    joined = {pair: joined_rows(results, pair, args, console) for pair in choose_pairs(names, args)}
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
    last = list(joined)[-1]
    show_changed(console, joined[last], last, args)
    return [as_json(pair, difference, joined[pair], args) for pair, difference in found.items()]


def many_tasks(tasks: dict[str, dict[str, Result]], args: Namespace, console: Console) -> list[dict]:
    """Compare pairs of models over all tasks that hold both: the targets first, then the forgetting panel."""
    for name in args.target:
        if name not in tasks:
            near = nearest(name, list(tasks))
            fix = f"did you mean {near}?" if near else f"one of {', '.join(tasks)}"
            raise InputError(f"there is no task {name!r}", where="--target", fix=fix)
    if args.by:
        raise InputError("--by looks into one task", where="--by", fix="give the files of one task")
    names = list(dict.fromkeys(name for results in tasks.values() for name in results))
    order = [*args.target, *(task for task in tasks if task not in args.target)]
    joined = {
        (*pair, task): joined_rows(tasks[task], pair, args, console)
        for pair in choose_pairs(names, args)
        for task in order
        if set(pair) <= tasks[task].keys()
    }
    if not joined:
        same = len({result.task for results in tasks.values() for result in results.values()}) == 1
        raise InputError(
            "these files have no row in common" if same else "no task has results of two models",
            where=", ".join(args.files),
            why=f"they are of {', '.join(tasks)}" if same else "",
            fix="evaluate both models on the same rows",
        )
    found = {key: compare(rows, args, " and ".join(key)) for key, rows in joined.items()}
    found = dict(zip(found, corrected(list(found.values())), strict=True))
    for pair in dict.fromkeys(key[:2] for key in found):
        console.print(f"[bold]{pair[0]}[/bold] and [bold]{pair[1]}[/bold], {args.column}")
        mine = {key[2]: difference for key, difference in found.items() if key[:2] == pair}
        for title, chosen in panels(mine, args.target):
            console.print(table_of({(task,): mine[task] for task in chosen}, [title], corrected_p=len(found) > 1))
        console.print(forgotten(pair, {task: d for task, d in mine.items() if task not in args.target}))
    console.print(f"p-values hold for all {len(found)} comparisons together (Holm).")
    return [{"task": key[2]} | as_json(key[:2], difference, joined[key], args) for key, difference in found.items()]


def panels(found: dict[str, Difference], targets: list[str]) -> list[tuple[str, list[str]]]:
    """Return (title, tasks) of the tables: one, or the targets and the rest."""
    if not targets:
        return [("task", list(found))]
    aimed = [task for task in found if task in targets]
    return [
        (title, names)
        for title, names in (("trained for", aimed), ("not trained for", [t for t in found if t not in targets]))
        if names
    ]


def forgotten(pair: tuple[str, str], found: dict[str, Difference]) -> str:
    """Say in a sentence where the second model is worse, and how much it could have lost unseen."""
    worse = [task for task, difference in found.items() if verdict(difference) == "worse"]
    if worse:
        return f"- {pair[1]} is worse than {pair[0]} at {', '.join(worse)}."
    if not found:
        return ""
    task, most = max(found.items(), key=lambda item: item[1].visible * scale_of(item[1]))
    size = f"{most.visible * scale_of(most):.1f}"
    return f"- No loss shown there; at {task} one of less than {size} would mostly go unseen."


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


def as_json(pair: tuple[str, str], difference: Difference, rows: list, args: Namespace) -> dict:
    """Return a comparison for a file: numbers, verdict, and the ids of the rows that changed."""
    change = [(a["id"], b[args.column] - a[args.column]) for a, b in rows]
    return (
        {"first": pair[0], "second": pair[1], "verdict": verdict(difference)}
        | {"sentence": sentence(difference, *pair), "difference": asdict(difference)}
        | {"rose": [i for i, c in change if c > 0], "fell": [i for i, c in change if c < 0]}
    )


if __name__ == "__main__":
    main()
