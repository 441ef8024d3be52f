"""Look for the rows of benchmarks among training rows, and leave those training rows out.

    python data/contamination.py --data data/tiny/chat --benchmark data/tiny/prompts data/tiny/choices
    python data/contamination.py --data mine.jsonl --benchmark gsm8k/test.jsonl --drop clean.jsonl

A training row holds a benchmark row when 13-grams they share cover half of the benchmark row's words; a benchmark row
of fewer words is looked for line by line. Prints rows by source and benchmark; --output keeps them all.
"""

import csv
import json
import sys
from argparse import Namespace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from alignment.config import Parser, install_excepthook, with_underscores
from alignment.contamination import NGRAM, SHARE, Found, Index, question_of, search
from alignment.errors import InputError
from alignment.files import Broken
from alignment.report import check_free, write_text
from alignment.sources import Part, resolve


def read_arguments(argv: list[str]) -> Namespace:
    """Return the command line."""
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="training rows: files, folders, hub ids, data/*.yaml")
    add("--benchmark", nargs="+", required=True, help="rows that must not be trained on: the same, or MMLU's csv")
    add("--ngram", type=int, default=NGRAM, help=f"words in a row that count as one place [{NGRAM}]")
    add("--share", type=float, default=SHARE, help=f"of a benchmark row's words that have to be covered [{SHARE}]")
    add("--show", type=int, default=3, help="rows to show of each benchmark [3]")
    add("--drop", help="write the training rows that hold no benchmark row (.jsonl)")
    add("--output", help="write what was found (.json)")
    add("--overwrite", action="store_true", help="replace these files")
    return parser.parse_args([with_underscores(word) for word in argv])


def read_benchmark(spec: str) -> dict[str, str]:
    """Return "file:row" -> what the row asks, of a benchmark's test rows."""
    texts = {}
    for part in resolve(spec, "test").parts:
        rows = headless(part) if part.where.endswith(".csv") else None
        for number, row in rows if rows is not None else part.read():
            if not isinstance(row, Broken):
                texts[f"{part.name}:{number}"] = question_of(row)
    if not any(texts.values()):
        raise InputError(f"{spec} holds no text", where="--benchmark", fix="give the rows of a benchmark")
    return texts


def headless(part: Part) -> list[tuple[int, dict]] | None:
    """Return the rows of a csv of MMLU, which has no line of column names; None for any other."""
    with Path(part.where).open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    if not rows or len(rows[0]) != 6 or rows[0][5].strip() not in ("A", "B", "C", "D"):
        return None
    return [(number, {"question": row[0]}) for number, row in enumerate(rows, start=1)]


def show(console: Console, found: dict[str, Found], texts: dict[str, dict[str, str]], count: int) -> None:
    """Print a line per benchmark and source, and a few of the rows."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("benchmark", "training rows"):
        table.add_column(head, overflow="fold", min_width=20)
    for head in ("read", "rows found", "share", "in rows"):
        table.add_column(head, justify="right")
    for benchmark, result in found.items():
        for source, (ids, rows) in result.by_source().items():
            name, share = "/".join(Path(benchmark).parts[-2:]), f"{100 * ids / result.rows:.1f} %"
            table.add_row(name, source, f"{result.read[source]:,}", f"{ids:,} of {result.rows:,}", share, f"{rows:,}")
    console.print(table)
    for benchmark, result in found.items():
        for name, places in sorted(result.hits.items())[:count]:
            source, number = places[0]
            text = " ".join(texts[benchmark][name].split())
            console.print(f"{name} is in {source}, row {number}: {text[:200]}", markup=False)


def write_clean(parts: list[Part], found: dict[str, Found], path: Path, console: Console) -> None:
    """Write the training rows that hold no benchmark row, and say how many of each source stay."""
    held = {place for result in found.values() for places in result.hits.values() for place in places}
    lines = []
    for part in parts:
        numbered = list(part.read())
        clean = [row for number, row in numbered if (part.name, number) not in held and not isinstance(row, Broken)]
        broken = sum(isinstance(row, Broken) for _, row in numbered)
        dropped = len(numbered) - len(clean) - broken
        unread = f", {broken:,} cannot be read" if broken else ""
        console.print(f"{part.name}: {len(numbered):,} read, {len(clean):,} kept, {dropped:,} dropped{unread}")
        lines += [json.dumps(row, ensure_ascii=False, default=str) for row in clean]
    write_text(path, "\n".join(lines) + "\n")
    console.print(f"written: {path}", soft_wrap=True)


def main() -> None:
    """Read the benchmarks, search the training rows, print, write."""
    install_excepthook()
    args = read_arguments(sys.argv[1:])
    drop, output = (check_free(p, overwrite=args.overwrite) if p else None for p in (args.drop, args.output))
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    parts = [part for spec in args.data for part in resolve(spec, "train").parts if part.role == "train"]
    texts = {spec: read_benchmark(spec) for spec in args.benchmark}
    found = {spec: search(Index(rows, args.ngram, args.share), parts) for spec, rows in texts.items()}
    show(console, found, texts, args.show)
    if drop:
        write_clean(parts, found, drop, console)
    if output:
        content = {
            spec: {"rows": result.rows, "read": result.read, "hits": result.hits} for spec, result in found.items()
        }
        write_text(
            output, json.dumps({"ngram": args.ngram, "share": args.share, "benchmarks": content}, indent=1) + "\n"
        )
        console.print(f"written: {output}", soft_wrap=True)


if __name__ == "__main__":
    main()
