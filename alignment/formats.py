"""The row formats people have, recognised by their columns and turned into the rows that trainers want.

`recognise` looks at the columns of a source once; the `Format` it returns reads every row. What is wrong
inside a row is not this module's business: `problems` says it about the converted row.
"""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alignment.errors import InputError, nearest
from alignment.labelled import CHECKS, LABELLED, LABELS, NEEDED_LABELLED, SINGLES, labelled_columns
from alignment.rows import Problem
from alignment.rows import problems as problems_of_answers
from alignment.turns import (
    as_answer,
    as_side,
    read_turns,
    roles_of,
    split_last,
    split_speakers,
    to_turns,
    turn,
)

__all__ = [
    "Format",
    "Problem",
    "convert",
    "core_columns",
    "is_chat",
    "problems",
    "recognise",
    "to_chat",
    "unpair",
]

CONVERSATIONS = ("messages", "conversations", "conversation")
# (question columns, answer columns): the names prompt and completion go by; the first that is there is meant.
PROMPTS = ("prompt", "question", "instruction", "query", "problem")
ANSWERS = ("completion", "response", "answer", "output", "solution")
KEPT = ("tools", "task", "margin", "chat_template_kwargs")
CORE = {
    "sft": ("messages", "prompt", "completion", "text"),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired_preference": ("prompt", "completion", "label"),
    "prompt": ("prompt",),
} | LABELLED
# What of these a row cannot do without: one of the sets.
NEEDED = {
    "sft": ({"messages"}, {"prompt", "completion"}, {"text"}),
    "preference": ({"chosen", "rejected"},),
    "unpaired_preference": ({"prompt", "completion", "label"},),
    "prompt": ({"prompt"},),
} | NEEDED_LABELLED
# Names that TRL gives a meaning to: they never ride along as a spare column.
MEANT_BY_TRL = {"messages", "prompt", "completion", "chosen", "rejected", "text", "label", "images", "image"}
RECIPE = {
    "pair": "recipes/dpo.py or recipes/reward.py train on them",
    "thumb": "recipes/kto.py trains on them",
    "chat": "recipes/sft.py trains on them",
    "answer": "recipes/sft.py trains on them",
    "text": "recipes/sft.py trains on them",
    "prompt": "a recipe that generates its own answers trains on them",
    "labelled": "recipes/classify.py trains on them",
}
WANTS = {
    "sft": "messages; or prompt and completion; or instruction and output; or text",
    "preference": "prompt, chosen and rejected",
    "unpaired_preference": "prompt, completion and label (or messages and label)",
    "prompt": "prompt (or messages, or question)",
    "sequence": "text and label; or sentence1, sentence2 and label",
    "token": "tokens and tags",
    "span": "question, context and answers",
}
# The shapes that can become the rows of a kind.
FITS = {
    "sft": ("chat", "answer", "text"),
    "preference": ("pair",),
    "unpaired_preference": ("thumb", "pair"),
    "prompt": ("prompt", "pair", "thumb", "answer", "chat"),
} | dict.fromkeys(LABELLED, ("labelled",))


@dataclass(frozen=True)
class Format:
    """How the rows of one source are read.

    Attributes:
        name: in words, for the note.
        shape: "chat", "answer" (prompt and completion), "pair", "thumb", "text" or "prompt".
        columns: the columns it uses.
        read: turns a raw row into {messages} / {prompt, completion} / {prompt, chosen, rejected} /
            {prompt, completion, label} / {text} / {prompt}.
    """

    name: str
    shape: str
    columns: tuple[str, ...]
    read: Callable[[dict], dict]


def recognise(columns: list[str], samples: list[dict], kind: str) -> Format | None:
    """Return the format with these columns, or None when there is none.

    Args:
        columns: the names in the rows, any order.
        samples: a few rows; they decide between text and lists of messages.
        kind: what the rows are wanted for; with "prompt", a column `prompt` is enough.
    """
    if kind in LABELLED:
        return labelled_format(columns, kind)
    form = by_columns(columns, samples, kind)
    if form is None or form.shape in FITS[kind]:
        return form
    # prompt, choosen, rejected: a name that is misspelt, and no rows for another recipe
    absent = [name for name in CORE[kind] if name not in columns]
    spare = [name for name in columns if name not in form.columns]
    return None if any(difflib.get_close_matches(name, absent, cutoff=0.75) for name in spare) else form


