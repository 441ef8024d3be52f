"""Rewards as a trainer uses them: functions whose values are checked, and a reward model as one of them."""

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel

from alignment.checkpoints import load_checkpoint
from alignment.errors import InputError, nearest
from alignment.folders import ADAPTER_WEIGHTS, check_model, fetch, is_adapter
from alignment.heads import adapter_config
from alignment.rewards import last_text, steps_of
from alignment.templates import ChatEncoder

# What a reward function may ask for beside the columns of the rows.
GIVEN = ("prompts", "completions", "completion_ids", "ended", "trainer_state", "log_extra", "log_metric")


class RewardModel:
    """A reward model as a reward function: the score of each answer, the same alone as in any batch.

    It reads texts, not token ids: a conversation is rendered with its own chat template and encoded with its own
    tokenizer, as in its training. An answer that was cut off is shown to it as if it had ended there: a reward for
    `ended` beside it keeps answers from growing.

    Args:
        path: what recipes/reward.py left, full weights or an adapter.
        batch_size: answers per forward pass; changes the speed only.
        dtype: of the weights.
        options: `load_in_4bit`, `trust_remote_code`; see `alignment.models.load_checkpoint`.

    Raises:
        InputError: it has no score head, or more than one score, or a tokenizer of another model.
    """

    __name__ = "reward_model"

    def __init__(self, path: str | Path, batch_size: int = 64, dtype: str | torch.dtype = "float32", **options: bool):
        path = fetch(path)
        check_scores(path)
        self.path, self.batch_size = str(path), batch_size
        self.model, self.tokenizer = load_checkpoint(path, dtype, head="sequence", **options)
        self.model.requires_grad_(False)
        self.encoder = ChatEncoder(self.tokenizer)
        self.positions = self.model.config.get_text_config().to_dict().get("max_position_embeddings") or math.inf

    def to(self, device: torch.device | str) -> "RewardModel":
        """Move the model to a device and return self."""
        if "quantization_config" not in vars(self.model.config):
            self.model.to(device)
        return self

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        """Return one score per answer.

        Args:
            prompts: conversations (lists of turns) or texts.
            completions: lists of turns, or texts that go on where the prompts end.
            columns: the other columns of the rows; "tools" and "chat_template_kwargs" are used for rendering.

        Raises:
            InputError: prompt and answer together exceed the reward model's positions.
        """
        extra = {name: columns[name] for name in ("tools", "chat_template_kwargs") if name in columns}
        ids = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids.append(self.encode(prompt, completion, **{name: values[i] for name, values in extra.items()}))
        return self.score(ids)

    def encode(
        self, prompt: Any, completion: Any, tools: str | None = None, chat_template_kwargs: dict | None = None
    ) -> list[int]:
        """Return the token ids of a prompt with its answer and the token that ends it, as in training."""
        if isinstance(prompt, str):
            ids = (self.encoder.encode_text(prompt) if prompt else []) + self.encoder.encode_text(
                last_text(completion), bos=not prompt
            )
            eos = self.tokenizer.eos_token_id
            return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
        kwargs = {k: v for k, v in (chat_template_kwargs or {}).items() if v is not None}
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        turns = [*prompt, *completion]
        return self.encoder.with_kwargs(kwargs).encode_chat(turns, json.loads(tools) if tools else None).input_ids

    def answer_tokens(self, completion: Any) -> int:
        """Return how many tokens an answer has, without what its template puts around it."""
        return len(self.encoder.encode_text(last_text(completion), bos=False))

    @torch.inference_mode()
    def score(self, ids: list[list[int]]) -> list[float]:
        """Return one score per sequence of the reward model's own token ids; like lengths share a batch."""
        longest = max(map(len, ids), default=0)
        if longest > self.positions:
            raise InputError(
                f"prompt and answer have {longest:,} tokens, and the reward model knows {self.positions:,} positions",
                where=self.path,
                why="beyond them its scores mean nothing",
                fix="a smaller --max_completion_length, or shorter prompts",
            )
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        scores, pad = [0.0] * len(ids), self.tokenizer.pad_token_id
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            width = max(len(ids[i]) for i in rows)
            tokens = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in rows], device=self.model.device)
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in rows], device=tokens.device)
            logits = self.model(input_ids=tokens, attention_mask=mask).logits
            for i, value in zip(rows, logits[:, 0].float().tolist(), strict=True):
                scores[i] = value
        return scores

    def shares_tokenizer(self, tokenizer: Any) -> bool:
        """Say whether another tokenizer gives the same ids to the same texts (PPO's shared backbone needs it)."""
        own, other = self.tokenizer, tokenizer
        return (
            own.get_vocab() == other.get_vocab() and own.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
        )


