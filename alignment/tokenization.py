"""Rows into tokens, once, before the trainer: exact masks, no row longer than it may be, and the books kept.

TRL's trainers would do this row by row, cut what is too long and drop what has no answer left without a word. Here each
row that is cut or dropped is in the ledger, with its cause.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from transformers import IntervalStrategy

from alignment.data import Splits
from alignment.errors import InputError
from alignment.ledger import Ledger
from alignment.templates import ChatEncoder, load_template

LONG = "longer than max_length"
COLUMNS = {
    "sft": ["input_ids", "labels"],
    "dpo": ["prompt_ids", "chosen_ids", "rejected_ids"],
    "kto": ["prompt_ids", "completion_ids"],
    "reward": ["chosen_ids", "rejected_ids"],
}


@dataclass
class Tokenized:
    """What the trainer is given, and what is known about it.

    Attributes:
        train, test: columns of COLUMNS[form], "length" (tokens of the longest sequence of the row), "source", "row".
        form: "sft", "dpo", "kto" or "reward".
        ledger: rows and tokens up to here. notes: sentences to print.
        encoder: the chat encoder, for whoever wants to encode a prompt in the same way.
        lengths: tokens of every row that was read, before anything was cut, per split.
        counts: turns without a stop token, turns skipped, control tokens kept as text, near-equal pairs, …
    """

    train: Dataset | IterableDataset
    test: Dataset | None
    form: str
    ledger: Ledger
    notes: list[str]
    encoder: ChatEncoder
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)


@dataclass
class Rules:
    """How rows are encoded: the encoder and the run's settings."""

    encoder: ChatEncoder
    max_length: int | None
    on_long_row: str
    assistant_only: bool = True
    completion_only: bool = True


def tokenize(splits: Splits, loaded: Any, args: Any, form: str) -> Tokenized:
    """Encode both splits for one of the trainers.

    Args:
        splits: what `load_splits` returned; its ledger is carried on.
        loaded: what `load_model` returned. The token that ends the assistant's turns is added to the generation
            config's stop tokens, so that the trained model stops in every program that reads it.
        args: the parsed arguments: `max_length`, `on_long_row`, `on_bad_row`, `chat_template_path`, ….
        form: "sft", "dpo", "kto" or "reward".

    Raises:
        InputError: no row is left, or a row cannot be used and `on_bad_row` is "stop".
    """
    notes = list(splits.notes)
    quick = not isinstance(splits.train, IterableDataset) and len(splits.train) < 20_000
    (datasets.disable_progress_bars if quick else datasets.enable_progress_bars)()
    if "chat_template_path" in vars(args.train) and args.train.chat_template_path:
        load_template(loaded.tokenizer, args.train.chat_template_path)
        args.train.chat_template_path = None
    encoder = ChatEncoder(loaded.tokenizer, vars(loaded.model).get("generation_config"))
    notes += _stop_at_end_of_turn(encoder, loaded.model)
    notes += _no_evaluation(splits, args.train)
    rules = Rules(encoder, args.train.max_length, args.data.on_long_row)
    if form == "sft":
        rules.assistant_only = args.train.assistant_only_loss
        rules.completion_only = args.train.completion_only_loss is not False
    result = Tokenized(splits.train, splits.test, form, splits.ledger, notes, encoder)
    for split in ("train", "test"):
        rows = getattr(splits, split)
        if rows is not None:
            setattr(result, split, _encode_split(rows, split, result, rules, args))
    splits.ledger.check()
    return result


def _no_evaluation(splits: Splits, train: Any) -> list[str]:
    """Switch evaluation off where there is nothing to evaluate on: the trainers would end with an error."""
    wanted = train.eval_strategy != "no"
    if splits.test is None or not wanted:
        train.eval_strategy, train.eval_on_start = IntervalStrategy.NO, False
    return ["no held-out rows: nothing is evaluated"] if wanted and splits.test is None else []


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
    encode = ENCODERS[result.form]
    map_args = {"batched": True, "batch_size": 256, "remove_columns": rows.column_names}
    if isinstance(rows, IterableDataset):
        keep = COLUMNS[result.form] + ["label"] * (result.form == "kto")
        encoded = rows.map(_batch(encode, rules), **map_args)
        return encoded.filter(lambda row: not row["fault"]).select_columns([*keep, "length"])
    encoded = rows.map(
        _batch(encode, rules),
        desc=f"Encoding {split} rows",
        num_proc=args.train.dataset_num_proc,
        load_from_cache_file=False,
        new_fingerprint=f"{rows._fingerprint}-{result.form}",
        **map_args,
    )
    result.lengths[split] = np.asarray(encoded["whole"], dtype=np.int64)
    for name in ("unstopped", "skipped", "escaped", "near", "turns"):
        result.counts[f"{split} {name}"] += int(np.sum(encoded[name]))
    return _settle(encoded, split, result, args)


