"""Log-likelihoods of continuations: batched, the part that prompts share computed once, spread over all processes."""

import copy
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from alignment.errors import InputError
from alignment.generation import has_virtual_tokens, process_state

WORTH_SHARING = 16  # tokens: a shorter common beginning is cheaper to compute with every row


@dataclass(frozen=True)
class Encoded:
    """One request in token ids: int32 `context` of one token or more, and each continuation's ids."""

    context: np.ndarray
    continuations: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens the model is given for the longest continuation, whose last token is only predicted."""
        return len(self.context) + max(map(len, self.continuations)) - 1


def choice_log_likelihoods(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[tuple[str, Sequence[str]]],
    *,
    groups: Sequence[Hashable] | None = None,
    batch_size: int = 64,
    label: str = "choices",
    made: Callable[[dict[int, list[float]]], None] | None = None,
    say: Callable[[str], None] = tqdm.write,
) -> list[list[float]]:
    """Return the log-likelihood of each continuation of each request, on every process.

    Same tokens and same numbers as lm-eval's `HFLM.loglikelihood` (0.4.13), which computes every prompt whole;
    here the tokens that all prompts of a group begin with are computed once. The numbers depend on neither the
    batch size nor the number of processes nor the tokenizer's padding side, up to the rounding of the dtype.

    Args:
        model: on its device, in eval mode; with an adapter, its virtual tokens come first.
        tokenizer: the model's own.
        requests: (context, continuations). A space between the two belongs to the continuation: ("2 + 2 =",
            [" 4", " five"]). Continuations may have several tokens, whose log-likelihoods are added.
        groups: per request a key; requests of one key share their common beginning. One group when not given.
        batch_size: continuations (or contexts, where all continuations are one token) per batch and process.
        label: what the progress bar says.
        made: is given each batch of this process as soon as it is there: request number -> log-likelihoods.
        say: is told, on the main process, what the user should know.

    Raises:
        InputError: no language-model head, a prompt beyond the model's positions, an empty continuation.
    """
    encoded = encode_requests(tokenizer, requests)
    check_window(encoded, model)
    return score_encoded(model, encoded, groups=groups, batch_size=batch_size, label=label, made=made, say=say)


def encode_requests(tokenizer: PreTrainedTokenizerBase, requests: Sequence[tuple[str, Sequence[str]]]) -> list[Encoded]:
    """Return the requests in token ids, cut between context and continuation where lm-eval 0.4.13 cuts.

    That is `TemplateLM._encode_pair`: white space at the end of a context moves to its continuations, both are
    encoded together, and what follows the tokens of the context alone is the continuation. An empty context
    becomes the BOS token (EOS without one).

    Raises:
        InputError: a continuation has no tokens.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    opening = tokenizer.decode(start)
    contexts = [context.rstrip() for context, _ in requests]
    tails: dict[tuple[str, ...], tuple[list[int], list[list[int]]]] = {}
    found = []
    for number, ids in enumerate(_encode(tokenizer, contexts, opening)):
        context = contexts[number]
        texts = [requests[number][0][len(context) :] + text for text in requests[number][1]]
        if context:
            ends = _ends(tokenizer, (context, ids, opening), texts, tails)
        else:
            ids = np.array([start], dtype=np.int32)
            ends = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
            ends = [end[1:] if end[:1] == [start] else end for end in ends]
        if not ends or not all(ends):
            raise InputError("a continuation has no tokens", where=f"request {number + 1}: {texts}"[:200])
        found.append(Encoded(ids, tuple(map(tuple, ends))))
    return found


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], opening: str) -> Iterator[np.ndarray]:
    """Yield the ids of each text; special tokens are added unless it begins with the opening one already."""
    for at in range(0, len(texts), 256):  # a list of Python integers is large: never one of all texts
        part = texts[at : at + 256]
        ids: dict[int, list[int]] = {}
        for special in (True, False):
            chosen = [i for i, text in enumerate(part) if text.startswith(opening) != special]
            if chosen:
                batch = [part[i] for i in chosen]
                made = tokenizer(batch, add_special_tokens=special, return_attention_mask=False)["input_ids"]
                ids |= zip(chosen, made, strict=True)
        yield from (np.array(ids[i], dtype=np.int32) for i in range(len(part)))


