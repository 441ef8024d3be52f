"""Every shipped YAML is read by the program it is for, and says what it is."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, RLOOConfig, SFTConfig

from alignment import adapters, config
from alignment.ppo_config import PPOConfig

CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig, "kto": KTOConfig, "reward": RewardConfig}
CONFIGS |= {"grpo": GRPOConfig, "rloo": RLOOConfig, "ppo": PPOConfig}
PRESETS = sorted((ROOT / "recipes" / "presets").glob("*.yaml"))
HARDWARE = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
NAMES = {"cpu", "single_gpu", "ddp", "fsdp2", "fsdp2_qlora", "zero2", "zero3", "multi_node"}


def launch_line(path):
    """The words of the command in the first line of a preset."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# accelerate launch --config_file ")
    return first.removeprefix("# ").split()


def test_there_are_presets_and_hardware_files():
    assert len(PRESETS) >= 14
    assert {path.stem for path in HARDWARE} == NAMES
    for model in ("smollm2-135m", "qwen3-0.6b", "qwen3-4b", "qwen3-8b", "llama-3.1-8b", "gemma-3"):
        assert any(path.name.startswith(model) for path in PRESETS), model
    for part in (
        "-full-",
        "-lora-",
        "-qlora-",
        "-24gb",
        "-80gb",
        "-8x80gb",
        "-sft-",
        "-dpo-",
        "-kto-",
        "-reward-",
        "-grpo-",
        "-rloo-",
        "-ppo-",
    ):
        assert any(part in path.name for path in PRESETS), part


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_launch_line_names_files_that_are_there(path):
    words = launch_line(path)
    for word in (words[3], words[4], words[6]):
        assert (ROOT / word).is_file(), f"{word} does not exist"
    assert ROOT / words[6] == path


@pytest.fixture(scope="module")
def defaults():
    """DEFAULTS of each recipe, as a preset meets them."""
    return {name: runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))["DEFAULTS"] for name in CONFIGS}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_parses_with_its_recipe(path, monkeypatch, defaults):
    words = launch_line(path)
    recipe = Path(words[4]).stem
    assert f"-{recipe}-" in path.name
    assert "Not run" in path.read_text(encoding="utf-8").splitlines()[1]
    monkeypatch.setattr(sys, "argv", [words[4]])
    also = (config.RewardArguments,) if recipe in ("grpo", "rloo", "ppo") else ()
    flags = ["--config", str(path), "--report_to", "none"]
    args = config.parse(CONFIGS[recipe], defaults[recipe], flags, also)
    method = adapters.resolve(args)
    assert f"-{'full' if method == 'none' else method}-" in path.name
    assert all((ROOT / source).is_file() for source in args.data.data)
    assert args.train.bf16
    assert args.train.max_steps <= 0, "the recipe's own limit of steps would end a long run"
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert all(args.sources[key].startswith("file") for key in written)
    hardware = load_config_from_file(str(ROOT / words[3]))
    assert (hardware.num_processes == 8) == ("-8x80gb" in path.name)
    batch = args.train.per_device_train_batch_size * args.train.gradient_accumulation_steps * hardware.num_processes
    assert 16 <= batch <= 128


@pytest.mark.parametrize("path", HARDWARE, ids=lambda path: path.stem)
def test_hardware_file_is_read_by_accelerate(path):
    found = load_config_from_file(str(path))
    assert found.num_processes % found.num_machines == 0
    kind = found.distributed_type.value
    expected = {
        "single_gpu": "NO",
        "cpu": "MULTI_GPU",
        "ddp": "MULTI_GPU",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
    }
    assert kind == expected.get(path.stem, "FSDP")
    if kind == "FSDP":
        assert found.fsdp_config["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert found.deepspeed_config["zero_stage"] == int(path.stem[-1])
    if kind in ("FSDP", "DEEPSPEED"):
        from accelerate.commands.launch import launch_command_parser

        known = vars(launch_command_parser().parse_args(["script.py"]))
        unknown = [key for part in (found.fsdp_config, found.deepspeed_config) for key in part if key not in known]
        assert not unknown, f"accelerate would ignore {unknown}"
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.slow
def test_cpu_file_starts_two_processes_that_know_each_other(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch.distributed as dist, torch\n"
        "from trl import SFTConfig\n"
        "from alignment.config import parse\n"
        "train = parse(SFTConfig, {'output_dir': 'x', 'report_to': 'none'}).train\n"
        "number = torch.tensor([train.process_index + 1.0])\n"
        "dist.all_reduce(number)\n"
        "open(f'{train.process_index}.txt', 'w').write(f'{train.world_size} {number.item()}')\n",
        encoding="utf-8",
    )
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / "cpu.yaml"), str(script), "--use_cpu", "true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["2 3.0", "2 3.0"]
