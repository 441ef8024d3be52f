"""How far training moved a model: KL from where it started, and what a text costs it now (the alignment tax)."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from alignment.templates import ChatEncoder


def batched(rows: Sequence[list[int]], size: int) -> list[list[int]]:
    """Return the numbers of the rows in batches of like lengths, the longest first."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return [order[at : at + size] for at in range(0, len(order), size)]


def forward(model: Any, rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probabilities of every next token (rows, width - 1, vocabulary), the targets, -1 where none)."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    logits = model(input_ids=ids, attention_mask=mask).logits
    # prompt and p-tuning put virtual tokens in front; their logits come first
    logits = logits[:, logits.shape[1] - width : -1]
    return logits.float().log_softmax(-1), ids[:, 1:].masked_fill(mask[:, 1:] == 0, -1)


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 32) -> float:
    """Return exp of the mean negative log-likelihood per token; the first token of a text is not predicted."""
    encoder = ChatEncoder(tokenizer)
    rows = [encoder.encode_text(text) for text in texts]
    loss, tokens = 0.0, 0
    for numbers in batched(rows, batch_size):
        log_probs, targets = forward(model, [rows[i] for i in numbers], tokenizer.pad_token_id)
        known = targets >= 0
        picked = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        loss -= picked[known].double().sum().item()
        tokens += int(known.sum())
    return math.exp(loss / tokens)


@torch.inference_mode()
def answer_kl(
    model: Any, reference: Any, tokenizer: Any, prompts: Sequence[Any], answers: Sequence[str], batch_size: int = 32
) -> list[float]:
    """Return KL(model || reference) of each answer, in nats: summed over its tokens, the stop token included.

    The divergence of the next-token distributions is exact at every position; the positions are those of the given
    answers, which should be samples of `model` (temperature 1), for the mean to estimate the KL of whole answers.
    """
    encoder = ChatEncoder(tokenizer, model.generation_config)
    starts, rows = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        if isinstance(prompt, str):
            first = encoder.encode_text(prompt)
            whole = first + encoder.encode_text(answer, bos=False) + [tokenizer.eos_token_id]
        else:
            first = encoder.encode_prompt(prompt)
            whole = encoder.encode_chat([*prompt, {"role": "assistant", "content": answer}])
            whole = whole.input_ids[: whole.turns[-1][1]]
        starts.append(len(first))
        rows.append(whole)
    found = [0.0] * len(rows)
    for numbers in batched(rows, batch_size):
        part = [rows[i] for i in numbers]
        mine, targets = forward(model, part, tokenizer.pad_token_id)
        other, _ = forward(reference, part, tokenizer.pad_token_id)
        each = (mine.exp() * (mine - other)).sum(-1).masked_fill(targets < 0, 0.0)
        for place, number in enumerate(numbers):
            found[number] = each[place, starts[number] - 1 :].sum().item()
    return found
