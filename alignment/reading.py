"""From raw rows to rows a trainer can use: recognised, converted, checked, and counted where they cannot."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.errors import InputError, nearest
from alignment.files import Broken, kind_of
from alignment.formats import (
    CORE,
    NEEDED,
    Format,
    convert,
    core_columns,
    is_chat,
    problems,
    recognise,
    to_chat,
    unknown_columns,
    unpair,
)
from alignment.ledger import Ledger
from alignment.rows import Problem
from alignment.sources import Part

ToRow = Callable[[dict], dict]
PEEK = 200  # rows that decide which format a source has


@dataclass
class Rows:
    """The rows of one part: `rows[i]` is what one raw row became, one row or (an unpaired pair) two.

    Attributes:
        bad: (row number, what is wrong) of the rows that are not in `rows`.
        read: raw rows in all.
        recognised: whether the columns are of a known format, or left to the recipe's row function.
    """

    part: Part
    rows: list[list[dict]] = field(default_factory=list)
    bad: list[tuple[int, Problem]] = field(default_factory=list)
    read: int = 0
    recognised: bool = True


def read_part(part: Part, kind: str, to_row: ToRow | None, notes: list[str]) -> Rows:
    """Read and convert the rows of one part, one list per raw row; unreadable rows are booked as bad."""
    table = Rows(part)
    numbered = list(part.read())
    table.read = len(numbered)
    raw = []
    for number, row in numbered:
        if isinstance(row, Broken):
            table.bad.append((number, Problem("row", row.why, "", "repair the line", "row cannot be read")))
        else:
            raw.append((number, rename(row, part)))
    if not raw:
        return table
    columns, samples = columns_of([row for _, row in raw])
    form = recognise(columns, samples, kind)
    if form is None and to_row is None:
        raise unknown_columns(columns, kind, part.where)
    table.recognised = form is not None
    for number, row in raw:
        table.rows.append([converted(row, form, kind, part) | {"source": part.name, "row": number}])
    announce(table, form, columns, kind, notes)
    return table


def rename(row: dict, part: Part) -> dict:
    """Rename the columns a declaration maps; a column of the new name gives way."""
    if not part.columns:
        return row
    missing = [theirs for theirs in part.columns if theirs not in row]
    if missing:
        near = nearest(missing[0], list(row))
        fix = f"did you mean {near}?" if near else f"name one of them: columns: {{THEIRS: {part.columns[missing[0]]}}}"
        if all(ours in row for ours in part.columns.values()):
            right = ", ".join(f"{ours}: {theirs}" for theirs, ours in part.columns.items())
            fix = f"the pairs are theirs: ours, so the other way round: columns: {{{right}}}"
        raise InputError(
            f"there is no column {missing[0]!r}",
            where=part.where,
            why=f"the columns are {', '.join(row)}",
            fix=fix,
        )
    kept = {k: v for k, v in row.items() if k not in part.columns and k not in part.columns.values()}
    return kept | {ours: row[theirs] for theirs, ours in part.columns.items()}


def columns_of(rows: list[dict]) -> tuple[list[str], list[dict]]:
    """Return the columns of a source (those of its first rows, and of most rows) and a few samples."""
    counts = Counter(column for row in rows[:PEEK] for column in row)
    return list(counts), rows[:PEEK]


def converted(row: dict, form: Format | None, kind: str, part: Part) -> dict:
    """Convert one row; say which source it is when its shape does not fit the recipe."""
    if form is None:
        return dict(row)
    try:
        return convert(row, form, kind)
    except InputError as error:
        raise InputError(error.what, where=part.where, why=error.why, fix=error.fix) from None


def announce(table: Rows, form: Format | None, columns: list[str], kind: str, notes: list[str]) -> None:
    """Note what was made of a source's columns, unless they already were what is wanted."""
    name = table.part.name
    if form is None:
        notes.append(f"{name}: the columns ({', '.join(columns)}) are left to the recipe's row function")
        return
    row = table.rows[0][0]
    got = [c for c in CORE[kind] if c in row]
    if set(form.columns) <= {*got, "system"} and "inside" not in form.name:
        return
    if kind == "unpaired_preference" and form.shape == "pair":
        n = len(table.rows)
        notes.append(f"{name}: {n:,} {form.name} ({', '.join(form.columns)}) read as {2 * n:,} rows with a thumb")
    else:
        notes.append(f"{name}: {form.name} ({', '.join(form.columns)}) read as {', '.join(got) or ', '.join(row)}")


def harmonise(tables: list[Rows], notes: list[str]) -> None:
    """Make all rows conversations where some are: a data set cannot hold both."""
    firsts = [(t, [group[0] for group in t.rows[:PEEK]]) for t in tables if t.rows and t.recognised]
    chats = [t for t, rows in firsts if any(is_chat(r) for r in rows)]
    texts = [t for t, rows in firsts if all("text" in r for r in rows)]
    if texts and len(texts) < len(firsts):
        other = next(t for t, _ in firsts if t not in texts)
        raise InputError(
            f"{texts[0].part.name} is plain text and {other.part.name} is not",
            why="nobody can tell who speaks in a plain text, so the two cannot be trained on together",
            fix="train on them one after the other",
        )
    if not chats:
        return
    for table, _ in firsts:
        plain = sum("prompt" in row and not is_chat(row) for (row,) in table.rows)
        if plain:
            name, other = table.part.name, chats[0].part.name
            notes.append(f"{name}: text read as turns in {plain:,} rows, as in {other}")
            table.rows = [[to_chat(row)] for (row,) in table.rows]