def _settle(encoded: Dataset, split: str, result: Tokenized, args: Any) -> Dataset:
    """Book what was encoded, cut and found unfit; return the rows that stay."""
    ledger, columns = result.ledger, encoded.select_columns(["source", "row", "fault", "whole", "lost", "tokens"])
    faults: dict[tuple[str, str], list[tuple[int, int]]] = {}
    cut: dict[str, list[int]] = {}
    kept: dict[str, list[int]] = {}
    pieces = Counter()
    trained = encoded["trained"]
    for index, row in enumerate(columns):
        source = row["source"]
        if row["fault"]:
            faults.setdefault((source, row["fault"]), []).append((row["row"], row["whole"]))
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
        ledger.drop(source, split, fault, [row for row, _ in rows], sum(tokens for _, tokens in rows))
    for source, (rows, tokens) in cut.items():
        ledger.cut(source, split, LONG, rows, tokens)
    for source, (tokens, answers) in kept.items():
        ledger.tokens(source, split, tokens, answers)
    good = [index for index, fault in enumerate(encoded["fault"]) if not fault]
    keep = COLUMNS[result.form] + [c for c in ("label", "margin") if c in encoded.column_names]
    return encoded.select(good).select_columns([*keep, "length", "source", "row"])


def _refuse(faults: dict, split: str, total: int, args: Any) -> None:
    """Stop the run for faults the user did not allow to be dropped, or when nothing would be left."""
    count = sum(map(len, faults.values()))
    stopping = {
        (source, fault): rows
        for (source, fault), rows in faults.items()
        if (args.data.on_long_row if fault.startswith(LONG) else args.data.on_bad_row) == "stop"
    }
    if not stopping and (count < total or split != "train"):
        return
    chosen = stopping or faults
    (source, fault), rows = max(chosen.items(), key=lambda item: len(item[1]))
    long = fault.startswith(LONG)
    places = ", ".join(str(row) for row, _ in rows[:3]) + (", …" if len(rows) > 3 else "")
    longest = max(tokens for _, tokens in rows)
    every = "every one" if count == total else f"{len(rows):,}"
    raise InputError(
        f"{every} of {total:,} {split} rows cannot be used: {fault}",
        where=f"{source}, row {places}" + (f" (the longest has {longest:,} tokens)" if long else ""),
        why="nothing would be left to train on" if count == total else "they would teach nothing, or the wrong thing",
        fix=f"--max_length {1 << (longest - 1).bit_length()}, or --on_long_row cut (answers lose their end)"
        if long
        else _fix(fault, count == total),
    )


def _fix(fault: str, every: bool) -> str:
    if "template" in fault:
        return "--chat_template_path with a template that keeps history as it was, or chat_template_kwargs in the rows"
    return "mend the rows" if every else "mend the rows, or leave them out with --on_bad_row drop"


def _batch(encode: Callable, rules: Rules) -> Callable[[dict], dict]:
    def run(batch: dict[str, list]) -> dict[str, list]:
        size = len(batch["source"])
        rows = [{key: values[i] for key, values in batch.items()} for i in range(size)]
        encoded = [_whole(item, row) for row in rows for item in encode(row, rules)]
        return {key: [item[key] for item in encoded] for key in encoded[0]}

    return run