def _ends(
    tokenizer: PreTrainedTokenizerBase, context: tuple[str, np.ndarray, str], texts: list[str], tails: dict
) -> list[list[int]]:
    """Return the ids of each continuation of a context (text, ids, opening).

    Prompts of one kind end with the same line. Encoding that line with the continuations is enough, once, where
    the context's own ids end as the line's do; else the whole is encoded.
    """
    text, ids, opening = context
    tail = text[text.rfind("\n") :] if "\n" in text else ""
    if tail:
        if (key := (tail, *texts)) not in tails:
            alone = tokenizer.encode(tail, add_special_tokens=False)
            together = [tokenizer.encode(tail + end, add_special_tokens=False) for end in texts]
            tails[key] = alone, [end[len(alone) :] for end in together]
        alone, ends = tails[key]
        if ids[-len(alone) :].tolist() == alone:
            return ends
    special = not text.startswith(opening)
    return [tokenizer.encode(text + end, add_special_tokens=special)[len(ids) :] for end in texts]


def window(model: PreTrainedModel | PeftModel) -> int | None:
    """Return how many tokens of text the model takes, after its virtual tokens; None where it has no limit."""
    config = model.config.get_text_config()
    names = [name for name in ("n_positions", "max_position_embeddings", "n_ctx") if hasattr(config, name)]
    virtual = model.active_peft_config.num_virtual_tokens if has_virtual_tokens(model) else 0
    return getattr(config, names[0]) - virtual if names else None


def check_window(encoded: Sequence[Encoded], model: PreTrainedModel | PeftModel) -> None:
    """Raise InputError for a request that exceeds the model's positions."""
    limit = window(model)
    for number, request in enumerate(encoded):
        if limit is not None and request.length > limit:
            raise InputError(
                f"a prompt of {request.length:,} tokens exceeds the {limit:,} that the model takes",
                where=f"request {number + 1}",
                why="beyond its positions a model says anything",
                fix="fewer examples in the prompt, or a shorter text",
            )


@dataclass
class _Row:
    """Ids to compute for a request, and what to read: (choice, its ids) at the last `count` positions."""

    request: int
    ids: np.ndarray
    count: int
    targets: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)


@dataclass
class _Batch:
    """Rows computed together; their first `shared` ids are those of the whole group."""

    group: int
    shared: int
    rows: list[_Row]

    @property
    def tokens(self) -> int:
        """Tokens computed, padding included, without the shared ones."""
        return len(self.rows) * (max(len(row.ids) for row in self.rows) - self.shared)


def score_encoded(
    model: PreTrainedModel | PeftModel,
    encoded: Sequence[Encoded],
    *,
    groups: Sequence[Hashable] | None = None,
    batch_size: int = 64,
    label: str = "choices",
    made: Callable[[dict[int, list[float]]], None] | None = None,
    say: Callable[[str], None] = tqdm.write,
) -> list[list[float]]:
    """Return the log-likelihoods of encoded requests; see `choice_log_likelihoods`."""
    state, scorer = process_state(), _Scorer(model)
    if not scorer.shares and state.is_main_process:
        say(f"{label}: the cache of this model cannot be shared ({scorer.why}): every prompt is computed whole")
    batches = _plan(encoded, [0] * len(encoded) if groups is None else groups, batch_size, scorer)
    batches = _share_out(batches, state.process_index, state.num_processes)
    found: list[tuple[int, list[float]]] = []
    mine = len({row.request for batch in batches for row in batch.rows})
    bar = tqdm(total=mine, desc=label, unit="row", disable=None if state.is_main_process else True)
    with bar, torch.inference_mode():
        for batch in batches:
            values = scorer.score(batch)
            found += values.items()
            if made is not None:
                made(values)
            bar.update(len(values))
            bar.set_postfix_str(f"{scorer.computed / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s")
    everyone = dict(gather_object(found))
    return [everyone[number] for number in range(len(encoded))]


