"""One row into tokens, for each kind of training: which tokens are trained, what is cut, what cannot be used.

Nothing is decided in silence: a row that cannot be used carries its fault, a row that is cut the tokens it lost.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alignment.templates import ChatEncoder, TemplateRefusal

LONG = "longer than max_length"
NO_ROOM = "too long: with its answer it exceeds the model's positions"
REFUSED = "the chat template refuses"
COLUMNS = {
    "sft": ["input_ids", "labels"],
    "dpo": ["prompt_ids", "chosen_ids", "rejected_ids"],
    "kto": ["prompt_ids", "completion_ids"],
    "reward": ["chosen_ids", "rejected_ids"],
    "prompt": ["prompt_ids"],
}
# Counts of things worth saying, summed over the rows of a split.
COUNTS = ("unstopped", "skipped", "escaped", "near", "turns", "control")


@dataclass
class Rules:
    """How rows are encoded: the encoder and the run's settings."""

    encoder: ChatEncoder
    max_length: int | None
    on_long_row: str
    assistant_only: bool = True
    completion_only: bool = True


def batch_encoder(form: str, rules: Rules) -> Callable[[dict], dict]:
    """Return a function for `Dataset.map(batched=True)`; a long text may become several rows.

    Its columns are COLUMNS[form], "length", "source", "row", and for the books: "fault" (empty, or why the row cannot
    be used), "whole" (tokens of the longest sequence before anything was cut), "given" (of all sequences), "tokens"
    (that are left), "trained" (that carry loss), "lost" (cut off; -1 marks a further piece of a long text), and
    those of COUNTS.
    """

    def run(batch: dict[str, list]) -> dict[str, list]:
        size = len(batch["source"])
        rows = [{key: values[i] for key, values in batch.items()} for i in range(size)]
        encoded = [_whole(item, row) for row in rows for item in _encode(form, row, rules)]
        return {key: [item[key] for item in encoded] for key in encoded[0]}

    return run


def _encode(form: str, row: dict[str, Any], rules: Rules) -> list[dict[str, Any]]:
    """Encode a row; one that the chat template refuses becomes an empty row with its fault."""
    try:
        return ENCODERS[form](row, rules)
    except TemplateRefusal as refusal:
        item = dict.fromkeys(COLUMNS[form], []) | dict.fromkeys(("length", "tokens", "trained", "whole", "given"), 0)
        item |= {name: row[name] for name in ("label", "margin") if name in row}
        return [item | {"fault": refusal.what}]


