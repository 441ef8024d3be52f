"""Several answers to a question: samples, majorities, pass@k, wordings; and answers that end at a string."""

import json
import statistics
from argparse import Namespace

import pytest
from conftest import ROOT
from eval_runs import run_script, write_rows

from alignment.generation import Answer, Decoding, divide, generate_answers
from alignment.journal import Journal
from alignment.models import load_checkpoint
from alignment.report import read_result

PROMPTS = ["The boat crossed", "Add seven and", "Spell", "Which is larger, forty", "A quick brown fox jumps"]


@pytest.fixture(scope="module")
def model_and_tokenizer(toy):
    return load_checkpoint(toy)


@pytest.fixture(scope="module")
def script():
    import runpy

    return runpy.run_path(str(ROOT / "eval" / "generate.py"))


def settings(**given):
    return Namespace(**{"num_samples": 1, "metrics": [], "pass_at": [1], "majority": False} | given)


def said(*texts):
    return [Answer(text.strip(), len(text.split()), True, 3, text) for text in texts]


def row_of(verifier, answer, prompt="How much?"):
    return {"id": "a", "prompt": prompt, "answer": answer, "verifier": verifier, "task": None, "source": "s", "row": 1}


def test_majority_mean_and_pass_at_k_of_samples(script):
    answers = said("It is 4", "four, 4.0", "5", "3", "none")
    made = script["finished"](row_of("number", "4"), answers, settings(num_samples=5, pass_at=[1, 2]))
    assert made["score"] == pytest.approx(2 / 5) and made["majority"] == 1.0, "4 and 4.0 are the same vote"
    assert made["pass@1"] == pytest.approx(2 / 5) and made["pass@2"] == pytest.approx(1 - 3 / 10)
    assert made["texts"] == [answer.text for answer in answers]
    elected = script["finished"](row_of("number", "4"), answers, settings(num_samples=5, majority=True))
    assert elected["score"] == 1.0
    wrong = script["finished"](row_of("number", "5"), answers, settings(num_samples=5))
    assert wrong["majority"] == 0.0 and wrong["score"] == pytest.approx(1 / 5)


def test_gsm8k_reports_both_extractions_and_their_majorities(script):
    answers = said("so\n#### 18", "the answer is 18", "it is 20", "#### 20\n#### 18")
    made = script["finished"](row_of("gsm8k", "…\n#### 18"), answers, settings(num_samples=4))
    assert made["score"] == pytest.approx(1 / 4) and made["flexible"] == pytest.approx(3 / 4)
    assert made["majority"] == 1.0 and made["flexible majority"] == 1.0, "of equals the earliest"
    silent = script["finished"](row_of("gsm8k", "#### 18"), said("a", "b"), settings(num_samples=2))
    assert silent["majority"] == silent["flexible majority"] == 0.0


def test_wordings_are_means_of_their_own(script):
    answers = said("4", "5", "4", "4")
    made = script["finished"](row_of("number", "4"), answers, settings(num_samples=2))
    assert made["wordings"] == [0.5, 1.0] and made["score"] == 0.75
    assert made["majority"] == pytest.approx(1.0), "the mean of both wordings' majorities: 4 (the earlier), 4"


def test_a_function_body_is_scored_behind_its_beginning(script):
    tests = "def check(candidate):\n    assert candidate(1, 2) == 3\ncheck(add)"
    row = row_of("code", tests, 'def add(a, b):\n    """Sum."""\n') | {"entry_point": "add"}
    texts = ["    return a + b\n", "    return a - b\n", "def add(x, y):\n    return x + y\n", "```\nadd = max\n```"]
    scores = [script["finished"](row, said(text), settings())["score"] for text in texts]
    assert scores == [1.0, 0.0, 1.0, 0.0]
    both = script["finished"](row, said(*texts[:2]), settings(num_samples=2, pass_at=[1, 2]))
    assert both["pass@1"] == 0.5 and both["pass@2"] == 1.0 and "majority" not in both


def test_instructions_are_counted_one_by_one(script):
    asked = {"instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"], "kwargs": [{}, {}]}
    made = script["finished"](row_of("ifeval", json.dumps(asked)), said("No comma"), settings())
    assert made["score"] == 0.0 and made["instructions"] == 0.5


def test_overlap_with_the_reference(script):
    rows = [
        script["finished"](row_of("exact", answer), said(text), settings(metrics=["f1", "rouge", "bleu"]))
        for text, answer in (("the cat sat on it", "a cat sat on it"), ("no", "yes"))
    ]
    assert rows[0]["f1"] == 1.0 and rows[1]["rougeL"] == 0.0 and rows[0]["rouge2"] == pytest.approx(0.75)
    args = settings(metrics=["f1", "rouge", "bleu"], asking=[None])
    found = script["summarise"](rows, args)
    assert found["BLEU"]["unit"] == "BLEU" and "tok:13a" in found["BLEU"]["signature"]
    assert found["f1"]["value"] == 0.5


