"""Few wasted tokens: packed rows where packing is exact, and batches that are not padded to their longest row.

TRL's preference trainers pad the 2n sequences of n pairs to the longest of them. Here the same batch runs as a few
narrower ones (`narrow`), each padded to its own longest row, with the same result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.modeling_outputs import ModelOutput

from alignment.errors import InputError

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


@dataclass
class TokenCount:
    """Tokens that went through the model: `real` ones of the rows, and `computed` ones with the padding."""

    real: int | torch.Tensor = 0
    computed: int = 0

    def add(self, real: int | torch.Tensor, computed: int) -> None:
        """Count one forward pass."""
        self.real += real
        self.computed += computed

    @property
    def padding(self) -> float:
        """Share of the computed tokens that is padding, between 0 and 1."""
        return 1 - int(self.real) / self.computed if self.computed else 0.0


@dataclass
class PackedCollator:
    """Stacks packed rows, with positions that restart at each sequence and no attention mask.

    Without a mask, attention in transformers keeps the sequences apart by their positions (sdpa, eager, flex), or by
    the sequence lengths on flash attention, which wants all rows in one (`flatten`).

    Returns:
        input_ids, labels, position_ids: (rows, longest row), or (1, tokens) when flattened.
    """

    pad_token_id: int
    flatten: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Stack the rows of a batch."""
        lengths = [row.get("seq_lengths") or [len(row["input_ids"])] for row in rows]
        ids = [list(row["input_ids"]) for row in rows]
        labels = [list(row["labels"]) for row in rows]
        positions = [[i for n in row for i in range(n)] for row in lengths]
        if self.flatten:
            ids, labels, positions = ([sum(x, [])] for x in (ids, labels, positions))
        width = max(map(len, ids))

        def stack(values: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([row + [filler] * (width - len(row)) for row in values])

        labels = stack(labels, -100)
        positions = stack(positions, 0)
        # The first token of a sequence is predicted by the last one of its neighbour.
        labels[positions == 0] = -100
        return {"input_ids": stack(ids, self.pad_token_id), "labels": labels, "position_ids": positions}


@torch.no_grad()
def packing_error(model: Any, length: int = 12) -> float:
    """Return how far the logits of two sequences packed into one row are from those of each alone, on this model.

    The result is relative: |difference| / |logits| over the second sequence, the one that could see the other. On
    the embedded model and sdpa it is 7e-7 in float32 and 6e-3 in bfloat16 (there with differences of 0.16, more
    than any fixed bound), and 0.6 where the sequences see each other.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    device = model.get_input_embeddings().weight.device
    ids = torch.randint(0, vocabulary, (2, length), generator=generator).to(device)
    positions = torch.arange(length, device=device).repeat(2)[None]
    training = model.training
    model.eval()
    packed = model(input_ids=ids.view(1, -1), position_ids=positions, use_cache=False).logits[0]
    apart = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in ids])
    model.train(training)
    packed, apart = packed[length:].float(), apart[length:].float()
    return ((packed - apart).norm() / apart.norm()).item()


def packs_exactly(model: Any) -> bool:
    """Say whether packed rows give what separate rows give, by trying it (flash attention is taken at its word)."""
    if "flash" in (model.config._attn_implementation or ""):
        return True
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.03
    return packing_error(model) <= tolerance


@lru_cache(maxsize=64)
def split_rows(lengths: tuple[int, ...], parts: int) -> list[int]:
    """Return where to cut rows sorted by falling length into `parts` runs so that the padded area is smallest.

    Args:
        lengths: row lengths, longest first.
        parts: how many runs, at most len(lengths).

    Returns:
        The end of each run. Exact, by dynamic programming over the cuts; policy and reference share one answer.
    """
    n = len(lengths)
    area = [lengths[0] * end for end in range(n + 1)]  # of the first `end` rows in one run
    cuts = [[end] for end in range(n + 1)]
    for part in range(2, parts + 1):
        options = {
            end: min((area[cut] + lengths[cut] * (end - cut), cut) for cut in range(part - 1, end))
            for end in range(part, n + 1)
        }
        cuts = [[*cuts[options[end][1]], end] if end in options else [] for end in range(n + 1)]
        area = [options[end][0] if end in options else 0 for end in range(n + 1)]
    return cuts[n]


def narrow(forward: Callable, count: Callable[[int, int], None], parts: int = 6) -> Callable:
    """Wrap a model's forward so that a right-padded training batch runs as up to `parts` narrower batches.

    The number of parts depends on the number of rows only, so that every rank of a sharded model makes the same
    number of forward passes. Outputs come back in the order and with the padding of the batch. Calls that are not a
    plain training batch (generation, packed rows, router losses) go through unchanged.

    Args:
        forward: the model's forward, or the PeftModel's.
        count: called with (real tokens, computed tokens) of each pass.
        parts: how many passes at most.
    """

    @wraps(forward)
    def run(*args, **inputs) -> ModelOutput:
        mask = inputs.get("attention_mask")
        plain = not args and inputs.get("use_cache") is False and inputs.get("input_ids") is not None
        if not plain or mask is None or mask.dim() != 2 or inputs.get("output_router_logits"):
            return forward(*args, **inputs)
        sizes = mask.sum(1)
        order = sizes.argsort(descending=True, stable=True)
        lengths = sizes[order].tolist()
        if not mask[:, 0].all() or len(lengths) == 1:  # padded on the left, or a row of nothing
            count(sum(lengths), mask.numel())
            return forward(**inputs)
        outputs, start = [], 0
        for end in split_rows(tuple(lengths), min(parts, len(lengths))):
            rows, width = order[start:end], lengths[start]
            count(sum(lengths[start:end]), width * (end - start))
            outputs.append(forward(**{k: _take(v, rows, width, mask.shape) for k, v in inputs.items()}))
            start = end
        return _join(outputs, order.argsort(), mask.shape[1] - lengths[0])

    return run


def _take(value: Any, rows: torch.Tensor, width: int, shape: torch.Size) -> Any:
    """Return the rows of a batched tensor, cut to the width where it runs along the sequence."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] != shape[0]:
        return value
    return value[rows, :width] if value.dim() > 1 and value.shape[1] == shape[1] else value[rows]


def _join(outputs: list[ModelOutput], inverse: torch.Tensor, spare: int) -> ModelOutput:
    """Put the outputs of the narrower batches back into the rows, order and width of the whole one.

    Args:
        outputs: those of the parts, from the longest rows to the shortest.
        inverse: where each row of the batch now stands.
        spare: columns of the batch that no row reaches.
    """
    first = outputs[0]
    joined = {}
    for key, value in first.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            continue  # a loss averaged over one part says nothing about the batch; TRL's trainers do not read it
        values = [output[key] for output in outputs]
        if key in PER_TOKEN or (key == "logits" and value.dim() == 3):
            width = values[0].shape[1] + spare
            missing = [[0, 0] * (v.dim() - 2) + [0, width - v.shape[1]] for v in values]
            values = [torch.nn.functional.pad(v, pad) for v, pad in zip(values, missing, strict=True)]
        joined[key] = torch.cat(values)[inverse]
    return type(first)(**joined)


def flush_left(forward: Callable) -> Callable:
    """Wrap a model's forward so that rows padded on both sides, as prompts with answers are, lose the padding in front.

    `narrow` inside of it can then make narrower batches, and positions count from the first token, as they do when
    answers are sampled. Log-probabilities and entropies come back where they belong. Only calls of TRL's fused head go
    through it; those with more inputs than tokens, mask and labels go through unchanged.
    """

    @wraps(forward)
    def run(*args, **inputs) -> ModelOutput:
        mask, known = inputs.get("attention_mask"), {"input_ids", "attention_mask", "labels", "fused_lm_head"}
        if args or not inputs.get("fused_lm_head") or mask is None or set(inputs) != known:
            return forward(*args, **inputs)
        columns, pads = torch.arange(mask.shape[1], device=mask.device), mask.long().argmax(1, keepdim=True)
        there = (columns + pads) % len(columns)
        moved = {name: inputs[name].gather(1, there) for name in ("input_ids", "attention_mask", "labels")}
        output = forward(**moved, fused_lm_head=True, use_cache=False)
        width = len(columns) - 1  # a log-probability for every token but the first
        back = (columns[:width] - pads) % width
        for name in PER_TOKEN:
            if name in output and output[name] is not None:
                output[name] = output[name][:, -width:].gather(1, back)  # virtual tokens of PEFT stand in front
        return output

    return run


def kl_completions(rows: Dataset, batch_size: int, seed: int) -> Dataset:
    """Put thumbs into fixed batches of like lengths and give each row another row's answer of its batch.

    KTO estimates its reference point z from answers that belong to other prompts (arXiv:2402.01306, section 4.1). As in
    TRL the answers of a batch are shifted within it, so the order must not change afterwards; here the batches
    are of like lengths, and the shift is the one that pairs the fewest rows with an answer to their own prompt.

    Raises:
        InputError: the rows are a stream.
    """
    if not isinstance(rows, Dataset):
        raise InputError(
            "KTO's reference point needs answers of other rows, and a stream cannot be looked through for them",
            where="--streaming",
            why="rows are put into batches of like lengths before training",
            fix="leave --streaming out, or --loss_type apo_zero_unpaired, which has no reference point",
        )
    generator = np.random.default_rng(seed)
    order, lengths = generator.permutation(len(rows)), np.asarray(rows["length"])
    span = 50 * batch_size
    blocks = [order[i : i + span] for i in range(0, len(order), span)]
    order = np.concatenate([block[np.argsort(lengths[block], kind="stable")] for block in blocks])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    full = batches[:-1] if len(batches[-1]) < batch_size else batches
    shuffled = [full[i] for i in generator.permutation(len(full))] + batches[len(full) :]
    prompts, answers = rows["prompt_ids"], rows["completion_ids"]
    others = []
    for batch in shuffled:
        own = [prompts[int(i)] for i in batch]
        shifts = range(1, len(batch)) if len(batch) > 1 else [0]
        shift = min(shifts, key=lambda s: sum(own[i] == own[i - s] for i in range(len(own))))
        others += [answers[int(batch[i - shift])] for i in range(len(batch))]
    return rows.select(np.concatenate(shuffled)).add_column("KL_completion_ids", others)
