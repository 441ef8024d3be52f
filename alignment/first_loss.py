"""What the loss of the first batch says before anything is trained."""

import math
from typing import Any

import torch

from alignment.adapters import PROMPT_LEARNING
from alignment.heads import ENDINGS
from alignment.labels import against_guessing
from alignment.tokenization import Tokenized


def look_at_first_loss(trainer: Any, args: Any, loaded: Any, rows: Tokenized) -> list[tuple[str, ...]]:
    """Run the first batch without training: the loss has a known value where nothing has been learnt yet.

    Args:
        trainer: the constructed trainer.
        args: the parsed arguments.
        loaded: what `load_model` returned.
        rows: what `tokenize` or `encode` returned.

    Returns:
        (level, what) or (level, what, fix) of what was found.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return [("fact", "the loss before training is not looked at: the model is not sharded yet")]
    loss, metrics = first_loss(trainer)
    if not math.isfinite(loss):
        return [("error", f"the loss of the first batch is {loss}", "--bf16 false, or another model")]
    if rows.form in ("sequence", "token") and (classes := trainer.model.config.num_labels) > 1:
        return [against_guessing(loss, classes)]
    if rows.form in ("sft", "reward", *ENDINGS):
        return [("fact", f"loss of the first batch before training: {loss:.3f}")]
    plain = _unweighted(args) and args.train.loss_type in (["sigmoid"], "sigmoid", "kto")
    expected = math.log(2) if rows.form == "dpo" else 0.5
    name = "ln 2" if rows.form == "dpo" else "0.5"
    margin = metrics.get("rewards/margins", 0.0)
    short = trainer.args.bf16 or trainer.args.fp16 or "quantization_config" in vars(loaded.model.config)
    tolerance = 0.02 if short else 2e-3
    off = abs(margin) > tolerance or (plain and abs(loss - expected) > tolerance)
    should = f" ({name} is {expected:.4f})" if plain else ""
    text = f"before training: loss {loss:.4f}{should}, margin {margin:.4f}"
    if not off:
        return [("fact", f"{text}: policy and reference agree")]
    if loaded.method in PROMPT_LEARNING:
        return [("warning", f"{text}: untrained virtual tokens have already moved the policy")]
    fix = "the reference is not the model that is trained: load both from one place"
    return [("error", text, fix)]


def _unweighted(args: Any) -> bool:
    """Say whether the loss has its textbook value at the start (no smoothing, no class weights)."""
    values = vars(args.train)
    weights = [values.get("desirable_weight", 1.0), values.get("undesirable_weight", 1.0)]
    return not values.get("label_smoothing") and weights == [1.0, 1.0] and not values.get("use_weighting")


@torch.no_grad()
def first_loss(trainer: Any) -> tuple[float, dict[str, float]]:
    """Return loss and metrics of a batch of the first rows, with the model as it stands; nothing is changed.

    The batch goes through the trainer's collator but not through its data loader, whose start would move the random
    numbers and leave a half-read loader behind.
    """
    size = trainer.args.per_device_train_batch_size
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset.take(size))))
    state, training = torch.get_rng_state(), trainer.model.training
    trainer.model.eval()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch)
    metrics = {}
    if "_metrics" in vars(trainer):  # TRL's trainers keep them
        metrics = {name: sum(values) / len(values) for name, values in trainer._metrics["eval"].items() if values}
        trainer._metrics["eval"].clear()
    trainer.model.train(training)
    torch.set_rng_state(state)
    return loss.item(), metrics
