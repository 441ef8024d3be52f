"""What a language model thinks of given tokens: log-likelihoods, and the perplexity of texts in sliding windows."""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from alignment.errors import InputError
from alignment.generation import has_virtual_tokens
from alignment.templates import ChatEncoder

LOGITS = 2**28  # logits held at a time: 1 GiB in 32 bits


@dataclass(frozen=True)
class Window:
    """Tokens that a model reads together, and from which on they count.

    Attributes:
        ids: token ids, no more than the model has positions.
        first: ids[first:] are scored, each given all before it in `ids`; 1 or more.
    """

    ids: list[int]
    first: int


def batched(rows: Sequence[list[int]], size: int, logits: int = 0, lead: int = 0) -> list[list[int]]:
    """Return the numbers of the rows in batches of like lengths, the longest first.

    With `logits` numbers per token a batch has no more rows than `LOGITS` leaves room for, but one row at least; the
    first `lead` tokens of each row need none.
    """
    order, batches, at = sorted(range(len(rows)), key=lambda i: -len(rows[i])), [], 0
    while at < len(order):
        room = LOGITS // max(1, (len(rows[order[at]]) - lead) * logits) if logits else size
        batches.append(order[at : at + max(1, min(size, room))])
        at += len(batches[-1])
    return batches


def next_logits(model: Any, rows: list[list[int]], pad: int, lead: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the model says of every token after the first `lead` + 1.

    Returns:
        logits (rows, width - 1 - lead, vocabulary), and the tokens they are about, -1 where there is none.
    """
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    kept = width - lead
    fewer = {"logits_to_keep": kept} if lead and keeps_logits(model) else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **fewer).logits
    # counted from the end: prompt and p-tuning put virtual tokens in front, and their logits come first
    logits = logits[:, logits.shape[1] - kept : -1]
    return logits, ids[:, 1 + lead :].masked_fill(mask[:, 1 + lead :] == 0, -1)


def keeps_logits(model: Any) -> bool:
    """Say whether the model can compute the logits of the last tokens only (code of its own may not)."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


@torch.inference_mode()
def log_likelihoods(model: Any, windows: Sequence[Window], pad: int, batch_size: int = 32) -> list[float]:
    """Return the log-likelihood of each window's scored tokens, in nats; it does not depend on the batch."""
    found = [0.0] * len(windows)
    lead = min((window.first for window in windows), default=1) - 1
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for numbers in batched([window.ids for window in windows], batch_size, vocabulary, lead):
        logits, targets = next_logits(model, [windows[i].ids for i in numbers], pad, lead)
        for place, number in enumerate(numbers):  # one row at a time: the copy in 32 bits stays small
            first, end = windows[number].first - 1 - lead, len(windows[number].ids) - 1 - lead
            losses = cross_entropy(logits[place, first:end].float(), targets[place, first:end], reduction="none")
            found[number] = -losses.double().sum().item()
    return found


def sliding_windows(ids: list[int], size: int, stride: int) -> Iterator[Window]:
    """Cut a text into windows that score each token but the first exactly once.

    The recipe of transformers' documentation ("Perplexity of fixed-length models"): windows begin every `stride`
    tokens and score what the one before has not. With stride = size - 1 they share one token only, the fastest and
    the least context; the smaller the stride, the more context each token has.

    Raises:
        ValueError: a stride that would leave tokens out: it has to be 1 or more, and less than the window.
    """
    if not 1 <= stride < size:
        raise ValueError(f"windows of {size} tokens every {stride}")
    done = 1
    for begin in range(0, max(len(ids) - 1, 0), stride):
        end = min(begin + size, len(ids))
        yield Window(ids[begin:end], done - begin)
        done = end
        if end == len(ids):
            return


def room_for_text(model: Any) -> int | None:
    """Return how many tokens of text fit into the model's positions, virtual tokens taken off; None: no limit."""
    limit = model.config.get_text_config().to_dict().get("max_position_embeddings")
    virtual = model.active_peft_config.num_virtual_tokens if has_virtual_tokens(model) else 0
    return limit - virtual if limit else None


def with_prefix(ids: list[int], tokenizer: Any) -> list[int]:
    """Return a text's ids behind one token that is not scored: BOS, else EOS, as lm-eval has it.

    So the first token of a text is predicted as well, and every byte of it is paid for.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prefix = eos if bos is None else bos
    if prefix is None:
        raise InputError(
            "the tokenizer has neither a BOS nor an EOS token", why="the first token of a text needs one before it"
        )
    return ids if bos is not None and ids[:1] == [bos] else [prefix, *ids]


def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 32) -> float:
    """Return exp of the mean negative log-likelihood per token; the first token of a text is not predicted."""
    encoder = ChatEncoder(tokenizer)
    rows = [Window(encoder.encode_text(text), 1) for text in texts]
    losses = log_likelihoods(model, rows, tokenizer.pad_token_id, batch_size)
    return math.exp(-sum(losses) / sum(len(row.ids) - 1 for row in rows))
