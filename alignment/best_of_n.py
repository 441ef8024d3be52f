"""Rejection sampling: several scored answers to a prompt; the best are rows for SFT, best and worst pairs for DPO."""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from alignment.checkpoints import load_checkpoint
from alignment.errors import InputError
from alignment.generation import Answer, Decoding, generate_answers, process_state
from alignment.opening import resuming
from alignment.report import write_text
from alignment.rewarding import checked

DRY = 16  # prompts that a dry run answers


@dataclass
class SamplingArguments:
    """How answers are drawn, and how often sampling and tuning take turns."""

    num_generations: int = field(default=8, metadata={"help": "Answers sampled to each prompt."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; higher is more varied."})
    max_completion_length: int = field(default=64, metadata={"help": "Answers are cut there, in tokens."})
    generation_batch_size: int = field(default=256, metadata={"help": "Answers sampled at a time and process."})
    rounds: int = field(default=1, metadata={"help": "Sample, keep, tune; again from the tuned model."})
    min_reward: float | None = field(
        default=None, metadata={"help": "Keep no answer with a lower reward; unset: the best one, however bad."}
    )

    def __post_init__(self):
        bounds = {
            "num_generations": (self.num_generations >= 2, "2 or more: the best of one is that one"),
            "temperature": (self.temperature > 0, "above 0: greedy answers are all the same"),
            "rounds": (self.rounds >= 1, "1 or more"),
        }
        for name, (fine, wanted) in bounds.items():
            if not fine:
                raise InputError(f"{name} is {vars(self)[name]}", where=f"--{name}", fix=wanted)


@dataclass
class Sampled:
    """What one round of sampling gave.

    Attributes:
        kept: {"messages"} or {"prompt", "completion"}, with "reward" and the row's own columns: rows for SFT.
        pairs: {"prompt", "chosen", "rejected"}: the best and the worst answer of each prompt that has both.
        numbers: mean rewards ("before", "sampled", "kept") and counts ("rows", "pairs", "answers", "flat": prompts
            whose answers are all worth the same; "ended": share that stopped by itself).
    """

    kept: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    numbers: dict[str, float | None]

    def sentence(self) -> str:
        """Return the counts as a sentence."""
        n = self.numbers
        return (
            f"{n['answers']:,} answers, mean reward {n['sampled']:.3f}, {n['ended']:.0%} ended; {n['rows']:,} kept "
            f"(mean {n['kept']:.3f}), {n['pairs']:,} pairs; {n['flat']:,} prompts whose answers are all worth the same"
        )


def rounds(args: Any, splits: Any, functions: list[Callable]) -> Iterator[Any]:
    """Sample, keep and write the rows of each round; yield the arguments to tune with, and go on when that is done.

    At the end the table of mean rewards is printed and kept in output_dir/rewards.json. In a dry run a few prompts are
    answered, what would be kept is shown, and the tuning looks at these rows and trains nothing.

    Args:
        args: the parsed arguments, with RewardArguments and SamplingArguments among `also`.
        splits: of `load_splits(args, "prompt")`; the held-out prompts are answered greedily, before and after.
        functions: reward functions, as a trainer takes them; their values are added up.

    Raises:
        InputError: no answer is good enough to be kept; a reward function fails; a run is to be resumed.
    """
    settings = next(group for group in args.also if isinstance(group, SamplingArguments))
    if resuming(args):
        raise InputError(
            "best of n cannot go on inside a round",
            where="--resume_from_checkpoint",
            fix="recipes/sft.py --data <output_dir>/rows/round_1.jsonl tunes on rows that were kept already",
        )
    rewards = [checked(function) for function in functions]
    train, test = list(splits.train), list(splits.test or [])
    console = Console(width=100, highlight=False, quiet=not process_state(args.train.use_cpu).is_main_process)
    folder, model, history = Path(args.train.output_dir), args.model.model_name_or_path, []
    if args.data.dry_run:
        yield from rehearsed(sample(model, train[:DRY], [], rewards, settings, args, 1), args, console)
        return
    for number in range(1, settings.rounds + 1):
        found = sample(model, train, test, rewards, settings, args, number)
        history.append(found.numbers)
        console.print(f"round {number}: " + found.sentence())
        if process_state().is_main_process:
            write_rows(folder / "rows" / f"round_{number}.jsonl", found.kept)
            write_rows(folder / "rows" / f"round_{number}_pairs.jsonl", found.pairs)
        process_state().wait_for_everyone()
        mine = round_of(args, number, model)
        yield mine
        model = mine.train.output_dir
    last = answer(model, test, rewards, Decoding(settings.max_completion_length), settings, args)[1] if test else []
    for entry, after in zip(history, [h["before"] for h in history[1:]] + [mean(last)], strict=True):
        entry["after"] = after
    if process_state().is_main_process:
        write_text(folder / "rewards.json", json.dumps(history, indent=1) + "\n")
    console.print(table(history))


def rehearsed(found: Sampled, args: Any, console: Console) -> Iterator[Any]:
    """Show what would be kept of the answers to a few prompts; yield a dry run of tuning on it, on rows thrown away."""
    console.print("dry run: " + found.sentence())
    for pair in found.pairs[:3]:
        prompt, best, worst = (
            " ".join((side if isinstance(side, str) else side[-1]["content"]).split())[:200]
            for side in (pair["prompt"], pair["chosen"], pair["rejected"])
        )
        console.print(f"  {prompt}\n    best   {best}\n    worst  {worst}", markup=False, style="dim")
    with tempfile.TemporaryDirectory() as folder:
        if process_state().is_main_process:
            write_rows(Path(folder) / "rows" / "round_1.jsonl", found.kept)
        mine = round_of(args, 1, args.model.model_name_or_path)
        mine.data.data = [str(Path(folder) / "rows" / "round_1.jsonl")]
        mine.train.output_dir = str(Path(folder) / "round_1")
        yield mine


def sample(
    model: str, train: list[dict], test: list[dict], rewards: list, settings: SamplingArguments, args: Any, number: int
) -> Sampled:
    """Answer every training prompt `num_generations` times and keep the best; measure the held-out prompts.

    Each answer draws from a random stream of its own, so that neither batch size nor processes change it.
    """
    count, decoding = settings.num_generations, Decoding(settings.max_completion_length)
    held_out = answer(model, test, rewards, decoding, settings, args)[1] if test else []
    decoding = replace(decoding, temperature=settings.temperature, seed=args.train.seed + number)
    repeated = [row for row in train for _ in range(count)]
    answers, values = answer(model, repeated, rewards, decoding, settings, args)
    got = np.array(values).reshape(len(train), count)
    texts = [[a.text for a in answers[i * count : (i + 1) * count]] for i in range(len(train))]
    kept, pairs = choose(train, texts, got, settings.min_reward)
    if not kept:
        raise InputError(
            f"none of {got.size:,} answers has a reward of {settings.min_reward:g} or more (best: {got.max():g})",
            where="--min_reward",
            why="nothing would be left to train on",
            fix="a lower --min_reward, more --num_generations, or a model that was tuned first (recipes/sft.py)",
        )
    numbers = {
        "before": mean(held_out),
        "sampled": float(got.mean()),
        "kept": float(np.mean([row["reward"] for row in kept])),
        "rows": len(kept),
        "pairs": len(pairs),
        "answers": got.size,
        "flat": int((got.max(1) == got.min(1)).sum()),
        "ended": float(np.mean([a.stopped for a in answers])),
    }
    return Sampled(kept, pairs, numbers)


def answer(
    model: str, rows: list[dict], rewards: list, decoding: Decoding, settings: SamplingArguments, args: Any
) -> tuple[list[Answer], list[float]]:
    """Return the answers of a checkpoint to the prompts of the rows, and the sum of their rewards."""
    device = process_state(args.train.use_cpu).device
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    policy, tokenizer = load_checkpoint(model, dtype, trust_remote_code=args.train.trust_remote_code)
    size = settings.generation_batch_size
    prompts = [row["prompt"] for row in rows]
    answers = generate_answers(policy.to(device), tokenizer, prompts, decoding, batch_size=size, label="answers")
    completions = [in_form(prompt, a.text) for prompt, a in zip(prompts, answers, strict=True)]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    total = np.zeros(len(rows))
    for reward in rewards:
        values = reward(prompts=prompts, completions=completions, ended=[a.stopped for a in answers], **columns)
        total += np.array([0.0 if value is None else value for value in values])
    return answers, total.tolist()


def mean(values: list[float]) -> float | None:
    """Return the mean; None for no values."""
    return float(np.mean(values)) if values else None


def in_form(prompt: str | list[dict], text: str) -> str | list[dict]:
    """Return an answer as TRL hands it to a reward function: a text, or a conversation of one assistant turn."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def choose(
    rows: Sequence[dict], texts: list[list[str]], rewards: np.ndarray, min_reward: float | None
) -> tuple[list[dict], list[dict]]:
    """Return (the best answer of each prompt, the pair of its best and worst).

    Of equal rewards the shortest answer wins: a reward that cannot tell must not pay for length. An empty answer is
    never kept. A prompt whose answers are all alike in reward gives no pair.
    """
    kept, pairs = [], []
    for row, said, got in zip(rows, texts, rewards, strict=True):
        order = sorted((i for i, text in enumerate(said) if text), key=lambda i: (-got[i], len(said[i]), i))
        if not order or (min_reward is not None and got[order[0]] < min_reward):
            continue
        best, worst, prompt = order[0], order[-1], row["prompt"]
        more = {name: value for name, value in row.items() if name not in ("prompt", "prompt_ids", "source", "row")}
        if isinstance(prompt, str):
            kept.append({"prompt": prompt, "completion": said[best], "reward": float(got[best]), **more})
        else:
            messages = [*prompt, *in_form(prompt, said[best])]
            kept.append({"messages": messages, "reward": float(got[best]), **more})
        if got[best] > got[worst]:
            chosen, rejected = (in_form(prompt, said[i]) for i in (best, worst))
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, **more})
    return kept, pairs


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line; the file appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def round_of(args: Any, number: int, model: str) -> Any:
    """Return the arguments of the tuning of one round: its model, its rows, its folder; `args` stay as they are."""
    mine = copy.copy(args)
    mine.data, mine.model, mine.train = copy.copy(args.data), copy.copy(args.model), copy.copy(args.train)
    folder = Path(args.train.output_dir)
    mine.data.data = [str(folder / "rows" / f"round_{number}.jsonl")]
    mine.model.model_name_or_path = model
    mine.train.output_dir = str(folder / f"round_{number}")
    return mine


def table(history: list[dict[str, float | None]]) -> Table:
    """Return the mean rewards of every round: held-out before, sampled, kept, held-out after."""
    shown = Table(title="Mean reward", title_justify="left")
    for head in ("round", "held out before", "sampled", "kept", "held out after", "kept rows", "pairs"):
        shown.add_column(head, justify="right")
    for number, row in enumerate(history, 1):
        means = ["" if row[name] is None else f"{row[name]:.3f}" for name in ("before", "sampled", "kept", "after")]
        shown.add_row(str(number), *means, f"{row['rows']:,.0f}", f"{row['pairs']:,.0f}")
    return shown
