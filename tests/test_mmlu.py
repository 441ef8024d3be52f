"""MMLU: lm-eval's prompts, numbers and means, question by question; data of four layouts; what is refused."""

import csv
import json
import runpy
import sys

import pytest
import torch
from conftest import ROOT, toy_tokenizer

from alignment.errors import InputError
from alignment.few_shot import Prompting, choose
from alignment.models import load_checkpoint
from alignment.multiple_choice import GROUP_OF, LETTERS, Question, read_questions
from alignment.report import mean_metric, pooled_metric, read_result
from alignment.wording import WORDINGS, chat_messages, plain_context, read_wordings, wording_hash

TINY = ROOT / "data" / "tiny"
MODEL = TINY / "model"


def rows_of(data, limit, subjects=None):
    questions = {s: rows[:limit] for s, rows in read_questions(str(data), "test", subjects).items()}
    return questions, read_questions(str(data), "dev", list(questions))


def flat_of(questions):
    return [question for rows in questions.values() for question in rows]


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(ROOT / "benchmarks" / "mmlu.py"))


@pytest.fixture(scope="module")
def tiny():
    return load_checkpoint(str(MODEL))


@pytest.fixture(scope="module")
def exact(tiny):
    """The embedded model in double precision: what is left of a difference is not rounding."""
    model, tokenizer = load_checkpoint(str(MODEL))
    return model.double(), tokenizer


def largest(choices, values):
    return max(
        abs(a - b) for c, v in zip(choices, values, strict=True) for a, b in zip(c.log_likelihoods, v, strict=True)
    )


@pytest.mark.parametrize(
    ("shots", "options"),
    [
        (0, {}),
        (5, {}),
        (2, {"apply_chat_template": True, "fewshot_as_multiturn": True}),
        (2, {"apply_chat_template": True, "fewshot_as_multiturn": False}),
    ],
)
def test_every_question_is_scored_as_lm_eval_scores_it(exact, benchmark, shots, options):
    questions, examples = rows_of(TINY / "choices", 4)
    model, tokenizer = exact
    choices = choose(model, tokenizer, flat_of(questions), examples, Prompting(shots, **options), batch_size=5)
    tasks = benchmark["lm_eval_tasks"](questions, examples, shots)
    values, results = benchmark["run_lm_eval"](model, tokenizer, tasks, 8, **options)
    assert {choice.shots for choice in choices} == {shots} and not any(choice.cut for choice in choices)
    assert largest(choices, values) < 1e-10
    for subject, rows in questions.items():
        mine = [c.prediction == q.answer for c, q in zip(choices, flat_of(questions), strict=True) if q in rows]
        assert results["results"][f"mmlu_{subject}"]["acc,none"] == pytest.approx(sum(mine) / len(mine))


def test_descriptions_and_groups_are_those_of_lm_eval():
    from pathlib import Path

    import lm_eval
    import yaml

    files = list((Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml"))
    assert len(files) == len(GROUP_OF) == 57
    for file in files:
        task = yaml.safe_load(file.read_text())
        subject = task["dataset_name"]
        assert task["tag"] == f"mmlu_{GROUP_OF[subject]}_tasks"
        assert task["description"] == WORDINGS["lm_eval"].describe(Question(subject, "", ("",) * 4, 0))


def test_pooled_error_is_that_of_lm_eval():
    from lm_eval.api.metrics import mean_stderr, pooled_sample_stderr

    groups = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0, 1.0], [0.0, 1.0]]
    theirs = pooled_sample_stderr([mean_stderr(group) for group in groups], [len(group) for group in groups])
    found = pooled_metric(groups)
    assert found["stderr"] == pytest.approx(theirs) and found["value"] == 0.6
    assert pooled_metric([[1.0], [0.0], [1.0, 0.0]]) == mean_metric([1.0, 0.0, 1.0, 0.0]), "nothing to pool"


