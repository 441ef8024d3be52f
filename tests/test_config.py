"""Arguments: precedence, provenance, strictness, and the same value however it is written."""

import dataclasses
import json
import os
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

from alignment.coerce import accepts, coerce
from alignment.config import RENAMED, DataArguments, parse
from alignment.errors import InputError

DEFAULTS = {"data": ["rows.jsonl"], "learning_rate": 1e-3, "beta": 0.2, "output_dir": "outputs/x"}


def write(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def run(argv, defaults=DEFAULTS):
    return parse(DPOConfig, defaults, argv)


def test_flag_beats_file_beats_recipe_beats_library(tmp_path):
    config = write(tmp_path, "beta: 0.3\nlearning_rate: 5e-4\n")
    args = run(["--config", config, "--beta", "0.4"])
    assert (args.train.beta, args.train.learning_rate) == (0.4, 5e-4)
    assert args.train.output_dir == "outputs/x"
    wanted = {"beta": "flag", "learning_rate": "file mine.yaml", "data": "recipe", "max_length": "library"}
    assert {k: args.sources[k] for k in wanted} == wanted


def test_every_field_has_a_source():
    args = run([])
    for part in (args.data, args.peft, args.model, args.train):
        names = {f.name for f in dataclasses.fields(part) if f.init} - {"use_peft"}
        assert names <= set(args.sources)


def test_output_dir_has_a_default_of_its_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/dpo.py"])
    args = parse(DPOConfig, {}, [])
    assert (args.recipe, args.train.output_dir) == ("dpo", "outputs/dpo")


@pytest.mark.parametrize(
    ("place", "mark"), [("flag", "--lerning_rate"), ("file", "mine.yaml, line 2"), ("recipe", "DEFAULTS")]
)
def test_unknown_key_is_an_error_everywhere(tmp_path, place, mark):
    argv, defaults = [], DEFAULTS
    if place == "flag":
        argv = ["--lerning_rate", "1e-3"]
    elif place == "file":
        argv = ["--config", write(tmp_path, "beta: 0.1\nlerning_rate: 1e-3\n")]
    else:
        defaults = DEFAULTS | {"lerning_rate": 1e-3}
    with pytest.raises(InputError, match="did you mean (--)?learning_rate") as caught:
        run(argv, defaults)
    assert mark in str(caught.value)


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_old_names_say_what_took_their_place(name):
    with pytest.raises(InputError) as caught:
        run([f"--{name}", "1"])
    assert caught.value.fix == RENAMED[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "a list, not a mapping"),
        ("", "empty, not a mapping"),
        ("just words\n", "a str, not a mapping"),
        ("beta: 0.1\nbeta: 0.2\n", "written twice, in lines 1 and 2"),
        ("learning_rate: 1\nlearning-rate: 2\n", "written twice"),
        ("peft_args:\n  r: 1\n  r: 2\n", "'r' is written twice, in lines 2 and 3"),
        ("a: [1\n", "no valid YAML"),
        ("max_steps: many\n", "not a whole number"),
        ("max_steps: 2.5\n", "not a whole number"),
        ("beta: [1, 2]\n", "not a number"),
        ("bf16: perhaps\n", "not true or false"),
        ("output_dir: {a: 1}\n", "not text"),
        ("peft_args: 3\n", "not a mapping"),
        ("learning_rate:\n", "not a number"),
        ("optim: adamw\n", "did you mean adamw_torch|it is one of"),
        ("on_bad_row: ignore\n", "stop, drop"),
        ("dtype: bfloat61\n", "did you mean bfloat16"),
        ("test_size: -1\n", "test_size is -1"),
        ("test_size: 3.5\n", "test_size is 3.5"),
    ],
)
def test_yaml_that_cannot_be_meant(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        run(["--config", write(tmp_path, text)])


def test_a_missing_config_names_the_nearest_file(tmp_path):
    write(tmp_path, "beta: 1\n")
    with pytest.raises(InputError, match="did you mean .*mine.yaml"):
        run(["--config", str(tmp_path / "mien.yaml")])


def test_wrong_encoding_of_a_config_names_the_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes("beta: 1\nrun_name: Grü\n".encode("latin-1"))
    with pytest.raises(InputError, match="line 2, byte 20"):
        run(["--config", str(path)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stray"], "'stray' belongs to no option"),
        (["--beta"], "expected one argument"),
        (["--beta", "x"], "beta is 'x'"),
        (["--beta", "nan"], "beta is 'nan'"),
        (["--config", "a.yaml", "--config=b.yaml"], "more than once"),
        (["--peft_args", "{'r': 1}"], "no valid JSON"),
        (["--load_in_4bit", "--load_in_8bit"], "ModelConfig refuses"),
        (["--learning_rat", "1"], "did you mean --learning_rate"),
    ],
)
def test_a_command_line_that_cannot_be_meant(argv, message):
    with pytest.raises(InputError, match=message):
        run(argv)


def test_hyphens_equals_switches_and_lists():
    argv = [
        "--learning-rate=3e-5",
        "--dry-run",
        "--no-disable_dropout",
        "--data",
        "a",
        "b",
        "--loss_type",
        "sft",
    ]
    args = run([*argv, "--sync_ref_model", "false", "--lora-target-modules", "q_proj", "v_proj"])
    assert args.train.learning_rate == 3e-5
    assert (args.data.dry_run, args.train.disable_dropout, args.train.sync_ref_model) == (True, False, False)
    assert (args.data.data, args.train.loss_type) == (["a", "b"], ["sft"])
    assert args.model.lora_target_modules == ["q_proj", "v_proj"]


def test_a_value_with_hyphens_is_left_alone():
    assert run(["--run-name=my-run-1"]).train.run_name == "my-run-1"
    assert run(["--run_name", "my-run-1"]).train.run_name == "my-run-1"


def test_mappings_are_read_from_json_and_from_yaml(tmp_path):
    kwargs = {"attn_implementation": "eager", "nested": {"a": [1, 2]}}
    by_flag = run(["--model_init_kwargs", json.dumps(kwargs), "--peft_args", '{"r": 64}'])
    by_file = run(["--config", write(tmp_path, yaml.safe_dump({"model_init_kwargs": kwargs, "peft_args": {"r": 64}}))])
    assert by_flag.train.model_init_kwargs == by_file.train.model_init_kwargs == kwargs
    assert by_flag.peft.peft_args == by_file.peft.peft_args == {"r": 64}


def test_none_no_and_numbers_as_text_in_yaml(tmp_path):
    text = "max_length: none\nsave_strategy: no\nlearning_rate: 1e-4\n"
    text += "max_steps: 1e2\nreport_to: none\ndata_seed: null\n"
    args = run(["--config", write(tmp_path, text)])
    assert args.train.max_length is None
    assert args.train.data_seed is None
    assert args.train.save_strategy == "no"
    assert (args.train.learning_rate, args.train.max_steps) == (1e-4, 100)
    assert args.train.report_to == []


@pytest.mark.parametrize(
    ("argv", "text", "wanted"),
    [
        ([], "", True),
        (["--no_gradient_checkpointing"], "", False),
        (["--gradient_checkpointing", "false"], "activation_checkpointing: true\n", False),
        (["--activation_checkpointing", "true"], "gradient_checkpointing: false\n", True),
    ],
)
def test_gradient_checkpointing_by_either_name_without_a_warning(tmp_path, argv, text, wanted):
    config = ["--config", write(tmp_path, text)] if text else []
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = run([*config, *argv])
    assert args.train.gradient_checkpointing is args.train.activation_checkpointing is wanted
    assert args.sources["gradient_checkpointing"] == args.sources["activation_checkpointing"]


def test_the_recipes_model_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).resolve().parents[1]
    assert run(["--model_name_or_path", "data/tiny"]).model.model_name_or_path == str(root / "data/tiny")
    assert run(["--model_name_or_path", "org/name"]).model.model_name_or_path == "org/name"
    (tmp_path / "data/tiny").mkdir(parents=True)
    assert run(["--model_name_or_path", "data/tiny"]).model.model_name_or_path == "data/tiny"


