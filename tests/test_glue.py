"""GLUE: official files read as they are, the files to submit, prompts, and eval/glue.py as it is typed."""

import json
import runpy

import numpy as np
import pytest
from conftest import ROOT
from eval_runs import write_rows
from test_recipes import launch, script

from alignment.errors import InputError
from alignment.files import Broken
from alignment.glue import DIAGNOSTIC, TASKS, find_task, from_hub, macro_average, part, plan, question, submission
from alignment.models import load_checkpoint

HEADERS = {
    "sst2": ("sentence\tlabel", "{text}\t{label}"),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t1\t2\t{text}\t{pair}"),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tg\tf\ty\to\ts\ts\t{text}\t{pair}\t{label}",
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\t{text}\t{pair}\t{label}"),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse"
        "\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t2\tg\tb\tb\tp\tp\t{text}\t{pair}\tneutral\t{label}",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\t{text}\t{pair}\t{label}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\t{text}\t{pair}\t{label}"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\t{text}\t{pair}\t{label}"),
}


def download(folder, name, labels, rows=24):
    """Write the training, dev and test files of a task as the official download has them."""
    task = TASKS[name]
    place = folder / task.folder
    place.mkdir(parents=True, exist_ok=True)
    for split, (file, *_) in task.splits.items():
        lines = []
        for i in range(rows):
            cells = {"text": f'He said "{i}', "pair": f"It is {i}.", "label": labels[i % len(labels)]}
            if split.startswith("test"):
                lines.append(f"{i}\t{cells['text']}\t{cells['pair']}" if task.tsv[1] else f"{i}\t{cells['text']}")
            elif name == "cola":
                lines.append(f"gj04\t{cells['label']}\t*\t{cells['text']}")
            else:
                lines.append(HEADERS[name][1].format(**cells))
        if split.startswith("test"):
            index = "id" if name == "qqp" else "index"
            lines.insert(0, "\t".join([index, *(column for column in task.tsv[:2] if column)]))
        elif name != "cola":
            lines.insert(0, HEADERS[name][0])
        inner = folder / "diagnostic" if split == DIAGNOSTIC else place
        inner.mkdir(exist_ok=True)
        (inner / file).write_text("\n".join([*lines, ""]), encoding="utf-8")
    return folder


def official(name):
    """Labels as they stand in the official files."""
    task = TASKS[name]
    return ["0.5", "4.250"] if name == "stsb" else list(task.labels) if task.named else ["0", "1"]


@pytest.mark.parametrize("name", TASKS)
def test_official_files_are_read_as_they_are(name, tmp_path):
    task, labels = TASKS[name], official(name)
    download(tmp_path, name, labels)
    for split in task.splits:
        rows = [row for _, row in part(task, str(tmp_path), split).read()]
        assert len(rows) == 24 and rows[3]["text"] == 'He said "3'  # quotes are letters
        assert ("text_pair" in rows[0]) == bool(task.tsv[1])
        if split.startswith("test"):
            assert rows[5]["index"] == "5" and "label" not in rows[5]
        else:
            wanted = 4.25 if name == "stsb" else task.labels[1]
            assert rows[1]["label"] == wanted
    assert [p.role for p in plan(task, str(tmp_path)).parts] == ["train", "eval"]


def test_rows_of_the_hub_have_the_same_columns():
    assert from_hub(TASKS["mnli"], {"premise": "a", "hypothesis": "b", "label": 2, "idx": 7}) == {
        "text": "a", "text_pair": "b", "label": "contradiction", "index": 7,
    }  # fmt: skip
    assert "label" not in from_hub(TASKS["cola"], {"sentence": "a", "label": -1, "idx": 0})
    assert from_hub(TASKS["stsb"], {"sentence1": "a", "sentence2": "b", "label": 2.5, "idx": 0})["label"] == 2.5


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "train", "dev", "test"),
    [("cola", 8551, 1043, 1063), ("sst2", 67349, 872, 0), ("rte", 2490, 277, 3000), ("wnli", 635, 71, 146)],
)
def test_real_files_have_the_known_rows(name, train, dev, test, real_data):
    for split, wanted in (("train", train), ("dev", dev), ("test", test)):
        if wanted:
            rows = [row for _, row in part(TASKS[name], str(real_data / "glue"), split).read()]
            assert len(rows) == wanted and not any(isinstance(row, Broken) for row in rows)


