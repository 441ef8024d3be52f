"""Answers of a model to prompts: batched, the same for every batch size, shared over all processes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alignment.errors import InputError
from alignment.templates import ChatEncoder


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen; a model's own generation_config adds its stop tokens and nothing else.

    Attributes:
        max_new_tokens: the answer is cut there.
        temperature: 0 takes the most likely token (greedy), more samples from softmax(logits / temperature).
        top_k: sample from the k most likely tokens only; 0 for all.
        top_p: sample from the fewest tokens that hold this probability together.
        num_beams: above 1, beam search.
        seed: of the sampling; each row draws from its own stream.
        stop_strings: an answer ends before the first of these.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 0
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self):
        bounds = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "num_beams": (self.num_beams >= 1, "1 or more"),
            "seed": (self.seed >= 0, "0 or more"),
            "stop_strings": (all(self.stop_strings), "texts that are not empty"),
        }
        for name, (fine, wanted) in bounds.items():
            if not fine:
                raise InputError(f"{name} is {vars(self)[name]}", where=f"--{name}", fix=wanted)
        if self.temperature > 0 and self.num_beams > 1:
            raise InputError(
                "beam search and sampling together",
                where="--num_beams and --temperature",
                why="the rows would not be reproducible one by one",
                fix="leave one of them out",
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise InputError(
                "top_k and top_p change nothing at temperature 0",
                where="--top_k, --top_p",
                fix="--temperature 1.0 samples; leave them out for greedy answers",
            )


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt.

    Attributes:
        text: the answer without control tokens and outer white space.
        tokens: its length, without the stop token.
        stopped: it ended by itself, at a stop token or string, before max_new_tokens.
        prompt_tokens: length of the prompt.
        raw: the text with its outer white space, which counts when it goes on with code.
    """

    text: str
    tokens: int
    stopped: bool
    prompt_tokens: int
    raw: str = ""


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict]],
    decoding: Decoding,
    *,
    batch_size: int = 32,
    label: str = "answers",
    made: Callable[[dict[int, Answer]], None] | None = None,
    streams: Sequence[int] | None = None,
    together: int = 1,
) -> list[Answer]:
    """Return the model's answer to each prompt, in their order, on every process.

    Prompts of similar length share a left-padded batch, the longest first. Greedy, sampled and beam answers
    depend on neither the batch size nor the number of processes, up to the rounding of the dtype.

    Args:
        model: on its device, in eval mode.
        tokenizer: the model's own.
        prompts: conversations, rendered with the chat template, or texts, continued as they are.
        decoding: how tokens are chosen.
        batch_size: prompts per batch and process.
        label: what the progress bar says.
        made: is given each batch of this process as soon as it is there: prompt number -> answer.
        streams: the random stream each prompt is sampled from; its number where not given.
        together: so many neighbouring prompts belong to one row, and are answered by the same process.

    Raises:
        InputError: no room for prompt and answer in the model's positions, or a prompt of no tokens.
    """
    encoder = ChatEncoder(tokenizer, model.generation_config)
    ids = [encoder.encode_text(p) if isinstance(p, str) else encoder.encode_prompt(p) for p in prompts]
    check_room(ids, model, decoding.max_new_tokens)
    state, streams = process_state(), streams or range(len(ids))
    mine = divide(ids, together, state.process_index, state.num_processes)
    found: list[tuple[int, Answer]] = []
    bar = tqdm(total=len(mine), desc=label, unit="row", disable=None if state.is_main_process else True)
    with bar, torch.inference_mode(), only_config(model, decoding, tokenizer, encoder.stops):
        tokens = 0
        for rows in batches(mine, ids, batch_size, equal=has_virtual_tokens(model)):
            drawn = [streams[i] for i in rows]
            width = max(len(ids[i]) for i in rows)
            ends = [StopAtStrings(tokenizer, decoding.stop_strings, width)] if decoding.stop_strings else []
            new = generate_batch(model, tokenizer.pad_token_id, [ids[i] for i in rows], drawn, decoding, ends)
            answers = {
                i: read_answer(tokenizer, out, encoder.stops, len(ids[i]), decoding.stop_strings)
                for out, i in zip(new, rows, strict=True)
            }
            found += answers.items()
            if made is not None:
                made(answers)
            tokens += sum(answer.tokens for answer in answers.values())
            bar.update(len(rows))
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s")
    everyone = dict(gather_object(found))
    return [everyone[i] for i in range(len(ids))]


def divide(ids: list[list[int]], together: int, rank: int, processes: int) -> list[int]:
    """Return the prompts of one process, the longest first; groups of `together` neighbours stay on one."""
    groups = [range(at, at + together) for at in range(0, len(ids), together)]
    groups.sort(key=lambda group: (-max(len(ids[i]) for i in group), group.start))
    mine = [i for group in groups[rank::processes] for i in group]
    return sorted(mine, key=lambda i: (-len(ids[i]), i))


def process_state(use_cpu: bool = False) -> PartialState:
    """Return this process's rank and device; the first call of a process decides.

    Accelerate has to be told of the CPU: a bare `PartialState()` in two processes without a GPU makes
    two worlds of one process, and each would do all the rows.
    """
    return PartialState(cpu=use_cpu or not torch.accelerator.is_available())


