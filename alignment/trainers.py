"""TRL's trainers on rows that are already tokens, without wasted padding, stopped before a bad loss does harm.

Each class is used as TRL's own, with the same arguments; only what happens to rows and batches differs:

- rows come from `alignment.tokenization`, so the trainer's own preparation is skipped;
- SFT packs rows where packing is exact on this model and attention, found out by trying;
- batches run as a few narrower ones (`alignment.batching.narrow`);
- a loss or gradient that is not finite ends the run before the optimizer sees it.
"""

import math
from copy import copy
from typing import Any

import peft
import torch
import trl
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from alignment.batching import PackedCollator, TokenCount, kl_completions, narrow, packs_exactly
from alignment.errors import InputError


class Order(TrainerCallback):
    """The random numbers of the order of rows, a function of seed and epoch alone.

    transformers' sampler by length draws from the global ones, which a run that goes on in the middle of an epoch does
    not have any more: it would see some rows twice and others never.
    """

    def __init__(self):
        self.generator = torch.Generator()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seed them for the epoch that begins, or is gone on with."""
        seed = args.seed if args.data_seed is None else args.data_seed
        self.generator.manual_seed(seed + math.floor(state.epoch or 0))


class Guard:
    """Ends a run whose loss or gradient is not finite before the weights are touched; stands before TRL's class."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one forward and backward pass; raise InputError when the loss is not finite."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._refuse(loss.item(), "loss")
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> float | None:
        """Return the gradient norm; raise InputError when it is not finite (fp16 scales and skips by itself)."""
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None and not self.args.fp16:
            self._refuse(float(norm), "gradient norm")
        return norm

    def _refuse(self, value: float, name: str) -> None:
        if math.isfinite(value):
            return
        raise InputError(
            f"the {name} is {value}: the run ends before the weights are touched",
            where=f"step {self.state.global_step + 1} of {self.state.max_steps}",
            why="one such step makes every weight nan, and nothing would say so",
            fix=f"start again from the last checkpoint with a lower --learning_rate (now {self.args.learning_rate:g})"
            ", --max_grad_norm 1, or in float32 (--bf16 false --fp16 false)",
        )


class Frugal(Guard):
    """What the trainers on rows with answers share; stands in front of TRL's class among the bases."""

    notes: list[str]
    token_count: TokenCount

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        # The sampler reads "length" from a data set that has lost the columns that are not named here.
        super()._set_signature_columns_if_needed()
        if "length" not in self._signature_columns:
            self._signature_columns.append("length")

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            order = Order()
            self.add_callback(order)
            sampler.generator = order.generator
        return sampler

    def _watch(self, notes: list[str]) -> None:
        """Wrap the forward passes; call it once the trainer is built."""
        self.notes, self.token_count = notes, TokenCount()
        self.model.forward = narrow(self.model.forward, self._count)
        reference = vars(self).get("ref_model")
        if reference is not None and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            reference.forward = narrow(reference.forward, self._count)

    def _count(self, real: int | torch.Tensor, computed: int) -> None:
        if self.model.training:
            self.token_count.add(real, computed)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one forward and backward pass, and count what a packed batch computes."""
        if "position_ids" in inputs and "attention_mask" not in inputs:
            real = (inputs["input_ids"] != self._tokenizer.pad_token_id) | (inputs["position_ids"] != 0)
            self.token_count.add(real.sum(), real.numel())
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log TRL's numbers, and the share of padding in what was computed so far."""
        if "loss" in logs and self.token_count.computed:
            logs["padding"] = round(self.token_count.padding, 4)
        super().log(logs, *args, **kwargs)


class SFTTrainer(Frugal, trl.SFTTrainer):
    """`trl.SFTTrainer` on the rows of `tokenize(..., "sft")`; packs them where that changes nothing but the speed."""

    def __init__(self, model: Any, args: Any, train_dataset: Any, eval_dataset: Any = None, **kwargs: Any):
        notes, args = [], copy(args)
        packing = args.packing and isinstance(train_dataset, Dataset)
        if packing:
            reason = _why_not_packed(model, kwargs.get("peft_config"), args)
            notes.append(
                reason or "rows packed to max_length: tried on this model, packed rows give what single rows give"
            )
            packing = not reason
        if packing:
            args.train_sampling_strategy = "random"
            strategy = args.packing_strategy
            train_dataset = _pack(train_dataset, args.max_length, strategy)
            eval_dataset = _pack(eval_dataset, args.max_length, strategy) if eval_dataset else eval_dataset
            kwargs["data_collator"] = PackedCollator(
                kwargs["processing_class"].pad_token_id, "flash" in (model.config._attn_implementation or "")
            )
        # These were honoured when the rows were encoded and packed; TRL would apply them to messages.
        args.packing = args.assistant_only_loss = args.padding_free = args.eval_packing = False
        args.completion_only_loss = args.chat_template_path = None
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.packed = packing
        self._watch(notes)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as TRL does; of packed rows TRL would count only the tokens of one row per batch."""
        super().log(logs, *args, **kwargs)
        if self.packed and "num_tokens" in logs:
            self.state.log_history[-1]["num_tokens"] = int(self.token_count.real) * self.args.world_size


class DPOTrainer(Frugal, trl.DPOTrainer):
    """`trl.DPOTrainer` on the rows of `tokenize(..., "dpo")`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._watch([])


class RewardTrainer(Frugal, trl.RewardTrainer):
    """`trl.RewardTrainer` on the rows of `tokenize(..., "reward")`."""

    def __init__(self, model: Any, args: Any, **kwargs: Any):
        args = copy(args)
        args.chat_template_path = None  # the rows were encoded with it
        super().__init__(model, args, **kwargs)
        self._watch([])


class KTOTrainer(Frugal, trl.KTOTrainer):
    """`trl.KTOTrainer` on the rows of `tokenize(..., "kto")`, in fixed batches of like lengths."""

    def __init__(self, model: Any, args: Any, train_dataset: Any, eval_dataset: Any = None, **kwargs: Any):
        args = copy(args)
        if args.loss_type == "kto":  # the losses without a reference point need no answers of other prompts
            args.train_sampling_strategy = "sequential"
            train_dataset = kl_completions(train_dataset, args.per_device_train_batch_size, args.seed)
            if eval_dataset:
                eval_dataset = kl_completions(eval_dataset, args.per_device_eval_batch_size, args.seed)
        super().__init__(model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self._watch([])


def _why_not_packed(model: Any, config: Any, args: Any) -> str:
    """Return why rows are not packed, or an empty string where packing is exact."""
    if isinstance(model, peft.PeftModel):
        config = model.active_peft_config
    if config is not None and config.is_prompt_learning:
        return (
            "rows not packed: virtual tokens would stand once in front of a whole packed row, and PEFT drops the "
            "positions that keep the rows apart"
        )
    if not args.max_length:
        return "rows not packed: packing needs --max_length"
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        return "rows not packed: under ZeRO-3 it cannot be tried beforehand whether packed rows stay apart"
    if not packs_exactly(model):
        return (
            f"rows not packed: with {model.config._attn_implementation} attention on this model packed rows would "
            "see each other"
        )
    return ""


def _pack(rows: Dataset, max_length: int, strategy: str) -> Dataset:
    """Pack rows best-fit into rows of at most max_length tokens; the lengths go along."""
    packed = trl.pack_dataset(rows.select_columns(["input_ids", "labels"]), max_length, strategy)
    return packed.with_format(None)


__all__ = ["DPOTrainer", "KTOTrainer", "RewardTrainer", "SFTTrainer"]