def _rows(number: int, request: Encoded) -> list[_Row]:
    """Return the rows of a request: continuations that differ in their last token only share one."""
    rows: dict[tuple[int, ...], _Row] = {}
    for choice, ids in enumerate(request.continuations):
        if ids[:-1] not in rows:
            whole = np.concatenate([request.context, np.array(ids[:-1], dtype=np.int32)])
            rows[ids[:-1]] = _Row(number, whole, len(ids))
        rows[ids[:-1]].targets.append((choice, ids))
    return list(rows.values())


def _common(rows: list[_Row]) -> int:
    """Return how many ids all rows begin with, short of the positions that are read."""
    end = min(len(row.ids) - row.count for row in rows)
    for row in rows[1:]:
        differ = np.flatnonzero(row.ids[:end] != rows[0].ids[:end])
        end = int(differ[0]) if differ.size else end
    return end


def _plan(encoded: Sequence[Encoded], groups: Sequence[Hashable], size: int, scorer: "_Scorer") -> list[_Batch]:
    """Cut the requests into batches: group by group, the longest first, a request never in two."""
    members: dict[Hashable, list[list[_Row]]] = {}
    for number, (request, key) in enumerate(zip(encoded, groups, strict=True)):
        members.setdefault(key, []).append(_rows(number, request))
    batches = []
    for group, requests in enumerate(members.values()):
        rows = [row for request in requests for row in request]
        shared = _common(rows) if scorer.shares and len(rows) > 1 else 0
        batch = _Batch(group, shared if shared >= WORTH_SHARING else 0, [])
        for request in sorted(requests, key=lambda request: -max(len(row.ids) for row in request)):
            uneven = scorer.equal and len({len(row.ids) for row in batch.rows + request}) > 1
            if batch.rows and (len(batch.rows) + len(request) > size or uneven):
                batches.append(batch)
                batch = _Batch(group, batch.shared, [])
            batch.rows += request
        batches.append(batch)
    return batches


def _share_out(batches: list[_Batch], index: int, processes: int) -> list[_Batch]:
    """Return the batches of one process: a run of neighbours, of about the same number of tokens for each.

    Neighbours, because each process computes the common part of every group it has a batch of.
    """
    if not batches:
        return []
    ends = np.cumsum([batch.tokens for batch in batches])
    first, last = (bisect_right(ends, ends[-1] * part / processes) for part in (index, index + 1))
    return batches[first:last]