def has_virtual_tokens(model: PreTrainedModel | PeftModel) -> bool:
    """Say whether the model is a PEFT model that puts tokens of its own in front (prompt, p-tuning, prefix).

    PEFT ignores position ids for these, so that padding on the left would move the prompt's positions.
    """
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def batches(order: list[int], ids: list[list[int]], size: int, equal: bool) -> Iterator[list[int]]:
    """Cut `order` into batches of at most `size` rows; with `equal`, of rows that need no padding."""
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) == size or (equal and len(ids[row]) != len(ids[batch[0]]))):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def check_room(ids: list[list[int]], model: PreTrainedModel | PeftModel, max_new_tokens: int) -> None:
    """Raise InputError for an empty prompt, or one that with its answer exceeds the model's positions."""
    limit = model.config.get_text_config().to_dict().get("max_position_embeddings")
    for index, tokens in enumerate(ids):
        if not tokens:
            raise InputError("a prompt has no tokens", where=f"prompt {index + 1}")
        if limit and len(tokens) + max_new_tokens > limit:
            raise InputError(
                f"a prompt of {len(tokens):,} tokens and {max_new_tokens:,} new ones exceed the model's "
                f"{limit:,} positions",
                where=f"prompt {index + 1}",
                why="beyond them a model says anything",
                fix=f"--max_new_tokens {limit - len(tokens)} or less"
                if len(tokens) < limit
                else "fewer --shots, a model with more positions, or the rows without this one",
            )


@contextmanager
def only_config(
    model: PreTrainedModel | PeftModel,
    decoding: Decoding,
    tokenizer: PreTrainedTokenizerBase,
    stops: set[int],
) -> Iterator[None]:
    """Replace the model's generation config for a while.

    Given as an argument, a config would be completed from the model's own: a repetition penalty that somebody
    shipped with the weights would then be in every "greedy" answer.
    """
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        num_beams=decoding.num_beams,
        eos_token_id=sorted(stops) or None,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    owners = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    kept = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, own in zip(owners, kept, strict=True):
            owner.generation_config = own


def generate_batch(
    model: PreTrainedModel | PeftModel,
    pad: int,
    ids: list[list[int]],
    streams: list[int],
    decoding: Decoding,
    ends: Sequence[StoppingCriteria] = (),
) -> list[list[int]]:
    """Return the new token ids of each prompt, padding included; `streams` are the rows' random streams."""
    width = max(map(len, ids))
    device = model.device
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    processors = LogitsProcessorList()
    if decoding.temperature > 0:
        processors.append(SampleByRow(streams, decoding, device))
    if decoding.num_beams > 1:  # a beam that ends early may still lose: cut afterwards
        ends = ()
    criteria = StoppingCriteriaList(ends)
    out = model.generate(input_ids=tokens, attention_mask=mask, logits_processor=processors, stopping_criteria=criteria)
    return out[:, width:].tolist()


def read_answer(
    tokenizer: PreTrainedTokenizerBase,
    tokens: list[int],
    stops: set[int],
    prompt_tokens: int,
    stop_strings: Sequence[str] = (),
) -> Answer:
    """Cut new tokens at the first stop token, their text at the first stop string; what follows is padding."""
    end = next((i for i, token in enumerate(tokens) if token in stops), None)
    body = tokens if end is None else tokens[:end]
    while stop_strings and body and body[-1] == tokenizer.pad_token_id:
        body = body[:-1]
    text = tokenizer.decode(body, skip_special_tokens=True)
    cuts = [at for string in stop_strings if (at := text.find(string)) >= 0]
    raw = text[: min(cuts, default=len(text))]
    return Answer(raw.strip(), len(body), end is not None or bool(cuts), prompt_tokens, raw)


class StopAtStrings(StoppingCriteria):
    """Ends a row as soon as one of the strings stands in its new tokens; the prompt does not count.

    Args:
        tokenizer: decodes the last few tokens at each step.
        strings: what ends an answer.
        start: width of the prompts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], start: int):
        self.tokenizer, self.strings, self.start = tokenizer, strings, start
        self.tail = max(len(string.encode()) for string in strings) + 1  # no token is shorter than a byte

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        """Return which rows have ended (rows,)."""
        tails = input_ids[:, max(self.start, input_ids.shape[1] - self.tail) :].tolist()
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        ended = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


class SampleByRow(LogitsProcessor):
    """Draws each row's next token from the row's own random stream, and leaves only that token possible.

    `generate` draws for the whole batch from one generator, so an answer would depend on its neighbours. Here
    each row has a stream (seed, number): one uniform number per token, looked up in the cumulated probabilities.
    """

    def __init__(self, streams: list[int], decoding: Decoding, device: torch.device):
        draws = [np.random.default_rng((decoding.seed, row)).random(decoding.max_new_tokens) for row in streams]
        self.precision = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no double
        self.draws = torch.tensor(np.array(draws), dtype=self.precision, device=device)  # (rows, new tokens)
        self.step = 0
        self.warpers = [TemperatureLogitsWarper(decoding.temperature)]
        if decoding.top_k:
            self.warpers.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            self.warpers.append(TopPLogitsWarper(decoding.top_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores (rows, vocabulary) with 0 at the drawn token and -inf elsewhere."""
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        heights = scores.to(self.precision).softmax(-1).cumsum(-1)
        # Below the total by construction, so that the drawn token always has a probability above zero.
        draw = self.draws[:, self.step, None] * heights[:, -1:]
        token = torch.searchsorted(heights, draw, right=True).clamp(max=scores.shape[-1] - 1)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)
