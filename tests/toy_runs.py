"""Whole runs of the recipes in this process, on toy rows: what tests of the run share."""

import importlib.util
import json
import os
import random
import signal
import sys
from pathlib import Path

import torch

from alignment import config, run

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("river", "boat", "rain", "mill", "fox", "dog", "letter", "number", "seven", "twelve", "old", "lazy")
RECIPES = ("sft", "dpo", "kto", "reward")
SETTINGS = [
    "--test_size=0", "--eval_strategy=no", "--no_eval_on_start", "--per_device_train_batch_size=4", "--max_steps=8",
    "--logging_steps=2", "--save_strategy=no", "--learning_rate=1e-2",
]  # fmt: skip


def say(generator, count):
    return " ".join(generator.choice(WORDS) for _ in range(count))


def toy_rows(folder, recipe, count=48):
    """Write rows for a recipe; returns the file."""
    generator = random.Random(recipe)
    rows = []
    for number in range(count):
        prompt = [{"role": "user", "content": say(generator, 3)}]
        good, bad = ([{"role": "assistant", "content": say(generator, generator.randint(1, 6))}] for _ in "ab")
        rows.append(
            {
                "sft": {"messages": prompt + good},
                "kto": {"prompt": prompt, "completion": good, "label": number % 2 == 0},
            }.get(recipe, {"prompt": prompt, "chosen": good, "rejected": bad})
        )
    file = folder / f"{recipe}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def load(recipe):
    spec = importlib.util.spec_from_file_location(f"recipe_{recipe}", ROOT / "recipes" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(monkeypatch, recipe, *flags):
    """Run a recipe as the command line would."""
    hook = sys.excepthook
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [f"recipes/{recipe}.py", *map(str, flags)])
        try:
            load(recipe).main()
        finally:
            sys.excepthook = hook


def built(monkeypatch, recipe, *flags):
    """Return (trainer, args, loaded, rows) of a recipe, as it hands them to `run`."""
    held = []
    with monkeypatch.context() as patch:
        patch.setattr(run, "run", lambda *parts: held.extend(parts))
        start(patch, recipe, *flags)
    return held


def signal_at(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal when a step begins."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(run.Progress, "on_step_begin", on_step_begin)


def weights(folder):
    from safetensors.torch import load_file

    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= {f"{file.name}:{name}": value for name, value in load_file(file).items()}
    assert found
    return found


def same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def arguments(recipe, *flags):
    """Return the parsed arguments without opening the run."""
    module = load(recipe)
    classes = {name: value for name, value in vars(module).items() if name.endswith("Config")}
    return config.parse(next(iter(classes.values())), module.DEFAULTS, list(map(str, flags)))