def test_extra_dataclasses_are_read_too():
    @dataclasses.dataclass
    class Extra:
        judge: str = "none"
        rounds: int = 1

    args = parse(SFTConfig, {"rounds": 2}, ["--judge", "x"], also=(Extra,))
    assert args.also == (Extra("x", 2),)


@pytest.mark.parametrize("cls", [SFTConfig, DPOConfig, KTOConfig, RewardConfig, GRPOConfig, DataArguments])
def test_every_default_of_the_library_is_a_value_we_accept(cls):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        if default is not None:
            assert coerce(field.name, default, hints[field.name], "test") == default, field.name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": st.floats(1e-9, 1, allow_nan=False),
            "max_steps": st.integers(-1, 10**6),
            "max_length": st.none() | st.integers(1, 10**5),
            "disable_dropout": st.booleans(),
            "bf16": st.just(False),
            "lr_scheduler_type": st.sampled_from(["linear", "cosine", "constant"]),
            "loss_type": st.lists(st.sampled_from(["sigmoid", "sft", "ipo"]), min_size=1, max_size=2),
            "run_name": st.text("abc-_ 19", min_size=1).filter(lambda s: not s.startswith("-") and s.strip() == s),
            "peft_args": st.dictionaries(st.sampled_from(["r", "lora_alpha"]), st.integers(1, 9)),
        },
    )
)
def test_flag_file_and_recipe_give_the_same_value(tmp_path, values):
    argv = []
    for name, value in values.items():
        words = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else str(value)]
        argv += [f"--{name}", *words]
    by_flag = run(argv, {})
    by_file = run(["--config", write(tmp_path, yaml.safe_dump(values) if values else "beta: 0.1")], {})
    by_recipe = run([], values)
    for name, value in values.items():
        holder = "peft" if name == "peft_args" else "train"
        got = [vars(vars(a)[holder])[name] for a in (by_flag, by_file, by_recipe)]
        assert got == [value] * 3, name