def labelled_format(columns: list[str], kind: str) -> Format | None:
    """Return the format of rows with labels, or None where a column is missing."""
    names = labelled_columns(columns, kind)
    if names is None:
        return None
    words = {"sequence": "labelled pairs" if "text_pair" in names else "labelled texts", "token": "tagged words"}
    return Format(
        words.get(kind, "questions on texts"),
        "labelled",
        tuple(names.values()),
        lambda r: {ours: r.get(theirs) for ours, theirs in names.items()},
    )


def problems(row: dict[str, Any], kind: str, alternate: bool = False) -> list[Problem]:
    """Return everything wrong with a converted row of any kind, an empty list when it can be trained on."""
    return list(CHECKS[kind](row, alternate)) if kind in CHECKS else problems_of_answers(row, kind, alternate)


def by_columns(columns: list[str], samples: list[dict], kind: str) -> Format | None:
    """Return the first format that finds its columns, whatever the rows are wanted for."""
    have = set(columns)
    turns = next((c for c in CONVERSATIONS if c in have), "")
    question = next((c for c in PROMPTS if c in have), "")
    answer = next((c for c in ANSWERS if c in have), "")
    if {"chosen", "rejected"} <= have:
        return pair_format(have, samples, turns, question)
    if "label" in have and turns:
        return Format(
            "thumbs up or down on conversations",
            "thumb",
            (turns, "label"),
            lambda r: read_thumb_chat(r, turns),
        )
    if "label" in have and question and answer:
        columns = (question, answer, "label")
        return Format("thumbs up or down", "thumb", columns, lambda r: read_thumb(r, question, answer))
    if turns:
        style = "messages" if turns == "messages" else "ShareGPT conversations"
        return Format(style, "chat", pick(have, turns, "system"), lambda r: {"messages": read_turns(r.get(turns), r)})
    if kind == "prompt" and "prompt" in have and "completion" not in have:
        return Format("prompts", "prompt", ("prompt",), lambda r: {"prompt": as_side(r.get("prompt"), "user")})
    if question == "instruction" and answer:
        used = pick(have, "instruction", "input", "context", answer, "system", "history")
        return Format("Alpaca rows", "chat", used, lambda r: {"messages": read_alpaca(r, answer)})
    if question and answer:
        return answer_format(have, question, answer)
    if "text" in have:
        return Format("plain text", "text", ("text",), lambda r: {"text": r.get("text")})
    if question:
        return Format("prompts", "prompt", (question,), lambda r: {"prompt": as_side(r.get(question), "user")})
    return None


def pick(have: set[str], *names: str) -> tuple[str, ...]:
    """Return those of `names` that are there, in their order."""
    return tuple(n for n in names if n in have)


def answer_format(have: set[str], question: str, answer: str) -> Format:
    """Return the format of rows with a question and its answer in two columns."""
    if question == "prompt":
        return Format("prompts and completions", "answer", (question, answer), lambda r: read_answer(r, answer))
    used = pick(have, question, answer, "system")
    return Format("questions and answers", "chat", used, lambda r: {"messages": read_question(r, question, answer)})


def pair_format(have: set[str], samples: list[dict], turns: str, question: str) -> Format | None:
    """Return the format of rows with a chosen and a rejected answer, wherever the prompt is."""
    first = next((r["chosen"] for r in samples if r.get("chosen")), None)
    whole = isinstance(first, list) and first and turn(first[0]).get("role") != "assistant"
    marked = isinstance(first, str) and "\n\nHuman:" in first and "\n\nAssistant:" in first
    both = ("chosen", "rejected")
    if whole or marked:
        words = "preference pairs with the prompt inside" + (" (Human: … Assistant: …)" if marked else "")
        return Format(words, "pair", both, read_shared_prefix)
    if turns:
        return Format("preference pairs on conversations", "pair", (turns, *both), lambda r: read_pair_chat(r, turns))
    if question == "instruction":
        used = (*pick(have, "instruction", "input", "context", "system", "history"), *both)
        return Format("preference pairs on Alpaca instructions", "pair", used, read_pair_alpaca)
    if question:
        return Format(
            "preference pairs",
            "pair",
            (*pick(have, question, "system"), *both),
            lambda r: read_pair(r, question),
        )
    return None