def test_files_to_submit():
    assert submission(TASKS["cola"], ["0", "1"], [1, 0]) == "index\tprediction\n0\t1\n1\t0\n"
    assert submission(TASKS["rte"], [0, 1], [1, 0]) == "index\tprediction\n0\tnot_entailment\n1\tentailment\n"
    assert submission(TASKS["stsb"], [0, 1], [5.3, -0.2]) == "index\tprediction\n0\t5.000\n1\t0.000\n"
    names = {file for task in TASKS.values() for *_, file in task.splits.values() if file}
    assert names == {
        "CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "STS-B.tsv", "QQP.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "QNLI.tsv",
        "RTE.tsv", "WNLI.tsv", "AX.tsv",
    }  # fmt: skip


def test_average_takes_tasks_not_metrics():
    scores = {"cola": {"m": 0.5}, "mrpc": {"accuracy": 0.8, "f1": 0.9}, "mnli": {"m": 0.7, "mm": 0.6}}
    assert macro_average(scores) == pytest.approx((0.5 + 0.85 + 0.65) / 3)


def test_prompts_are_those_of_lm_eval():
    """Rendered by lm-eval's own templates, for every task it has."""
    yaml = pytest.importorskip("yaml")
    jinja2 = pytest.importorskip("jinja2")
    tasks = pytest.importorskip("lm_eval.tasks")
    import re
    from pathlib import Path

    folder = Path(tasks.__file__).parent / "glue"
    checked = 0
    for name, task in TASKS.items():
        file = folder / name / "default.yaml"
        if not file.is_file():
            assert name == "stsb"  # lm-eval has no STS-B
            continue
        text = re.sub(r"!function ", "", file.read_text(encoding="utf-8"))
        theirs = yaml.safe_load(text)
        row = {"text": "He runs fast.", "text_pair": " She sleeps "}
        doc = dict(zip(task.hub, (row["text"], row["text_pair"]), strict=False))
        if name == "mnli":
            from lm_eval.tasks.glue.mnli.utils import doc_to_text

            wanted = doc_to_text(doc)
        else:
            wanted = jinja2.Template(theirs["doc_to_text"], keep_trailing_newline=True).render(**doc)
        assert question(task, row) == wanted
        assert tuple(theirs["doc_to_choice"]) == task.words
        checked += 1
    assert checked == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda place: (place / "dev.tsv").unlink(), "there is no RTE/dev.tsv"),
        (
            lambda place: (place / "dev.tsv").write_text("index\tsentence_1\tsentence2\tlabel\n0\ta\tb\t0\n"),
            "'sentence_1' meant",
        ),
        (
            lambda place: (place / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\n"),
            "2 cells where the header has 4",
        ),
        (
            lambda place: (place / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n"),
            "'maybe', not one of entailment",
        ),
        (
            lambda place: (place / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n"),
            "dev.tsv has no rows",
        ),
    ],
)
def test_damaged_files_are_named(change, said, tmp_path, toy_bert):
    download(tmp_path, "rte", official("rte"))
    change(tmp_path / "RTE")
    flags = ("--task", "rte", "--data", tmp_path, "--output_dir", tmp_path / "out", "--model_name_or_path", toy_bert)
    with pytest.raises(InputError) as error:
        launch("classify", *flags, "--max_steps", 1)
    assert said in str(error.value), error.value


def test_unknown_task_names_the_nearest():
    assert find_task("SST-2") is TASKS["sst2"]
    with pytest.raises(InputError, match="did you mean mrpc"):
        find_task("mprc")


def test_recipe_on_a_task_knows_its_labels_and_metrics(tmp_path, toy_bert):
    download(tmp_path, "mrpc", official("mrpc"))
    out = tmp_path / "out"
    flags = ("--task", "mrpc", "--data", tmp_path, "--output_dir", out, "--model_name_or_path", toy_bert)
    trainer, *_ = launch("classify", *flags, "--max_steps", 2, "--save_strategy", "no", "--max_length", 64)
    assert trainer.model.config.id2label == {0: "not_equivalent", 1: "equivalent"}
    metrics = json.loads((out / "run.json").read_text())["metrics"]["after"]
    assert {"accuracy", "f1", "loss"} <= metrics.keys()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, toy_bert):
    """GLUE-like files of two tasks, and a checkpoint of each."""
    folder = tmp_path_factory.mktemp("glue")
    for name in ("mnli", "stsb"):
        download(folder, name, official(name))
        flags = ("--task", name, "--data", folder, "--output_dir", folder / f"out-{name}", "--max_length", 64)
        launch("classify", *flags, "--model_name_or_path", toy_bert, "--max_steps", 1, "--save_strategy", "no")
    return folder


