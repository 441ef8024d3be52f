"""Checkpoints: sealed, checked, found, and those of another run kept apart."""

import json
from types import SimpleNamespace

import pytest

from alignment import checkpointing
from alignment.checkpointing import (
    Seal,
    check_same_run,
    checkpoints,
    drop_aside,
    fault_of,
    find_checkpoint,
    leftovers,
    set_aside,
)
from alignment.errors import InputError


def written(folder, step, names=("model.safetensors", "optimizer.pt", "state/part.bin")):
    """A checkpoint that was written but not sealed."""
    target = folder / f"checkpoint-{step}"
    for name in names:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"{name} of {step}".encode())
    return target


def seal(folder, step, limit=None):
    args = SimpleNamespace(output_dir=str(folder), should_save=True, save_total_limit=limit)
    callback, state = Seal(), SimpleNamespace(global_step=step, best_model_checkpoint=None)
    callback.on_train_begin(args, state, None)
    assert args.save_total_limit is None  # the trainer would delete before the new one is sealed
    callback.on_save(args, state, None)
    callback.on_train_end(args, state, None)
    assert args.save_total_limit == limit


def good(folder, step, limit=None):
    target = written(folder, step)
    seal(folder, step, limit)
    return target


def test_sealed_checkpoint_has_no_fault(tmp_path):
    target = good(tmp_path, 3)
    assert fault_of(target) == ""
    assert set(json.loads((target / "complete.json").read_text())) == {
        "model.safetensors", "optimizer.pt", "state/part.bin",
    }  # fmt: skip


def flip(target):
    file = target / "state" / "part.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda target: (target / "complete.json").unlink(), "interrupted"),
        (lambda target: (target / "complete.json").write_text("{"), "complete.json is not as it was written"),
        (lambda target: (target / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda target: (target / "model.safetensors").write_bytes(b""), "model.safetensors is not as"),
        (flip, "part.bin is not as"),
    ],
)
def test_each_damage_is_found_and_the_one_before_is_taken(tmp_path, damage, word):
    before, newest = good(tmp_path, 9), good(tmp_path, 10)
    assert find_checkpoint(str(tmp_path), "last")[0] == str(newest)  # 10 is newer than 9
    damage(newest)
    found, notes = find_checkpoint(str(tmp_path), "true")
    assert found == str(before)
    assert word in notes[0] and notes[-1] == f"goes on from {before}"
    with pytest.raises(InputError, match="cannot go on from"):
        find_checkpoint(str(tmp_path), str(newest))
    assert find_checkpoint(str(tmp_path), str(before))[0] == str(before)


def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path):
    target = written(tmp_path, 2, ("model.safetensors",))
    seal(tmp_path, 2)
    assert "optimizer" in fault_of(target)


def test_nothing_to_go_on_from_names_what_was_passed_over(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    written(tmp_path, 5)
    with pytest.raises(InputError, match="no checkpoint to go on from.*checkpoint-5 passed over"):
        find_checkpoint(str(tmp_path), "last")


def test_old_checkpoints_go_only_when_the_new_one_is_sealed(tmp_path, monkeypatch):
    good(tmp_path, 1, limit=1)
    written(tmp_path, 2)

    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "write_text", crash)
        with pytest.raises(KeyboardInterrupt):
            seal(tmp_path, 2, limit=1)
    assert find_checkpoint(str(tmp_path), "last")[0].endswith("checkpoint-1")
    seal(tmp_path, 2, limit=1)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_what_changed_is_named_and_may_be_allowed():
    before = {"data": "a", "processes": 2, "new_key": 1}
    now = {"data": "b", "processes": 2}
    assert check_same_run(before, dict(before), allowed=False) == []
    with pytest.raises(InputError, match=r"other data \(was a, is b\)") as caught:
        check_same_run(before, now, allowed=False)
    assert "processes" not in caught.value.what
    (note,) = check_same_run(before, now, allowed=True)
    assert "was a, is b" in note


def test_going_on_leaves_only_later_checkpoints_behind(tmp_path):
    for step in (5, 9, 10):
        good(tmp_path, step)
    (tmp_path / "run.json").write_text("{}")
    found = leftovers(tmp_path, str(tmp_path / "checkpoint-9"))
    assert [path.name for path in found] == ["checkpoint-10"]
    set_aside(found, tmp_path, [])
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-5"]
    assert (tmp_path / "earlier_run_1" / "checkpoint-10" / "complete.json").is_file()
    assert drop_aside(tmp_path) and not (tmp_path / "earlier_run_1").exists()


def test_what_is_no_run_is_never_deleted(tmp_path):
    (tmp_path / "README.md").write_text("of somebody's project")
    (tmp_path / "thesis.tex").write_text("work of years")
    set_aside(leftovers(tmp_path, None), tmp_path, [])
    assert (tmp_path / "thesis.tex").is_file()
    assert drop_aside(tmp_path) == []
    assert (tmp_path / "earlier_run_1" / "README.md").read_text() == "of somebody's project"


def test_model_of_the_new_run_is_not_moved(tmp_path):
    base = tmp_path / "base_model"
    base.mkdir()
    (base / "config.json").write_text("{}")
    for needed in (base, tmp_path):
        with pytest.raises(InputError, match="holds the model this run starts from"):
            set_aside(leftovers(tmp_path, None), tmp_path, [str(needed)])
    assert (base / "config.json").is_file()
    assert set_aside(leftovers(tmp_path, None), tmp_path, ["org/name-on-a-hub"])
