"""`make demo` and `make rlhf` in small: every step, the page, and the folder they are allowed to clear."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from alignment.report import read_result


def demo(*words, timeout=400, script="demo"):
    return subprocess.run(
        [sys.executable, f"eval/{script}.py", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    done = demo("--output_dir", tmp_path)
    assert done.returncode == 2 and "not the demo's" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.slow
def test_the_demo_ends_with_a_page_and_three_lines_and_can_be_repeated(tmp_path):
    folder = tmp_path / "demo"
    words = ["--output_dir", folder, "--max_steps", "2", "--limit", "12"]
    folder.mkdir()
    (folder / ".made-by-the-demo").touch()
    (folder / "old.txt").touch()
    done = demo(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (folder / "old.txt").exists()
    results = [read_result(folder / "eval" / f"{name}.json") for name in ("base", "sft", "dpo")]
    assert [len(result.rows) for result in results] == [12, 12, 12]
    assert results[0].run is None and results[1].run and results[2].run
    text = (folder / "index.html").read_text()
    assert not re.search(r'(src|href|srcset)="(?!data:)', text)
    assert text.count("data:image/png") == 4
    assert "chat/train.jsonl" in text and "preferences/train.jsonl" in text
    last = done.stdout.rstrip().splitlines()[-3:]
    assert [line.split("  accelerate")[0].strip() for line in last] == [
        "your own model",
        "your own rows",
        "your own GPU",
    ]


@pytest.mark.slow
def test_the_road_compares_what_it_trained_from_one_start(tmp_path):
    folder = tmp_path / "rlhf"
    done = demo("--output_dir", folder, "--only", "dpo", "grpo", "--max_steps", 2, "--limit", 8, script="rlhf")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "results.json").read_text())
    assert list(found) == ["sft", "dpo", "grpo"]
    assert found["sft"]["kl"] == pytest.approx(0, abs=1e-5) and found["dpo"]["kl"] > 0
    assert all(row["perplexity"] > 1 and 0 <= row["right"] <= 1 for row in found.values())
    text = (folder / "index.html").read_text()
    assert "KL from SFT" in text and text.count("data:image/png") == 6
    assert "--model_name_or_path" in text and max(map(len, done.stdout.splitlines()[-12:])) <= 120
