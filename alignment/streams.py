"""Rows that are read while training, for data that do not fit in memory: the same formats, checks and counts.

The ledger grows while rows are drawn and adds up at any moment; a row is booked when it is drawn for the
first time. In a run of several processes the first one reads and hands out (accelerate's default here).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from alignment.errors import InputError
from alignment.files import Broken
from alignment.formats import Format, is_chat, recognise, to_chat, unknown_columns
from alignment.ledger import Ledger
from alignment.reading import (
    PEEK,
    Rows,
    ToRow,
    announce,
    bad_rows_error,
    columns_of,
    converted,
    finish,
    rename,
)
from alignment.rows import Problem
from alignment.sources import Part

if TYPE_CHECKING:
    from datasets import IterableDataset

BUFFER = 1000  # rows that wait to be shuffled


@dataclass
class Stream:
    """One source that is read as it is needed.

    Attributes:
        chat: other sources hold conversations, so text becomes turns here too.
        aside: so many of the first raw rows are not for training but for evaluation.
        alternate: user and assistant must take turns.
        seen: the highest row number drawn so far; later epochs and looks ahead book nothing twice.
    """

    part: Part
    form: Format | None
    kind: str
    to_row: ToRow | None
    policy: str
    ledger: Ledger
    chat: bool = False
    aside: int = 0
    alternate: bool = False
    seen: int = 0

    def rows(self, split: str) -> Iterator[dict]:
        """Yield and book the finished rows of "train" or "test"; a bad row stops the run or is dropped."""
        part = self.part
        end = part.rows + self.aside if part.rows else None
        first, last = (0, self.aside) if split == "test" else (self.aside, end)
        for number, raw in itertools.islice(part.read(), first, last):
            found, made = self.finish(number, raw)
            if found and self.policy != "drop":
                raise bad_rows_error([(part, number, found[0])], number, droppable=True)
            if number > self.seen:
                self.seen = number
                self.book(split, number, found, made)
            yield from [] if found else made

    def book(self, split: str, number: int, found: list[Problem], made: list[dict]) -> None:
        """Book one raw row: as dropped, or as the one or two rows it became."""
        name = self.part.name
        self.ledger.read(name, 1)
        if found:
            self.ledger.drop(name, None, found[0].cause, rows=[number])
        else:
            self.ledger.repeat(name, len(made) - 1)
            self.ledger.keep(name, split, len(made))

    def finish(self, number: int, raw: dict) -> tuple[list[Problem], list[dict]]:
        """Return (problems, the one or two rows) of one raw row."""
        if isinstance(raw, Broken):
            return [Problem("row", raw.why, "", "repair the line", "row cannot be read")], []
        row = converted(rename(raw, self.part), self.form, self.kind, self.part)
        row = to_chat(row) if self.chat else row
        marked = row | {"source": self.part.name, "row": number}
        table = Rows(self.part, recognised=self.form is not None)
        return finish(marked, self.kind, self.to_row, table, self.alternate)


def open_stream(
    part: Part, kind: str, to_row: ToRow | None, policy: str, ledger: Ledger, notes: list[str]
) -> tuple[Stream, dict]:
    """Look at the first rows of a source; return its stream and its first row, converted."""
    raw = [(n, row) for n, row in itertools.islice(part.read(), PEEK) if not isinstance(row, Broken)]
    if not raw:
        raise InputError(f"the first {PEEK} rows of {part.name} cannot be read", where=part.where)
    columns, samples = columns_of([rename(row, part) for _, row in raw])
    form = recognise(columns, samples, kind)
    if form is None and to_row is None:
        raise unknown_columns(columns, kind, part.where)
    first = converted(samples[0], form, kind, part)
    announce(Rows(part, [[first]], recognised=form is not None), form, columns, kind, notes)
    return Stream(part, form, kind, to_row, policy, ledger), first


def open_streams(
    parts: list[Part], kind: str, to_row: ToRow | None, policy: str, ledger: Ledger, notes: list[str]
) -> list[Stream]:
    """Open all sources; text becomes turns where some of them hold turns."""
    opened = [open_stream(part, kind, to_row, policy, ledger, notes) for part in parts]
    chat = any(is_chat(first) for _, first in opened)
    if chat and any("text" in first for _, first in opened):
        raise InputError("plain text and conversations in one stream", fix="train on them one after the other")
    for stream, _ in opened:
        stream.chat = chat
    return [stream for stream, _ in opened]


def interleave(streams: list[Stream], seed: int) -> Iterator[dict]:
    """Draw from the sources by their weights (equal without) until each is used up once."""
    rng = np.random.default_rng([seed, 3])
    open_ones = [(s.part.weight or 1.0, s.rows("train")) for s in streams]
    while open_ones:
        weights = np.array([w for w, _ in open_ones])
        index = int(rng.choice(len(open_ones), p=weights / weights.sum()))
        row = next(open_ones[index][1], None)
        if row is None:
            del open_ones[index]
        else:
            yield row


def train_stream(streams: list[Stream], seed: int) -> IterableDataset:
    """Return the mixture as a data set that reads its sources anew every epoch and shuffles in a buffer."""
    from datasets import IterableDataset

    rows = IterableDataset.from_generator(lambda: interleave(streams, seed))
    return rows.shuffle(seed=seed, buffer_size=BUFFER)