def check_scores(path: str | Path, flag: str = "--reward_model") -> None:
    """Raise InputError when a checkpoint, given by this flag, does not give one score per text."""
    fix, path = "a folder that recipes/reward.py left", fetch(path)
    if is_adapter(path):
        config = adapter_config(path)
        if config.task_type != "SEQ_CLS":
            raise InputError(
                f"{path} is the adapter of a language model: it has no score head",
                where=flag,
                why="its scores would be random numbers",
                fix=fix,
            )
        with safe_open(Path(path) / ADAPTER_WEIGHTS, "pt") as file:
            heads = [name for name in file.keys() if name.endswith(("score.weight", "classifier.weight"))]  # noqa: SIM118
            labels = file.get_slice(heads[0]).get_shape()[0] if heads else 1
    else:
        config = _config(path)
        names = config.get("architectures") or []
        if not any(name.endswith("ForSequenceClassification") for name in names):
            raise InputError(
                f"{path} has no score head (it is a {', '.join(names) or 'model without a head'})",
                where=flag,
                why="its scores would be random numbers",
                fix=fix,
            )
        labels = len(config.get("id2label") or {0: "", 1: ""})
    if labels != 1:
        raise InputError(
            f"{path} gives {labels} numbers a text: it is a classifier",
            where=flag,
            why="a reward is one number",
            fix=fix + ", or a reward function that makes one number of its answer",
        )


def _config(path: str | Path) -> dict[str, Any]:
    """Return config.json of a folder, or of a hub id, as it is written."""
    check_model(path)
    return PretrainedConfig.get_config_dict(str(path))[0]


class Checked:
    """A reward function whose values are looked at before they reach the loss.

    Args:
        function: takes lists of equal length by name (`prompts`, `completions`, the columns of the rows, and of GIVEN
            what it asks for) and returns a list of numbers, None where it has nothing to say; or for each answer a list
            with one number per step (`alignment.rewards.steps_of`), whose mean is then its value.
        stops: token ids at which an answer ends.

    Attributes:
        by_step: whether the trainer can use a reward per step.
        steps: the rewards per step of the last call, None for an answer without.

    Raises (when called):
        InputError: the function raised, or returned something else than one finite number or None per answer.
    """

    def __init__(self, function: Callable, stops: Iterable[int] = ()):
        self.function, self.stops, self.by_step = function, set(stops), False
        self.steps: list[list[float] | None] = []
        self.__name__ = name_of(function)
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.names = {p.name for p in named}
        self.needs = [p.name for p in named if p.default is p.empty]

    def check_columns(self, columns: list[str] | None, where: str = "the rows") -> None:
        """Raise InputError when the function needs a column that is not there; None: they are not known."""
        there = [name for name in columns or [] if name not in ("prompt", "completion")]
        missing = [name for name in self.needs if name not in (*there, *GIVEN)] if columns is not None else []
        if missing:
            near = nearest(missing[0], there)
            fix = "rename it in a data/*.yaml or in to_prompt, or change the function"
            if missing == ["verifier"]:
                fix = "--verifier number (or exact, contains, regex, …) for rows that name none"
            raise InputError(
                f"the reward function {self.__name__} needs a column {missing[0]!r}, which {where} do not have",
                where=f"columns: {', '.join(there) or 'none beside prompt'}",
                why="it decides what an answer is worth",
                fix=(f"did you mean {near}? " if near else "") + fix,
            )

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        """Return one number or None per answer."""
        given = self._given(prompts, completions, columns)
        with _Blame(self, given):
            values = self.function(**given)
        if inspect.isawaitable(values):
            raise TypeError("an asynchronous reward function has to be wrapped by `checked`")
        return self.look(values, given)

    def _given(self, prompts: list, completions: list, columns: dict) -> dict[str, Any]:
        """Return the arguments the function takes; `ended` says of each answer whether it stopped by itself."""
        given = {"prompts": prompts, "completions": completions} | columns
        if "ended" not in given and given.get("completion_ids") is not None:
            given["ended"] = [bool(ids) and ids[-1] in self.stops for ids in given["completion_ids"]]
        return given if self.takes_all else {name: value for name, value in given.items() if name in self.names}

    def look(self, values: Any, given: dict[str, Any]) -> list[float | None]:
        """Return the values as plain numbers; raise InputError for anything that is none."""
        count = len(next(iter(given.values())))
        if isinstance(values, torch.Tensor | np.ndarray):
            values = values.tolist()
        if not isinstance(values, list | tuple):
            raise self.wrong(f"returned {_shown(values)}, not a list", None, given)
        if len(values) != count:
            raise self.wrong(f"returned {len(values)} values for {count} answers", None, given)
        numbers: list[float | None] = []
        self.steps = []
        for index, value in enumerate(values):
            self.steps.append(self._steps(value, index, given) if isinstance(value, list) else None)
            if self.steps[-1] is not None:
                value = sum(self.steps[-1]) / max(len(self.steps[-1]), 1)
            if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
                value = value.item()
            if value is not None and not isinstance(value, Real):
                raise self.wrong(f"returned {_shown(value)}, which is no number", index, given)
            if value is not None and not math.isfinite(value):
                raise self.wrong(f"returned {float(value)}", index, given)
            numbers.append(None if value is None else float(value))
        return numbers

    def _steps(self, values: list, index: int, given: dict[str, Any]) -> list[float]:
        """Return the rewards of the steps of one answer."""
        if not self.by_step:
            raise self.wrong("returned a list for one answer: rewards per step are for GRPO", index, given)
        wanted = len(steps_of(given["completions"][index])) if "completions" in given else len(values)
        if len(values) != wanted:
            raise self.wrong(f"returned {len(values)} rewards for an answer of {wanted} steps (lines)", index, given)
        for value in values:
            if not isinstance(value, Real) or not math.isfinite(value):
                raise self.wrong(f"returned {_shown(value)} for a step", index, given)
        return [float(value) for value in values]

    def wrong(self, what: str, index: int | None, given: dict[str, Any]) -> InputError:
        """Return the error for a value, with the row, prompt and answer it belongs to."""
        return InputError(
            f"the reward function {self.__name__} {what}",
            where=place(index, given) if index is not None else "",
            why="the advantages of the whole group are made from it",
            fix="return one finite number per answer, or None where the reward does not apply",
        )