def test_the_prompt_of_the_authors():
    shot = Question("high_school_physics", " What is heavy? ", ("air", "lead", "light", "heat"), 1)
    found = plain_context(WORDINGS["hendrycks"], [shot], shot)
    block = " What is heavy? \nA. air\nB. lead\nC. light\nD. heat\nAnswer:"
    head = "The following are multiple choice questions (with answers) about  high school physics.\n\n"
    assert found == f"{head}{block} B\n\n{block}"
    assert plain_context(WORDINGS["lm_eval"], [], shot) == head.replace("  ", " ") + block.replace(
        " What is heavy? ", "What is heavy?"
    )
    turns = chat_messages(WORDINGS["lm_eval"], [shot], shot, multiturn=True)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]


def test_long_prompts_lose_whole_examples_then_tokens(tiny):
    questions, examples = rows_of(TINY / "choices", 2, ["reading"])
    long = Question("reading", "Who? " * 420, ("a", "b", "c", "d"), 0)
    endless = Question("reading", "Who? " * 3000, ("a", "b", "c", "d"), 0)
    model, tokenizer = tiny
    said = []
    choices = choose(model, tokenizer, [*questions["reading"], long, endless], examples, Prompting(5), say=said.append)
    assert [c.shots for c in choices[:2]] == [5, 5] and 0 <= choices[2].shots < 5 and choices[2].cut == 0
    assert choices[3].shots == 0 and choices[3].cut > 1000
    assert "2 of 4 prompts did not fit into 1,024 tokens" in said[0] and "whole ones, from the front" in said[0]
    assert "1 of 4 prompts were too long without any example" in said[1]
    assert "a letter is up to 2 tokens" in said[2]
    kept = examples["reading"][5 - choices[2].shots : 5]
    assert choose(model, tokenizer, [long], {"reading": kept}, Prompting(len(kept)))[
        0
    ].log_likelihoods == pytest.approx(choices[2].log_likelihoods, abs=1e-4)


def test_a_template_without_a_system_message_and_a_tokenizer_without_a_template(toy):
    model, tokenizer = load_checkpoint(toy)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}{{ m.content }}"
        "{% endfor %}"
    )
    question, said = Question("law", "Why?", ("a", "b", "c", "d"), 0), []
    choose(model, tokenizer, [question], {}, Prompting(0, apply_chat_template=True), say=said.append)
    assert any("takes no system message" in note for note in said)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        choose(model, tokenizer, [question], {}, Prompting(0, apply_chat_template=True))


# --- data


def write_csv(folder, split, subject, rows):
    (folder / split).mkdir(parents=True, exist_ok=True)
    with (folder / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


ROWS = [["What, then?\nSay.", "one", "two", 'the "third"', "four", "C"], ["Two?", "1", "2", "3", "4", "A"]]


def test_the_same_questions_from_csv_parquet_and_json_lines(tmp_path):
    import datasets

    for split in ("test", "dev"):
        for subject in ("old_law", "new_law"):
            write_csv(tmp_path / "csv", split, subject, ROWS)
    table = [
        {"subject": subject, "question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5])}
        for subject in ("old_law", "new_law")
        for row in ROWS
    ]
    for name in ("all", "old_law"):
        part = [row for row in table if name in ("all", row["subject"])]
        (tmp_path / "hub" / name).mkdir(parents=True)
        datasets.Dataset.from_list(part).to_parquet(tmp_path / "hub" / name / "test-00000-of-00001.parquet")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "test.jsonl").write_text("\n".join(map(json.dumps, table)))
    first, second, third = (read_questions(str(tmp_path / name)) for name in ("csv", "hub", "lines"))
    assert first == second == third
    assert list(first) == ["new_law", "old_law"] and first["old_law"][0].choices[2] == 'the "third"'
    for name in ("csv", "hub", "lines"):
        assert read_questions(str(tmp_path / name), subjects=["old law"]) == {"old_law": first["old_law"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["Why?", "a", "b", "c", "D"], "5 columns instead of 6"),
        (["Why?", "a", "b", "c", "d", "E"], "the answer is 'E'"),
        (["Why?", "a", "b", "c", "d", "AB"], "the answer is 'AB'"),
    ],
)
def test_bad_csv_rows_name_file_and_line(tmp_path, row, message):
    write_csv(tmp_path, "test", "law", [*ROWS, row])
    with pytest.raises(InputError, match=message) as caught:
        read_questions(str(tmp_path))
    assert "law_test.csv, line 4" in str(caught.value), "the first question spans two lines"


