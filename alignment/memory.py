"""Count parameters and estimate the memory of a run before it starts."""

from typing import Any

import torch

# Bytes an optimizer keeps per trainable parameter, apart from the gradient.
_STATE = (("8bit", 2), ("sgd", 0), ("adafactor", 0.1), ("lion", 4), ("adalomo", 0.1), ("galore", 2))
_ADAM_STATE = 8
TILE = 4096


def parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return (trainable, total) parameters; a 4-bit weight counts as the numbers it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            state = parameter.quant_state
            # packed: two numbers to a byte of the storage type
            count = state.shape.numel() if state is not None else count * 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def memory_estimate(
    model: torch.nn.Module,
    train_args: Any,
    tokens: int,
    reference: torch.nn.Module | None = None,
    shards: int = 1,
) -> dict[str, int]:
    """Return a rough count of the bytes one device needs, by what they are for.

    weights: the parameters and buffers as they lie there (a 4-bit weight is half a byte), the reference
        included.
    gradients: one number per trainable parameter, in its type.
    optimizer: two 32-bit numbers per trainable parameter for Adam, less for 8-bit, SGD, Adafactor.
    activations: per layer and token 34 bytes × hidden size at 16 bits (Korthikanti et al. 2022, without the
        attention matrix, which flash and sdpa attention do not keep), double at 32 bits; with gradient
        checkpointing the input of each layer and one layer in full.
    logits: three 32-bit copies of tokens × vocabulary (they, their softmax, the gradient), for at most a
        tile of
        tokens: TRL multiplies with the head in tiles.

    Args:
        model: the model, with its adapter when there is one.
        train_args: a TrainingArguments; `optim`, `gradient_checkpointing`, `bf16`, `fp16` are read.
        tokens: tokens in one forward pass on one device, padding included (batch × length, twice that
            for pairs).
        reference: a second model held in memory (DPO with full fine-tuning).
        shards: processes over which FSDP or ZeRO-3 divides weights, gradients and optimizer.
    """
    weights = sum(t.numel() * t.element_size() for m in (model, reference) if m for t in _tensors(m))
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trainable)
    name = str(train_args.optim)
    state = next((size for key, size in _STATE if key in name), _ADAM_STATE)
    optimizer = int(sum(p.numel() for p in trainable) * state)
    config = model.config.get_text_config()
    size = 1 if train_args.bf16 or train_args.fp16 or model.dtype.itemsize == 2 else 2
    layer = 34 * tokens * config.hidden_size * size
    layers = config.num_hidden_layers
    inputs = 2 * tokens * config.hidden_size * size * layers
    kept = inputs + layer if train_args.gradient_checkpointing else layer * layers
    found = {
        "weights": weights // shards,
        "gradients": gradients // shards,
        "optimizer": optimizer // shards,
        "activations": kept,
        "logits": 3 * 4 * min(tokens, TILE) * config.vocab_size if model.get_output_embeddings() else 0,
    }
    return found | {"total": sum(found.values())}


def _tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
