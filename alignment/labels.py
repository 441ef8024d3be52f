"""What labels mean: their names, whether they are numbers to be met, and what can be wrong with them as a whole."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from alignment.data import Splits, load_splits
from alignment.errors import InputError, nearest
from alignment.glue import HUB_ID, Task, find_task, plan
from alignment.methods import explicit
from alignment.reading import ToRow

_WHOLE, _NUMBER = re.compile(r"[+-]?\d+"), re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass
class Labels:
    """The outputs of a classifier.

    Attributes:
        head: "sequence", "token" or "span".
        names: of the classes, in the order of the outputs; none for a regression or a span.
        task: the GLUE task, or None for rows of the user's own.
        tags: the names are BIO tags, and spans can be counted.
    """

    head: str
    names: list[str]
    task: Task | None = None
    tags: bool = False

    @property
    def regression(self) -> bool:
        """Say whether the rows have numbers to be met instead of classes."""
        return self.head == "sequence" and not self.names

    @property
    def outputs(self) -> list[str] | None:
        """Return the names of the outputs as the model's configuration keeps them; None for a span head."""
        return None if self.head == "span" else self.names or ["LABEL_0"]

    def number(self, value: Any) -> int | float:
        """Return a row's label as the loss wants it: the number of its class, or the number itself."""
        if self.regression:
            return float(value)
        if isinstance(value, str | bool) or str(value) in self.names:
            return self.names.index(str(value))
        return int(value)


def load_labelled(args: Any, to_row: ToRow | None = None) -> tuple[Splits, Labels]:
    """Read the rows of `--task` or `--data`, and find out what their labels are.

    Args:
        args: the parsed arguments of `recipes/classify.py`.
        to_row: the recipe's row function; the rows of a GLUE task need none.

    Raises:
        InputError: rows that cannot be used, a label that is not among `--label_names`.
    """
    head, task = args.train.head, find_task(args.train.task) if args.train.task else None
    if args.data.streaming:
        raise InputError(
            "labels have to be known before training",
            where="--streaming",
            why="the head gets an output for each of them",
            fix="leave --streaming out",
        )
    if task is None:
        splits = load_splits(args, head, to_row)
    elif head != "sequence":
        raise InputError(f"{task.name} is a task on sequences", where=f"--head {head}", fix="--head sequence")
    else:
        if not explicit(args, "data"):
            args.data.data = [HUB_ID]
        splits = load_splits(args, head, plans=[plan(task, spec) for spec in args.data.data])
    if head == "span":
        return splits, Labels(head, [])
    column = "label" if head == "sequence" else "tags"
    known = [rows[column] for rows in (splits.train, splits.test) if rows is not None]
    if task is not None:
        return splits, Labels(head, list(task.labels), task)
    values = list({v for values in known for v in (flat(values) if head == "token" else values)})
    names = find_names(values, args.train.label_names, head, splits.notes)
    return splits, Labels(head, names, tags=head == "token" and not all(isinstance(v, int) for v in values))


def flat(rows: Iterable[list]) -> Iterable[Any]:
    """Yield the values of rows of values."""
    return (value for row in rows for value in row)


def find_names(values: list[Any], given: list[str] | None, head: str, notes: list[str]) -> list[str]:
    """Return the names of the classes, none where the labels are numbers to be met.

    Args:
        values: every label that occurs, once.
        given: `--label_names`, in the order of the classes.
        head: "sequence" or "token".
        notes: what was decided is added here.
    """
    kinds = {type(value) for value in values}
    if given:
        return check_given(values, given)
    if kinds <= {int, float} and float in kinds or (head == "sequence" and kinds == {str} and decimal(values)):
        if head == "token":
            raise InputError("tags are decimal numbers", where="column tags", fix="names, or whole numbers")
        notes.append("labels are decimal numbers: a regression, with the squared error as its loss")
        return []
    if all(_WHOLE.fullmatch(str(value)) for value in values):
        return [str(value) for value in sorted(values, key=int)]
    names = sorted(map(str, values))
    return ["O", *(name for name in names if name != "O")] if head == "token" and "O" in names else names


def decimal(values: list[str]) -> bool:
    """Say whether texts are numbers of which some are not whole: a csv has only text."""
    return all(map(_NUMBER.fullmatch, values)) and not all(map(_WHOLE.fullmatch, values))


def check_given(values: list[Any], given: list[str]) -> list[str]:
    """Return the names the user gave; raises InputError for a label they do not cover."""
    if len(set(given)) < len(given):
        raise InputError("a name is there twice", where=f"--label_names {' '.join(given)}", fix="each class once")
    for value in values:
        place = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(given)
        if str(value) not in given and not place:
            near = nearest(str(value), given)
            raise InputError(
                f"the rows have a label {value!r} that is not among --label_names",
                where=f"--label_names {' '.join(given)}",
                fix=f"did you mean {near}?" if near else "name all classes, in the order of their numbers",
            )
    return list(given)


def label_findings(train: list[Any], test: list[Any], labels: Labels) -> list[tuple[str, str, str]]:
    """Return (level, what, fix) of everything that can be said about the labels before training.

    Args:
        train: the labels of the encoded training rows, as `Labels.number` gives them; of tokens those that are scored.
        test: those of the held-out rows.
        labels: what they mean.
    """
    if labels.regression:
        low, high = min(train), max(train)
        found = [("fact", f"labels: from {low:g} to {high:g}, mean {sum(train) / len(train):.3f}", "")]
        alike = [("error", "all training rows have one and the same label", "other rows")]
        return found + (alike if low == high else [])
    counts, held = Counter(train), Counter(test)
    shares = [f"{labels.names[i]} {n:,} ({n / len(train):.0%})" for i, n in counts.most_common(6)]
    more = f" and {len(counts) - 6} more" if len(counts) > 6 else ""
    found = [("fact", f"labels: {', '.join(shares)}{more}", "")]
    if held:
        top = counts.most_common(1)[0][0]
        text = f"always answering {labels.names[top]} is right in {held[top] / len(test):.1%} of the held-out "
        found.append(("fact", text + ("tokens" if labels.head == "token" else "rows"), ""))
    if len(counts) == 1:
        only = labels.names[next(iter(counts))]
        found.append(("error", f"all training rows have the label {only}", "rows of a second class"))
    unseen = {labels.names[i]: held[i] for i in range(len(labels.names)) if i not in counts}
    wrong = {name: n for name, n in unseen.items() if n}
    if wrong:
        names = ", ".join(f"{name} ({n:,})" for name, n in wrong.items())
        text = f"labels of held-out rows that no training row has: {names}; they can only be wrong by design"
        found.append(("warning", text, "training rows with them, or held-out rows without"))
    elif unseen:
        found.append(("warning", f"no row has the label {', '.join(unseen)}", ""))
    return found


def against_guessing(loss: float, classes: int) -> tuple[str, str, str]:
    """Return the finding that compares the first loss of a classifier with that of guessing among its classes."""
    text = f"before training: loss of the first batch {loss:.4f} (guessing: ln {classes} = {math.log(classes):.4f})"
    if loss <= math.log(classes) + 0.5:
        return "fact", text, ""
    return "warning", f"{text}, which is worse than guessing", "labels in the order of the model's own, or a new head"