def test_missing_files_subjects_and_splits(tmp_path):
    write_csv(tmp_path, "test", "anatomy", ROWS)
    with pytest.raises(InputError, match="no file of the subject abstract_algebra"):
        read_questions(str(tmp_path))
    assert list(read_questions(str(tmp_path), subjects=["anatomy"])) == ["anatomy"]
    with pytest.raises(InputError, match="did you mean anatomy"):
        read_questions(str(tmp_path), subjects=["anatomie"])
    with pytest.raises(InputError, match="no questions of the split dev"):
        read_questions(str(tmp_path), "dev", ["anatomy"])
    write_csv(tmp_path, "test", "anatomy", [])
    with pytest.raises(InputError, match="anatomy has no questions in the split test"):
        read_questions(str(tmp_path), subjects=["anatomy"])
    with pytest.raises(InputError, match="did you mean reading"):
        read_questions(str(TINY / "choices"), subjects=["readin"])
    with pytest.raises(InputError, match="is a file"):
        read_questions(str(TINY / "choices" / "test.jsonl"))
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "test.jsonl").write_text(
        '{"question": "Why?", "choices": ["a", "b"], "answer": 0, "subject": "x"}'
    )
    with pytest.raises(InputError, match="2 choices instead of 4"):
        read_questions(str(tmp_path / "lines"))


# --- the script


def call_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["mmlu.py", *map(str, words)])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    runpy.run_path(str(ROOT / "eval" / "mmlu.py"), run_name="__main__")


def test_several_models_one_table_and_a_file_each(monkeypatch, tmp_path, capsys):
    call_main(monkeypatch, "--model", f"a={MODEL}", f"b={MODEL}", "--limit", 24, "--output", tmp_path)
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if not line.startswith(("written", "next"))) <= 100
    assert "mean of subjects" in out and "subject/reading" in out and "compare.py" in out
    first, second = read_result(tmp_path / "a.json"), read_result(tmp_path / "b.json")
    assert first.rows == second.rows and len(first.rows) == 24
    row = first.rows[0]
    assert row["score"] == (row["prediction"] == row["answer"]) and len(row["log_likelihoods"]) == 4
    assert row["prediction"] == LETTERS[max(range(4), key=row["log_likelihoods"].__getitem__)]
    assert first.metrics["accuracy"]["value"] == pytest.approx(sum(row["score"] for row in first.rows) / 24)


def test_interrupted_and_resumed_and_the_batch_size_changes_nothing(monkeypatch, tmp_path):
    from alignment.journal import Journal

    words = ["--model", MODEL, "--limit", 20, "--subjects", "words", "nature", "--shots", 1]
    call_main(monkeypatch, *words, "--output", tmp_path / "whole.json", "--batch_size", 3)
    add, count = Journal.add, []

    def interrupted(self, rows):
        if count:
            raise KeyboardInterrupt
        add(self, rows)
        count.append(1)

    monkeypatch.setattr(Journal, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call_main(monkeypatch, *words, "--output", tmp_path / "r.json", "--batch_size", 7)
    monkeypatch.setattr(Journal, "add", add)
    call_main(monkeypatch, *words, "--output", tmp_path / "r.json", "--resume")
    whole, resumed = read_result(tmp_path / "whole.json").rows, read_result(tmp_path / "r.json").rows
    for one, other in zip(whole, resumed, strict=True):
        assert one["id"] == other["id"] and one["prediction"] == other["prediction"]
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-4)


