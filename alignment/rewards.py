"""Verifiers: does an answer pass the check that its row asks for? They score, and can reward.

A row names its verifier in the column "verifier"; "answer" holds what the verifier needs. `verify` applies them to a
batch; `stopped`, `repetitive` and `lengthy` are rewards of their own, for the list of `reward_funcs` of a trainer.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

from alignment.constraints import follows
from alignment.errors import InputError, nearest
from alignment.sandbox import code_in, judge
from alignment.text_metrics import gsm8k_equal, gsm8k_strict, token_f1

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


def form(text: str, answer: str) -> float:
    """1.0 when the whole text, white space at its ends aside, is matched by the pattern in `answer`.

    Raises:
        InputError: the pattern is no regular expression.
    """
    try:
        return float(re.fullmatch(answer, text.strip(), re.DOTALL) is not None)
    except re.error as error:
        raise InputError(f"the verifier 'format' cannot read the pattern {answer!r}: {error}") from error


def length(text: str, answer: str) -> float:
    """1.0 when the text has as many words as `answer` allows: "20" (at most), "5-20", "5-" (at least).

    Raises:
        InputError: `answer` is no such range.
    """
    found = re.fullmatch(r"\s*(?:(\d+)\s*(-))?\s*(\d+)?\s*", answer)
    if found is None or not answer.strip():
        raise InputError(
            f"the verifier 'length' cannot read the range {answer!r}",
            where="column answer",
            fix='a number of words: "20" for at most 20, "5-20", or "5-" for at least 5',
        )
    least, _, most = found.groups()
    words = len(text.split())
    return float(int(least or 0) <= words <= (float("inf") if most is None else int(most)))


def code(text: str, answer: str) -> float:
    """1.0 when the code in the text (its last fenced block, else all of it) passes the tests in `answer`.

    It runs in `alignment.sandbox`, which says what that keeps out and what it does not.

    Raises:
        InputError: the tests are no Python, or use nothing of the answer.
    """
    return float(judge(code_in(text), answer).passed)


def gsm8k(text: str, answer: str) -> float:
    """1.0 when the number behind "#### " is that of the reference solution: lm-eval's strict match of GSM8K."""
    return gsm8k_equal(gsm8k_strict(text), answer)


def ifeval(text: str, answer: str) -> float:
    """1.0 when the text follows every instruction in `answer`; `alignment.constraints.follows` says what it holds.

    Raises:
        InputError: an instruction that is not known, or other arguments than it takes.
    """
    return float(all(follows(text, answer)))


VERIFIERS: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "number": number,
    "contains": contains,
    "regex": regex,
    "format": form,
    "length": length,
    "code": code,
    "f1": token_f1,
    "gsm8k": gsm8k,
    "ifeval": ifeval,
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
        verifiers: the column "verifier".
        answers: the column "answer", what the verifier needs.

    Raises:
        InputError: there is no such verifier, or it cannot use the answer.
    """
    triples = list(zip(completions, verifiers, answers, strict=True))
    checks = {name: verifier(name) for name in dict.fromkeys(verifiers)}

    def score(triple: tuple) -> float:
        text, name, answer = triple
        return checks[name](last_text(text).strip(), answer)

    if "code" not in checks:
        return [score(triple) for triple in triples]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # each waits for a process of its own
        return list(pool.map(score, triples))


def stopped(completions: Sequence, ended: Sequence[bool], **columns: Any) -> list[float]:
    """Reward of 1.0 for an answer that stopped by itself, 0.0 for one that was cut off."""
    return [float(end) for end in ended]


def repetitive(completions: Sequence[str | list[dict]], **columns: Any) -> list[float]:
    """Reward from 0.0 (nothing is said twice) down to -1.0: see `repetition`."""
    return [-repetition(last_text(text)) for text in completions]


def lengthy(completions: Sequence[str | list[dict]], **columns: Any) -> list[float]:
    """Reward that falls by 0.01 a word: weigh it with --reward_weights."""
    return [-0.01 * len(last_text(text).split()) for text in completions]


def repetition(text: str, n: int = 3) -> float:
    """Return the share of runs of n words (of single words, where there are no more) that stood in the text before."""
    words = text.casefold().split()
    size = n if len(words) > n else 1
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def steps_of(said: str | list[dict]) -> list[str]:
    """Return the steps of an answer, its lines that are not empty: what a reward per step has one number for."""
    return [line for line in last_text(said).split("\n") if line.strip()]


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
