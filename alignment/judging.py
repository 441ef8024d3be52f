"""Which of two answers is better? A reward model or a language model decides; order and length are looked at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from alignment.errors import InputError
from alignment.likelihood import Window, log_likelihoods, room_for_text
from alignment.templates import ChatEncoder

RESAMPLES = 500
RIDGE = 0.01  # keeps the regression finite when one side always wins
FEWEST = 0.05  # share of rows on the less frequent side of equal length that a comparison needs
PLACES = ("{question}", "{first}", "{second}")
PROMPT = """Which of two answers to a question is better? Judge whether it is correct and helpful, not its length.

[Question]
{question}

[Answer A]
{first}

[Answer B]
{second}

Reply with the letter of the better answer, A or B."""


@dataclass(frozen=True)
class Contest:
    """Two answers to one prompt: the baseline's and the candidate's. `prompt` is a list of turns."""

    prompt: list[dict[str, Any]]
    baseline: str
    candidate: str


def judge_by_reward(reward: Any, contests: Sequence[Contest], margin: float) -> list[dict[str, Any]]:
    """Return the verdicts of a reward model: the answer with the higher score wins, within `margin` it is a tie.

    Args:
        reward: an `alignment.rewarding.RewardModel`.
        contests: what to judge.
        margin: scores that differ by this or less tie.

    Returns:
        per contest "score" (1 the candidate wins, 0.5 tie, 0 it loses) and "margin", candidate minus baseline.
    """
    prompts = [contest.prompt for contest in contests]
    theirs = reward(prompts, [contest.baseline for contest in contests])
    mine = reward(prompts, [contest.candidate for contest in contests])
    return [
        {"score": 0.5 if abs(b - a) <= margin else float(b > a), "margin": b - a}
        for a, b in zip(theirs, mine, strict=True)
    ]


def read_judge_prompt(path: str | None) -> str:
    """Return the wording of the judge's question, our own or that of a text file.

    Raises:
        InputError: it cannot be read, or lacks a place for the question or an answer.
    """
    if path is None:
        return PROMPT
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", where="--judge_prompt") from error
    missing = [place for place in PLACES if place not in text]
    if missing:
        raise InputError(
            f"the judge's prompt has no {missing[0]}",
            where=f"{path}, --judge_prompt",
            why="the judge has to see the question and both answers",
            fix=f"a text with {', '.join(PLACES)} that asks for the letter A or B",
        )
    return text


def judge_by_model(
    model: Any, tokenizer: Any, contests: Sequence[Contest], prompt: str = PROMPT, batch_size: int = 16
) -> list[dict[str, Any]]:
    """Return the verdicts of a language model that reads both answers, each pair in both orders.

    It says A or B: the letter it finds more likely as its answer. A verdict that changes with the order is a tie.

    Args:
        model: the judge, a causal model.
        tokenizer: its tokenizer. With a chat template the question is a user's turn.
        contests: what to judge.
        prompt: with {question}, {first} and {second}.
        batch_size: changes the speed only.

    Returns:
        per contest "score" (1 the candidate wins, 0.5 tie, 0 it loses), "margin" (the mean over both orders of
        log p(candidate's letter) - log p(baseline's)), "flipped", and "first" (how often of 2 the first one won).

    Raises:
        InputError: question and answers exceed the judge's positions.
    """
    encoder = ChatEncoder(tokenizer, model.generation_config)
    room, windows = room_for_text(model), []
    for number, contest in enumerate(contests, start=1):
        question = "\n\n".join(turn["content"] for turn in contest.prompt)
        for first, second in ((contest.baseline, contest.candidate), (contest.candidate, contest.baseline)):
            asked = fill(prompt, (question, first, second))
            for ids in ask_for_letter(encoder, asked):
                windows.append(ids)
                if room and len(ids.ids) > room:
                    raise InputError(
                        f"question and answers have {len(ids.ids):,} tokens, and the judge knows {room:,} positions",
                        where=f"contest {number}",
                        why="beyond them its verdict means nothing",
                        fix="a judge with a longer context, or shorter answers",
                    )
    found = log_likelihoods(model, windows, tokenizer.pad_token_id, batch_size)
    return [verdict(*found[at : at + 4]) for at in range(0, len(found), 4)]


def fill(prompt: str, values: tuple[str, ...]) -> str:
    """Return the prompt with the values in their places; what a value says is not read as a place."""
    parts, rest = [], prompt
    while places := [(rest.find(place), place) for place in PLACES if place in rest]:
        at, place = min(places)
        parts += [rest[:at], values[PLACES.index(place)]]
        rest = rest[at + len(place) :]
    return "".join([*parts, rest])


def ask_for_letter(encoder: ChatEncoder, asked: str) -> list[Window]:
    """Return the windows that score the letters A and B as the judge's answer."""
    if encoder.tokenizer.chat_template:
        start, letters = encoder.encode_prompt([{"role": "user", "content": asked}]), ("A", "B")
    else:
        start, letters = encoder.encode_text(asked + "\n\nThe better answer is"), (" A", " B")
    return [Window(start + encoder.encode_text(letter, bos=False), len(start)) for letter in letters]


