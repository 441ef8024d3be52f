"""The turns of a conversation, in whichever spelling they come."""

import json
from typing import Any

ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
TURN_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content")


def turn(message: Any) -> Any:
    """Return a turn as {role, content}, whichever of the two spellings it has; anything else unchanged."""
    if not isinstance(message, dict):
        return message
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(p.get("text", "")) for p in content)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": read_calls(content)}
    extra = {k: message[k] for k in TURN_KEYS if message.get(k)}
    return {"role": ROLE_NAMES.get(role, role) if isinstance(role, str) else role, "content": content} | extra


def read_calls(text: Any) -> list[dict] | None:
    """Return ShareGPT's function call as OpenAI-style tool calls, None when it is no JSON."""
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError:
        return None
    calls = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": call} for call in calls if isinstance(call, dict)] or None


def read_turns(value: Any, row: dict) -> Any:
    """Return a list of turns, with the row's own `system` column in front; what is no list stays as it is."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    messages = [turn(m) for m in value]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not (messages and roles_of(messages)[0] == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def roles_of(messages: list) -> list[Any]:
    """Return the roles of a list of turns."""
    return [m.get("role") if isinstance(m, dict) else None for m in messages]


def as_side(value: Any, role: str) -> Any:
    """Return a prompt or an answer: a list of turns, or text as it is; a single turn becomes a list."""
    if isinstance(value, dict):
        return [turn(value)]
    return [turn(m) for m in value] if isinstance(value, list) else value


def as_answer(value: Any, chat: bool) -> Any:
    """Return an answer as turns when the prompt is turns."""
    if chat and (isinstance(value, str) or value is None):
        return [{"role": "assistant", "content": value}]
    return as_side(value, "assistant")


def split_speakers(text: Any) -> Any:
    r"""Return hh-rlhf's text ("\n\nHuman: … \n\nAssistant: …") as turns; anything but text unchanged."""
    if not isinstance(text, str):
        return text
    messages: list[dict] = []
    for piece in text.split("\n\n"):
        for word, role in (("Human:", "user"), ("Assistant:", "assistant")):
            if piece.startswith(word):
                messages.append({"role": role, "content": piece[len(word) :].strip()})
                break
        else:
            if messages:
                messages[-1]["content"] = f"{messages[-1]['content']}\n\n{piece}"
            elif piece.strip():
                messages.append({"role": "user", "content": piece})
    return messages


def split_last(messages: Any) -> tuple[Any, Any]:
    """Split turns before the last assistant turn; (all, None) when there is none."""
    if isinstance(messages, list):
        last = max((i for i, r in enumerate(roles_of(messages)) if r == "assistant"), default=None)
        if last is not None:
            return messages[:last], messages[last : last + 1]
    return messages, None


def to_turns(value: Any, role: str) -> list:
    """Return turns for text; turns stay."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]
