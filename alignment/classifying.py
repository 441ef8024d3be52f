"""Rows with labels into tokens and targets, for the three heads, with the books kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alignment.data import Splits
from alignment.encoding import LONG
from alignment.errors import InputError
from alignment.labels import Labels, flat, label_findings
from alignment.models import LoadedModel
from alignment.spans import Reading, place_answer, windows
from alignment.templates import ChatEncoder
from alignment.tokenization import Tokenized, no_evaluation, settle

NO_WORD = "no token carries a tag"
LONG_QUESTION = "the question leaves no room for its context"
_BOOKS = ("fault", "whole", "given", "tokens", "trained", "lost", "length", "source", "row")
TARGETS = {"sequence": ("labels",), "token": ("labels",), "span": ("start_positions", "end_positions")}
# What the answers of held-out rows are found and scored with.
_SPAN_ROW = ("id", "context", "answers", "starts", "ends")


def encode(splits: Splits, loaded: LoadedModel, args: Any, labels: Labels) -> Tokenized:
    """Encode both splits for `alignment.classifier.ClassificationTrainer`.

    Columns: input_ids, token_type_ids where the model reads them, and the target: labels (a class or a number; for
    tokens a list with -100 where nothing is scored) or start_positions and end_positions. Held-out rows are sorted by
    length.

    Raises:
        InputError: no row is left, a row cannot be used, or the tokenizer knows no character positions.
    """
    tokenizer = loaded.tokenizer
    if labels.head != "sequence" and not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer of {args.model.model_name_or_path} does not say which characters a token stands for",
            where=f"--head {labels.head}",
            why="words and answers are found by their characters",
            fix="a model with a tokenizer.json",
        )
    result = Tokenized(
        splits.train, splits.test, labels.head, splits.ledger, list(splits.notes), ChatEncoder(tokenizer)
    )
    result.label_names = labels.names
    rules = Encoder(tokenizer, labels, reading_of(args), args.data.on_long_row, reads_types(loaded.model))
    small = len(splits.train) < 20_000
    (datasets.disable_progress_bars if small else datasets.enable_progress_bars)()
    for split in ("train", "test"):
        rows = getattr(splits, split)
        if rows is not None:
            setattr(result, split, encode_split(rows, split, result, rules, args))
    if result.test is not None and not len(result.test):
        result.test = None
    result.notes += no_evaluation(result, args.train)
    if labels.head != "span":
        known = [rows["labels"] if rows is not None else [] for rows in (result.train, result.test)]
        if labels.head == "token":
            known = [[value for value in flat(rows) if value != -100] for rows in known]
        result.findings = label_findings(*known, labels)
    else:
        answered = int(np.sum(np.asarray(result.train["end_positions"]) > 0))
        text = f"{answered:,} of {len(result.train):,} windows hold the answer to their question"
        result.findings = [("fact" if answered else "error", text, "" if answered else "a larger --max_length")]
    splits.ledger.check()
    return result


def reading_of(args: Any) -> Reading:
    """Return how windows are cut and answers chosen, from the flags."""
    train = args.train
    return Reading(
        train.max_length, train.doc_stride, train.max_answer_length, train.n_best_size, train.null_score_diff_threshold
    )


def reads_types(model: Any) -> bool:
    """Say whether the model tells the first text of a pair from the second by a number a token (BERT does)."""
    return vars(model.config).get("type_vocab_size", 0) > 1


def encode_split(rows: Dataset, split: str, result: Tokenized, rules: "Encoder", args: Any) -> Dataset:
    """Encode one split and book what was cut or cannot be used; held-out rows come back sorted by length."""
    encoded = rows.map(
        rules.function(),
        batched=True,
        batch_size=1000,
        remove_columns=rows.column_names,
        desc=f"Encoding {split} rows",
        load_from_cache_file=False,
        new_fingerprint=f"{rows._fingerprint}-{result.form}",
    )
    result.lengths[split] = np.asarray(encoded["whole"], dtype=np.int64)
    good = settle(encoded, split, result, args)
    keep = [name for name in encoded.column_names if name not in _BOOKS] + ["length", "source", "row"]
    if split == "train":
        keep = [name for name in keep if name not in _SPAN_ROW]
    else:  # rows of like lengths meet in a batch: less padding
        lengths = np.asarray(encoded["length"])[good]
        good = np.asarray(good, dtype=np.int64)[np.argsort(lengths, kind="stable")]
    return encoded.select(good).select_columns(keep)


@dataclass
class Encoder:
    """How rows become tokens and targets."""

    tokenizer: PreTrainedTokenizerBase
    labels: Labels
    reading: Reading
    on_long_row: str
    types: bool

    def function(self) -> Callable[[dict], dict]:
        """Return the function for `Dataset.map(batched=True)` of this head."""
        return {"sequence": self.sequences, "token": self.tokens, "span": self.spans}[self.labels.head]

    def texts(self, first: list[str], second: list[str] | None, cut: bool) -> dict[str, list]:
        """Encode texts or pairs, cut to the longest length or not; control tokens in them stay text."""
        return self.tokenizer(
            first, second, truncation=cut, max_length=self.reading.max_length if cut else None,
            return_token_type_ids=self.types, return_attention_mask=False, split_special_tokens=True,
        )  # fmt: skip

    def sequences(self, batch: dict[str, list]) -> dict[str, list]:
        """Encode texts or pairs with one label each."""
        first, second = batch["text"], batch.get("text_pair")
        tokenizer = self.tokenizer
        if second and tokenizer.num_special_tokens_to_add(pair=True) == tokenizer.num_special_tokens_to_add():
            first = [f"{text}\n" for text in first]  # decoders have no token that parts two texts
        encoded = self.texts(first, second, cut=False)
        whole = [len(ids) for ids in encoded["input_ids"]]
        long = [i for i, size in enumerate(whole) if size > self.reading.max_length]
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        out = {name: list(encoded[name]) for name in names}
        if long and self.on_long_row == "cut":
            pairs = [second[i] for i in long] if second else None
            shorter = self.texts([first[i] for i in long], pairs, cut=True)
            for name in names:
                for i, values in zip(long, shorter[name], strict=True):
                    out[name][i] = values
        out["labels"] = [self.labels.number(value) for value in batch["label"]]
        return out | self.books(out["input_ids"], whole, [0] * len(whole), batch)

    def tokens(self, batch: dict[str, list]) -> dict[str, list]:
        """Encode words with a tag each: the first token of a word carries it, the others are not scored."""
        texts = [" ".join(words) for words in batch["tokens"]]
        encoded = self.tokenizer(
            texts, return_token_type_ids=self.types, return_attention_mask=False, return_offsets_mapping=True,
            split_special_tokens=True,
        )  # fmt: skip
        limit = self.reading.max_length
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        out: dict[str, list] = {name: list(encoded[name]) for name in names} | {"labels": []}
        whole, trained = [len(ids) for ids in out["input_ids"]], []
        ends = self.tokenizer.num_special_tokens_to_add() and encoded["offset_mapping"][0][-1] == (0, 0)
        for i, (words, tags) in enumerate(zip(batch["tokens"], batch["tags"], strict=True)):
            targets = [-100] * whole[i]
            for token, word in first_tokens(words, encoded["offset_mapping"][i]).items():
                targets[token] = self.labels.number(tags[word])
            if whole[i] > limit and self.on_long_row == "cut":
                keep = [*range(limit - 1), -1] if ends else range(limit)  # the special token at the end stays
                targets = [targets[k] for k in keep]
                for name in names:
                    out[name][i] = [out[name][i][k] for k in keep]
            out["labels"].append(targets)
            trained.append(sum(target != -100 for target in targets))
        books = self.books(out["input_ids"], whole, trained, batch)
        books["fault"] = [fault or ("" if n else NO_WORD) for fault, n in zip(books["fault"], trained, strict=True)]
        return out | books

    def spans(self, batch: dict[str, list]) -> dict[str, list]:
        """Encode questions on contexts; a long context becomes several windows."""
        out: dict[str, list] = {}
        for i, question in enumerate(batch["question"]):
            answers, context = batch["answers"][i], batch["context"][i]
            place = {
                "source": batch["source"][i],
                "row": batch["row"][i],
                "context": context,
                "answers": answers["text"],
            }
            place["id"] = str(batch["id"][i]) if "id" in batch else f"{place['source']}#{place['row']}"
            found = windows(self.tokenizer, question, context, self.reading)
            size = sum(len(window.input_ids) for window in found)
            for number, window in enumerate(found):
                if answers["text"]:
                    place_answer(window, answers["answer_start"][0], answers["text"][0])
                row = {"input_ids": window.input_ids, "starts": window.starts, "ends": window.ends}
                row |= {"token_type_ids": window.token_type_ids} if self.types else {}
                row |= {"start_positions": window.start, "end_positions": window.end, "fault": ""}
                length = len(window.input_ids)
                row |= {"length": length, "whole": length, "given": length, "tokens": length}
                row |= {"trained": 0, "lost": -1 if number else 0}
                collect(out, place | row)
            if not size:
                row = {"input_ids": [], "starts": [], "ends": [], "start_positions": 0, "end_positions": 0}
                row |= {"token_type_ids": []} if self.types else {}
                row |= dict.fromkeys(("length", "whole", "given", "tokens", "trained", "lost"), 0)
                collect(out, place | row | {"fault": LONG_QUESTION})
        return out

    def books(self, ids: list[list[int]], whole: list[int], trained: list[int], batch: dict) -> dict[str, list]:
        """Return the columns of the ledger for rows that stay one row each."""
        limit, cut = self.reading.max_length, self.on_long_row == "cut"
        sizes = [len(row) for row in ids]
        return {
            "fault": [LONG if n > limit and not cut else "" for n in whole],
            "whole": whole,
            "given": whole,
            "length": sizes,
            "tokens": sizes,
            "trained": trained,
            "lost": [n - m for n, m in zip(whole, sizes, strict=True)],
            "source": batch["source"],
            "row": batch["row"],
        }


def collect(columns: dict[str, list], row: dict[str, Any]) -> None:
    """Append a row to columns."""
    for name, value in row.items():
        columns.setdefault(name, []).append(value)


def first_tokens(words: list[str], offsets: list[tuple[int, int]]) -> dict[int, int]:
    """Return {token: word} for the first token of each word of a text that is the words with spaces between.

    Args:
        words: the words.
        offsets: of the tokens, in characters of the text; (0, 0) for special tokens.
    """
    owner: list[int] = []
    for number, word in enumerate(words):
        owner += [number] * len(word) + [-1]
    found, seen = {}, set()
    for token, (start, end) in enumerate(offsets):
        word = next((owner[i] for i in range(start, end) if owner[i] >= 0), -1)
        if word >= 0 and word not in seen:
            seen.add(word)
            found[token] = word
    return found


@dataclass
class Collator:
    """Pads a batch on the right to its longest row, whatever the tokenizer does: positions then count from 0.

    Returns:
        input_ids, attention_mask, token_type_ids (where rows have them): (rows, longest row); labels: (rows,), or
        (rows, longest row) for tokens; start_positions, end_positions: (rows,).
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Stack the rows of a batch."""
        width = max(len(row["input_ids"]) for row in rows)

        def stack(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([list(row[name]) + [filler] * (width - len(row[name])) for row in rows])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch = {"input_ids": stack("input_ids", self.pad_token_id)}
        batch["attention_mask"] = (torch.arange(width)[None] < lengths[:, None]).long()
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = stack("token_type_ids", 0)
        for name in ("labels", "start_positions", "end_positions"):
            if name in rows[0]:
                whole = isinstance(rows[0][name], list)
                batch[name] = stack(name, -100) if whole else torch.tensor([row[name] for row in rows])
        return batch
