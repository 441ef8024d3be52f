"""Answers that stand in a text (SQuAD): long texts as overlapping windows, and the best legal span of their scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Window:
    """A question with a part of its context.

    Attributes:
        input_ids, token_type_ids: as the tokenizer gives them, special tokens included.
        starts, ends: first character and the one after the last of each token in the context; -1 outside of it.
        start, end: first and last token of the answer; 0 and 0 where it is not in this window.
        answered: the whole answer is in it.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    starts: list[int]
    ends: list[int]
    start: int = 0
    end: int = 0
    answered: bool = False


@dataclass(frozen=True)
class Reading:
    """How windows are cut and answers chosen.

    Attributes:
        max_length: tokens of a window. doc_stride: tokens two windows share.
        max_answer_length: tokens of an answer. n_best: starts and ends that are looked at.
        threshold: how much better than a span no answer has to be; None where every question has one.
    """

    max_length: int
    doc_stride: int = 128
    max_answer_length: int = 30
    n_best: int = 20
    threshold: float | None = None


def windows(tokenizer: Any, question: str, context: str, reading: Reading) -> list[Window]:
    """Return the windows of a row, none where the question leaves no room for the context.

    Decoders without a token between two texts get a line break after the question.
    """
    if tokenizer.num_special_tokens_to_add(pair=True) == tokenizer.num_special_tokens_to_add(pair=False):
        question += "\n"
    plain = tokenizer(question, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    room = reading.max_length - len(plain) - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 8:
        return []
    side = tokenizer.padding_side
    tokenizer.padding_side = "right"
    encoded = tokenizer(
        question, context, truncation="only_second", max_length=reading.max_length,
        stride=min(reading.doc_stride, room - 4), return_overflowing_tokens=True, return_offsets_mapping=True,
        return_token_type_ids=True, split_special_tokens=True,
    )  # fmt: skip
    tokenizer.padding_side = side
    found = []
    for index, ids in enumerate(encoded["input_ids"]):
        inside = [place == 1 for place in encoded.sequence_ids(index)]
        offsets = encoded["offset_mapping"][index]
        found.append(
            Window(
                ids,
                encoded["token_type_ids"][index],
                [a if here else -1 for (a, _), here in zip(offsets, inside, strict=True)],
                [b if here else -1 for (_, b), here in zip(offsets, inside, strict=True)],
            )
        )
    return found


def place_answer(window: Window, start: int, text: str) -> None:
    """Mark the tokens of an answer in a window when all of it is there.

    Args:
        window: the window.
        start: the answer's first character in the context.
        text: the answer.
    """
    end = start + len(text)
    inside = [i for i, (a, b) in enumerate(zip(window.starts, window.ends, strict=True)) if b > start and -1 < a < end]
    if text and inside and window.starts[inside[0]] <= start and window.ends[inside[-1]] >= end:
        window.start, window.end, window.answered = inside[0], inside[-1], True


def best_spans(
    scored: Sequence[tuple[np.ndarray, np.ndarray, Sequence[int], Sequence[int]]], context: str, reading: Reading
) -> list[dict[str, Any]]:
    """Return the best answers of a question, best first: {"text", "score"}; an empty text is no answer.

    A span is legal when both ends are in the context, the end is not before the start, and it is not longer than
    `max_answer_length`. The score of no answer is the lowest over the windows of (first token's start + end), as
    SQuAD 2.0's baseline takes it.

    Args:
        scored: (start scores, end scores, first characters, characters after the last) of each window, per token.
        context: the text the characters count in.
        reading: limits.
    """
    found: dict[str, float] = {}
    nothing = float("inf")
    for start_scores, end_scores, starts, ends in scored:
        size = len(starts)
        first, last = np.asarray(start_scores[:size], np.float64), np.asarray(end_scores[:size], np.float64)
        nothing = min(nothing, float(first[0] + last[0]))
        legal = np.asarray(starts) >= 0
        order = [np.argsort(np.where(legal, side, -np.inf))[::-1][: reading.n_best] for side in (first, last)]
        for i in order[0]:
            for j in order[1]:
                if not (legal[i] and legal[j]) or j < i or j - i + 1 > reading.max_answer_length:
                    continue
                text = context[starts[i] : ends[j]].strip()
                score = float(first[i] + last[j])
                if text and score > found.get(text, -np.inf):
                    found[text] = score
    ranked = [{"text": text, "score": score} for text, score in sorted(found.items(), key=lambda item: -item[1])]
    ranked = ranked[: reading.n_best]
    if reading.threshold is not None or not ranked:
        empty = {"text": "", "score": nothing}
        wins = not ranked or nothing > ranked[0]["score"] + (reading.threshold or 0.0)
        ranked = [empty, *ranked] if wins else [*ranked, empty]
    return ranked