def _copies(cache: Cache, count: int) -> Cache:
    """Return a cache that begins, in each of `count` rows, with a cache of one row; that one stays as it is."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in twin.layers:
        if layer.is_initialized:  # a view: going on with the cache writes new tensors
            layer.keys = layer.keys.expand(count, -1, -1, -1)
            layer.values = layer.values.expand(count, -1, -1, -1)
    return twin


class _Scorer:
    """Computes batches with one model, and keeps the cache of the common part of the last group.

    Rows are padded on the right, where padding comes after every token that counts: the positions and the
    attention of real tokens are those of a row on its own, in every architecture. A prompt-learning adapter
    becomes a cache of its virtual tokens from which the base model goes on: what PEFT's forward pass computes, but
    that one takes no cache.
    """

    def __init__(self, model: PreTrainedModel | PeftModel):
        virtual = has_virtual_tokens(model)
        self.base = model.get_base_model() if virtual else model
        self.head = self.base.get_output_embeddings()
        if self.head is None:
            raise InputError(
                f"{type(self.base).__name__} has no language-model head",
                why="the probability of a word is read from it",
                fix="give a causal language model",
            )
        self.computed = 0
        self.group, self.cache = -1, None
        self.why = self._cannot_share(model)
        self.shares = not self.why
        self.runner = self.base if self.shares else model
        # PEFT's forward pass puts the virtual tokens in front, and ignores positions: no padding then
        self.equal = virtual and not self.shares
        self.start = self._virtual_cache(model) if virtual and self.shares else None

    @torch.inference_mode()
    def _cannot_share(self, model: PreTrainedModel | PeftModel) -> str:
        """Return why a cache cannot go on with several rows; an empty string when it can."""
        if isinstance(model, PeftModel) and vars(model.active_peft_config).get("alora_invocation_tokens"):
            return "an activated LoRA looks for its tokens in the whole prompt"
        probe = torch.zeros((1, 2), dtype=torch.long, device=self.base.device)
        cache = self.base(input_ids=probe, use_cache=True).get("past_key_values")
        if not isinstance(cache, Cache):
            return "it is not one of keys and values"
        kinds = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
        return ", ".join(sorted(kind.__name__ for kind in kinds))

    @torch.inference_mode()
    def _virtual_cache(self, model: PeftModel) -> Cache:
        """Return the cache of the adapter's virtual tokens, for one row."""
        prompt = model.get_prompt(batch_size=1)
        if isinstance(prompt, Cache):  # prefix tuning
            return prompt
        prompt = prompt.to(self.base.get_input_embeddings().weight.dtype)
        return self.base(inputs_embeds=prompt, use_cache=True)["past_key_values"]

    def score(self, batch: _Batch) -> dict[int, list[float]]:
        """Return request -> log-likelihood of each of its continuations."""
        if batch.group != self.group:
            self.group, self.cache = batch.group, self.start
            if batch.shared:
                ids = torch.from_numpy(batch.rows[0].ids[None, : batch.shared]).long()
                self.cache = self._forward(ids, torch.ones_like(ids), torch.zeros_like(ids[:, :1]), keep=True)[1]
        rest = [torch.from_numpy(row.ids[batch.shared :]).long() for row in batch.rows]
        ids = torch.nn.utils.rnn.pad_sequence(rest, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in rest], batch_first=True)
        most = max(row.count for row in batch.rows)
        places = torch.tensor([[max(len(part) - most + i, 0) for i in range(most)] for part in rest])
        logits, _ = self._forward(ids, mask, places)
        values = logits.float().log_softmax(-1)  # (rows, most, vocabulary)
        found: dict[int, dict[int, float]] = {}
        for row, read in zip(batch.rows, values, strict=True):
            lines = torch.arange(most - row.count, most)
            for choice, target in row.targets:
                picked = read[lines, torch.tensor(target)].double().sum().item()
                found.setdefault(row.request, {})[choice] = picked
        return {request: [picked[i] for i in range(len(picked))] for request, picked in found.items()}

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor, keep: bool = False
    ) -> tuple[torch.Tensor, Cache | None]:
        """Go on from the cache with ids (rows, width); return the logits (rows, n, vocabulary) at `places` (rows, n).

        With `keep`, also return the cache with the ids in it. Only the hidden states at `places` go through the
        head: they are taken on their way into it, so that scaling and capping after it stay the model's own.
        """
        device, width = self.base.device, ids.shape[1]
        past = _copies(self.cache, len(ids)) if self.cache is not None else None
        if past is not None:
            mask = torch.cat([mask.new_ones((len(ids), past.get_seq_length())), mask], dim=1)
        self.computed += ids.numel()

        def take(head: torch.nn.Module, inputs: tuple) -> tuple:
            hidden = inputs[0]
            at = places.to(hidden.device) + hidden.shape[1] - width  # PEFT may have put virtual tokens in front
            return (hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])), *inputs[1:])

        hook = self.head.register_forward_pre_hook(take)
        try:
            out = self.runner(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                past_key_values=past,
                use_cache=keep or past is not None,
            )
        finally:
            hook.remove()
        return out["logits"], out.get("past_key_values")
