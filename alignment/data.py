"""Rows for training and evaluation: read, sampled, mixed and split, the same on every rank.

Everything random comes from numpy generators seeded with (seed, position of the source); nothing depends on
`hash`, on the order of files in a folder or on a cache that ranks could race for. Rows are held in memory
once per process: `--streaming` is for what does not fit.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from alignment.errors import InputError
from alignment.formats import CORE
from alignment.ledger import Ledger
from alignment.reading import Rows, ToRow, check_rows, harmonise, read_part, settle_bad_rows
from alignment.sources import Part, Plan, resolve
from alignment.streams import open_streams, train_stream

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from alignment.config import Arguments


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


def load_splits(
    args: Arguments,
    kind: str,
    to_row: ToRow | None = None,
    alternate: bool = False,
    plans: list[Plan] | None = None,
) -> Splits:
    """Read `args.data.data` into a training and a test set.

    Args:
        args: `data.data`, `data.eval_data`, `data.test_size`, … and the seed in `train`.
        kind: "sft", "preference", "unpaired_preference" or "prompt"; "sequence", "token" or "span" for labels.
        to_row: the recipe's own function from a converted row to the row the trainer wants.
        alternate: the chat template wants user and assistant to take turns; rows that do not are bad rows.
        plans: where the rows are, when that is not for `args.data` to say (a benchmark's own files).

    Raises:
        InputError: nothing to train on, a file or row that cannot be used (unless `on_bad_row` is "drop").
    """
    plans = gather(args) if plans is None else plans
    to_row = with_verifier(args, to_row) if kind == "prompt" else to_row
    notes: list[str] = []
    seed, test_size = settle(args, plans, notes)
    parts = [p for plan in plans for p in plan.parts if p.role == "train" or test_size or args.data.eval_data]
    name_apart(parts)
    if args.data.streaming:
        return streamed(args, parts, Wanted(kind, to_row, alternate, seed, test_size), notes)
    ledger = Ledger()
    tables = [read_part(part, kind, to_row, notes) for part in parts]
    harmonise(tables, notes)
    for table in tables:
        check_rows(table, kind, to_row, notes, alternate)
    settle_bad_rows(tables, ledger, args.data.on_bad_row)
    own = [t for t in tables if t.part.role == "eval"]
    train, test = mix([t for t in tables if t not in own], ledger, seed, 0 if own else test_size, notes)
    sizes = [len(t.rows) for t in own]
    if 1 <= test_size < sum(sizes) and not args.data.eval_data:
        sizes = share(int(test_size), sizes)
    for index, (table, size) in enumerate(zip(own, sizes, strict=True)):
        test += take(table, ledger, [seed, index, 2], size)
    ledger.check()
    note_twins(train, test, kind, notes)
    return Splits(build(train), build(test) if test else None, ledger, notes)


def with_verifier(args: Arguments, to_row: ToRow | None) -> ToRow | None:
    """Return the row function, completed by `--verifier` for rows that name none."""
    name = next((vars(group)["verifier"] for group in args.also if "verifier" in vars(group)), None)
    if name is None:
        return to_row

    @functools.wraps(to_row or dict)
    def completed(row: dict) -> dict:
        row = to_row(row) if to_row else row
        return row | {"verifier": row.get("verifier") or name} if isinstance(row, dict) else row

    return completed


@dataclass
class Wanted:
    """What is to become of a stream's rows: see `load_splits`; `seed` and `test_size` are settled."""

    kind: str
    to_row: ToRow | None
    alternate: bool
    seed: int
    test_size: float


def streamed(args: Arguments, parts: list[Part], want: Wanted, notes: list[str]) -> Splits:
    """Return training rows that are read as they are needed, and a test set of whole rows in memory.

    Without rows of their own to evaluate on, the first `test_size` rows are set aside; a share of a stream of
    unknown length cannot be.
    """
    ledger, policy, size = Ledger(), args.data.on_bad_row, want.test_size
    notes.append("rows are read while training: the ledger grows as they come")
    train = open_streams([p for p in parts if p.role == "train"], want.kind, want.to_row, policy, ledger, notes)
    own = open_streams([p for p in parts if p.role == "eval"], want.kind, want.to_row, policy, ledger, notes)
    if not own and 0 < size < 1:
        if written(args, "test_size"):
            raise InputError(
                f"test_size {size:g} is a share, and nobody knows how long a stream is",
                where="--test_size",
                fix="a number of rows, 0, or --eval_data",
            )
        notes.append("no rows are held out of a stream: --test_size 500 sets the first 500 aside")
    elif not own:
        for stream, n in zip(train, share(int(size), [1] * len(train)), strict=True):
            stream.aside = n
    for stream in (*train, *own):
        stream.alternate = want.alternate
    for stream in own:
        stream.aside = int(size) if size >= 1 and not args.data.eval_data else sys.maxsize
    test = [row for stream in (own or train) for row in stream.rows("test")]
    return Splits(train_stream(train, want.seed), build(test) if test else None, ledger, notes)


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


def settle(args: Arguments, plans: list[Plan], notes: list[str]) -> tuple[int, float]:
    """Return the seed and the test size: the user's word, a declaration's, the default."""
    train = args.train
    seed, test_size = train.seed if train.data_seed is None else train.data_seed, args.data.test_size
    for plan in plans:
        if plan.seed is not None and not written(args, "seed") and not written(args, "data_seed"):
            seed = plan.seed
            notes.append(f"rows are sampled with the declaration's seed {seed}")
        if plan.test_size is not None and not written(args, "test_size"):
            test_size = plan.test_size
            notes.append(f"rows are held out by the declaration's test_size {test_size:g}")
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
            [int(i) for i in itertools.islice(repeated(kept, rng), max(0, n - len(table.rows)))] if len(kept) else []
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


def take(table: Rows, ledger: Ledger, seed: list[int], limit: int) -> list[dict]:
    """Return the rows of a source for evaluation, at most `limit` of them (a seeded sample, in order)."""
    order = np.random.default_rng(seed).permutation(len(table.rows))[:limit]
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
        notes.append(f"{twins:,} of {len(test):,} rows to evaluate on are also in the training rows, word for word")


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
            return f"{column}: " + ", ".join(f"{kind} in {r['source']} row {r['row']}" for kind, r in firsts.items())
    return ", ".join(columns)