class CheckedAsync(Checked):
    """A reward function written with `async def`, checked in the same way."""

    async def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        """Return one number or None per answer."""
        given = self._given(prompts, completions, columns)
        with _Blame(self, given):
            values = await self.function(**given)
        return self.look(values, given)


def checked(function: Callable, stops: Iterable[int] = ()) -> Checked:
    """Return a reward function with its values checked; a path to a reward model is loaded first.

    Raises:
        InputError: it cannot be called.
    """
    if isinstance(function, Checked):
        return function
    if isinstance(function, str | Path):
        function = RewardModel(function)
    if isinstance(function, PreTrainedModel) or not callable(function):
        raise InputError(
            f"{_shown(function)} is no reward function",
            where="reward_funcs",
            fix="a function of prompts and completions, or RewardModel(path)",
        )
    called = function if inspect.isfunction(function) else type(function).__call__
    return (CheckedAsync if inspect.iscoroutinefunction(called) else Checked)(function, stops)


def call(reward: Checked, prompts: list, completions: list, **columns: Any) -> list[float | None]:
    """Return the values of a checked function, asynchronous or not, outside a trainer."""
    values = reward(prompts=prompts, completions=completions, **columns)
    return asyncio.run(values) if inspect.iscoroutine(values) else values


class _Blame:
    """Turns what a reward function raises, whatever it is, into an InputError that names the row."""

    def __init__(self, reward: Checked, given: dict[str, Any]):
        self.reward, self.given = reward, given

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception):
            return  # nothing happened, or Ctrl-C
        if isinstance(error, InputError):
            where = place(self._culprit(), self.given)
            what = f"the reward function {self.reward.__name__}: {error.what}"
            raise InputError(what, where=where, why=error.why, fix=error.fix) from error
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'without a message'}"
        line = _line(trace, self.reward.function)
        raise InputError(
            f"the reward function {self.reward.__name__} raised {text}" + (f" (line {line})" if line else ""),
            where=place(self._culprit(), self.given),
            why="without its value there is nothing to learn from this answer",
            fix="mend the function, or let it return None for such a row",
        ) from error

    def _culprit(self) -> int | None:
        """Return the first answer that makes the function raise when it is alone, or None."""
        if isinstance(self.reward, CheckedAsync):
            return None
        count = len(next(iter(self.given.values())))
        for index in range(count):
            alone = {k: [v[index]] if isinstance(v, list) and len(v) == count else v for k, v in self.given.items()}
            trial = _Trial()
            with trial:
                self.reward.function(**alone)
            if trial.failed:
                return index
        return None


class _Trial:
    """Notes whether its block raised."""

    failed = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> bool:
        self.failed = isinstance(error, Exception)
        return self.failed


def _line(trace: Any, function: Callable) -> int | None:
    """Return the line in the user's own function at which it raised."""
    code, line = function.__code__ if inspect.isfunction(function) else None, None
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code is code else line
        trace = trace.tb_next
    return line


def place(index: int | None, given: dict[str, Any]) -> str:
    """Return source, row, prompt and answer of one of the answers, in words."""
    if index is None:
        return "no single answer does it alone: a whole batch does"
    there = {name: given[name][index] for name in ("source", "row", "prompts", "completions") if name in given}
    row = f"{there['source']}, row {there['row']}" if {"source", "row"} <= there.keys() else f"answer {index + 1}"
    texts = [
        f"{name}: {_shown(last_text(there[key]), 120)}"
        for key, name in (("prompts", "prompt"), ("completions", "answer"))
        if key in there
    ]
    return "\n        ".join([row, *texts])


def name_of(function: Callable) -> str:
    """Return what a reward is called in the log."""
    return function.__name__ if "__name__" in dir(function) else type(function).__name__


def _shown(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"