def _whole(item: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Complete an encoded row with its place and the counts it did not set."""
    counts = {"fault": "", "lost": 0} | dict.fromkeys(COUNTS, 0)
    return {**counts, **item, "source": row["source"], "row": row["row"]}


def _chat(rules: Rules, row: dict, messages: list[dict]) -> Any:
    encoder, tools = _encoder(rules, row)
    return encoder.encode_chat(messages, tools)


def _encoder(rules: Rules, row: dict) -> tuple[ChatEncoder, list | None]:
    """Return the encoder with the row's own template arguments, and the row's tools."""
    tools = json.loads(row["tools"]) if row.get("tools") else None
    kwargs = row.get("chat_template_kwargs") or {}
    return rules.encoder.with_kwargs({k: v for k, v in kwargs.items() if v is not None}), tools


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
        answer = _ended(encoder.encode_text(row["completion"], bos=False), encoder)
        ids, mask = prompt + answer, [int(not rules.completion_only)] * len(prompt) + [1] * len(answer)
    else:
        return _pieces(_ended(encoder.encode_text(row["text"]), encoder), rules.max_length)
    labels = [token if bit else -100 for token, bit in zip(ids, mask, strict=True)]
    labels[:1] = [-100]  # nothing predicts the first token
    item = {"input_ids": ids, "labels": labels, "whole": len(ids), "given": len(ids)} | counts
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
    return (
        f"{LONG}: the answer begins after it"
        if rules.max_length and len(ids) > rules.max_length
        else "no trained token"
    )


def _pieces(ids: list[int], max_length: int | None) -> list[dict[str, Any]]:
    """Split a text into rows of max_length tokens; the last two share, where one token would be left alone."""
    size = max_length or max(len(ids), 1)
    starts = list(range(0, len(ids), size)) or [0]
    if len(starts) > 1 and len(ids) % size == 1 and size > 2:
        starts[-1] -= 1
    items = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        part, trained = ids[start:end], max(end - start - 1, 0)
        item = {"input_ids": part, "labels": [-100, *part[1:]][: len(part)], "length": len(part), "tokens": len(part)}
        item |= {"whole": 0 if start else len(ids), "given": len(part), "trained": trained, "lost": -int(start > 0)}
        items.append(item | ({} if trained or start else {"fault": "no trained token"}))
    return items


def _turns(chat: Any) -> dict[str, int]:
    unstopped = sum(not stopped for *_, stopped in chat.turns)
    return {"unstopped": unstopped, "skipped": chat.skipped, "escaped": chat.escaped, "turns": len(chat.turns)}


def _ended(ids: list[int], encoder: ChatEncoder) -> list[int]:
    """Return the ids with the eos token at their end, once."""
    eos = encoder.tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _prompt_and_answers(row: dict, keys: tuple[str, ...], rules: Rules) -> dict[str, Any]:
    """Encode a prompt and one answer per key; the prompt is the part they share."""
    encoder, item = rules.encoder, {}
    if isinstance(row["prompt"], str):
        prompt = row["prompt"]  # without one the answer is the beginning
        item["prompt_ids"] = encoder.encode_text(prompt) if prompt else []
        for key in keys:
            item[f"{key}_ids"] = _ended(encoder.encode_text(row[key], bos=not prompt), encoder)
        return item
    prompts = []
    for key in keys:
        chat = _chat(rules, row, row["prompt"] + row[key])
        answers = sum(message["role"] == "assistant" for message in row[key])
        starts = [turn[0] for turn, index in zip(chat.turns, chat.messages, strict=True) if index >= len(row["prompt"])]
        if len(starts) < answers or not starts:
            item["fault"] = "the chat template shows the answer otherwise than the model would see it"
        start = min(starts, default=len(chat.input_ids))
        prompts.append(chat.input_ids[:start])
        item[f"{key}_ids"] = chat.input_ids[start:]
        for name, count in _turns(chat).items():
            item[name] = item.get(name, 0) + count
    if not item.get("fault") and any(prompt != prompts[0] for prompt in prompts):
        item["fault"] = "the chat template shows the prompt in another way for each answer"
    return item | {"prompt_ids": prompts[0]}


def _fit(item: dict, keys: tuple[str, ...], rules: Rules) -> dict[str, Any]:
    """Apply the length limit to a prompt with its answers, and book tokens."""
    prompt = len(item["prompt_ids"])
    sizes = [prompt + len(item[f"{key}_ids"]) for key in keys]
    item["whole"], item["given"], limit = max(sizes), sum(sizes), rules.max_length
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
    item["near"] = int(len(answers) == 2 and not item.get("fault") and _alike(*answers) > 0.95)
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
    return [item | ({"margin": float(row["margin"] or 0)} if "margin" in row else {})]


def encode_prompt(row: dict[str, Any], rules: Rules) -> list[dict[str, Any]]:
    """Encode a prompt that the model will answer: prompt_ids, all that it is given before its first token."""
    prompt, counts = row["prompt"], {}
    if isinstance(prompt, str):
        ids = rules.encoder.encode_text(prompt)
        counts["control"] = _controls(rules, prompt)
    else:
        encoder, tools = _encoder(rules, row)
        ids = encoder.encode_prompt(prompt, tools)
        counts["escaped"] = sum(_controls(rules, message.get("content")) for message in prompt)
    size = len(ids)
    fault = "the prompt has no tokens" if not ids else NO_ROOM if size > (rules.max_length or size) else ""
    books = dict.fromkeys(("whole", "given", "tokens", "length"), size) | {"trained": 0, "fault": fault}
    return [{"prompt_ids": ids} | books | counts]


def _controls(rules: Rules, text: Any) -> int:
    """Count the spellings of control tokens in a text."""
    return len(rules.encoder.special_pattern.findall(text)) if isinstance(text, str) else 0


ENCODERS = {"sft": encode_sft, "dpo": encode_dpo, "kto": encode_kto, "reward": encode_reward, "prompt": encode_prompt}
