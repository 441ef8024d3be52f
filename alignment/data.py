"""Rows for training and evaluation: read, converted, checked, sampled, mixed and split, the same on every rank.

Everything random comes from numpy generators seeded with (seed, position of the source); nothing depends on `hash`,
on the order of files in a folder or on a cache that ranks could race for. Rows are held in memory once per process:
`--streaming` is for what does not fit.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.errors import InputError, nearest
from alignment.files import Broken, kind_of
from alignment.formats import (
    CORE,
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
from alignment.sources import Part, Plan, resolve

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from alignment.config import Arguments

ToRow = Callable[[dict], dict]
PEEK = 200  # rows that decide which format a source has


@dataclass
class Splits:
    """What a recipe trains and evaluates on.

    Attributes:
        train, test: datasets with the columns of their kind, "source" and "row"; test is None without one.
        ledger: what happened to every row.
        notes: sentences to print: conversions, splits, samples.
    """

    train: Dataset | IterableDataset
    test: Dataset | None
    ledger: Ledger
    notes: list[str]


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


def load_splits(args: Arguments, kind: str, to_row: ToRow | None = None) -> Splits:
    """Read `args.data.data` into a training and a test set.

    Args:
        args: `data.data`, `data.eval_data`, `data.test_size`, … and the seed in `train`.
        kind: "sft", "preference", "unpaired_preference" or "prompt".
        to_row: the recipe's own function from a converted row to the row the trainer wants.

    Raises:
        InputError: nothing to train on, a file or row that cannot be used (unless `on_bad_row` is "drop").
    """
    plans = gather(args)
    seed, test_size = settle(args, plans)
    parts = [p for plan in plans for p in plan.parts if p.role == "train" or test_size or args.data.eval_data]
    name_apart(parts)
    if args.data.streaming:
        from alignment.streams import stream_splits

        return stream_splits(args, parts, kind, to_row)
    notes: list[str] = []
    ledger = Ledger()
    tables = [read_part(part, kind, to_row, notes) for part in parts]
    harmonise(tables, notes)
    for table in tables:
        check_rows(table, kind, to_row, notes)
    settle_bad_rows(tables, ledger, args.data.on_bad_row)
    own = [t for t in tables if t.part.role == "eval"]
    train, test = mix([t for t in tables if t not in own], ledger, seed, 0 if own else test_size, notes)
    size = 0 if args.data.eval_data else test_size
    for index, table in enumerate(own):
        test += take(table, ledger, seed + index, int(size) if size > 1 else None)
    ledger.check()
    note_twins(train, test, kind, notes)
    return Splits(build(train), build(test) if test else None, ledger, notes)


def load_rows(spec: str, kind: str) -> Dataset:
    """Read the rows of one source for evaluation: its test split when it has one, all of it otherwise.

    Raises:
        InputError: it cannot be read, or a row of it cannot be used.
    """
    parts = resolve(spec, "test").parts
    name_apart(parts)
    notes: list[str] = []
    tables = [read_part(part, kind, None, notes) for part in parts]
    harmonise(tables, notes)
    for table in tables:
        check_rows(table, kind, None, notes)
    settle_bad_rows(tables, Ledger(), "raise")
    return build([row for table in tables for group in table.rows for row in group])


def gather(args: Arguments) -> list[Plan]:
    """Resolve `data` and `eval_data`; refuse to train on what is called test."""
    if not args.data.data:
        raise InputError(
            "no data to train on", where="--data", fix="--data rows.jsonl, a folder, org/name, or data/x.yaml"
        )
    plans = [resolve(spec, "train", args.data.streaming) for spec in args.data.data]
    for part in (p for plan in plans for p in plan.parts):
        if part.role == "train" and part.is_test and not args.data.allow_test_split:
            raise InputError(
                f"{part.name} is called test",
                where=part.where,
                why="a model trained on a test split has no honest score on it any more",
                fix="another split, or --allow_test_split when it is no benchmark",
            )
    if args.data.eval_data:
        for plan in plans:
            plan.parts = [p for p in plan.parts if p.role == "train"]
        for spec in args.data.eval_data:
            plan = resolve(spec, "test", args.data.streaming)
            plan.parts = [replace(p, role="eval", weight=None, rows=None) for p in plan.parts]
            plans.append(plan)
    return plans


def settle(args: Arguments, plans: list[Plan]) -> tuple[int, float]:
    """Return the seed and the test size: what the user wrote goes before a declaration, that before defaults."""
    train = args.train
    seed, test_size = train.seed if train.data_seed is None else train.data_seed, args.data.test_size
    for plan in plans:
        if plan.seed is not None and not written(args, "seed") and not written(args, "data_seed"):
            seed = plan.seed
        if plan.test_size is not None and not written(args, "test_size"):
            test_size = plan.test_size
    return seed, test_size


def written(args: Arguments, name: str) -> bool:
    """Say whether the user wrote this option himself, in a file or on the command line."""
    return args.sources.get(name, "").startswith(("flag", "file"))


def name_apart(parts: list[Part]) -> None:
    """Give every part a name of its own: the full place, or a number when the same place is read twice."""
    counts = Counter(p.name for p in parts)
    for part in parts:
        if counts[part.name] > 1 and "@" not in part.name:
            part.name = part.where
    seen: Counter = Counter()
    for part in parts:
        seen[part.name] += 1
        if seen[part.name] > 1:
            part.name = f"{part.name} ({seen[part.name]})"


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
        raise InputError(
            f"there is no column {missing[0]!r}",
            where=part.where,
            why=f"the columns are {', '.join(row)}",
            fix=f"did you mean {near}?" if near else "",
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
        notes.append(
            f"{name}: {n:,} {form.name} ({', '.join(form.columns)}) read as {2 * n:,} rows with a thumb"
        )
    else:
        notes.append(
            f"{name}: {form.name} ({', '.join(form.columns)}) read as {', '.join(got) or ', '.join(row)}"
        )


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
    for table, rows in firsts:
        if not all(is_chat(r) for r in rows):
            notes.append(f"{table.part.name}: text read as turns, as in {chats[0].part.name}")
        table.rows = [[to_chat(row) for row in group] for group in table.rows]


def check_rows(table: Rows, kind: str, to_row: ToRow | None, notes: list[str]) -> None:
    """Validate every row, split pairs where thumbs are wanted, apply `to_row`; rows with problems move to `bad`."""
    if kind == "unpaired_preference" and kind_of(Path(table.part.where)) in (".csv", ".tsv"):
        read_labels(table, notes)
    good = []
    for (row,) in table.rows:
        found, made = finish(row, kind, to_row, table.recognised, table.part.where)
        if found:
            table.bad.append((row["row"], found[0]))
        else:
            good.append(made)
    table.rows = good


def read_labels(table: Rows, notes: list[str]) -> None:
    """Read true/false in a csv as what they are: a csv has only text."""
    words = {"true": True, "false": False, "1": True, "0": False}
    for (row,) in table.rows:
        row["label"] = words.get(str(row.get("label")).strip().lower(), row.get("label"))
    notes.append(f"{table.part.name}: the words true and false in label read as labels")


def finish(
    row: dict, kind: str, to_row: ToRow | None, recognised: bool, where: str
) -> tuple[list[Problem], list[dict]]:
    """Return (what is wrong with a converted row, the one or two rows it becomes)."""
    pair = kind == "unpaired_preference" and "chosen" in row
    found = problems(row, "preference" if pair else kind) if recognised else []
    if found:
        return found, []
    made = []
    for one in unpair(row) if pair else [row]:
        out = one if to_row is None else apply(to_row, one, kind, where)
        if out is not one:
            found += problems(out, kind)
        marks = {"source": row["source"], "row": row["row"]}
        made.append({k: v for k, v in out.items() if stays(k, v, one, kind, to_row)} | marks)
    return found, made


def stays(column: str, value: Any, before: dict, kind: str, to_row: ToRow | None) -> bool:
    """Say whether a column stays: the kind's own, and what the row function made; for prompts, all of them."""
    if kind == "prompt" or column in core_columns(kind):
        return True
    return to_row is not None and (column not in before or before[column] is not value)


