"""Sampled answers: their rewards checked, their shape counted, a few of them shown and kept."""

import inspect
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alignment.errors import InputError
from alignment.ppo_math import repetition

SHOWN = 4
# What a function of the user's can raise for a reason that lies in it, or in the row it got.
_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


def checked_reward(function: Callable) -> Callable:
    """Wrap a reward function so that what it raises or returns wrongly becomes an InputError that names it.

    None means that a function has nothing to say of an answer, as in TRL.
    """
    name = _name(function)
    if inspect.iscoroutinefunction(function):
        return function

    def run(prompts: list, completions: list, **columns: Any) -> list[float | None]:
        try:
            rewards = function(prompts=prompts, completions=completions, **columns)
        except InputError:
            raise
        except _FAULTS as error:
            raise InputError(
                f"the reward function {name} raised {type(error).__name__}: {error}",
                where=f"on answers like {str(completions[0])[:80]!r}",
                fix="it has to take any answer; it is given " + ", ".join(["prompts", "completions", *sorted(columns)]),
            ) from error
        if not isinstance(rewards, Sequence) and not hasattr(rewards, "tolist"):
            raise InputError(f"the reward function {name} returned {type(rewards).__name__}, not a list of numbers")
        rewards = rewards.tolist() if hasattr(rewards, "tolist") else list(rewards)
        if len(rewards) != len(completions):
            raise InputError(
                f"the reward function {name} returned {len(rewards)} numbers for {len(completions)} answers",
                why="each answer is learnt from by its own reward",
                fix="return one number per completion, in their order",
            )
        for reward, completion in zip(rewards, completions, strict=True):
            if reward is not None and (not isinstance(reward, Real) or not math.isfinite(reward)):
                raise InputError(
                    f"the reward function {name} returned {reward!r}",
                    where=f"for the answer {str(completion)[:80]!r}",
                    why="one such reward makes every weight useless",
                    fix="return a finite number, or None where the function does not apply",
                )
        return rewards

    run.__name__ = name
    return run


def _name(function: Callable) -> str:
    return function.__name__ if hasattr(function, "__name__") else type(function).__name__


def statistics(answer: list[int], stops: Sequence[int]) -> list[float]:
    """Return [tokens, ended by itself, share of repeated 4-grams] of an answer."""
    return [float(len(answer)), float(answer[-1] in stops), repetition(answer)]


class AnswerTable:
    """Keeps a few answers of each rollout, and shows and writes them every so many updates.

    Args:
        output_dir: the table goes to completions/answers.jsonl in it. every: updates between two; 0 is never.
    """

    def __init__(self, output_dir: str, every: int):
        self.file, self.every = Path(output_dir) / "completions" / "answers.jsonl", every
        self.rows: list[dict[str, Any]] = []
        self.written = 0

    def keep(self, prompts: list, completions: list, rewards: list[float]) -> None:
        """Remember the first answers of a rollout."""
        if self.every:
            kept = zip(prompts[:SHOWN], completions, rewards, strict=False)
            self.rows = [{"prompt": text_of(p), "answer": text_of(c), "reward": r} for p, c, r in kept]

    def show(self, step: int) -> None:
        """Print and write them when the time has come; on one process."""
        if not self.every or not self.rows or step - self.written < self.every:
            return
        self.written = step
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            for row in self.rows:
                file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        lines = [f"answers at step {step}"]
        for row in self.rows:
            prompt, answer = (textwrap.shorten(row[key], 60, placeholder=" …") for key in ("prompt", "answer"))
            lines.append(f"  {row['reward']:>7.2f}  {prompt}  →  {answer or '(nothing)'}")
        tqdm.write("\n".join(lines))


def text_of(prompt: str | list[dict[str, Any]]) -> str:
    """Return a text, or what the last message says."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
