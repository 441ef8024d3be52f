"""Encoded rows as a person can read them: what is trained stands out from what is only read."""

from typing import Any

from datasets import IterableDataset
from rich.text import Text

from alignment.tokenization import Tokenized

LEGEND = {
    "sft": "what is marked",
    "dpo": "the chosen answer up, the rejected one down",
    "kto": "up or down, by its thumb",
    "prompt": "the answers that are sampled to these prompts",
    "sequence": "the label of each row",
    "token": "the marked tokens carry the label of their word",
    "span": "the first and last token of what is marked",
    "reward": "the score of the chosen answer above that of the rejected one",
}


def draw_masks(rows: Tokenized, plain: bool, count: int = 2, limit: int = 700) -> list[Text]:
    """Return a drawing of a few rows: what is trained stands out, what is only read is dim.

    Args:
        rows: the tokenized rows; the first of each source are drawn.
        plain: use marks in place of colours: [+trained+], for pairs also [-rejected-].
        count: how many rows.
        limit: characters of a row that are shown.
    """
    decode = rows.encoder.tokenizer.decode
    lines = [Text(f"What is trained ({LEGEND[rows.form]}):", style="bold")]
    for row in rows.train.take(count) if isinstance(rows.train, IterableDataset) else _one_per_source(rows, count):
        text = Text()
        for ids, mark in spans(row, rows.form):
            piece = decode(ids)
            piece = piece if len(piece) <= limit else f"{piece[: limit // 2]} […] {piece[-limit // 2 :]}"
            if plain and mark:
                piece = f"[{mark}{piece}{mark}]"
            text.append(piece, style={"": "dim", "+": "bold green", "-": "bold red"}[mark])
        if rows.form == "sequence":
            label = rows.label_names[row["labels"]] if rows.label_names else f"{row['labels']:g}"
            text.append(f" -> {label}", style="bold green")
        lines += [text, Text()]
    return lines


def _one_per_source(rows: Tokenized, count: int) -> list[dict]:
    first: dict[str, int] = {}
    for index, source in enumerate(rows.train["source"]):
        first.setdefault(source, index)
    chosen = list(first.values())[:count]
    chosen += [i for i in range(len(rows.train)) if i not in chosen][: count - len(chosen)]
    return [rows.train[i] for i in chosen]


def spans(row: dict[str, Any], form: str) -> list[tuple[list[int], str]]:
    """Return (token ids, mark) runs of an encoded row: "" is read only, "+" trained or wanted, "-" unwanted."""
    if form == "sequence":
        return [(row["input_ids"], "")]
    if form == "span":
        first, last = row["start_positions"], row["end_positions"] + 1
        ids = row["input_ids"]
        return [(ids[:first], ""), (ids[first:last], "+"), (ids[last:], "")] if last > 1 else [(ids, "")]
    if form in ("sft", "token"):
        runs: list[tuple[list[int], str]] = []
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            mark = "+" if label != -100 else ""
            if not runs or runs[-1][1] != mark:
                runs.append(([], mark))
            runs[-1][0].append(token)
        return runs
    if form == "prompt":
        return [(row["prompt_ids"], "")]
    if form == "kto":
        return [(row["prompt_ids"], ""), (row["completion_ids"], "+" if row["label"] else "-")]
    prompt = row.get("prompt_ids", [])
    chosen, rejected = row["chosen_ids"], row["rejected_ids"]
    if not prompt:  # a reward model reads both sequences whole: what they share is drawn once
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return [(prompt, ""), (chosen, "+"), (rejected, "-")]


def sequences(row: dict[str, Any], form: str) -> list[list[int]]:
    """Return the whole token sequences of an encoded row, as the model will see them."""
    if form == "sft":
        return [list(row["input_ids"])]
    if form == "prompt":
        return [list(row["prompt_ids"])]
    prompt = list(row.get("prompt_ids", []))
    names = ("completion_ids",) if form == "kto" else ("chosen_ids", "rejected_ids")
    return [prompt + list(row[name]) for name in names]
