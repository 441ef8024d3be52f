"""Sampled answers: their shape counted, a few of them shown and kept."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alignment.ppo_math import repetition
from alignment.rewards import last_text

SHOWN = 4


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
            self.rows = [{"prompt": last_text(p), "answer": last_text(c), "reward": r} for p, c, r in kept]

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
