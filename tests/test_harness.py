"""Tasks of lm-eval on our checkpoints: its numbers, in our form."""

import json
import runpy
import sys

import peft
import pytest
import torch
from conftest import ROOT

from alignment.errors import InputError
from alignment.models import load_checkpoint
from alignment.report import read_result

MODEL = ROOT / "data" / "tiny" / "model"
COMPLETION = """
task: spelled
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""
ROLLING = """
task: tales
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks of ours."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"What is {i} plus 2?", "answer": str(i + 2)} for i in range(5)]
    rows.append(rows[0])
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("spelled", COMPLETION), ("tales", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(file=folder / "rows.jsonl"))
    return folder


def call_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["harness.py", *map(str, words)])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    runpy.run_path(str(ROOT / "eval" / "harness.py"), run_name="__main__")


def test_the_default_task_gives_lm_evals_numbers(monkeypatch, tmp_path, capsys):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    call_main(monkeypatch, "--model", MODEL, "--limit", 30, "--num_fewshot", 2, "--output", tmp_path / "r.json")
    found, out = read_result(tmp_path / "r.json"), capsys.readouterr().out
    model, tokenizer = load_checkpoint(str(MODEL))
    theirs = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks=["village_choices"], limit=30, num_fewshot=2,
        task_manager=TaskManager(include_path=str(ROOT / "eval" / "tasks"), include_defaults=False),
    )["results"]["village_choices"]  # fmt: skip
    for metric in ("acc", "acc_norm"):
        assert found.metrics[metric]["value"] == pytest.approx(theirs[f"{metric},none"])
        assert found.metrics[metric]["stderr"] == pytest.approx(theirs[f"{metric}_stderr,none"])
    assert (found.task, found.version, len(found.rows)) == ("lm-eval/village_choices", 1, 30)
    assert found.metrics["score"]["value"] == found.metrics["acc"]["value"]
    assert all(row["score"] == row["acc"] for row in found.rows)
    assert "acc_norm" in out and max(map(len, out.splitlines()[:-1])) <= 100


def test_several_tasks_adapters_and_resume(monkeypatch, toy, tasks, tmp_path, capsys):
    base, tokenizer = load_checkpoint(toy)
    torch.manual_seed(0)
    adapter = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    adapter.save_pretrained(tmp_path / "prompt")
    tokenizer.save_pretrained(tmp_path / "prompt")
    words = ["--model", f"base={toy}", tmp_path / "prompt", "--tasks", "spelled", "tales", "--include_path", tasks]
    call_main(monkeypatch, *words, "--output", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.json"))
    assert names == ["base.spelled.json", "base.tales.json", "prompt.spelled.json", "prompt.tales.json"]
    spelled, tales = (read_result(tmp_path / "out" / f"base.{name}.json") for name in ("spelled", "tales"))
    assert spelled.version == 3 and len(spelled.rows) == 6 and spelled.metrics["score"]["value"] == 0
    assert spelled.rows[5]["id"] == f"{spelled.rows[0]['id']}#2"
    assert all(row["score"] < 0 for row in tales.rows), "log-likelihood per word: higher is better"
    mean = tales.metrics["bits_per_byte"]["value"]
    assert mean > 0 and tales.metrics["bits_per_byte"]["unit"] == "bits_per_byte"
    other = read_result(tmp_path / "out" / "prompt.tales.json")
    assert [row["id"] for row in other.rows] == [row["id"] for row in tales.rows] and other.rows != tales.rows
    assert other.prompt_hash == tales.prompt_hash
    before = (tmp_path / "out" / "base.tales.json").read_text()
    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", None)  # what is there is not computed again
    call_main(monkeypatch, *words, "--output", tmp_path / "out", "--resume")
    assert (tmp_path / "out" / "base.tales.json").read_text() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "village_choice"], "did you mean village_choices"),
        (["--include_path", "no/folder"], "there is no folder no/folder"),
        (["--data", "x"], "--data says nothing here"),
        (["--tasks", "hellaswag"], "the hub set hellaswag cannot be read"),
    ],
)
def test_wrong_command_lines(monkeypatch, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        call_main(monkeypatch, "--model", MODEL, "--output", tmp_path / "r.json", *words)


def test_without_lm_eval_the_command_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r'pip install "plumbline\[eval\]"'):
        call_main(monkeypatch, "--model", MODEL, "--output", tmp_path / "r.json")
