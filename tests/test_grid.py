"""Every recipe with every PEFT method: what trains, what stays, what comes back from disk.

The table in recipes/README.md is what happened here; PLUMBLINE_WRITE_GRID=1 and the slow tests write it anew.
"""

import os
import re
from functools import partial

import pytest
import torch
from conftest import ROOT
from test_recipes import RECIPES, few_rows, launch
from transformers import TrainerCallback

from alignment import online, run
from alignment.adapters import NAMES, PROMPT_LEARNING, all_names
from alignment.critic import policy_of
from alignment.errors import InputError
from alignment.models import load_checkpoint

README = ROOT / "recipes" / "README.md"
START, END = "<!-- grid: written by tests/test_grid.py -->\n", "<!-- end of grid -->\n"
ONLINE = ("grpo", "rloo", "ppo")
GRID = (*RECIPES, *ONLINE, "classify")
SAMPLING = {"num_generations": 4, "max_completion_length": 8, "rehearsal_prompts": 0}
IDS = torch.tensor([[5, 6, 7, 8, 40, 41, 42]])
SIX = ("none", "lora", "qlora", "dora", "ia3", "prefix", "prompt", "ptuning")
# Notes about this run, not about the method in it.
QUIET = (
    "learning rate",
    "new, trained from scratch",
    "rows packed",
    "no held-out rows",
    "the prefix starts",
    "rewards:",
)


class Before(TrainerCallback):
    """Keeps every parameter as it is when training begins, and whether it is to be trained."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = model
        self.state = {key: (p.detach().clone(), p.requires_grad) for key, p in model.named_parameters()}


def answer(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float()


def letters(completions):
    """A reward that differs from answer to answer, as that of untrained models does not."""
    return [sum(map(str.isalpha, answer[0]["content"])) / 8 for answer in completions]


def two_steps(recipe, name, folder, bits4=False):
    """Train two steps as the recipe does; returns its trainer, loaded model and what stood there before."""
    before, finish = Before(), run.run
    flags = {
        "peft": name, "load_in_4bit": bits4 or name == "qlora",
        "data": few_rows(recipe, folder), "output_dir": folder / "out", "test_size": 0,
        "max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no",
        "learning_rate": 0.01, "lr_scheduler_type": "constant", "warmup_steps": 0,
    }  # fmt: skip
    flags |= SAMPLING if recipe in ONLINE else {}
    flags |= {"max_steps": 4} if recipe == "ppo" else {}  # the critic's head starts at 0, and its adapter behind it

    def remember(trainer, *rest):
        trainer.add_callback(before)
        finish(trainer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run", remember)
        patch.setattr(online, "reward_functions", lambda functions, args: [letters])
        patch.setattr(run, "draw_curves", lambda *args, **kwargs: None)  # half a second, and not the matter here
        trainer, _, loaded, _ = launch(recipe, *(word for key, v in flags.items() for word in (f"--{key}", v)))
    return trainer, loaded, before


def check(recipe, name, folder, bits4=False):
    """Fail unless exactly the trainable tensors changed and the folder gives the same model again."""
    trainer, loaded, before = two_steps(recipe, name, folder, bits4)
    now = dict(before.model.named_parameters())
    assert before.state.keys() == now.keys()
    changed = {key for key, (was, _) in before.state.items() if not torch.equal(was, now[key])}
    trainable = {key for key, (_, trained) in before.state.items() if trained}
    assert trainable and changed == trainable
    assert name == "none" or len(trainable) < len(now)
    files = {file.name for file in (folder / "out").iterdir()}
    assert ("adapter_model.safetensors" if name != "none" else "model.safetensors") in files
    assert name == "none" or "model.safetensors" not in files, "an adapter is saved without its base"
    head = "sequence" if recipe in ("reward", "classify") else "causal"
    again = partial(load_checkpoint, dtype=loaded.model.dtype, head=head, load_in_4bit=bits4 or name == "qlora")
    trained = answer(policy_of(before.model))
    torch.testing.assert_close(answer(again(folder / "out")[0]), trained, rtol=1e-5, atol=1e-4)
    if head == "causal":  # and it is another model than the base
        base, _ = load_checkpoint(ROOT / "data/tiny/model", loaded.model.dtype, load_in_4bit=bits4 or name == "qlora")
        assert not torch.allclose(answer(base)[:, -1], trained[:, -1], atol=1e-4)
    return [note for note in [*loaded.notes, *trainer.notes] if not note.startswith(QUIET)]


def cell(recipe, name, folder):
    """Return what happened: "works", the notes a user reads, or the sentence of the refusal."""
    folder.mkdir()
    try:
        notes = check(recipe, name, folder)
    except InputError as error:
        return "refused", [error.why]
    return "works", [
        re.sub(rf"^{name}: |(?<=with ){name}(?=:)", "", note).replace("with :", "with it:") for note in notes
    ]


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("recipe", RECIPES)
def test_method_trains_and_comes_back(recipe, name, tmp_path):
    result, notes = cell(recipe, name, tmp_path / "run")
    assert result == "works"
    assert bool(notes) == (name in PROMPT_LEARNING and (recipe != "reward" or name == "prompt")), notes


@pytest.mark.parametrize(("recipe", "name"), [("grpo", "qlora"), ("grpo", "prefix"), ("rloo", "ptuning")])
def test_method_learns_from_its_own_answers(recipe, name, tmp_path):
    assert cell(recipe, name, tmp_path / "run")[0] == "works"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora", "ia3", "prefix", "vera", "oft", "road"])
@pytest.mark.parametrize("recipe", ["sft", "dpo", "reward"])
def test_method_on_a_base_in_4_bits(recipe, name, tmp_path):
    check(recipe, name, tmp_path, bits4=True)


def table(cells):
    """Return the grid as Markdown: a row per method, notes below."""
    notes = {}
    for _, said in cells.values():
        for note in said:
            notes.setdefault(note, len(notes) + 1)

    def show(recipe, name):
        result, said = cells[recipe, name]
        return result + "".join(f" [{notes[note]}]" for note in said)

    lines = [f"| `--peft` | {' | '.join(GRID)} |", "|---|" + "---|" * len(GRID)]
    names = list(dict.fromkeys(name for _, name in cells))
    alike = {}
    for name in names:
        alike.setdefault((name in NAMES) * name or tuple(show(r, name) for r in GRID), []).append(name)
    for same in alike.values():
        cells_of = [show(recipe, same[0]) for recipe in GRID]
        lines.append(f"| {', '.join(f'`{name}`' for name in same)} | {' | '.join(cells_of)} |")
    return "\n".join([*lines, "", *(f"{n}. {note}" for note, n in notes.items()), ""])


@pytest.mark.slow
def test_grid_in_the_readme_is_what_happens(tmp_path):
    cells, failed = {}, {}
    for name in all_names():
        for recipe in GRID:
            try:
                cells[recipe, name] = cell(recipe, name, tmp_path / f"{recipe}-{name}")
            except (
                AssertionError,
                ArithmeticError,
                LookupError,
                TypeError,
                ValueError,
                RuntimeError,
            ) as error:
                failed[recipe, name] = repr(error)[:300]
    assert not failed
    before, found, rest = README.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    assert found and end, f"no place for the grid in {README}"
    text = before + START + table(cells) + END + after
    if os.environ.get("PLUMBLINE_WRITE_GRID"):
        README.write_text(text, encoding="utf-8")
    assert README.read_text(encoding="utf-8") == text, "PLUMBLINE_WRITE_GRID=1 writes the new table"
