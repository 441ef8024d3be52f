"""Rows into tokens, once, before the trainer: exact masks, no row longer than it may be, and the books kept.

TRL's trainers would do this row by row, cut what is too long and drop what has no answer left without a word. Here each
row that is cut or dropped is in the ledger, with its cause.
"""

from collections import Counter
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from transformers import IntervalStrategy

from alignment.data import Splits, load_splits
from alignment.encoding import COLUMNS, COUNTS, LONG, NO_ROOM, REFUSED, Rules, batch_encoder
from alignment.errors import InputError
from alignment.ledger import Ledger
from alignment.templates import ChatEncoder, load_template

# What the encoder says of a row beside its tokens.
BOOKS = ["length", "whole", "given", "tokens", "trained", "fault", "lost", *COUNTS]


@dataclass
class Tokenized:
    """What the trainer is given, and what is known about it.

    Attributes:
        train, test: columns of COLUMNS[form], "length" (tokens of the longest sequence of the row), "source", "row";
            of the form "prompt" the row's own columns and "prompt_ids", all that the model is given.
        form: "sft", "dpo", "kto", "reward" or "prompt"; "sequence", "token" or "span" of rows with labels.
        ledger: rows and tokens up to here. notes: sentences to print.
        encoder: the chat encoder, for whoever wants to encode a prompt in the same way.
        lengths: tokens of every row that was read, before anything was cut, per split.
        findings: (level, what, fix) of what the encoding found out, for the examination before the first step.
        counts: turns without a stop token, turns skipped, control tokens kept as text, near-equal pairs, …
        label_names: of the classes, in the order of their numbers; none but for rows with classes.
    """

    train: Dataset | IterableDataset
    test: Dataset | None
    form: str
    ledger: Ledger
    notes: list[str]
    encoder: ChatEncoder
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)
    findings: list[tuple[str, str, str]] = field(default_factory=list)
    label_names: list[str] = field(default_factory=list)


def tokenize(splits: Splits, loaded: Any, args: Any, form: str) -> Tokenized:
    """Encode both splits for one of the trainers.

    Args:
        splits: what `load_splits` returned; its ledger is carried on.
        loaded: what `load_model` returned. The token that ends the assistant's turns is added to the generation
            config's stop tokens, so that the trained model stops in every program that reads it.
        args: the parsed arguments: `max_length`, `on_long_row`, `on_bad_row`, `chat_template_path`, ….
        form: "sft", "dpo", "kto", "reward", or "prompt" for trainers that sample the answers themselves.

    Raises:
        InputError: no row is left, or a row cannot be used and `on_bad_row` is "stop".
    """
    notes = list(splits.notes)
    quick = not isinstance(splits.train, IterableDataset) and len(splits.train) < 20_000
    (datasets.disable_progress_bars if quick else datasets.enable_progress_bars)()
    if "chat_template_path" in vars(args.train) and args.train.chat_template_path:
        load_template(loaded.tokenizer, args.train.chat_template_path)
    kwargs = vars(args.train).get("chat_template_kwargs") if form == "prompt" else None
    encoder = ChatEncoder(loaded.tokenizer, vars(loaded.model).get("generation_config"), kwargs)
    notes += _stop_at_end_of_turn(encoder, loaded.model)
    limit = _room(loaded, args) if form == "prompt" else args.train.max_length
    rules = Rules(encoder, limit, args.data.on_long_row)
    if form == "sft":
        rules.assistant_only = args.train.assistant_only_loss
        rules.completion_only = args.train.completion_only_loss is not False
    result = Tokenized(splits.train, splits.test, form, splits.ledger, notes, encoder)
    for split in ("train", "test"):
        rows = getattr(splits, split)
        if rows is not None:
            setattr(result, split, _encode_split(rows, split, result, rules, args))
    if isinstance(result.test, Dataset) and not len(result.test):
        result.test = None
    notes += no_evaluation(result, args.train)
    splits.ledger.check()
    return result


def _room(loaded: Any, args: Any) -> int | None:
    """Return the tokens a prompt may have beside `max_completion_length`; None where positions have no end."""
    positions = vars(loaded.model.config.get_text_config()).get("max_position_embeddings")
    if args.data.on_long_row == "cut":
        raise InputError(
            "a prompt that is too long cannot be cut",
            where="--on_long_row cut",
            why="half a question has another answer",
            fix="--on_long_row drop, or stop",
        )
    answer = args.train.max_completion_length
    if answer is None:
        raise InputError("answers have no longest length", where="--max_completion_length", fix="a number of tokens")
    if positions is None:
        return None
    if loaded.peft_config is not None and loaded.peft_config.is_prompt_learning:
        positions -= loaded.peft_config.num_virtual_tokens
    if answer >= positions:
        raise InputError(
            f"answers of {answer:,} tokens leave no room for a prompt in {positions:,} positions",
            where="--max_completion_length",
            fix=f"--max_completion_length {positions // 2}",
        )
    return positions - answer