def apply(to_row: ToRow, row: dict, kind: str, where: str) -> dict:
    """Run the recipe's row function; a column it misses becomes an InputError."""
    columns = [c for c in row if c not in ("source", "row")]
    try:
        out = to_row(dict(row))
    except KeyError as error:
        raise unknown_columns(columns, kind, f"{where}, asked for {error} by {to_row.__name__}") from error
    if not isinstance(out, dict) or not any(c in out for c in CORE[kind]):
        raise unknown_columns(columns, kind, f"{where}, after {to_row.__name__}")
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
    if bad and (policy != "drop" or empty):
        raise bad_rows_error(bad, sum(t.read for t in tables), droppable=policy == "stop" and not empty)


def bad_rows_error(bad: list[tuple[Part, int, Problem]], total: int, droppable: bool) -> InputError:
    """Build one error for all bad rows: the counts by cause, and one example each for the first three causes."""
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


def share(total: int, sizes: list[int]) -> list[int]:
    """Divide `total` in proportion to `sizes`, in whole numbers that sum to it (largest remainders first)."""
    whole = sum(sizes)
    if not whole:
        return [0] * len(sizes)
    parts = [total * size // whole for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % whole), i))
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


def quotas(tables: list[Rows], notes: list[str]) -> list[int]:
    """Return how many rows of each table are wanted: by weight, by row count, else all."""
    wanted = [len(t.rows) for t in tables]
    groups: dict[str, list[int]] = {}
    for i, table in enumerate(tables):
        groups.setdefault(table.part.group or f"#{i}", []).append(i)
    sizes = {g: sum(wanted[i] for i in members) for g, members in groups.items()}
    first = {g: tables[members[0]].part for g, members in groups.items()}
    for g, members in groups.items():
        part = first[g]
        if part.weight is not None:
            file = g.rsplit("#", 1)[0]
            beside = [o for o in groups if o.rsplit("#", 1)[0] == file]
            unit = min(sizes[o] / first[o].weight for o in beside)  # the largest mixture that repeats no row
            count = max(1, int(unit * part.weight + 1e-9))
        else:
            count = part.rows or sizes[g]
        if count > sizes[g]:
            notes.append(f"{part.name}: {count:,} rows wanted of {sizes[g]:,}: rows are repeated")
        for i, n in zip(members, share(count, [wanted[i] for i in members]), strict=True):
            wanted[i] = n
    return wanted


def mix(
    tables: list[Rows], ledger: Ledger, seed: int, test_size: float, notes: list[str]
) -> tuple[list[dict], list[dict]]:
    """Sample each table, hold rows out, repeat what was asked for more often; return (train, test) rows.

    Rows are held out before anything is repeated, so no row is on both sides.
    """
    wanted = quotas(tables, notes)
    unique = [min(n, len(t.rows)) for n, t in zip(wanted, tables, strict=True)]
    out = int(test_size) if test_size >= 1 else round(test_size * sum(unique))
    if out >= sum(unique):
        raise InputError(
            f"test_size {test_size:g} leaves nothing of {sum(unique):,} rows to train on",
            where="--test_size",
            fix="a smaller one",
        )
    train, test = [], []
    for index, (table, n, k) in enumerate(zip(tables, wanted, share(out, unique), strict=True)):
        rng = np.random.default_rng([seed, index])
        order = rng.permutation(len(table.rows))[: min(n, len(table.rows))]
        held, kept = np.sort(order[:k]), np.sort(order[k:])
        extra = (
            [int(i) for i in itertools.islice(repeated(kept, rng), max(0, n - len(table.rows)))]
            if len(kept)
            else []
        )
        used = [table.rows[i] for i in (*kept, *extra)]
        book(ledger, table, used, [table.rows[i] for i in held], repeats=len(extra))
        train += [row for group in used for row in group]
        test += [row for i in held for row in table.rows[i]]
    if len(tables) > 1 or any(n > len(t.rows) for n, t in zip(wanted, tables, strict=True)):
        train = [train[i] for i in np.random.default_rng([seed, len(tables), 1]).permutation(len(train))]
    return train, test


def repeated(rows: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    """Yield rows again and again, each pass in another order."""
    while True:
        yield from rng.permutation(rows)


def take(table: Rows, ledger: Ledger, seed: int, limit: int | None) -> list[dict]:
    """Return the rows of a source that is for evaluation, at most `limit` of them (a seeded sample, in order)."""
    order = np.random.default_rng([seed, 2]).permutation(len(table.rows))[:limit]
    held = [table.rows[i] for i in np.sort(order)]
    book(ledger, table, [], held, repeats=0)
    return [row for group in held for row in group]


def book(ledger: Ledger, table: Rows, train: list[list[dict]], test: list[list[dict]], repeats: int) -> None:
    """Book where the raw rows of a table went; a pair that became two rows counts as a row repeated."""
    name = table.part.name
    counts = {"train": sum(map(len, train)), "test": sum(map(len, test))}
    for split, n in counts.items():
        ledger.keep(name, split, n)
    ledger.keep(name, "unsampled", len(table.rows) + repeats - len(train) - len(test))
    ledger.repeat(name, repeats + sum(counts.values()) - len(train) - len(test))


def note_twins(train: list[dict], test: list[dict], kind: str, notes: list[str]) -> None:
    """Note how many rows to evaluate on are also trained on."""

    def key(row: dict) -> str:
        return json.dumps([row.get(c) for c in CORE[kind]], sort_keys=True, default=str)

    known = {key(row) for row in test}
    seen = {k for row in train if known and (k := key(row)) in known}
    twins = sum(key(row) in seen for row in test) if seen else 0
    if twins:
        notes.append(
            f"{twins:,} of {len(test):,} rows to evaluate on are also in the training rows, word for word"
        )


def build(rows: list[dict]) -> Dataset:
    """Return rows as a Dataset with the union of their columns."""
    import pyarrow as pa
    from datasets import Dataset

    columns = list(dict.fromkeys(column for row in rows for column in row))
    full = [{column: row.get(column) for column in columns} for row in rows]
    options = {"on_mixed_types": "use_json"} if any(has_calls(row) for row in rows) else {}
    try:
        return Dataset.from_list(full, **options)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(
            "a column holds values of several kinds",
            where=mixed_column(full, columns),
            why=str(error).split("\n")[0],
            fix="give the column one type in all rows and sources",
        ) from error


def has_calls(row: dict) -> bool:
    """Say whether a row has tool calls, whose arguments differ from row to row."""
    sides = [row.get(c) for c in ("messages", "prompt", "completion", "chosen", "rejected")]
    return any(m.get("tool_calls") for side in sides if isinstance(side, list) for m in side)


def mixed_column(rows: list[dict], columns: list[str]) -> str:
    """Return the first column with values of several types, with a row of each."""
    for column in columns:
        firsts: dict[str, dict] = {}
        for row in rows:
            if row[column] is not None:
                firsts.setdefault(type(row[column]).__name__, row)
        if len(firsts) > 1:
            return f"{column}: " + ", ".join(
                f"{kind} in {r['source']} row {r['row']}" for kind, r in firsts.items()
            )
    return ", ".join(columns)
