"""Instructions that a program can check, under the names and with the arguments of IFEval (Zhou et al. 2023).

Each check does what `check_following` of the same name does in lm-eval 0.4.13 (tasks/ifeval/instructions.py). Left out
are those that need a language detector, a sentence splitter or the wording of the prompt.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from alignment.errors import InputError, nearest

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "less than": lambda found, wanted: found < wanted,
    "at least": lambda found, wanted: found >= wanted,
}


def _compare(found: int, relation: str, wanted: int) -> bool:
    if relation not in RELATIONS:
        raise InputError(f"the relation {relation!r} is none of {', '.join(RELATIONS)}", where="column kwargs")
    return RELATIONS[relation](found, wanted)


def _keywords(text: str, keywords: list[str]) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(keyword, text, re.IGNORECASE)), relation, frequency)


def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(Counter(text.lower())[letter.lower()], let_relation, let_frequency)


def _words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    if not all(part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == num_paragraphs


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _bullets(text: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def _json(text: str) -> bool:
    text = text.strip()
    for opening in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(opening)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def _title(text: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CONSTRAINTS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "length_constraints:number_words": _words,
    "length_constraints:number_paragraphs": _paragraphs,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "change_case:english_lowercase": lambda text: text.islower(),  # IFEval asks a detector for the language as well
    "change_case:english_capital": lambda text: text.isupper(),
    "punctuation:no_comma": lambda text: "," not in text,
    "startend:end_checker": _end,
    "startend:quotation": _quoted,
}


def follows(text: str, answer: str) -> list[bool]:
    """Say of each instruction whether the text follows it; an empty text follows none.

    Args:
        text: the answer.
        answer: JSON: {"instruction_id_list": [names], "kwargs": [the arguments of each; null counts as not given]}.

    Raises:
        InputError: it is no such JSON, there is no such instruction, or its arguments are others.
    """
    return [bool(text.strip()) and bool(check(text, **kwargs)) for check, kwargs in read_constraints(answer)]


def read_constraints(answer: str) -> list[tuple[Callable[..., bool], dict[str, Any]]]:
    """Return (check, its arguments) of each instruction; see `follows`."""
    try:
        asked = json.loads(answer)
        names, kwargs = asked["instruction_id_list"], asked["kwargs"]
        pairs = list(zip(names, [{k: v for k, v in (one or {}).items() if v} for one in kwargs], strict=True))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the verifier 'ifeval' cannot read {answer[:80]!r}",
            where="columns instruction_id_list and kwargs",
            fix='{"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}',
        ) from error
    for name, given in pairs:
        if name not in CONSTRAINTS:
            near = nearest(str(name), list(CONSTRAINTS))
            raise InputError(
                f"unknown instruction {name!r}",
                where="column instruction_id_list",
                fix=(f"did you mean {near}? " if near else "") + f"there are {', '.join(CONSTRAINTS)}",
            )
        wanted = CONSTRAINTS[name].__code__.co_varnames[1 : CONSTRAINTS[name].__code__.co_argcount]
        if set(given) != set(wanted):
            raise InputError(
                f"{name} has the arguments {', '.join(given) or 'none'}",
                where="column kwargs",
                fix=f"it takes {', '.join(wanted) or 'none'}",
            )
    return [(CONSTRAINTS[name], given) for name, given in pairs]
