"""The recipes as a user runs them: what they leave on disk, how one goes on from another, that they learn."""

import importlib.util
import sys

import pytest
from conftest import ROOT

RECIPES = ("sft", "dpo", "kto", "reward")
ROWS = {"sft": "chat", "dpo": "preferences", "kto": "feedback", "reward": "preferences"}


def recipe_main(name):
    """The main() of a recipe, read from its file as a script is."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def launch(name, *flags):
    """Run a recipe in this process; returns what it gave to `run`: trainer, args, loaded model, rows."""
    from alignment import run

    seen, finish = [], run.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run", lambda *given: (seen.extend(given), finish(*given)))
        patch.setattr(sys, "argv", [str(ROOT / "recipes" / f"{name}.py"), *map(str, flags)])
        patch.setattr(sys, "excepthook", sys.__excepthook__)
        recipe_main(name)()
    return seen


def few_rows(recipe, folder, rows=8, split="train"):
    """A file with the first rows of the embedded data of a recipe."""
    source = ROOT / "data" / "tiny" / ROWS[recipe] / f"{split}.jsonl"
    file = folder / f"{recipe}.jsonl"
    file.write_text(
        "".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8"
    )
    return file