def test_checkpoints_are_measured_and_their_test_rows_predicted(checkpoints, capsys):
    folder = checkpoints
    script(
        ROOT / "eval" / "glue.py", "--model", f"mine={folder}/out-mnli,{folder}/out-stsb", "--data", folder,
        "--output", folder / "mine.json", "--use_cpu",
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert "mnli-mm" in shown and "missing of GLUE's nine: cola" in shown and "no GLUE score" in shown
    result = json.loads((folder / "mine.json").read_text())
    metrics = result["metrics"]
    assert metrics.keys() == {"mnli/accuracy", "mnli-mm/accuracy", "stsb/pearsonr", "stsb/spearmanr", "average"}
    means = [(metrics["mnli/accuracy"]["value"] + metrics["mnli-mm/accuracy"]["value"]) / 2]
    means.append((metrics["stsb/pearsonr"]["value"] + metrics["stsb/spearmanr"]["value"]) / 2)
    assert metrics["average"]["value"] == pytest.approx(np.mean(means))
    rows = [row for row in result["rows"] if row["task"] == "stsb"]
    assert len(result["rows"]) == 24 * 3
    found = result["contamination"]  # the rows made up for training and for dev are the same
    assert found["rows"] == found["found"] == 24 * 3 and sum(found["read"].values()) == 2 * 24
    assert "warning: these are no unseen rows: 72 of the 72 rows overlap with the 48 rows of its training data" in shown
    assert all(row["score"] == pytest.approx(-((row["prediction"] - row["label"]) ** 2)) for row in rows)
    for name, word in (("MNLI-m", "entailment neutral contradiction"), ("MNLI-mm", ""), ("AX", ""), ("STS-B", "")):
        lines = (folder / "mine" / "seed42" / f"{name}.tsv").read_text().splitlines()
        assert lines[0] == "index\tprediction" and len(lines) == 25
        assert not word or lines[1].split("\t")[1] in word.split()
    # finished jobs are not done again
    before = (folder / "mine.json").read_text()
    script(
        ROOT / "eval" / "glue.py", "--model", f"mine={folder}/out-mnli,{folder}/out-stsb", "--data", folder,
        "--output", folder / "mine.json", "--use_cpu", "--resume",
    )  # fmt: skip
    assert json.loads(before)["rows"] == json.loads((folder / "mine.json").read_text())["rows"]


def test_metrics_of_the_recipe_and_of_the_loaded_checkpoint_are_one(checkpoints):
    file = checkpoints / "one.json"
    words = ("--model", checkpoints / "out-mnli", "--data", checkpoints, "--output", file, "--use_cpu")
    script(ROOT / "eval" / "glue.py", *words)
    here = json.loads(file.read_text())["metrics"]["mnli/accuracy"]["value"]
    there = json.loads((checkpoints / "out-mnli" / "run.json").read_text())["metrics"]["after"]["accuracy"]
    assert here == pytest.approx(there)


def test_language_model_is_asked_for_the_label_word(tmp_path, toy, toy_bert):
    download(tmp_path, "rte", official("rte"))
    words = ("--data", tmp_path, "--tasks", "rte", "--prompted", "--shots", 1, "--limit", 6, "--use_cpu")
    script(ROOT / "eval" / "glue.py", "--model", toy, *words, "--output", tmp_path / "a.json")
    script(ROOT / "eval" / "glue.py", "--model", toy, *words, "--output", tmp_path / "b.json", "--batch_size", 1)
    one, other = (json.loads((tmp_path / name).read_text())["rows"] for name in ("a.json", "b.json"))
    assert one == other and len(one) == 6
    with pytest.raises(InputError, match="is an encoder"):
        script(ROOT / "eval" / "glue.py", "--model", toy_bert, *words, "--output", tmp_path / "c.json")


@pytest.mark.parametrize(("name", "key", "shots"), [("rte", "acc", 1), ("mnli", "acc", 2), ("cola", "mcc", 0)])
def test_asking_scores_as_lm_eval_does(name, key, shots, tmp_path, monkeypatch):
    """The embedded pairs as rows of a task, asked by us and by lm-eval's own task with the same examples."""
    import re
    from argparse import Namespace
    from pathlib import Path

    import lm_eval.tasks
    import yaml
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.glue.mnli.utils import doc_to_text

    from alignment.metrics import metric

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task, (model, tokenizer) = TASKS[name], load_checkpoint(ROOT / "data" / "tiny" / "model")
    pairs = [json.loads(line) for line in (ROOT / "data/tiny/sentence_pairs/test.jsonl").read_text().splitlines()[:60]]
    labels = [row["label"] % len(task.labels) for row in pairs]
    docs = [dict(zip(task.hub, (row["sentence1"], row["sentence2"]), strict=True)) for row in pairs]
    docs = [{c: v for c, v in (doc | {"label": k}).items() if c} for doc, k in zip(docs, labels, strict=True)]
    rows = [from_hub(task, doc | {"idx": 0}) for doc in docs]
    glue = runpy.run_path(str(ROOT / "eval" / "glue.py"))
    glue["ask"].__globals__["training_rows"] = lambda job: rows[:8]
    job = glue["Job"](task, 0, tmp_path, "", {"dev": rows[8:]})
    found = glue["ask"](job, (model.double(), tokenizer), Namespace(shots=shots, seed=1, batch_size=5))["dev"]

    file = Path(lm_eval.tasks.__file__).parent / "glue" / name / "default.yaml"
    config = yaml.safe_load(re.sub("!function ", "", file.read_text())) | {"tag": None, "dataset_name": None}
    files = {"train": docs[:8], "validation": docs[8:]}
    files = {split: str(write_rows(tmp_path / f"{split}.jsonl", some)) for split, some in files.items()}
    config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "validation_split": "validation"}
    config |= {"doc_to_text": doc_to_text} if name == "mnli" else {}
    chosen = [docs[i] for i in np.random.default_rng(1).permutation(8)[:shots]]
    config |= {"num_fewshot": shots, "fewshot_config": {"sampler": "first_n", "samples": chosen}} if shots else {}
    lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4)
    theirs = evaluate(lm, {"tasks": {name: ConfigurableTask(config=config)}}, bootstrap_iters=0)
    samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
    assert found == [int(np.argmax([pair[0] for pair in sample["filtered_resps"]])) for sample in samples]
    assert len(set(found)) > 1 or not shots, "the answers differ"
    (mine,) = metric("glue", name).compute(predictions=found, references=labels[8:]).values()
    assert mine == pytest.approx(theirs["results"][name][f"{key},none"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tasks", "colla"), "did you mean cola"),
        (("--tasks", "cola"), "the embedded rows are no cola"),
        (("--shots", "3"), "for --prompted only"),
        (("--data", "data/tiny/sentences"), "holds no GLUE task"),
    ],
)
def test_wrong_words(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=said):
        script(ROOT / "eval" / "glue.py", "--model", "data/tiny/model", "--output", tmp_path / "x.json", *words)


