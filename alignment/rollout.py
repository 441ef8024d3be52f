"""A rollout of PPO: answers sampled in one batch, scored, and turned into advantages and returns."""

from typing import Any

import torch
import trl
from accelerate.utils import gather

from alignment import ppo_math
from alignment.answers import AnswerTable, statistics
from alignment.online import Online
from alignment.ppo_config import PPOConfig
from alignment.sampling import SamplingRules, row_draws, sample

TRAIN, EVAL = 0, 1


class Rollout(Online, trl.GRPOTrainer):
    """What `PPOTrainer` does before the updates.

    Attributes:
        kl: the coefficient of the KL penalty. spread: of the scores so far. table: of sampled answers.
    """

    args: PPOConfig
    kl: ppo_math.KLController
    spread: ppo_math.RunningStd
    table: AnswerTable
    _completions_at = 3
    _eval_batches: int

    def _drop_padding(self) -> None:
        self._apart = False  # `ActorCritic` drops padding by itself, and has no virtual tokens

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Sample answers, score them, and work out advantages and returns; every tensor is (rows, tokens)."""
        prompts = [row["prompt"] for row in inputs]
        self._rows = inputs
        prompt_ids, completion_ids, _, completions, log_probs, *_ = self._generate(prompts)
        per_function = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        batch = self._batch(prompt_ids, completion_ids, log_probs)
        scores, raw = self._scores(per_function, completion_ids)
        with torch.no_grad():
            known = self._forward_rows(batch)
        batch |= {"old_log_probs": known.get("log_probs", batch.get("old_log_probs")), "values": known["values"]}
        mask = batch["mask"]
        batch["old_log_probs"] = batch["old_log_probs"] * mask
        kl = torch.zeros_like(mask)
        if "reference" in known:
            kl = ppo_math.kl_per_token(batch["old_log_probs"], known["reference"], self.args.kl_estimator) * mask
        rewards = ppo_math.token_rewards(kl, scores, mask, self.kl.coef)
        if self.args.whiten_rewards:
            rewards = ppo_math.whiten(rewards, mask, self._total(rewards, mask), shift_mean=False)
        advantages, returns = ppo_math.gae(rewards, batch["values"], mask, self.args.gamma, self.args.lam)
        batch["advantages"] = ppo_math.whiten(advantages, mask, self._total(advantages, mask))
        batch["returns"] = returns
        self._book(batch, kl, scores, raw, per_function, completion_ids)
        if self.model.training:
            self.table.keep(prompts, completions, raw.tolist())
        return batch

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        values = super()._calculate_rewards(*args, **kwargs)
        if self.num_generations == 1:  # one answer is no group, and learns from the critic's forecast
            self.groups = self.flat_groups = 0
        return values

    def _generate_single_turn(self, prompt_ids: Any, images: Any, fields: Any, *args: Any, **kwargs: Any) -> tuple:
        """Return answers and log-probabilities; where weights are sharded or served elsewhere, only TRL's answers."""
        args_ = self.args
        plain = not (self.use_vllm or self.use_transformers_continuous_batching or images or fields)
        plain &= not (self.is_fsdp_enabled or self.is_deepspeed_enabled or args_.generation_kwargs)
        if not plain or self.repetition_penalty != 1.0 or self.min_p:
            return super()._generate_single_turn(prompt_ids, images, fields, *args, **kwargs)[0], None
        rules = SamplingRules(
            self.max_completion_length, self.temperature, self.top_k or 0, self.top_p, tuple(self.eos_token_ids),
            self._tokenizer.pad_token_id,
        )  # fmt: skip
        training = self.model.training
        part = self._step // (args_.steps_per_generation * self.num_iterations) if training else self._eval_batches
        self._eval_batches += not training
        first = self.accelerator.process_index * len(prompt_ids)
        draws = row_draws(
            (args_.seed, EVAL - training, part), range(first, first + len(prompt_ids)), rules.max_new_tokens
        )
        whole = self.accelerator.unwrap_model(self.model_wrapped)
        whole.policy.eval()
        with self.accelerator.autocast():
            answers, log_probs = sample(whole.base[0], prompt_ids, draws, rules)
        whole.policy.train(training)
        # In 16 bits the cache and the whole sequence give noticeably different numbers: computed again there.
        exact = whole.base[0].dtype == torch.float32 and not (args_.bf16 or args_.fp16)
        return answers, log_probs if exact else None

    def _batch(self, prompts: list, answers: list, log_probs: list | None) -> dict[str, torch.Tensor]:
        """Return prompts and answers as one padded batch: input_ids, attention_mask, mask (of the answers)."""
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((len(prompts), width), self._tokenizer.pad_token_id)
        attention, mask = torch.zeros_like(ids), torch.zeros(len(prompts), width)
        old = torch.zeros(len(prompts), width)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            start, end = len(prompt), len(prompt) + len(answer)
            ids[row, :end] = torch.tensor([*prompt, *answer])
            attention[row, :end], mask[row, start:end] = 1, 1
            if log_probs is not None:
                old[row, start:end] = torch.tensor(log_probs[row])
        batch = {"input_ids": ids, "attention_mask": attention, "mask": mask}
        if log_probs is not None:
            batch["old_log_probs"] = old
        return {key: value.to(self.args.device) for key, value in batch.items()}

    def _forward_rows(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return values, reference and (when the sampler gave none) log-probabilities, longest rows first in parts.

        The number of parts depends on the number of rows only: sharded models need equal calls on every process.
        """
        want = ("values",) + (("reference",) if self.args.kl_coef else ())
        want += () if "old_log_probs" in batch else ("policy",)
        sizes = batch["attention_mask"].sum(1)
        order, found = sizes.argsort(descending=True, stable=True), {}
        for rows in order.split(2 * self.args.per_device_train_batch_size):
            width = int(sizes[rows[0]])
            part = {key: batch[key][rows, :width] for key in ("input_ids", "attention_mask", "mask")}
            out = self._forward(self.model_wrapped, part, want)
            for key, value in out.items():
                whole = found.setdefault(key, torch.zeros_like(batch["mask"]))
                whole[rows, :width] = value.float()
        return found

    def _forward(self, model: Any, batch: dict[str, torch.Tensor], want: tuple[str, ...], text: Any = None) -> dict:
        labels = batch["input_ids"].masked_fill(batch["mask"] == 0, -100)
        with self.accelerator.autocast():
            return model(batch["input_ids"], batch["attention_mask"], labels, want, text)

    def _scores(self, per_function: torch.Tensor, answers: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores of this process's answers as they are learnt from, and as they were given, (rows,)."""
        raw = (per_function * self.reward_weights.to(per_function.device)).nansum(1)
        first = self.accelerator.process_index * len(answers)
        raw = raw[first : first + len(answers)]
        scores = raw.clone()
        if self.args.missing_eos_penalty is not None:
            open_end = [answer[-1] not in self.eos_token_ids for answer in answers]
            scores -= self.args.missing_eos_penalty * torch.tensor(open_end, device=scores.device)
        if self.args.reward_scaling:
            if self.model.training:
                self.spread.update(gather(scores))
            scores = scores / self.spread.std
        if self.args.reward_clip is not None:
            scores = scores.clamp(-self.args.reward_clip, self.args.reward_clip)
        return scores, raw

    def _total(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(ppo_math.moments(values, mask), "sum")

    def _book(self, batch: dict, kl: torch.Tensor, scores: Any, raw: Any, per_function: Any, answers: list) -> None:
        """Put the numbers of a rollout into the log, over all processes, and move the KL coefficient."""
        mask, device = batch["mask"], raw.device
        facts = torch.tensor([statistics(answer, self.eos_token_ids) for answer in answers], device=device)
        rows = gather(torch.cat([facts, torch.stack([raw, scores, kl.sum(1)], 1).to(facts.dtype)], 1)).double()
        errors = self._total(batch["returns"] - batch["values"], mask)
        explained = ppo_math.explained_variance(errors, self._total(batch["returns"], mask))
        length, ended, repeated, reward, score, divergence = rows.mean(0).tolist()
        numbers = {
            "reward": reward, "reward_std": float(rows[:, 3].std(correction=0)), "score": score, "kl": divergence,
            "kl_coef": self.kl.coef, "explained_variance": explained, "answer_length": length, "ended": ended,
            "repetition": repeated,
        }  # fmt: skip
        for name, column in zip(self.reward_func_names, per_function.T, strict=True):
            numbers[f"rewards/{name}"] = float(column.nanmean())
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in numbers.items():
            metrics[name].append(value)
        if self.model.training:
            self.kl.update(divergence, len(rows))
