"""Proximal Policy Optimisation with a critic (arXiv:1707.06347, for language models arXiv:1909.08593 and 2203.02155).

Stands on TRL's GRPOTrainer, and through it on transformers' Trainer, because what comes before the objective is the
same: repeating and sharding prompts, templates, vLLM, reward functions and models, the buffer of a rollout, logging,
evaluation, DDP, FSDP and DeepSpeed. TRL's own PPO ended with 1.13. What is PPO's is here: the critic, rewards per token
with their KL penalty, GAE, the clipped losses. Three things of the base are done otherwise: answers are drawn by
`sampling.sample`, which keeps the log-probabilities and gives each row its own random numbers; minibatches are every
n-th row, so that two processes see what one would; and a checkpoint inside a rollout holds the rest of it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import RepeatSampler

from alignment import ppo_math
from alignment.answers import AnswerTable
from alignment.critic import build
from alignment.diagnosis import diagnose
from alignment.errors import InputError
from alignment.ppo_config import PPOConfig
from alignment.rewarding import RewardModel
from alignment.rollout import Rollout

__all__ = ["PPOConfig", "PPOTrainer"]
STATE_FILE = "ppo_state.json"
# What one update's numbers add up to; the first divides all others.
SUMS = ("tokens", "policy_loss", "value_loss", "entropy", "clip_share", "value_clip_share", "approx_kl", "text_loss")


class PPOTrainer(Rollout):
    """`alignment.online.GRPOTrainer` with PPO's objective.

    Args:
        model: the policy: a model, or a PeftModel whose adapter goes on being trained (it is its own reference).
        reward_funcs: functions `f(prompts, completions, **columns) -> list[float]`, `rewarding.RewardModel`s, or both.
        args: `PPOConfig`.
        train_dataset: rows with "prompt" (a text or messages) and the columns the rewards want.
        text_dataset: rows of "input_ids" for the pretraining mix (`ptx_coef`), or None.
        others: as of `trl.GRPOTrainer`; with `peft_config` the reference is the model without the adapter.

    Raises:
        InputError: fewer prompts than one rollout needs; settings or a critic that do not fit.
    """

    compares = False  # an answer with the critic's forecast, not with others

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reward_funcs: Callable | list,
        args: PPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        text_dataset: Dataset | None = None,
        **others: Any,
    ):
        _check_rows(train_dataset, text_dataset, args)
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, **others)
        # vLLM and the generation settings hold the policy; everything that trains holds policy and critic from here on.
        whole = build(self.model, args.critic_model, isinstance(model, PeftModel), args.kl_coef > 0)
        self.model = self.model_wrapped = whole.to(self.args.device)
        for reward in self.rewards:
            shared = isinstance(reward.function, RewardModel) and whole.share_reward(reward.function.path)
            if shared:
                reward.function.model = shared
                self.notes.append(f"the reward model {reward.function.path} runs on the policy's backbone")
        self.text_dataset, self.token_count = text_dataset, whole.count
        self.kl = ppo_math.KLController(args.kl_coef, args.target_kl, args.kl_horizon)
        self.spread = ppo_math.RunningStd()
        self.table = AnswerTable(args.output_dir, args.num_completions_log_steps)
        self._stopped, self._window_kl, self._eval_batches = False, torch.zeros(2), 0
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64)
        self._resume: str | None = None

    # The rollout

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        base = super()._get_train_sampler(dataset)
        return EpochSampler(
            base.data_source, base.mini_repeat_count, base.batch_size, base.repeat_count, base.shuffle, base.seed
        )

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, torch.Tensor]:
        """Return the minibatch of this step; sample and score a new rollout when the last one is used up."""
        if not self.model.training:
            rollout = self._generate_and_score_completions(generation_batch)
            return rollout | {"tokens": rollout["mask"].sum()}
        self._restore()
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._stopped = False
            self._buffered_inputs = self._minibatches(self._generate_and_score_completions(generation_batch))
        return self._buffered_inputs[self._step % steps]

    def _minibatches(self, rollout: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Cut a rollout of n updates into every n-th row, and these likewise; count the tokens of each update.

        Each part is as wide as its longest row. So cut, an update holds the same rows however many processes and
        accumulated batches it is spread over.
        """
        steps, window = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        updates, parts = steps // window, []
        for step in range(steps):
            rows = {key: value[step // window :: updates][step % window :: window] for key, value in rollout.items()}
            width = int(rows["attention_mask"].sum(1).max())
            parts.append({key: value[:, :width] for key, value in rows.items()})
        counts = torch.stack([part["mask"].sum() for part in parts]).view(-1, window).sum(1)
        counts = self.accelerator.reduce(counts, "sum").repeat_interleave(window) / self.accelerator.num_processes
        return [part | {"tokens": count} for part, count in zip(parts, counts, strict=True)]

    # The update

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one minibatch; nothing at all once a rollout's updates were ended for their KL."""
        self._restore()
        fresh = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        if self._stopped and not fresh and not (self.args.fp16 or self.is_deepspeed_enabled):
            self._step += 1
            self._metrics["train"]["skipped"].append(1.0)
            return torch.zeros((), device=self.args.device)
        if self.args.max_approx_kl is not None:
            self._metrics["train"]["skipped"].append(float(self._stopped and not fresh))
        return super().training_step(model, inputs, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return policy loss + vf_coef value loss - entropy_coef entropy + ptx_coef text loss, per token of the update.

        Every token of all minibatches of an update, on all processes, counts the same.
        """
        args, mask, count = self.args, inputs["mask"], inputs["tokens"]
        text = self._text() if args.ptx_coef and self.model.training else None
        out = self._forward(model, inputs, ("policy", "values"), text and text[0])
        log_probs, entropy, values = out["log_probs"].float(), out["entropy"].float(), out["values"].float()
        old = inputs["old_log_probs"]
        policy, clipped = ppo_math.policy_loss(log_probs, old, inputs["advantages"], args.cliprange)
        value, held = ppo_math.value_loss(values, inputs["values"], inputs["returns"], args.cliprange_value)
        terms = policy + args.vf_coef * value - args.entropy_coef * entropy
        loss = (terms * mask).sum() / count
        text_loss = torch.zeros_like(loss)
        if text:
            text_loss = -out["text_log_probs"].sum() / text[1]
            loss = loss + args.ptx_coef * text_loss
        with torch.no_grad():
            away = ppo_math.kl_per_token(old, log_probs, "k3")  # of the policy from the sampler
            parts = torch.stack([torch.ones_like(mask), policy, value, entropy, clipped, held, away])
            sums = torch.cat([(parts * mask).flatten(1).sum(1), text_loss.detach()[None] * count]).double().cpu()
        if not self.model.training:
            return loss
        self._sums += sums
        return loss * self._after(sums)

    def _after(self, sums: torch.Tensor) -> float:
        """Look at the KL of the update this minibatch ends; return 0 when it must not change the weights, else 1."""
        if self.args.max_approx_kl is None:
            return 1.0
        was = self._stopped
        self._window_kl += sums[[SUMS.index("approx_kl"), SUMS.index("tokens")]].float()
        if (self._step + 1) % self.args.gradient_accumulation_steps == 0:
            total, tokens = self.accelerator.reduce(self._window_kl.to(self.args.device), "sum").tolist()
            self._stopped = was or total > self.args.max_approx_kl * max(tokens, 1)
            self._window_kl = torch.zeros(2)
        return float(not was)

    def _text(self) -> tuple[dict[str, torch.Tensor], float]:
        """Return the texts of this step, the same after a resume, and the tokens of its whole update per process."""
        window, size = self.args.gradient_accumulation_steps, self.args.per_device_train_batch_size
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        order = torch.randperm(len(self.text_dataset), generator=torch.Generator().manual_seed(self.args.seed)).tolist()
        begin = (self._step - self._step % window) * size * world
        update = [order[i % len(order)] for i in range(begin, begin + window * size * world)]
        lengths = [len(row) - 1 for row in self.text_dataset.select(update)["input_ids"]]
        at = ((self._step % window) * world + rank) * size
        rows = [torch.tensor(row) for row in self.text_dataset.select(update[at : at + size])["input_ids"]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, self._tokenizer.pad_token_id).to(self.args.device)
        mask = (torch.arange(ids.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]).to(ids.device)
        labels = ids.masked_fill(~mask, -100)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}, sum(lengths) / world

    # The optimizer, checkpoints, the log

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Give the critic a learning rate of its own where one is set."""
        made = self.optimizer is None
        super().create_optimizer(model)
        rate = self.args.critic_learning_rate
        if made and rate is not None:
            own = {id(p) for p in self.accelerator.unwrap_model(self.model).critic_parameters().values()}
            for group in list(self.optimizer.param_groups):
                critic = [p for p in group["params"] if id(p) in own]
                if critic:
                    group["params"] = [p for p in group["params"] if id(p) not in own]
                    self.optimizer.add_param_group({**group, "params": critic, "lr": rate})
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Trainer writes a module of a class it does not know as one file of all weights.
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, Path(folder) / "training_args.bin")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            state = {"kl_coef": self.kl.coef, "spread": vars(self.spread), "step": self._step, "stopped": self._stopped}
            (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        if self._buffered_inputs is not None and self._step % (self.args.steps_per_generation * self.num_iterations):
            parts = {f"{i}.{key}": v for i, part in enumerate(self._buffered_inputs) for key, v in part.items()}
            save_file({key: value.contiguous().cpu() for key, value in parts.items()}, self._rollout_file(folder))

    def _rollout_file(self, folder: str | Path) -> Path:
        return Path(folder) / f"rollout_{self.accelerator.process_index}.safetensors"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        whole = self.accelerator.unwrap_model(self.model if model is None else model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, whole.policy)
            whole.load_critic(resume_from_checkpoint)
        self._resume = resume_from_checkpoint

    def _restore(self) -> None:
        """Read back, before the first step after a resume, what PPO kept beside weights and optimizer."""
        if self._resume is None:
            return
        folder, self._resume = Path(self._resume), None
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        self.kl.coef, self._step, self._stopped = state["kl_coef"], state["step"], state["stopped"]
        self.spread = ppo_math.RunningStd(**state["spread"])
        if self._rollout_file(folder).is_file():
            parts: list[dict] = [{} for _ in range(self.args.steps_per_generation)]
            for key, value in load_file(self._rollout_file(folder)).items():
                number, _, name = key.partition(".")
                parts[int(number)][name] = value.to(self.args.device)
            self._buffered_inputs = parts

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log TRL's numbers and PPO's, means over all tokens since the last time; show answers when it is time."""
        if "loss" in logs and self._sums[0]:
            total = self.accelerator.reduce(self._sums.to(self.args.device, torch.float32), "sum").double()
            for name, value in zip(SUMS[1:], (total[1:] / total[0]).tolist(), strict=True):
                if name != "text_loss" or self.args.ptx_coef:
                    logs[name] = value
            self._sums.zero_()
        super().log(logs, *args, **kwargs)
        if self.accelerator.is_main_process:
            self.table.show(self.state.global_step)
            if "train_runtime" in logs:
                for sentence in diagnose(self.state.log_history):
                    tqdm.write(f"! {sentence}")


class EpochSampler(RepeatSampler):
    """The order of prompts as a function of seed and epoch, so that a resumed run goes on with its own."""

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch at the next iteration."""
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


def _check_rows(rows: Dataset, texts: Dataset | None, args: PPOConfig) -> None:
    """Raise InputError where there is too little to sample from, or a text loss without texts."""
    needed = args.generation_batch_size // args.num_generations
    if isinstance(rows, Dataset) and len(rows) < needed:
        raise InputError(
            f"{len(rows)} prompts, and one rollout takes {needed}",
            where="--data",
            why="not one rollout could be sampled",
            fix="more prompts, or a smaller --per_device_train_batch_size or --steps_per_generation",
        )
    if bool(args.ptx_coef) != (texts is not None):
        raise InputError(
            "the pretraining mix needs both its weight and its texts",
            where="--ptx_coef",
            fix="--ptx_coef above 0 and --text_data rows of text, or neither",
        )