def verdict(a_first: float, b_first: float, a_second: float, b_second: float) -> dict[str, Any]:
    """Return the verdict from log p("A") and log p("B"): first with the baseline as A, then with the candidate as A."""
    one, two = b_first - a_first, a_second - b_second  # above 0: the candidate is preferred
    firsts = (one < 0) + (two > 0)
    score = 1.0 if one > 0 and two > 0 else 0.0 if one < 0 and two < 0 else 0.5
    return {"score": score, "margin": (one + two) / 2, "flipped": float(one * two < 0), "first": float(firsts)}


def wilson(scores: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's (1927) score interval of a mean of 0, 0.5 and 1; a tie counts as half a win."""
    n, p, z = len(scores), float(np.mean(scores)), float(stats.norm.ppf(0.5 + confidence / 2))
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def controlled_win_rate(scores: Sequence[float], differences: Sequence[float], seed: int = 0) -> dict[str, Any] | None:
    """Return the win rate at equal lengths as a metric, with a bootstrap standard error over the rows.

    None when fewer than one in twenty answers are as long as the baseline's or on the other side of it: then there is
    nothing to compare, and the regression would only extrapolate.

    A logistic regression of the verdict on tanh(difference / its standard deviation), read at difference 0: the
    length term of AlpacaEval 2's length-controlled win rate (Dubois et al. 2024). Left out are its term for how hard
    an instruction is, fitted on many models, and its cross-validated penalty: ours is a ridge of 0.01.

    Args:
        scores: 1, 0.5 or 0 per row.
        differences: length of the candidate's answer minus the baseline's.
        seed: of the bootstrap.
    """
    y, gap = np.asarray(scores, float), np.asarray(differences, float)
    if min((gap <= 0).mean(), (gap >= 0).mean()) < FEWEST:
        return None
    spread = gap.std()
    x = np.tanh(gap / spread) if spread else np.zeros_like(gap)
    rng = np.random.default_rng(seed)
    drawn = [intercept(y[rows], x[rows]) for rows in rng.integers(0, len(y), (RESAMPLES if len(y) > 1 else 0, len(y)))]
    stderr = float(np.std(drawn, ddof=1)) if drawn else None
    return {"value": intercept(y, x), "stderr": stderr, "n": len(y), "unit": "share"}


def intercept(y: np.ndarray, x: np.ndarray) -> float:
    """Return sigmoid(a) of the logistic regression y ~ sigmoid(a + b x), fitted by Newton's method."""
    design, weights = np.stack([np.ones_like(x), x], 1), np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-(design @ weights)))
        slope = design.T @ (y - p) - RIDGE * weights
        curve = (design * (p * (1 - p))[:, None]).T @ design + RIDGE * np.eye(2)
        step = np.linalg.solve(curve, slope)
        weights += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-weights[0])))