def test_neighbours_stay_on_one_process_and_all_are_answered_once():
    ids = [[0] * n for n in (3, 9, 4, 4, 1, 7, 2, 2, 8, 5, 5, 6)]
    for together in (1, 2, 3):
        parts = [divide(ids, together, rank, 3) for rank in range(3)]
        assert sorted(sum(parts, [])) == list(range(12))
        groups = [{i // together for i in part} for part in parts]
        assert sum(map(len, groups)) == 12 // together
    assert [len(ids[i]) for i in divide(ids, 2, 0, 1)] == sorted(map(len, ids), reverse=True)


def test_answers_end_at_a_string_as_if_they_had_been_cut_there(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    free = generate_answers(model, tokenizer, PROMPTS, Decoding(24, 1.0), batch_size=2)
    longest = max((answer.raw for answer in free), key=len)
    string = longest[len(longest) // 2 :][:2]
    assert sum(string in answer.raw for answer in free) >= 1
    for size in (1, 5):
        ended = generate_answers(model, tokenizer, PROMPTS, Decoding(24, 1.0, stop_strings=(string,)), batch_size=size)
        for one, whole in zip(ended, free, strict=True):
            assert one.raw == whole.raw.partition(string)[0]
            assert one.stopped == (whole.stopped or string in whole.raw)
            assert one.tokens <= whole.tokens and (string in whole.raw or one == whole)
        assert any(one.tokens < whole.tokens for one, whole in zip(ended, free, strict=True)), "it stops early"


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return write_rows(path, [{"prompt": p, "answer": "4", "verifier": "contains"} for p in PROMPTS])


@pytest.fixture
def wordings(tmp_path):
    path = tmp_path / "wordings.yaml"
    path.write_text("plain: '{prompt}'\nasked: 'Q {prompt} A'\n")
    return path


def test_samples_and_wordings_through_the_script(monkeypatch, toy, rows_file, wordings, tmp_path, capsys):
    words = ["--model", toy, "--data", rows_file, "--max_new_tokens", 6, "--temperature", 1]
    run_script(monkeypatch, "generate", *words, "--output", tmp_path / "one.json")
    more = [*words, "--prompts", wordings, "--num_samples", 3]
    run_script(monkeypatch, "generate", *more, "--batch_size", 4, "--output", tmp_path / "many.json")
    one, many = read_result(tmp_path / "one.json"), read_result(tmp_path / "many.json")
    assert [len(row["texts"]) for row in many.rows] == [6] * len(PROMPTS)
    assert [row["texts"][0] for row in many.rows] == [row["text"] for row in one.rows], (
        "the first sample is the only one"
    )
    assert len({text for row in many.rows for text in row["texts"]}) > 10
    assert many.prompt_hash != one.prompt_hash
    spread = {name: metric["value"] for name, metric in many.metrics.items() if name.startswith("wordings/")}
    each = [spread["wordings/plain"], spread["wordings/asked"]]
    assert (spread["wordings/lowest"], spread["wordings/highest"]) == (min(each), max(each))
    assert spread["wordings/sd"] == pytest.approx(statistics.stdev(each))
    assert many.metrics["score"]["value"] == pytest.approx(statistics.mean(each))
    assert "wordings/asked" in capsys.readouterr().out


def test_an_interrupted_evaluation_of_many_answers_goes_on(monkeypatch, toy, rows_file, wordings, tmp_path):
    words = ["--model", toy, "--data", rows_file, "--max_new_tokens", 6, "--temperature", 1, "--batch_size", 4]
    words += ["--prompts", wordings, "--num_samples", 3]
    run_script(monkeypatch, "generate", *words, "--output", tmp_path / "whole.json")
    add, kept = Journal.add, []

    def interrupted(self, rows):
        rows = list(rows)
        if rows and len(kept) >= 2:
            raise KeyboardInterrupt
        kept.extend(rows)
        add(self, rows)

    monkeypatch.setattr(Journal, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_script(monkeypatch, "generate", *words, "--output", tmp_path / "r.json")
    assert 2 <= len(kept) < len(PROMPTS)
    monkeypatch.setattr(Journal, "add", add)
    run_script(monkeypatch, "generate", *words, "--output", tmp_path / "r.json", "--resume")
    whole, again = read_result(tmp_path / "whole.json"), read_result(tmp_path / "r.json")
    assert whole.rows == again.rows and whole.metrics == again.metrics