def no_evaluation(rows: Tokenized, train: Any) -> list[str]:
    """Switch evaluation off where there is nothing to evaluate on: the trainers would end with an error."""
    wanted = train.eval_strategy != "no"
    if rows.test is None or not wanted:
        train.eval_strategy, train.eval_on_start = IntervalStrategy.NO, False
    return ["no held-out rows: nothing is evaluated"] if wanted and rows.test is None else []


def _stop_at_end_of_turn(encoder: ChatEncoder, model: Any) -> list[str]:
    """Add the control token that ends an assistant turn to the tokens at which generation stops."""
    if not encoder.tokenizer.chat_template:
        return []
    try:
        probe = encoder.encode_chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except InputError:  # a template with rules of its own: the rows themselves will tell
        return []
    if not probe.turns or probe.turns[-1][2]:
        return []
    last = probe.input_ids[probe.turns[-1][1] - 1]
    token = encoder.tokenizer.convert_ids_to_tokens(last)
    config = vars(model).get("generation_config")
    if token not in encoder.specials or config is None:
        return []
    config.eos_token_id = sorted({*encoder.stops, last})
    encoder.stops.add(last)
    encoder.stop_tokens.add(token)
    return [f"the template ends answers with {token}: added to the stop tokens of generation_config.json"]


def _encode_split(rows: Any, split: str, result: Tokenized, rules: Rules, args: Any) -> Any:
    encode = batch_encoder(result.form, rules)
    map_args = {"batched": True, "batch_size": 256, "remove_columns": rows.column_names}
    if result.form == "prompt":
        _check_names(rows)
    if isinstance(rows, IterableDataset):
        if result.form == "prompt":  # the row's own columns stay: rewards read them
            encoded = rows.map(encode, batched=True, batch_size=256)
            return encoded.filter(_StreamFilter(result.ledger, split, args)).remove_columns(BOOKS)
        keep = COLUMNS[result.form] + ["label"] * (result.form == "kto")
        encoded = rows.map(encode, **map_args)
        return encoded.filter(_StreamFilter(result.ledger, split, args)).select_columns([*keep, "length"])
    encoded = rows.map(
        encode,
        desc=f"Encoding {split} rows",
        num_proc=vars(args.train).get("dataset_num_proc"),
        load_from_cache_file=False,
        new_fingerprint=f"{rows._fingerprint}-{result.form}",
        **map_args,
    )
    result.lengths[split] = np.asarray(encoded["whole"], dtype=np.int64)
    for name in COUNTS:
        result.counts[f"{split} {name}"] += int(np.sum(encoded[name]))
    good = settle(encoded, split, result, args)
    if result.form != "prompt":
        keep = COLUMNS[result.form] + [c for c in ("label", "margin") if c in encoded.column_names]
        return encoded.select(good).select_columns([*keep, "length", "source", "row"])
    own = rows.select(good)
    return datasets.concatenate_datasets([own, encoded.select(good).select_columns(["prompt_ids"])], axis=1)


def _check_names(rows: Any) -> None:
    """Raise InputError when the rows have a column whose name the trainer needs."""
    names = ["prompt_ids", *BOOKS] if isinstance(rows, IterableDataset) else ["prompt_ids"]
    taken = [name for name in rows.column_names or [] if name in names]
    if taken:
        raise InputError(
            f"the rows have a column {taken[0]!r}, a name that is needed here",
            where=f"column {taken[0]}",
            fix=f"rename it in a data/*.yaml (columns: {{my_{taken[0]}: {taken[0]}}}) or in the row function",
        )


class _StreamFilter:
    """Says which rows of a stream stay; the others are booked once, however often the stream is read."""

    def __init__(self, ledger: Ledger, split: str, args: Any):
        self.ledger, self.split, self.args = ledger, split, args
        self.seen: set[tuple] = set()

    def __call__(self, row: dict[str, Any]) -> bool:
        if not row["fault"]:
            return True
        faults = {(row["source"], row["fault"]): [(row["row"], row["whole"], row["given"])]}
        _refuse(faults, self.split, None, self.args)
        key = (row["source"], row["row"], row["fault"], row["given"])
        if key not in self.seen:
            self.seen.add(key)
            self.ledger.drop(row["source"], self.split, row["fault"], [row["row"]], row["given"])
        return False


