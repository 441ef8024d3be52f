"""TRL's trainers that sample their own answers, on the rows of `tokenize(..., "prompt")` and with checked rewards.

Each class is used as TRL's own, with the same arguments; what differs:

- prompts come as the tokens of `alignment.tokenization`: control tokens in somebody's text stay text;
- a reward function that raises, or returns anything else than a number or None per answer, ends the run with the row;
- a reward function may ask for `ended`: whether each answer stopped by itself;
- a loss or gradient that is not finite ends the run before the optimizer sees it;
- groups whose answers all have the same reward are counted: they teach nothing.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import trl
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer import add_fused_lm_head

from alignment.errors import InputError
from alignment.rewarding import Checked, RewardModel, checked
from alignment.trainers import Guard


@dataclass
class Sample:
    """Answers of the policy as it stands, `num_generations` to each prompt, in the order of the prompts.

    Attributes:
        completions: lists of one assistant turn, or texts where the prompts are texts.
        ids: token ids of each answer, the stop token included.
        ended: whether it stopped by itself.
    """

    completions: list
    ids: list[list[int]]
    ended: list[bool]


class Online(Guard):
    """What GRPO and RLOO share; stands in front of TRL's class among the bases.

    Args:
        model, args, kwargs: as TRL's.
        reward_funcs: functions, `RewardModel`s or paths to reward models.
        train_dataset, eval_dataset: rows with "prompt", "prompt_ids" and what the rewards read.
        ref_model: the reference, where TRL could not load it again by the model's name; else None.

    Raises:
        InputError: a column that a reward function needs is missing, or weights and rewards differ in number.
    """

    notes: list[str]
    _completions_at: int

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any = None,
        ref_model: Any = None,
        **kwargs: Any,
    ):
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self.rewards = [checked(function) for function in functions]
        check_rewards(self.rewards, args, train_dataset, eval_dataset)
        own_reference = ref_model is not None and args.beta != 0
        beta, args = args.beta, deepcopy(args) if own_reference else args
        if own_reference:
            args.beta = 0.0  # else TRL would load the reference by name, and not the model as it starts
        super().__init__(
            model, list(self.rewards), args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs
        )
        for reward in self.rewards:
            reward.stops = set(self.eos_token_ids)
            if isinstance(reward.function, RewardModel):
                reward.function.to(self.accelerator.device)
        if own_reference:
            self._set_reference(ref_model, beta)
        self.groups, self.flat_groups = 0, 0
        self._rows: list[dict[str, Any]] = []
        self.notes = [f"rewards: {self._reward_names()}"]

    def _reward_names(self) -> str:
        weights = self.args.reward_weights or [1.0] * len(self.rewards)
        return " + ".join(
            reward.__name__ if weight == 1 else f"{weight:g} x {reward.__name__}"
            for weight, reward in zip(weights, self.rewards, strict=True)
        )

    def _set_reference(self, model: Any, beta: float) -> None:
        """Take a model in memory as the reference, prepared as TRL prepares its own."""
        self.beta = self.args.beta = beta
        add_fused_lm_head(model, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(model, self.accelerator)
        elif self.is_fsdp_enabled:
            self.ref_model = prepare_fsdp(model, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(model, evaluation_mode=True)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list) -> tuple:
        if vars(self).get("tools") or any("prompt_ids" not in row for row in self._rows):
            return super()._tokenize_prompts(prompts)
        return [list(row["prompt_ids"]) for row in self._rows], None, {}

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the values of all rewards, of all processes; count the groups without a difference."""
        values = super()._calculate_rewards(*args, **kwargs)
        if self.model.training:
            total = (values * self.reward_weights.to(values.device)).nansum(dim=1).view(-1, self.num_generations)
            self.groups += len(total)
            self.flat_groups += int((total.amax(1) - total.amin(1) < 1e-6).sum())
        return values

    def sample(self, rows: list[dict[str, Any]]) -> Sample:
        """Return answers of the policy to each row, by the trainer's own sampling settings; nothing is logged.

        Every process has to call it. The random numbers move: see `rehearsal.untouched`.
        """
        metrics, seen = deepcopy(self._metrics), self.state.num_input_tokens_seen
        training = self.model.training
        self.model.train()
        self._rows = rows
        made = self._generate([row["prompt"] for row in rows])
        self.model.train(training)
        self._metrics, self.state.num_input_tokens_seen = metrics, seen
        ids = made[1]
        ended = [bool(tokens) and tokens[-1] in self.eos_token_ids for tokens in ids]
        return Sample(made[self._completions_at], ids, ended)


class GRPOTrainer(Online, trl.GRPOTrainer):
    """`trl.GRPOTrainer` (Shao et al. 2024) on the rows of `tokenize(..., "prompt")`."""

    _completions_at = 3


class RLOOTrainer(Online, trl.RLOOTrainer):
    """`trl.RLOOTrainer` (Ahmadian et al. 2024) on the rows of `tokenize(..., "prompt")`."""

    _completions_at = 2


def reward_functions(functions: list, args: Any) -> list:
    """Return the recipe's reward functions and, where `--reward_model` names one, the reward model."""
    options = next(group for group in args.also if "reward_model" in vars(group))
    if not options.reward_model:
        return functions
    return [*functions, RewardModel(options.reward_model, options.reward_batch_size)]


def check_rewards(rewards: list[Checked], args: Any, *splits: Any) -> None:
    """Raise InputError for a missing column, a wrong number of weights, or two rewards of one name."""
    for name, rows in zip(("the training rows", "the held-out rows"), splits, strict=False):
        if rows is not None:
            names = rows.column_names
            for reward in rewards:
                reward.check_columns(names, name)
    weights = args.reward_weights
    if weights is not None and len(weights) != len(rewards):
        raise InputError(
            f"{len(weights)} weights for {len(rewards)} rewards ({', '.join(r.__name__ for r in rewards)})",
            where="--reward_weights",
            fix=f"--reward_weights {' '.join(['1.0'] * len(rewards))}",
        )
    seen: set[str] = set()
    for reward in rewards:
        if reward.__name__ in seen:
            raise InputError(
                f"two rewards are called {reward.__name__}",
                why="their numbers would be mixed in the log",
                fix="give one of the functions another name",
            )
        seen.add(reward.__name__)


__all__ = ["GRPOTrainer", "Online", "RLOOTrainer", "Sample", "check_rewards", "reward_functions"]
