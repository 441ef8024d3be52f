"""Verifiers: does an answer pass the check that its row asks for? They score, and can reward.

A row names its verifier in the column "verifier"; "answer" holds what the verifier needs.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal

from alignment.errors import InputError, nearest

# A number as written: 12, -3, 1,234.50, .5, 2e6. A minus counts as a sign only where no word or number
# stands directly before it, so "3-4" holds 3 and 4.
NUMBER = re.compile(
    r"(?<![\w.])[-\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}\b)?|(?<!\w)[-\u2212]?\.\d+|\d+"
)


def exact(text: str, answer: str) -> float:
    """1.0 when the text is the answer; only white space is forgiven, case and punctuation count."""
    return float(squeeze(text) == squeeze(answer))


def number(text: str, answer: str) -> float:
    """1.0 when the last number in the text equals the last number in the answer (1,000.0 = 1000).

    Raises:
        InputError: the answer holds no number.
    """
    wanted = last_number(answer)
    if wanted is None:
        raise InputError(
            f"the verifier 'number' found no number in the answer {answer!r}",
            fix="verifier: exact or contains",
        )
    return float(last_number(text) == wanted)


def contains(text: str, answer: str) -> float:
    """1.0 when the answer's words stand in the text, in this order and as whole words; case is ignored."""
    wanted = squeeze(answer).casefold()
    if not wanted:
        raise InputError("the verifier 'contains' has an empty answer", why="every text contains it")
    pattern = r"(?<!\w)" + re.escape(wanted) + r"(?!\w)"
    return float(re.search(pattern, squeeze(text).casefold()) is not None)


def regex(text: str, answer: str) -> float:
    """1.0 when the pattern in `answer` matches somewhere in the text (`re.search`; anchor it with ^ and $).

    Raises:
        InputError: the pattern is no regular expression.
    """
    try:
        return float(re.search(answer, text) is not None)
    except re.error as error:
        raise InputError(f"the verifier 'regex' cannot read the pattern {answer!r}: {error}") from error


VERIFIERS: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "number": number,
    "contains": contains,
    "regex": regex,
}


def verifier(name: str, *, where: str = "") -> Callable[[str, str], float]:
    """Return the verifier of this name: a function (text, answer) -> score from 0.0 to 1.0.

    Raises:
        InputError: there is none, with the nearest name.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    near = nearest(str(name), list(VERIFIERS))
    raise InputError(
        f"unknown verifier {name!r}",
        where=where,
        why="it decides which answers count as right",
        fix=(f"did you mean {near}? " if near else "") + f"there are {', '.join(VERIFIERS)}",
    )


def verify(completions: Sequence[str | list[dict]], verifiers: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return the score of each completion by the verifier that its row names.

    Args:
        completions: texts, or lists of turns whose last one is looked at.
        verifiers: the column "verifier". answers: the column "answer", what the verifier needs.

    Raises:
        InputError: there is no such verifier, or it cannot use the answer.
    """
    triples = zip(completions, verifiers, answers, strict=True)
    return [verifier(name)(last_text(text).strip(), answer) for text, name, answer in triples]


def last_text(said: str | list[dict]) -> str:
    """Return the text of a prompt or an answer: itself, or that of its last turn."""
    return said if isinstance(said, str) else (said[-1].get("content") or "") if said else ""


def squeeze(text: str) -> str:
    """Return the text with every run of white space as one blank, none at the ends, in Unicode's NFC form."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def last_number(text: str) -> Decimal | None:
    """Return the last number written in the text, or None."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None
