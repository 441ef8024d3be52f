"""What can be wrong with one row, found before it costs anything."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from alignment.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")


class Problem(NamedTuple):
    """One thing wrong with a row.

    Attributes:
        column: where in the row, e.g. "messages[2]".
        what, why, fix: one clause each.
        cause: `what` without this row's particulars; problems are counted by it.
    """

    column: str
    what: str
    why: str
    fix: str
    cause: str

    def __str__(self) -> str:
        """Return column, what and fix in one line."""
        return f"{self.column}: {self.what}" + (f" ({self.fix})" if self.fix else "")


def problems(row: dict[str, Any], kind: str, alternate: bool = False) -> list[Problem]:
    """Return everything wrong with a converted row, an empty list when it can be trained on.

    Args:
        row: a row as `formats.convert` returns it.
        kind: "sft", "preference", "unpaired_preference" or "prompt".
        alternate: user and assistant must take turns (the chat template demands it).
    """
    checks = {
        "sft": check_sft,
        "preference": check_pair,
        "unpaired_preference": check_thumb,
        "prompt": check_prompt,
    }
    return list(checks[kind](row, alternate))


def check_sft(row: dict, alternate: bool) -> Iterator[Problem]:
    """Check a conversation, a prompt with its completion, or a text."""
    if "messages" in row:
        yield from check_messages("messages", row["messages"], alternate)
        if isinstance(row["messages"], list) and row["messages"] and "assistant" not in roles(row["messages"]):
            yield Problem(
                "messages",
                f"no assistant turn (roles: {', '.join(map(str, roles(row['messages'])))})",
                "there is nothing to learn from",
                "drop the row or add the answer",
                "no assistant turn",
            )
    elif "text" in row:
        yield from check_text("text", row["text"])
    else:
        yield from check_side("prompt", row.get("prompt"), alternate)
        yield from check_side("completion", row.get("completion"), alternate, answer=True)


def check_pair(row: dict, alternate: bool) -> Iterator[Problem]:
    """Check a prompt with two answers to it."""
    yield from check_side("prompt", row.get("prompt"), alternate)
    yield from check_side("chosen", row.get("chosen"), alternate, answer=True)
    yield from check_side("rejected", row.get("rejected"), alternate, answer=True)
    if row.get("chosen") and row.get("chosen") == row.get("rejected"):
        yield Problem(
            "chosen, rejected",
            "the same text in both",
            "the pair prefers nothing: its loss stays at ln 2",
            "drop the row",
            "chosen equals rejected",
        )


def check_thumb(row: dict, alternate: bool) -> Iterator[Problem]:
    """Check a prompt, an answer and whether it was liked."""
    yield from check_side("prompt", row.get("prompt"), alternate)
    yield from check_side("completion", row.get("completion"), alternate, answer=True)
    label = row.get("label")
    if isinstance(label, bool):
        return
    if isinstance(label, str):
        fix = f"write {label.lower()} without quotes" if label.lower() in ("true", "false") else "write true or false"
        yield Problem("label", f"the text {label!r}", "as text, 'false' counts as true", fix, "label is text")
    elif label is None:
        yield Problem("label", "no value", "the loss needs it", "write true or false", "label missing")
    else:
        yield Problem("label", f"{label!r}, neither true nor false", "", "write true or false", "label is no bool")


def check_prompt(row: dict, alternate: bool) -> Iterator[Problem]:
    """Check a prompt that the model will answer itself."""
    yield from check_side("prompt", row.get("prompt"), alternate)


def check_side(column: str, value: Any, alternate: bool, answer: bool = False) -> Iterator[Problem]:
    """Check a prompt or an answer: text, or turns that end with the user's (prompt) or hold the answer."""
    if not isinstance(value, list):
        yield from check_text(column, value)
        return
    yield from check_messages(column, value, alternate)
    if not value:
        return
    if answer and roles(value)[0] != "assistant":
        what = f"begins with a {roles(value)[0]} turn"
        yield Problem(
            column,
            what,
            "an answer is the assistant's",
            "put the history into prompt",
            "answer is not the assistant's",
        )
    if not answer and roles(value)[-1] not in ("user", "tool"):
        what = f"ends with a {roles(value)[-1]} turn"
        yield Problem(
            column,
            what,
            "the model answers the user's last turn",
            "end with the user",
            "prompt does not end with the user",
        )


def roles(messages: list) -> list[Any]:
    """Return the role of each message, None where there is none."""
    return [m.get("role") if isinstance(m, dict) else None for m in messages]


def check_text(column: str, value: Any) -> Iterator[Problem]:
    """Check that a value is text with something in it."""
    if value is None:
        yield Problem(column, "no value", "the row is incomplete", "fill it in or drop the row", f"{column} missing")
    elif not isinstance(value, str):
        what = f"a {type(value).__name__} ({str(value)[:40]!r}), not text"
        yield Problem(column, what, "only text can be tokenised", "write it as text", f"{column} is no text")
    elif not value.strip():
        yield Problem(column, "empty" if not value else "only white space", "", "drop the row", f"{column} empty")


def check_messages(column: str, messages: Any, alternate: bool) -> Iterator[Problem]:
    """Check each turn, and the order of the turns where `alternate` asks for it."""
    if not isinstance(messages, list) or not messages:
        what = {type(None): "no value", list: "an empty list"}.get(type(messages), f"a {type(messages).__name__}")
        why = "chosen and rejected share no beginning, or nothing was asked" if column == "prompt" else ""
        fix = "a list of {role, content}"
        yield Problem(column, f"{what}, not a list of turns", why, fix, f"{column}: no turns")
        return
    for index, message in enumerate(messages):
        yield from check_turn(f"{column}[{index}]", message)
    spoken = [r for r in roles(messages) if r not in ("system", "developer", "tool")]
    doubled = [r for r, following in zip(spoken, spoken[1:], strict=False) if r == following]
    if alternate and doubled and "tool" not in roles(messages):
        yield Problem(
            column,
            f"two {doubled[0]} turns in a row",
            "the chat template forbids it",
            "join the two turns into one",
            f"two {doubled[0]} turns in a row",
        )


def check_turn(column: str, message: Any) -> Iterator[Problem]:
    """Check one turn: a known role and text in it."""
    if not isinstance(message, dict):
        what = f"a {type(message).__name__}, not a turn"
        yield Problem(column, what, "", "write {role, content}", "turn is no mapping")
        return
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        near = nearest(str(role), list(ROLES))
        why = "the chat template knows no such speaker"
        fix = f"did you mean {near}?" if near else f"one of {', '.join(ROLES)}"
        yield Problem(f"{column}.role", f"unknown role {role!r}", why, fix, "unknown role")
    if message.get("tool_calls") and not content:
        return
    if isinstance(content, list):
        kinds = sorted({str(p.get("type")) if isinstance(p, dict) else type(p).__name__ for p in content} - {"text"})
        what = f"parts of type {', '.join(kinds) or 'none'}"
        yield Problem(
            f"{column}.content",
            what,
            "only text can be trained on here",
            "drop the row",
            "content is not only text",
        )
    elif not isinstance(content, str):
        what = "no value" if content is None else f"a {type(content).__name__} ({str(content)[:40]!r}), not text"
        yield Problem(f"{column}.content", what, "only text can be tokenised", "write it as text", "content is no text")
    elif not content.strip() and role in ("user", "assistant"):
        why = "the model would learn to say nothing" if role == "assistant" else "there is nothing to answer"
        yield Problem(f"{column}.content", f"empty {role} turn", why, "drop the row", f"empty {role} turn")
