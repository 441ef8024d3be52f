"""Sample the answers of a rollout in one batch: prompts read once, finished rows dropped, log-probabilities kept."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

COMPACT_BELOW = 0.75  # share of unfinished rows under which the finished ones are dropped from the batch


@dataclass(frozen=True)
class SamplingRules:
    """How the next token is drawn.

    Attributes:
        max_new_tokens: where an answer is cut. temperature: above 0. top_k: 0 for all. top_p: 1 for all.
        stops: tokens that end an answer. pad: the token for padding on the left.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stops: tuple[int, ...]
    pad: int


def row_draws(seed: tuple[int, ...], rows: list[int], count: int) -> torch.Tensor:
    """Return uniform numbers (rows, count): each row has its own stream, whatever rows stand beside it."""
    return torch.from_numpy(np.stack([np.random.default_rng((*seed, row)).random(count) for row in rows]))


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompts: list[list[int]], draws: torch.Tensor, rules: SamplingRules
) -> tuple[list[list[int]], list[list[float]]]:
    """Return the new tokens of each prompt, the stop token included, and the policy's log-probability of each.

    Equal prompts are read once. The log-probabilities are those of softmax(logits / temperature) before top_k and
    top_p, which is what the loss compares with.

    Args:
        model: a causal model with a key-value cache, adapters (if any) active.
        prompts: token ids.
        draws: (rows, max_new_tokens) uniform numbers in [0, 1), see `row_draws`.
        rules: how tokens are drawn.
    """
    device, count = model.device, len(prompts)
    logits, cache, mask = _read(model, prompts, rules.pad)
    tokens = torch.full((count, rules.max_new_tokens), rules.pad, device=device)
    chosen = torch.zeros(count, rules.max_new_tokens, device=device)
    lengths = torch.full((count,), rules.max_new_tokens, device=device)
    stops = torch.tensor(rules.stops, device=device)
    alive, running = torch.arange(count, device=device), torch.ones(count, dtype=torch.bool, device=device)
    draws = draws.to(device, torch.float32 if device.type == "mps" else torch.float64)
    warpers = _warpers(rules)
    for step in range(rules.max_new_tokens):
        token, log_prob = _draw(logits, draws[alive, step], rules.temperature, warpers)
        tokens[alive, step] = torch.where(running, token, rules.pad)
        chosen[alive, step] = log_prob
        ended = running & torch.isin(token, stops)
        lengths[alive[ended]] = step + 1
        running = running & ~ended
        left = int(running.sum())
        if not left or step + 1 == rules.max_new_tokens:
            break
        if left < COMPACT_BELOW * len(alive):
            alive, token, mask = alive[running], token[running], mask[running]
            cache.batch_select_indices(running.nonzero().squeeze(1))
            running = running[running]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = model(
            input_ids=token[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache, use_cache=True,
        ).logits[:, -1]  # fmt: skip
    sizes = lengths.tolist()
    answers = [row[:size] for row, size in zip(tokens.tolist(), sizes, strict=True)]
    return answers, [row[:size] for row, size in zip(chosen.tolist(), sizes, strict=True)]


def _read(
    model: PreTrainedModel, prompts: list[list[int]], pad: int
) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
    """Read each different prompt once; return logits, cache and mask with one row per prompt given."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    width = max(map(len, places))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in places], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in places], device=model.device)
    cache = DynamicCache(config=model.config)
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache, use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    rows = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=model.device)
    if len(places) < len(prompts):
        cache.batch_select_indices(rows)
        return out.logits[rows, -1], cache, mask[rows]
    return out.logits[:, -1], cache, mask


def _draw(
    logits: torch.Tensor, draws: torch.Tensor, temperature: float, warpers: LogitsProcessorList
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token per row, looked up in the cumulated probabilities, and its log-probability."""
    log_probs = torch.log_softmax(logits.float() / temperature, -1)
    kept = warpers(None, log_probs) if warpers else log_probs
    heights = kept.to(draws.dtype).exp().cumsum(-1)
    # Below the total by construction, so that the drawn token always has a probability above zero.
    token = torch.searchsorted(heights, draws[:, None] * heights[:, -1:], right=True)
    token = token.clamp(max=logits.shape[-1] - 1)
    return token.squeeze(1), log_probs.gather(1, token).squeeze(1)


def _warpers(rules: SamplingRules) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if rules.top_k:
        found.append(TopKLogitsWarper(rules.top_k))
    if rules.top_p < 1:
        found.append(TopPLogitsWarper(rules.top_p))
    return found