def test_folder_that_is_no_checkpoint(checkpoints, toy_bert, tmp_path):
    words = ("--data", checkpoints, "--output", tmp_path / "x.json")
    with pytest.raises(InputError, match="is no checkpoint of recipes/classify.py"):
        script(ROOT / "eval" / "glue.py", "--model", f"m={checkpoints}/out-mnli,{toy_bert}", *words)


@pytest.mark.slow
def test_glue_trains_over_seeds_and_goes_on(tmp_path, toy_bert, capsys):
    folder, file = tmp_path / "glue", tmp_path / "result.json"
    download(folder, "rte", official("rte"))
    words = ["--model", f"toy={toy_bert}", "--data", folder, "--seeds", 2, "--output", file]
    words += ["--runs", tmp_path / "runs", "--use_cpu"]
    last = ["--train", "--max_steps", 2, "--max_length", 64, "--save_strategy", "no"]
    script(ROOT / "eval" / "glue.py", *words, *last)
    result = json.loads(file.read_text())
    assert result["metrics"]["rte/accuracy"]["n"] == 2 and len(result["rows"]) == 48
    assert "±" in capsys.readouterr().out
    file.unlink()
    script(ROOT / "eval" / "glue.py", *words, "--resume", *last)
    assert "training:" not in capsys.readouterr().out  # the checkpoints are there
    assert json.loads(file.read_text())["rows"] == result["rows"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(checkpoints):
    import os
    import subprocess
    import sys

    words = ["--model", f"mine={checkpoints}/out-mnli,{checkpoints}/out-stsb", "--data", checkpoints, "--use_cpu"]
    script(ROOT / "eval" / "glue.py", *words, "--output", checkpoints / "single.json")
    start = [sys.executable, "-m", "accelerate.commands.launch"]
    start += ["--config_file", ROOT / "accelerate_configs" / "cpu.yaml", "eval/glue.py"]
    command = [str(word) for word in (*start, *words, "--output", checkpoints / "double.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((checkpoints / f"{name}.json").read_text())["rows"] for name in ("single", "double"))
    assert [row["id"] for row in one] == [row["id"] for row in two]
    assert all(a["score"] == pytest.approx(b["score"], abs=1e-4) for a, b in zip(one, two, strict=True))
    assert done.stdout.count("written:") == 1