def test_several_wordings_give_their_spread(monkeypatch, tmp_path, capsys):
    file = tmp_path / "wordings.yaml"
    file.write_text(
        '- "{question}\\nA. {A}\\nB. {B}\\nC. {C}\\nD. {D}\\nAnswer:"\n'
        "- {name: terse, description: '', question: \"{question}\\n(A) {A} (B) {B} (C) {C} (D) {D}\\n=\"}\n"
    )
    call_main(
        monkeypatch, "--model", f"a={MODEL}", "--limit", 16, "--shots", 2, "--prompts", file, "--output", tmp_path
    )
    both, out = read_result(tmp_path / "a.json"), capsys.readouterr().out
    parts = [read_result(tmp_path / f"a.{name}.json") for name in ("wording_1", "terse")]
    assert parts[0].prompt_hash != parts[1].prompt_hash != both.prompt_hash
    for row, one, two in zip(both.rows, parts[0].rows, parts[1].rows, strict=True):
        assert row["score"] == (one["score"] + two["score"]) / 2
        assert (row["score/wording_1"], row["score/terse"]) == (one["score"], two["score"])
    means = sorted(part.metrics["accuracy"]["value"] for part in parts)
    assert [both.metrics[f"wordings/{name}"]["value"] for name in ("lowest", "highest")] == means
    assert "wordings/sd" in out and "wording/terse" in out
    same = {"shots": 2, "chat": False, "multiturn": False}
    assert parts[0].prompt_hash == wording_hash(WORDINGS["lm_eval"], same), "the name of a wording does not count"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one: two", "no two wordings"),
        ('- "{question} {A} {B} {C}"\n- x', r"no field \{D\}"),
        ('- "{question} {A} {B} {C} {D} {E}"\n- x', "unknown field"),
        ('- "{question} {A} {B} {C} {D"\n- x', "is no template"),
        ("- {question: x, nam: y}\n- x", "has the keys"),
    ],
)
def test_wordings_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "w.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_wordings(str(tmp_path / "w.yaml"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shots", "6"], "6 shots, and .* has 5 questions in its dev split"),
        (["--shots", "-1"], "--shots is -1"),
        (["--fewshot_as_multiturn"], "without turns"),
        (["--subjects", "natur"], "did you mean nature"),
        (["--data", "org/none"], "the hub set org/none cannot be read"),
    ],
)
def test_wrong_command_lines(monkeypatch, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        call_main(monkeypatch, "--model", MODEL, "--output", tmp_path / "r.json", *words)


def test_an_encoder_and_a_classifier_are_refused(monkeypatch, tmp_path, toy_bert):
    with pytest.raises(InputError, match="bert is an encoder"):
        call_main(monkeypatch, "--model", toy_bert, "--output", tmp_path / "r.json")
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = toy_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    with pytest.raises(InputError, match="is a classifier or reward model"):
        call_main(monkeypatch, "--model", tmp_path / "reward", "--output", tmp_path / "r.json")


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize("size", ["2m", "60m"])
def test_real_questions_are_scored_as_lm_eval_scores_them(real_data, benchmark, size):
    """In float32, as people run it."""
    limit = 12 if size == "2m" else 4
    questions, examples = rows_of(real_data / "mmlu", limit, ["astronomy", "professional_law", "virology"])
    model, tokenizer = benchmark["make_model"](size, {s: [*questions[s], *examples[s]] for s in questions})
    choices = choose(model, tokenizer, flat_of(questions), examples, Prompting(5))
    values, _ = benchmark["run_lm_eval"](model, tokenizer, benchmark["lm_eval_tasks"](questions, examples, 5), 4)
    assert all(choice.shots == 5 for choice in choices)
    assert largest(choices, values) <= 1e-5
    assert [choice.prediction for choice in choices] == [max(range(4), key=value.__getitem__) for value in values]
    assert torch.get_default_dtype() == torch.float32