def _whole(item: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Complete an encoded row with its place and the counts it did not set."""
    counts = {"fault": "", "lost": 0, "unstopped": 0, "skipped": 0, "escaped": 0, "near": 0, "turns": 0}
    return {**counts, **item, "source": row["source"], "row": row["row"]}


def _chat(rules: Rules, row: dict, messages: list[dict]) -> Any:
    tools = json.loads(row["tools"]) if row.get("tools") else None
    kwargs = row.get("chat_template_kwargs") or {}
    return rules.encoder.with_kwargs({k: v for k, v in kwargs.items() if v is not None}).encode_chat(messages, tools)


def encode_sft(row: dict[str, Any], rules: Rules) -> list[dict[str, Any]]:
    """Encode a conversation, a prompt with its completion, or a plain text (which may become several rows)."""
    encoder, counts = rules.encoder, {}
    if row.get("messages") is not None:
        chat = _chat(rules, row, row["messages"])
        ids = chat.input_ids
        mask = chat.mask if rules.assistant_only else [1] * len(ids)
        counts = _turns(chat)
    elif row.get("prompt") is not None:
        prompt = encoder.encode_text(row["prompt"])
        answer = encoder.encode_text(row["completion"], bos=False) + _eos(encoder)
        ids, mask = prompt + answer, [int(not rules.completion_only)] * len(prompt) + [1] * len(answer)
    else:
        return _pieces(encoder.encode_text(row["text"]) + _eos(encoder), rules.max_length)
    labels = [token if bit else -100 for token, bit in zip(ids, mask, strict=True)]
    labels[:1] = [-100]  # nothing predicts the first token
    item = {"input_ids": ids, "labels": labels, "whole": len(ids)} | counts
    if rules.max_length and len(ids) > rules.max_length:
        item |= {"input_ids": ids[: rules.max_length], "labels": labels[: rules.max_length]}
        item |= {"lost": len(ids) - rules.max_length} if rules.on_long_row == "cut" else {"fault": LONG}
    trained = sum(label != -100 for label in item["labels"])
    if not trained and not item.get("fault"):
        item["fault"] = _why_untrained(item, ids, rules)
    return [item | {"trained": trained, "tokens": len(item["input_ids"]), "length": len(item["input_ids"])}]


def _why_untrained(item: dict, ids: list[int], rules: Rules) -> str:
    if item.get("skipped"):
        return "the chat template shows every answer otherwise than the model would see it (no trained token)"
    return f"{LONG}: the answer begins after it" if rules.max_length and len(ids) > rules.max_length else "no trained token"


def _pieces(ids: list[int], max_length: int | None) -> list[dict[str, Any]]:
    size = max_length or len(ids)
    items = []
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        if len(part) > 1 or not items:
            trained = len(part) - 1
            items.append({"input_ids": part, "labels": [-100, *part[1:]], "length": len(part), "tokens": len(part)})
            items[-1] |= {"whole": len(ids) if start == 0 else 0, "trained": trained, "lost": -int(start > 0)}
            items[-1] |= {} if trained else {"fault": "no trained token"}
    return items


def _turns(chat: Any) -> dict[str, int]:
    unstopped = sum(not stopped for *_, stopped in chat.turns)
    return {"unstopped": unstopped, "skipped": chat.skipped, "escaped": chat.escaped, "turns": len(chat.turns)}


def _eos(encoder: ChatEncoder) -> list[int]:
    eos = encoder.tokenizer.eos_token_id
    return [] if eos is None else [eos]


def _prompt_and_answers(row: dict, keys: tuple[str, ...], rules: Rules) -> dict[str, Any]:
    """Encode a prompt and one answer per key; the prompt is the part they share."""
    encoder, item = rules.encoder, {}
    if isinstance(row["prompt"], str):
        item["prompt_ids"] = encoder.encode_text(row["prompt"])
        for key in keys:
            item[f"{key}_ids"] = encoder.encode_text(row[key], bos=False) + _eos(encoder)
        return item
    prompts = []
    for key in keys:
        chat = _chat(rules, row, row["prompt"] + row[key])
        answers = sum(message["role"] == "assistant" for message in row[key])
        if len(chat.turns) < answers or chat.turns[-1][1] < len(chat.input_ids):
            item["fault"] = "the chat template shows the answer otherwise than the model would see it"
        start = chat.turns[-answers][0] if len(chat.turns) >= answers else len(chat.input_ids)
        prompts.append(chat.input_ids[:start])
        item[f"{key}_ids"] = chat.input_ids[start:]
        for name, count in _turns(chat).items():
            item[name] = item.get(name, 0) + count
    if any(prompt != prompts[0] for prompt in prompts):
        item["fault"] = "the chat template shows the prompt in another way for each answer"
    return item | {"prompt_ids": prompts[0]}


def _fit(item: dict, keys: tuple[str, ...], rules: Rules) -> dict[str, Any]:
    """Apply the length limit to a prompt with its answers, and book tokens."""
    prompt = len(item["prompt_ids"])
    sizes = [prompt + len(item[f"{key}_ids"]) for key in keys]
    item["whole"], limit = max(sizes), rules.max_length
    if limit and max(sizes) > limit and not item.get("fault"):
        if rules.on_long_row != "cut":
            item["fault"] = LONG
        elif prompt >= limit:
            item["fault"] = f"{LONG}: the prompt alone fills it"
        else:
            for key in keys:
                item[f"{key}_ids"] = item[f"{key}_ids"][: limit - prompt]
            item["lost"] = sum(sizes) - sum(min(size, limit) for size in sizes)
    answers = [item[f"{key}_ids"] for key in keys]
    if len(answers) == 2 and answers[0] == answers[1] and not item.get("fault"):
        item["fault"] = "chosen and rejected are the same tokens" + (" once cut" if item.get("lost") else "")
    item["trained"] = sum(map(len, answers))
    item["tokens"] = item["trained"] + len(keys) * prompt
    item["length"] = prompt + max(map(len, answers))
    item["near"] = int(len(answers) == 2 and _alike(*answers) > 0.95)
    return item


def _alike(a: list[int], b: list[int]) -> float:
    """Return the share of the longer sequence that is a common start or a common end of both."""
    short = min(len(a), len(b))
    front = next((i for i in range(short) if a[i] != b[i]), short)
    back = next((i for i in range(short - front) if a[-1 - i] != b[-1 - i]), short - front)
    return (front + back) / max(len(a), len(b), 1)


def encode_dpo(row: dict[str, Any], rules: Rules) -> list[dict[str, Any]]:
    """Encode a pair: prompt_ids, chosen_ids, rejected_ids."""
    return [_fit(_prompt_and_answers(row, ("chosen", "rejected"), rules), ("chosen", "rejected"), rules)]


def encode_kto(row: dict[str, Any], rules: Rules) -> list[dict[str, Any]]:
    """Encode an answer with its thumb: prompt_ids, completion_ids, label."""
    item = _fit(_prompt_and_answers(row, ("completion",), rules), ("completion",), rules)
    return [item | {"label": row["label"]}]


def encode_reward(row: dict[str, Any], rules: Rules) -> list[dict[str, Any]]:
    """Encode a pair for a reward model: the prompt stands in front of both answers."""
    if row.get("prompt") is None:
        row = {**row, "prompt": ""}
    (item,) = encode_dpo(row, rules)
    prompt = item.pop("prompt_ids")
    item |= {f"{key}_ids": prompt + item[f"{key}_ids"] for key in ("chosen", "rejected")}
    return [item | ({"margin": float(row["margin"])} if row.get("margin") is not None else {})]


ENCODERS = {"sft": encode_sft, "dpo": encode_dpo, "kto": encode_kto, "reward": encode_reward}


def kl_completions(rows: Dataset, batch_size: int, seed: int) -> Dataset:
    """Put thumbs into fixed batches of like lengths and give each row another row's answer of its batch.

    KTO estimates its reference point z from answers that belong to other prompts (arXiv:2402.01306, section 4.1). As in
    TRL the answers of a batch are shifted within it, so the order must not change afterwards; here the batches
    are of like lengths, and the shift is the one that pairs the fewest rows with an answer to their own prompt.
    """
    generator = np.random.default_rng(seed)
    order, lengths = generator.permutation(len(rows)), np.asarray(rows["length"])
    span = 50 * batch_size
    blocks = [order[i : i + span] for i in range(0, len(order), span)]
    order = np.concatenate([block[np.argsort(lengths[block], kind="stable")] for block in blocks])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    full = batches[:-1] if len(batches[-1]) < batch_size else batches
    shuffled = [full[i] for i in generator.permutation(len(full))] + batches[len(full) :]
    prompts, answers = rows["prompt_ids"], rows["completion_ids"]
    others = []
    for batch in shuffled:
        own = [prompts[int(i)] for i in batch]
        shifts = range(1, len(batch)) if len(batch) > 1 else [0]
        shift = min(shifts, key=lambda s: sum(own[i] == own[i - s] for i in range(len(own))))
        others += [answers[int(batch[i - shift])] for i in range(len(batch))]
    return rows.select(np.concatenate(shuffled)).add_column("KL_completion_ids", others)