def settle(encoded: Dataset, split: str, result: Tokenized, args: Any) -> list[int]:
    """Book what was encoded, cut and found unfit; return the places of the rows that stay."""
    names = ["source", "row", "fault", "whole", "given", "lost", "tokens"]
    ledger, columns = result.ledger, encoded.select_columns(names)
    faults: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    cut: dict[str, list[int]] = {}
    kept: dict[str, list[int]] = {}
    pieces = Counter()
    trained = encoded["trained"]
    for index, row in enumerate(columns):
        source = row["source"]
        if row["fault"]:
            faults.setdefault((source, row["fault"]), []).append((row["row"], row["whole"], row["given"]))
            continue
        total = kept.setdefault(source, [0, 0])
        total[0] += row["tokens"]
        total[1] += trained[index]
        if row["lost"] > 0:
            lost = cut.setdefault(source, [0, 0])
            lost[0] += 1
            lost[1] += row["lost"]
        elif row["lost"] < 0:  # a further piece of a long text
            pieces[source] += 1
    _refuse(faults, split, len(encoded), args)
    for source, n in pieces.items():
        ledger.repeat(source, n)
        ledger.keep(source, split, n)
        result.notes.append(f"{source}: long texts of the {split} rows split into {n:,} more pieces, nothing cut")
    for (source, fault), rows in faults.items():
        ledger.drop(source, split, fault, [row for row, *_ in rows], sum(given for *_, given in rows))
    for source, (rows, tokens) in cut.items():
        ledger.cut(source, split, LONG, rows, tokens)
    for source, (tokens, answers) in kept.items():
        ledger.tokens(source, split, tokens, answers)
    return [index for index, fault in enumerate(encoded["fault"]) if not fault]


def _refuse(faults: dict, split: str, total: int | None, args: Any) -> None:
    """Stop the run for faults the user did not allow to be dropped, or when nothing would be left.

    Args:
        faults: (source, fault) -> (row, tokens of its longest sequence, tokens of all its sequences).
        split: "train" or "test".
        total: rows of the split, None where that is not known (a stream).
        args: the parsed arguments.
    """
    count = sum(map(len, faults.values()))
    stopping = {
        (source, fault): rows
        for (source, fault), rows in faults.items()
        if (args.data.on_long_row if fault.startswith((LONG, NO_ROOM)) else args.data.on_bad_row) == "stop"
    }
    if not stopping and (count != total or split != "train"):
        return
    chosen = stopping or faults
    (source, fault), rows = max(chosen.items(), key=lambda item: len(item[1]))
    long = fault.startswith((LONG, NO_ROOM))
    places = ", ".join(str(row) for row, *_ in rows[:3]) + (", …" if len(rows) > 3 else "")
    longest = max(tokens for _, tokens, _ in rows)
    every = "every one" if count == total else f"{len(rows):,}"
    of = "" if total is None else f" of {total:,}"
    raise InputError(
        f"{every}{of} {split} rows cannot be used: {fault}",
        where=f"{source}, row {places}" + (f" (the longest has {longest:,} tokens)" if long else ""),
        why="nothing would be left to train on" if count == total else "they would teach nothing, or the wrong thing",
        fix=f"--max_length {1 << (longest - 1).bit_length()}, or --on_long_row cut (answers lose their end)"
        if fault.startswith(LONG)
        else _fix(fault, count == total),
    )


def _fix(fault: str, every: bool) -> str:
    if fault == NO_ROOM:
        return "a smaller --max_completion_length" + ("" if every else ", or --on_long_row drop")
    if fault.startswith(REFUSED):
        return "merge or reorder the turns, or leave such rows out with --on_bad_row drop"
    if "template" in fault:
        return "--chat_template_path with a template that keeps history as it was, or chat_template_kwargs in the rows"
    return "mend the rows" if every else "mend the rows, or leave them out with --on_bad_row drop"


def load_texts(args: Any, loaded: Any) -> Dataset | None:
    """Return the plain texts of `--text_data` as rows of "input_ids", for PPO's pretraining mix; None without any.

    Each text ends in the tokenizer's end token; what is longer than the model's positions is cut there.

    Raises:
        InputError: the rows are no plain texts.
    """
    if not args.train.text_data:
        return None
    mine = copy(args)
    mine.data = replace(args.data, data=[args.train.text_data], eval_data=None, test_size=0, streaming=False)
    rows = load_splits(mine, "sft").train
    if "text" not in rows.column_names:
        raise InputError(
            f"no plain text: the columns are {', '.join(rows.column_names)}",
            where=f"--text_data {args.train.text_data}",
            why="the pretraining mix is the language model's loss on whole texts",
            fix='rows with a column "text", or a .txt file',
        )
    encoder, end = ChatEncoder(loaded.tokenizer), loaded.tokenizer.eos_token_id
    limit = loaded.model.config.get_text_config().to_dict().get("max_position_embeddings")
    ids = [[*encoder.encode_text(text), *([end] if end is not None else [])][:limit] for text in rows["text"]]
    return Dataset.from_dict({"input_ids": [row for row in ids if len(row) > 1]})