def read_answer(row: dict, answer: str) -> dict:
    """Return prompt and completion; when one of them is turns, both are."""
    prompt, completion = as_side(row.get("prompt"), "user"), as_side(row.get(answer), "assistant")
    if isinstance(prompt, list) or isinstance(completion, list):
        prompt, completion = to_turns(prompt, "user"), to_turns(completion, "assistant")
    return {"prompt": prompt, "completion": completion}


def read_question(row: dict, question: str, answer: str) -> list[dict]:
    """Return question and answer as two turns."""
    pair = [{"role": "user", "content": row.get(question)}, {"role": "assistant", "content": row.get(answer)}]
    return read_turns(pair, row)


def read_alpaca(row: dict, answer: str) -> list[dict]:
    """Return an Alpaca row as turns: system, history, instruction with its input, output."""
    text = row.get("instruction")
    given = row.get("input") or row.get("context")
    if isinstance(text, str) and isinstance(given, str) and given.strip():
        text = f"{text}\n\n{given}"
    messages = []
    for exchange in row.get("history") or []:
        said = exchange if isinstance(exchange, list) and len(exchange) == 2 else [exchange, None]
        messages += [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
    messages.append({"role": "user", "content": text})
    if answer:
        messages.append({"role": "assistant", "content": row.get(answer)})
    return read_turns(messages, row)


def read_pair(row: dict, question: str) -> dict:
    """Return prompt, chosen and rejected from three columns, as turns when one of them is turns."""
    prompt, sides = row.get(question), [row.get("chosen"), row.get("rejected")]
    system = row.get("system")
    chat = any(isinstance(v, list | dict) for v in (prompt, *sides)) or bool(isinstance(system, str) and system.strip())
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = read_turns(prompt, row) if chat else prompt
    return {"prompt": prompt, "chosen": as_answer(sides[0], chat), "rejected": as_answer(sides[1], chat)}


def read_pair_chat(row: dict, turns: str) -> dict:
    """Return a pair whose prompt is a conversation."""
    sides = {k: as_answer(row.get(k), True) for k in ("chosen", "rejected")}
    return {"prompt": read_turns(row.get(turns), row)} | sides


def read_pair_alpaca(row: dict) -> dict:
    """Return a pair whose prompt is an Alpaca instruction."""
    return {"prompt": read_alpaca(row, "")} | {k: as_answer(row.get(k), True) for k in ("chosen", "rejected")}


def read_shared_prefix(row: dict) -> dict:
    """Return a pair from two whole conversations: what they share is the prompt."""
    sides = [read_turns(split_speakers(row.get(k)), row) for k in ("chosen", "rejected")]
    if not all(isinstance(side, list) for side in sides):
        return {"prompt": [], "chosen": sides[0], "rejected": sides[1]}
    shared = 0
    for one, other in zip(*sides, strict=False):
        if one != other:
            break
        shared += 1
    while shared and roles_of(sides[0])[shared - 1] == "assistant" and shared in (len(sides[0]), len(sides[1])):
        shared -= 1  # one is the beginning of the other, or both are equal: the last answer still is an answer
    return {"prompt": sides[0][:shared], "chosen": sides[0][shared:], "rejected": sides[1][shared:]}


def as_label(value: Any) -> Any:
    """Return 0 and 1 as false and true; anything else unchanged."""
    return bool(value) if isinstance(value, int) and value in (0, 1) else value


def read_thumb(row: dict, question: str, answer: str) -> dict:
    """Return prompt, completion and label from three columns."""
    pair = read_pair({**row, "chosen": row.get(answer), "rejected": row.get(answer)}, question)
    return {"prompt": pair["prompt"], "completion": pair["chosen"], "label": as_label(row.get("label"))}


def read_thumb_chat(row: dict, turns: str) -> dict:
    """Return a rated conversation: its last assistant turn is the completion."""
    messages = read_turns(row.get(turns), row)
    prompt, answer = split_last(messages)
    return {"prompt": prompt, "completion": answer, "label": as_label(row.get("label"))}


def convert(row: dict, form: Format, kind: str) -> dict:
    """Return a raw row as the row of `kind`, with the columns that ride along.

    Raises:
        InputError: rows of this shape cannot be used for this kind (the same for every row of the source).
    """
    core = reshape(form.read(row), form, kind)
    spare = {k: v for k, v in row.items() if k not in form.columns and k not in MEANT_BY_TRL and k not in core}
    if isinstance(spare.get("tools"), list):
        spare["tools"] = json.dumps(spare["tools"], ensure_ascii=False)
    return core | spare


def reshape(core: dict, form: Format, kind: str) -> dict:
    """Turn one shape into the row of a kind, where that makes sense."""
    shape = form.shape
    if shape not in FITS[kind]:
        raise InputError(
            f"{form.name} cannot be used here",
            why=f"this recipe wants {WANTS[kind]}",
            fix=RECIPE[shape],
        )
    if kind == "sft":
        joined = shape == "answer" and is_chat(core)
        return {"messages": core["prompt"] + core["completion"]} if joined else core
    return prompt_only(core, shape) if kind == "prompt" else core


def prompt_only(core: dict, shape: str) -> dict:
    """Keep the prompt; an answer becomes the column `answer`, which a verifier or a benchmark may read."""
    if shape == "chat":
        prompt, answer = split_last(core["messages"])
        return {"prompt": prompt} | ({"answer": answer[0]["content"]} if answer else {})
    if shape == "answer":
        answer = core["completion"]
        return {
            "prompt": core["prompt"],
            "answer": answer[-1]["content"] if isinstance(answer, list) and answer else answer,
        }
    return {"prompt": core["prompt"]}


def is_chat(row: dict) -> bool:
    """Say whether a converted row is made of turns and not of text."""
    return any(isinstance(row.get(k), list) for k in ("messages", "prompt", "chosen", "completion"))


def to_chat(row: dict) -> dict:
    """Return a converted row of text as one of turns (plain `text` stays: nobody knows who speaks)."""
    if is_chat(row) or "prompt" not in row:
        return row
    sides = {k: to_turns(row[k], "assistant") for k in ("completion", "chosen", "rejected") if k in row}
    prompt = to_turns(row["prompt"], "user")
    if "completion" in row and "label" not in row:
        rest = {k: v for k, v in row.items() if k not in ("prompt", "completion")}
        return rest | {"messages": prompt + sides["completion"]}
    return row | {"prompt": prompt} | sides


def unpair(row: dict) -> list[dict]:
    """Return a preference pair as two rows with a thumb."""
    rest = {k: v for k, v in row.items() if k not in ("chosen", "rejected")}
    return [
        rest | {"completion": row["chosen"], "label": True},
        rest | {"completion": row["rejected"], "label": False},
    ]


def core_columns(kind: str) -> set[str]:
    """Return the columns a dataset of this kind may have; for "prompt" all others stay too."""
    return {*CORE[kind], *KEPT}


def missing_labelled(columns: list[str]) -> str:
    """Return "theirs: ours" for the text or the label that these columns do not have under a known name."""
    text = next((name for name in SINGLES if name in columns), None)
    label = next((name for name in LABELS if name in columns), None)
    rest = [name for name in columns if name not in (text, label)]
    known = rest[0] if len(rest) == 1 else None
    pairs = {"text": (text, known or "YOUR_TEXT"), "label": (label, known or "YOUR_LABELS")}
    return ", ".join(f"{guess}: {ours}" for ours, (there, guess) in pairs.items() if not there)


def unknown_columns(columns: list[str], kind: str, where: str) -> InputError:
    """Build the error for columns that fit no format: what there is, the nearest name, the fix."""
    wanted = [*CORE[kind], *(CONVERSATIONS if kind != "preference" else ()), *PROMPTS]
    if kind in LABELLED:
        wanted = [*CORE[kind], *((*SINGLES, *LABELS, "sentence1", "sentence2") if kind == "sequence" else ())]
    close = {ours: theirs for theirs in columns if theirs not in wanted and (ours := nearest(theirs, wanted))}
    names = ", ".join(f"{theirs}: {ours}" for ours, theirs in close.items() if ours not in columns)
    if kind == "sequence":
        names = missing_labelled(columns)
    fix = f"declare them in a yaml of yours: sources: [{{path: …, columns: {{{names or 'theirs: ours'}}}}}]"
    return InputError(
        f"the columns ({', '.join(columns)}) are of no format that is known",
        where=where,
        why=f"this recipe wants {WANTS[kind]}",
        fix=f"{fix}; or edit the row function of the recipe",
    )
