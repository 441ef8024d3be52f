"""How far training moved a model: KL from where it started."""

from collections.abc import Sequence
from typing import Any

import torch

from alignment.likelihood import batched, next_logits
from alignment.templates import ChatEncoder


def forward(model: Any, rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probabilities of every next token (rows, width - 1, vocabulary), the targets, -1 where none)."""
    logits, targets = next_logits(model, rows, pad)
    return logits.float().log_softmax(-1), targets


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
