"""Check a written value against a field's annotation: the same rules for a flag, a YAML file and DEFAULTS."""

import json
import math
import types
import typing
from enum import Enum
from typing import Any, Literal

from alignment.errors import InputError, nearest

TRUE, FALSE = {"true", "yes", "y", "t", "1", "on"}, {"false", "no", "n", "f", "0", "off"}
# Fields for which the word "none" is a value of its own and not Python's None.
KEEP_NONE_WORD = {"report_to", "peft"}


def members(hint: Any) -> list[Any]:
    """Return the alternatives of an annotation: `int | None` -> [int, NoneType]."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return list(typing.get_args(hint))
    return [hint]


def plain(hint: Any) -> Any:
    """Return the bare type of one alternative: `list[str]` -> list."""
    return typing.get_origin(hint) or hint


def accepts(hint: Any, kind: type) -> bool:
    """Say whether one alternative of `hint` is `kind` itself (bool is not an int here)."""
    return any(plain(m) is kind for m in members(hint))


def coerce(name: str, value: Any, hint: Any, where: str, choices: list | None = None) -> Any:
    """Turn `value` into what the annotation asks for.

    Args:
        name: the field's name.
        value: text from the command line, or what YAML or Python gave.
        hint: the resolved annotation.
        where: the place, for the message.
        choices: allowed values, when the field names them.

    Raises:
        InputError: the value cannot be read as any alternative of the annotation.
    """
    alternatives = members(hint)
    optional = type(None) in alternatives
    if any(named_choices(a) for a in alternatives):  # `SchedulerType | str` means the text of one of its values
        alternatives = [a for a in alternatives if a is not str]
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and optional):
        if name in KEEP_NONE_WORD:
            return "none"
        if optional:
            return None
    one_word = isinstance(value, str) and str in alternatives and not value.lstrip().startswith("[")
    for alternative in sorted((a for a in alternatives if a is not type(None)), key=specific):
        if one_word and plain(alternative) is list:
            continue  # "all-linear" is not ["all-linear"] where both are allowed
        if alternative is bool and one_word and value.lower() not in ("true", "false"):
            continue  # nor is the word "no" the value false
        done, result = read_as(name, value, alternative, where)
        if done:
            if choices and result is not None and result not in choices:
                raise refused(name, value, where, list(choices))
            return result
    allowed = [c for a in alternatives for c in named_choices(a)]
    if allowed and isinstance(value, str):
        raise refused(name, value, where, allowed)
    wanted = " or ".join(spoken(a) for a in alternatives if a is not type(None))
    raise InputError(
        f"{name} is {value!r}, which is not {wanted}",
        where=where,
        fix=f"write {wanted}" + (" or none" * optional),
    )


def specific(hint: Any) -> int:
    """Order alternatives so that text, which accepts nearly everything, is tried last."""
    order = [dict, list, bool, int, float]
    return order.index(plain(hint)) if plain(hint) in order else (9 if hint is str else 7)


def named_choices(hint: Any) -> list:
    """Return the values a Literal or an Enum allows."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [e.value for e in hint]
    return []


def refused(name: str, value: Any, where: str, allowed: list) -> InputError:
    """Build the error for a value outside a closed list."""
    near = nearest(str(value), [str(a) for a in allowed])
    hint = f"did you mean {near}? " if near else ""
    return InputError(f"{name} is {value!r}", where=where, fix=f"{hint}it is one of {', '.join(map(str, allowed))}")


def read_as(name: str, value: Any, hint: Any, where: str) -> tuple[bool, Any]:
    """Try one alternative; return (did it fit, the value)."""
    kind = plain(hint)
    if kind is Any:
        return True, value
    if kind is dict:
        return read_dict(name, value, where)
    if kind is list:
        return read_list(name, value, hint, where)
    if kind is bool:
        return read_bool(value)
    if kind in (int, float):
        return read_number(value, kind)
    if kind is str:
        text = isinstance(value, str | int | float) and not isinstance(value, bool)
        return text, str(value)
    allowed = named_choices(hint)
    if value is False and "no" in allowed:  # YAML reads a bare `no` as false
        return True, "no"
    if isinstance(value, Enum):
        value = value.value
    return value in allowed if not isinstance(value, list | dict) else False, value


def read_dict(name: str, value: Any, where: str) -> tuple[bool, Any]:
    """Accept a mapping, or JSON text of one."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{name} is no valid JSON: {error}",
                where=where,
                fix=f"--{name} '{{\"key\": 1}}' with double quotes inside",
            ) from error
    return isinstance(value, dict), value


def read_list(name: str, value: Any, hint: Any, where: str) -> tuple[bool, Any]:
    """Accept a list or JSON text of one; one word alone is a list of one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return False, value
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, dict) or value is None:
        return False, value
    items = value if isinstance(value, list) else [value]
    element = (typing.get_args(hint) or (Any,))[0]
    return True, [coerce(name, item, element, where) for item in items]


def read_bool(value: Any) -> tuple[bool, Any]:
    """Accept true/false, yes/no, on/off, 1/0."""
    word = str(value).lower()
    return (isinstance(value, bool | int | str) and word in TRUE | FALSE), word in TRUE


def read_number(value: Any, kind: type) -> tuple[bool, Any]:
    """Accept a number or its text (YAML reads 1e-4 as text); an int must be whole."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False, value
    try:
        number = float(value)
    except ValueError:
        return False, value
    if kind is float:
        return not math.isnan(number), number
    if not number.is_integer():
        return False, value
    exact = isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("+-").isdigit())
    return True, int(value) if exact else int(number)


def spoken(hint: Any) -> str:
    """Name an alternative in words."""
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "a mapping",
        list: "a list",
    }
    allowed = named_choices(hint)
    if allowed:
        return "one of " + ", ".join(map(str, allowed))
    return words.get(plain(hint), str(hint))