def check_rows(table: Rows, kind: str, to_row: ToRow | None, notes: list[str], alternate: bool = False) -> None:
    """Validate every row, unpair, apply `to_row`; rows with problems move to `bad`."""
    if kind == "unpaired_preference" and kind_of(Path(table.part.where)) in (".csv", ".tsv"):
        read_labels(table, notes)
    good = []
    for (row,) in table.rows:
        found, made = finish(row, kind, to_row, table, alternate)
        if found:
            table.bad.append((row["row"], found[0]))
        else:
            good.append(made)
    table.rows = good
    table.bad.sort(key=lambda pair: pair[0])


def read_labels(table: Rows, notes: list[str]) -> None:
    """Read true/false in a csv as what they are: a csv has only text."""
    words = {"true": True, "false": False, "1": True, "0": False}
    for (row,) in table.rows:
        row["label"] = words.get(str(row.get("label")).strip().lower(), row.get("label"))
    notes.append(f"{table.part.name}: the words true and false in label read as labels")


def finish(
    row: dict, kind: str, to_row: ToRow | None, table: Rows, alternate: bool
) -> tuple[list[Problem], list[dict]]:
    """Return (what is wrong with a converted row, the one or two rows it becomes)."""
    pair = table.recognised and kind == "unpaired_preference" and "chosen" in row
    found = problems(row, "preference" if pair else kind, alternate) if table.recognised else []
    if found:
        return found, []
    made = []
    for one in unpair(row) if pair else [row]:
        out = one if to_row is None else apply(to_row, one, kind, table)
        if out is not one:
            found += problems(out, kind, alternate)
        marks = {"source": row["source"], "row": row["row"]}
        made.append({k: v for k, v in out.items() if stays(k, v, one, kind, to_row)} | marks)
    return found, made


def stays(column: str, value: Any, before: dict, kind: str, to_row: ToRow | None) -> bool:
    """Say whether a column stays: the kind's own, and what the row function made; for prompts, all."""
    if kind == "prompt" or column in core_columns(kind):
        return True
    return to_row is not None and (column not in before or before[column] is not value)


def apply(to_row: ToRow, row: dict, kind: str, table: Rows) -> dict:
    """Run the recipe's row function; a column it misses becomes an InputError."""
    columns, where = [c for c in row if c not in ("source", "row")], table.part.where
    try:
        out = to_row(dict(row))
    except KeyError as error:
        raise unknown_columns(columns, kind, f"{where}, asked for {error} by {to_row.__name__}") from error
    fits = isinstance(out, dict) and any(c in out for c in CORE[kind])
    if not fits or not (table.recognised or any(out.keys() >= needed for needed in NEEDED[kind])):
        raise unknown_columns(columns, kind, f"{where}, after {to_row.__name__} of the recipe")
    return out


def settle_bad_rows(tables: list[Rows], ledger: Ledger, policy: str) -> None:
    """Book what was read; stop at bad rows, or book them as dropped when the policy is "drop"."""
    bad = [(t.part, number, problem) for t in tables for number, problem in t.bad]
    for table in tables:
        ledger.read(table.part.name, table.read)
        causes: dict[str, list[int]] = {}
        for number, problem in table.bad:
            causes.setdefault(problem.cause, []).append(number)
        for cause, numbers in causes.items():
            ledger.drop(table.part.name, None, cause, rows=numbers)
    empty = next((t for t in tables if not t.rows), None)
    if empty:
        bad = [b for b in bad if b[0] is empty.part]
    if bad and (policy != "drop" or empty):
        total = empty.read if empty else sum(t.read for t in tables)
        raise bad_rows_error(bad, total, droppable=policy == "stop" and not empty)


def bad_rows_error(bad: list[tuple[Part, int, Problem]], total: int, droppable: bool) -> InputError:
    """Build one error for all bad rows: counts by cause, and one example each for three causes."""
    causes = Counter(problem.cause for *_, problem in bad)
    examples = list({problem.cause: (part, n, problem) for part, n, problem in reversed(bad)}.values())[::-1]
    examples = (examples + [b for b in bad if b not in examples])[:3]
    lines = [f"{part.where}, row {n}, {p.column}: {p.what}" for part, n, p in examples]
    whys = dict.fromkeys(p.why for *_, p in examples if p.why)
    fixes = dict.fromkeys(p.fix for *_, p in examples if p.fix)
    counts = ", ".join(f"{n:,} x {cause}" for cause, n in causes.most_common(6))
    return InputError(
        f"{len(bad):,} of {total:,} rows cannot be used: {counts}",
        where="\n        ".join(lines),
        why="; ".join(whys),
        fix="; ".join(fixes) + ("; or --on_bad_row drop to leave such rows out" if droppable else ""),
    )
