"""Before the first step of a run that samples its own answers: a few answers, and what the rewards say of them.

A reward that never differs inside a group, that fails on a row, that pays for length or cannot be earned because every
answer is cut off shows here, in seconds, and not after a night.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import IterableDataset
from rich.console import Console
from rich.table import Table

from alignment.errors import InputError
from alignment.preflight import Finding
from alignment.rewarding import Checked, call
from alignment.rewards import last_text

FLAT = 1e-6  # rewards closer than this are the same
SHOWN = 3  # answers that are printed


@dataclass
class Trial:
    """What one reward said of the answers.

    Attributes:
        values: shape (groups, answers in each), nan where the reward had nothing to say.
        seconds: of the call.
    """

    name: str
    values: np.ndarray
    seconds: float

    @property
    def groups(self) -> np.ndarray:
        """The values by group; where there is one answer to each prompt (PPO), all of them are one group."""
        return self.values if self.values.shape[1] > 1 else self.values.T

    @property
    def spread(self) -> float:
        """The mean standard deviation inside the groups."""
        return float(np.nan_to_num(np.nanstd(self.groups, axis=1)).mean())

    @property
    def flat(self) -> float:
        """The share of groups whose answers all have the same reward."""
        return float((np.nan_to_num(np.ptp(np.nan_to_num(self.groups), axis=1)) < FLAT).mean())


@dataclass
class Rehearsal:
    """The answers, their rewards and what is to be said about them.

    Attributes:
        trials: one per reward, and "all together" at the end where there are several.
        lengths, ended: tokens of each answer, and whether it stopped by itself, shape (groups, answers in each).
        examples: (prompt, answer, reward) of a few.
    """

    trials: list[Trial] = field(default_factory=list)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    ended: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))
    examples: list[tuple[str, str, float]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


@contextmanager
def untouched(seed: int) -> Iterator[None]:
    """Run a block with random numbers of its own; those of Python, numpy and torch go on as if it had not been."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def rehearse(trainer: Any, prompts: int) -> Rehearsal:
    """Answer a few prompts with the untrained policy, by the trainer's own settings, and reward the answers.

    Every process has to call it; all report what the first one found.

    Args:
        trainer: a trainer of `alignment.online`, or another with `sample(rows)`, `rewards` (`Checked` functions),
            `num_generations` and `reward_weights`.
        prompts: how many rows of the training set, spread evenly over it (a stream: its first).
    """
    found = Rehearsal()
    if not prompts:
        return found
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        found.findings.append(Finding("fact", "no rehearsal of the rewards: the model is not sharded yet"))
        return found
    size = trainer.num_generations
    rows = [row for row in _some(trainer.train_dataset, prompts) for _ in range(size)]
    with untouched(trainer.args.seed):
        sample = trainer.sample(rows)
        shape = (len(rows) // size, size) if size > 1 else (1, len(rows))  # PPO compares over all prompts
        found.lengths = np.array([len(ids) for ids in sample.ids]).reshape(shape)
        found.ended = np.array(sample.ended).reshape(shape)
        for reward in trainer.rewards:
            try:
                found.trials.append(_try(reward, rows, sample, trainer.state, shape))
            except InputError as error:
                text = f"{error.what}; {' '.join(error.where.split())}" if error.where else error.what
                found.findings.append(Finding("error", text, error.fix))
    if not found.findings:
        _judge(found, trainer, rows, sample)
    box = [found]
    return broadcast_object_list(box)[0] if trainer.args.world_size > 1 else found


def _some(rows: Any, count: int) -> list[dict]:
    """Return `count` rows, spread evenly over the data set."""
    if isinstance(rows, IterableDataset):
        return list(islice(rows, count))
    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
    return [rows[int(i)] for i in places]


def _try(reward: Checked, rows: list[dict], sample: Any, state: Any, shape: tuple[int, int]) -> Trial:
    """Call one reward function as the trainer would; raises InputError for what is wrong with it."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    columns |= {"completion_ids": sample.ids, "trainer_state": state}
    columns |= {"log_extra": lambda column, values: None, "log_metric": lambda name, value: None}
    began = time.perf_counter()
    values = call(reward, [row["prompt"] for row in rows], sample.completions, **columns)
    numbers = [float("nan") if value is None else value for value in values]
    return Trial(reward.__name__, np.array(numbers, dtype=float).reshape(shape), time.perf_counter() - began)


def _judge(found: Rehearsal, trainer: Any, rows: list[dict], sample: Any) -> None:
    """Add the sum of all rewards, a few examples and the findings."""
    weights = trainer.reward_weights.tolist()
    parts = [weight * trial.values for weight, trial in zip(weights, found.trials, strict=True)]
    silent = np.all([np.isnan(part) for part in parts], axis=0)
    total = Trial("all together", np.nansum(parts, axis=0), sum(trial.seconds for trial in found.trials))
    if len(found.trials) > 1:
        found.trials.append(total)
    for place in range(0, len(rows), trainer.num_generations)[:SHOWN]:
        texts = last_text(rows[place]["prompt"]), last_text(sample.completions[place])
        found.examples.append((*texts, float(total.values.flat[place])))
    found.findings += [*_about_rewards(total, silent, trainer.compares), *_about_length(found, total, trainer.args)]


def _about_rewards(total: Trial, silent: np.ndarray, compares: bool = True) -> list[Finding]:
    """Say what share of the groups can teach something; `compares`: answers are compared within their group."""
    groups, found = len(total.groups), []
    if silent.any():
        text = f"no reward applies to {silent.mean():.0%} of the answers (all returned None)"
        found.append(Finding("warning", text, "a reward for every kind of row"))
    text = f"rehearsal: mean reward {total.values.mean():.3f}, {total.flat:.0%} of {groups} groups without a difference"
    best = total.values.max() - total.values.min() < FLAT
    if total.flat <= 0.6 or not (compares or best):
        return [*found, Finding("fact", text)]
    fix = "start from a model that is right now and then (recipes/sft.py), easier prompts, more --num_generations, a "
    fix += "higher --temperature, or a reward with shades"
    why = ": every answer has the same reward, and nothing would be learnt" if best else ": these teach nothing"
    return [*found, Finding("warning", text + why, fix)]


def _about_length(found: Rehearsal, total: Trial, args: Any) -> list[Finding]:
    """Say how many answers are cut off, and whether the reward goes with the length."""
    cut, said = 1 - found.ended.mean(), []
    if cut > 0.3:
        text = f"{cut:.0%} of the answers do not end within max_completion_length ({args.max_completion_length})"
        fix = "start from a model that stops (recipes/sft.py), or a larger --max_completion_length"
        said.append(Finding("warning", text + (": this policy never stops" if cut == 1 else ""), fix))
    correlation = _correlation(found.lengths, total.values)
    if abs(correlation) > 0.5:
        way = "longer" if correlation > 0 else "shorter"
        text = f"the reward goes with the length (correlation {correlation:+.2f}): {way} answers will be learnt first"
        said.append(
            Finding("warning", text, "a reward against it (alignment.rewards.lengthy), or look at the function")
        )
    return said


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's correlation, 0.0 where one of the two does not vary."""
    if a.std() < FLAT or b.std() < FLAT:
        return 0.0
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def show(found: Rehearsal, console: Console) -> None:
    """Print the table of the rewards and a few answers."""
    if not found.trials:
        return
    groups, size = found.lengths.shape
    console.print()
    name = f"{groups} prompts x {size} answers" if groups > 1 else f"{size} answers"
    table = Table(title=f"Rehearsal: {name}, untrained", title_justify="left")
    for head in ("reward", "mean", "spread in groups", "flat groups", "with length", "seconds"):
        table.add_column(head, justify="left" if head == "reward" else "right")
    for trial in found.trials:
        with_length = _correlation(found.lengths, np.nan_to_num(trial.values))
        numbers = f"{np.nanmean(trial.values) if not np.isnan(trial.values).all() else 0:.3f}", f"{trial.spread:.3f}"
        table.add_row(trial.name, *numbers, f"{trial.flat:.0%}", f"{with_length:+.2f}", f"{trial.seconds:.2f}")
    console.print(table)
    console.print(f"answers of {found.lengths.mean():.1f} tokens, {1 - found.ended.mean():.0%} cut off")
    for prompt, answer, reward in found.examples:
        console.print(f"  {prompt[-60:]!r} -> {answer[:60]!r}  {reward:.2f}", markup=False)
    console.print()