def test_text_or_list_keeps_a_single_word_as_text():
    assert coerce("x", "all-linear", str | list[str], "") == "all-linear"
    assert coerce("x", ["a"], str | list[str], "") == ["a"]
    assert coerce("x", "a", list[str] | None, "") == ["a"]
    assert coerce("x", "[1, 2]", list[float], "") == [1.0, 2.0]
    assert accepts(int | None, int) and not accepts(int | None, bool)


def test_help_shows_this_recipes_values(capsys):
    with pytest.raises(SystemExit) as caught:
        run(["--help", "--beta", "0.7"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--beta *[0.7]" in out and "--on_bad_row [stop]" in out and "--learning_rate *[0.001]" in out
    assert "adam_beta1" not in out
    with pytest.raises(SystemExit):
        run(["--help-all"])
    assert "--adam_beta1 [0.9]" in capsys.readouterr().out


HOOK = """
from alignment.config import install_excepthook
from alignment.errors import InputError
install_excepthook(); install_excepthook()
raise {error}("the file is gone")
"""


@pytest.mark.parametrize(
    ("error", "rank", "code", "printed"),
    [
        ("InputError", "0", 2, "error: the file is gone"),
        ("InputError", "1", 2, ""),
        ("KeyError", "0", 1, "Traceback"),
    ],
)
def test_input_errors_end_with_status_two_and_no_traceback(error, rank, code, printed):
    environment = os.environ | {"LOCAL_RANK": rank}
    command = [sys.executable, "-c", HOOK.format(error=error)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == code
    assert printed in done.stderr if printed else done.stderr == ""
    assert ("Traceback" in done.stderr) == (error == "KeyError")


def test_importing_the_leaves_costs_no_torch():
    modules = "alignment.config, alignment.data, alignment.formats, alignment.ledger"
    code = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "trl", "datasets", "rich"} & set(done.stdout.split())
