"""TRL's trainers that sample their own answers, on the rows of `tokenize(..., "prompt")` and with checked rewards.

Each class is used as TRL's own, with the same arguments; what differs:

- prompts come as the tokens of `alignment.tokenization`: control tokens in somebody's text stay text;
- a reward function that raises, or returns anything else than a number or None per answer, ends the run with the row;
- a reward function may ask for `ended`: whether each answer stopped by itself;
- a loss or gradient that is not finite ends the run before the optimizer sees it;
- a reward function of GRPO may return a list per answer, one number for each step: see `alignment.supervision`;
- no padding is computed in the training step, so that positions are those of the sampling, with virtual tokens, too;
- groups whose answers all have the same reward are counted: they teach nothing.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import peft
import torch
import trl
from accelerate.utils import gather_object
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer import add_fused_lm_head

from alignment.batching import TokenCount, flush_left, narrow
from alignment.errors import InputError
from alignment.rewarding import Checked, RewardModel, checked
from alignment.supervision import EPSILON, step_advantages, step_ends
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
    compares = True  # answers of one group with each other: a group of equal rewards teaches nothing
    _completions_at: int  # where TRL's `_generate` returns the texts
    _with_scores: bool  # whether its `_generate_single_turn` returns log-probabilities beside the ids

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
        self._drop_padding()
        self._rows: list[dict[str, Any]] = []
        self.notes = [f"rewards: {self._reward_names()}"]

    def _drop_padding(self) -> None:
        """Wrap the forward passes, so that padding is not computed; count what is."""
        self.token_count = TokenCount()
        self._apart = virtual_embeddings(self.accelerator.unwrap_model(self.model))
        self.model.forward = flush_left(narrow(self.model.forward, self._count))
        if self.ref_model is not None and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            self.ref_model.forward = flush_left(narrow(self.ref_model.forward, lambda real, computed: None))

    def _count(self, real: int | torch.Tensor, computed: int) -> None:
        if torch.is_grad_enabled():
            self.token_count.add(real, computed)

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

    def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any) -> Any:
        """Sample answers; behind PEFT's virtual tokens in batches of equal lengths, as padding would move positions."""
        if not self._apart or self.use_vllm:
            return super()._generate_single_turn(prompt_ids, *rest)
        answers: list[list[int]] = [[] for _ in prompt_ids]
        for length in sorted({len(ids) for ids in prompt_ids}):
            places = [place for place, ids in enumerate(prompt_ids) if len(ids) == length]
            made = super()._generate_single_turn([prompt_ids[place] for place in places], *rest)
            for place, ids in zip(places, made[0] if self._with_scores else made, strict=True):
                answers[place] = ids
        return (answers, None) if self._with_scores else answers

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the values of all rewards, of all processes; count the groups without a difference."""
        values = self._values = super()._calculate_rewards(*args, **kwargs)
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
    """`trl.GRPOTrainer` (Shao et al. 2024) on the rows of `tokenize(..., "prompt")`, with rewards per step, too."""

    _completions_at, _with_scores = 3, True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for reward in self.rewards:
            reward.by_step = True

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        flags = [any(steps is not None for steps in reward.steps) for reward in self.rewards]
        flags = self.accelerator.reduce(torch.tensor(flags, device=self.accelerator.device).int(), "sum").bool()
        if self.model.training and flags.any():
            output["advantages"] = self._by_step(output, flags)
        return output

    def _by_step(self, output: dict[str, Any], flags: torch.Tensor) -> torch.Tensor:
        """Return advantages per token, shape (answers of this process, tokens).

        The rewards per step are normalised over their group, those of whole answers as always; by their weights the two
        are added up.
        """
        size, scale = self.num_generations, self.scale_rewards != "none"
        mask, ids = output["completion_mask"], output["completion_ids"]
        width, mine = ids.shape[1], len(ids)
        rows = [row[: int(kept)].tolist() for row, kept in zip(ids, mask.sum(1), strict=True)]
        pieces = [[self._tokenizer.decode([token], skip_special_tokens=True) for token in row] for row in rows]
        ends = gather_object([step_ends(row) for row in pieces])
        start = self.accelerator.process_index * mine
        whole = (self._values * self.reward_weights.to(ids.device))[:, ~flags].nansum(dim=1).view(-1, size)
        centred = whole - whole.mean(1, keepdim=True)
        outcome = centred / (whole.std(1, keepdim=True) + EPSILON) if scale else centred
        total = outcome.view(-1, 1).expand(-1, width).cpu().clone()
        for weight, reward in zip(self.reward_weights.tolist(), self.rewards, strict=True):
            steps = gather_object([given or [] for given in reward.steps])
            for first in range(0, len(steps), size):
                group = slice(first, first + size)
                places = [end if given else [] for given, end in zip(steps[group], ends[group], strict=True)]
                total[group] += weight * step_advantages(steps[group], places, width, scale)
        return total[start : start + mine].to(ids.device)


class RLOOTrainer(Online, trl.RLOOTrainer):
    """`trl.RLOOTrainer` (Ahmadian et al. 2024) on the rows of `tokenize(..., "prompt")`."""

    _completions_at, _with_scores = 2, False


def virtual_embeddings(model: Any) -> bool:
    """Say whether a model begins with virtual tokens of prompt or p-tuning (a prefix is a cache, another thing)."""
    if not isinstance(model, peft.PeftModel):
        return False
    config = model.active_peft_config
    return config.is_prompt_learning and config.peft_type.value not in ("PREFIX_TUNING", "CARTRIDGE")


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
