"""What in a model an adapter acts on, read from the model: its linear layers, head and token rows."""

import math
import re

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from alignment.errors import InputError, nearest

# Parts of a vision-language model that text fine-tuning leaves alone.
NOT_TEXT = r".*(vision_tower|vision_model|visual|multi_modal_projector|audio_tower).*"


def _width(layer: torch.nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a linear layer; GPT-2 keeps its weights transposed."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features


def _place(name: str) -> tuple[str, str] | None:
    """Split `model.layers.3.mlp.experts.0.w2` into (container, pattern of what follows the layer number)."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return None
    return ".".join(parts[:at]), r"\.".join(r"\d+" if p.isdigit() else re.escape(p) for p in parts[at + 1 :])


def attention_and_feedforward(model: PreTrainedModel) -> tuple[str, str]:
    """Return two regular expressions over module names, as PEFT's `target_modules` takes them.

    The first matches every projection of the attention and the layer through which each feed-forward block
    writes back; the second matches the latter only. Raises ValueError when the model has no such layers.
    """
    hidden = model.config.get_text_config().hidden_size
    attention, feedforward = set(), set()
    for name, layer in model.named_modules():
        place = _place(name) if isinstance(layer, torch.nn.Linear | Conv1D) else None
        if place is None or re.fullmatch(NOT_TEXT, name):
            continue
        inputs, outputs = _width(layer)
        if any("attn" in part or "attention" in part for part in name.lower().split(".")):
            attention.add(place)
        elif outputs == hidden and inputs != hidden:
            feedforward.add(place)
    if not attention:
        raise ValueError(f"{type(model).__name__} has no numbered layers with attention projections")
    return _pattern(attention | feedforward), _pattern(feedforward)


def _pattern(places: set[tuple[str, str]]) -> str:
    """Return one regular expression for a set of places; it matches nothing when there are none."""
    alternatives = sorted(rf"{re.escape(container)}\.\d+\.{rest}" for container, rest in places)
    return f"({'|'.join(alternatives)})" if alternatives else r"(?!)"


def common_block(model: PreTrainedModel, most: int = 256) -> int:
    """Return the largest size up to `most` that divides inputs and outputs of every layer but the head."""
    head = model.get_output_embeddings()
    widths = [
        width
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear | Conv1D) and layer is not head
        for width in _width(layer)
        if width > 1  # a new head of one score is no target
    ]
    common = math.gcd(*widths)
    return next(size for size in range(min(common, most), 0, -1) if common % size == 0)


def named(model: PreTrainedModel, wanted: str | list[str]) -> str | list[str]:
    """Return the target modules a user named as PEFT takes them.

    Args:
        model: the model the adapter goes onto.
        wanted: names or their last parts, one such name, a regular expression, or "all-linear".

    Raises:
        InputError: one of them is not in the model; PEFT would pass it over while another fits.
    """
    names = [name for name, _ in model.named_modules() if name]
    if wanted == "all-linear" or (isinstance(wanted, str) and any(re.fullmatch(wanted, n) for n in names)):
        return wanted
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)  # TRL unpacks a list of one
    missing = [w for w in wanted if not any(name == w or name.endswith(f".{w}") for name in names)]
    if not missing:
        return wanted
    last = sorted({part for name in names if not (part := name.rpartition(".")[2]).isdigit()})
    close = nearest(missing[0], last)
    raise InputError(
        f"no module of the model is called {missing[0]!r}",
        where="target_modules",
        why="PEFT would leave it out and say nothing while another name fits",
        fix=f"did you mean {close!r}?" if close else f"one of {', '.join(last)}",
    )


def has_vision(model: PreTrainedModel) -> bool:
    """Say whether the model has parts that do not read text."""
    return any(re.fullmatch(NOT_TEXT, name) for name, _ in model.named_modules())


def head_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules outside the backbone that hold weights: the head of a classifier."""
    backbone = model.base_model
    return [
        name
        for name, module in model.named_children()
        if module is not backbone and any(True for _ in module.parameters())
    ]


def linear_layers(model: PreTrainedModel, spared: list[str]) -> list[str]:
    """Return the last parts of the names of all linear layers of the backbone, without those of the spared modules."""
    layers = {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear | Conv1D) and name.partition(".")[0] not in spared
    }
    return sorted(layers - {name.rpartition(".")[2] for name in spared})


def control_tokens(tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> set[int]:
    """Return the ids of the special tokens that the chat template writes, and the stop tokens."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {i for i, text in special.items() if text in template} | {i for i in stops if i is not None}


@torch.no_grad()
def untrained_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the control tokens whose embedding rows were never trained.

    A row counts as untrained when its norm is below a hundredth of the median row's, or when another special
    or reserved token has practically the same row (distance below a thousandth of the median norm):
    gradients would have moved two used tokens apart. LoRA alone never changes these rows, so the model
    cannot learn to stop.
    """
    weight = model.get_input_embeddings().weight
    if weight.ndim != 2 or weight.is_meta:
        return []
    config = model.generation_config.eos_token_id if model.generation_config else None
    stops = {tokenizer.eos_token_id, *(config if isinstance(config, list) else [config])} - {None}
    candidates = sorted(i for i in control_tokens(tokenizer, stops) if i < len(weight))
    if not candidates:
        return []
    special = {i for i in tokenizer.added_tokens_decoder if i < len(weight)}
    # Rows past the tokenizer's end are never used: the best picture of an untrained row there is.
    pool = sorted(special | set(candidates) | set(range(len(tokenizer), len(weight))))
    median = weight.float().norm(dim=1).median()
    rows, others = weight[candidates].float(), weight[pool].float()
    distance = torch.cdist(rows, others)
    for row, token in enumerate(candidates):
        distance[row, pool.index(token)] = torch.inf
    twin = distance.min(dim=1).values < 1e-3 * median
    empty = rows.norm(dim=1) < 1e-2 * median
    return [token for token, bad in zip(candidates, (twin | empty).tolist(), strict=True) if bad]
