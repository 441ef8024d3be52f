"""Training rows that hold benchmark rows are found, named and can be left out; nothing else is touched."""

import json
import runpy
import sys

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.contamination import MOST_ROWS, Found, Index, check, question_of, search, sentence, texts_of, words
from alignment.errors import InputError
from alignment.sources import resolve

LONG = "a plane travels twelve hundred miles in three hours how many more hours for two thousand miles at that rate"
SHORT = "What is 17 + 7?"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_case_punctuation_and_form_do_not_hide_a_row_but_operators_count():
    index = Index({"long": LONG, "short": SHORT})
    shouted = LONG.upper().replace(" in", ", in") + "!!"
    assert index.held_by([f"Before. {shouted} And after."]) == {"long"}
    assert index.held_by(["what  is 17+7"]) == {"short"}
    assert index.held_by(["What is 17 - 7?"]) == set()
    assert index.held_by(["so what is 17 + 7?"]) == set(), "a short row counts as a whole line only"
    assert index.held_by(["Sum:\n" + SHORT + "\n24"]) == {"short"}
    assert words("ﬁne — Ünïcode") == ("fine", "ünïcode")


def test_half_of_the_words_have_to_be_covered_by_one_training_row():
    parts = LONG.split()
    index = Index({"long": LONG})
    assert len(parts) == 20
    assert index.held_by([" ".join(parts[:13])]) == {"long"}, "13 of 20 words"
    assert index.held_by([" ".join(parts[:12]) + " and so on for ever and ever"]) == set()
    assert Index({"long": LONG}, share=0.7).held_by([" ".join(parts[:13])]) == set()
    assert Index({"long": LONG}, n=4).held_by([" ".join(parts[:5]), " ".join(parts[10:15])]) == {"long"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=14), st.lists(st.sampled_from("abcd"), max_size=30))
def test_the_index_agrees_with_a_search_word_by_word(row, text):
    n, share = 3, 0.5
    held = bool(Index({"r": " ".join(row)}, n, share).held_by([" ".join(text)]))
    if len(row) < n:
        assert held == (row == text)
        return
    covered = {
        place + k
        for place in range(len(row) - n + 1)
        if any(text[at : at + n] == row[place : place + n] for at in range(len(text)))
        for k in range(n)
    }
    assert held == (len(covered) >= share * len(row))


def test_what_a_row_asks_is_its_questions_without_answers_and_system_messages():
    turns = [("system", "Be brief."), ("user", "one"), ("assistant", "no"), ("user", "two")]
    assert question_of({"prompt": [{"role": r, "content": c} for r, c in turns], "answer": "x"}) == "one\ntwo"
    assert question_of({"question": "q", "choices": ["a"], "answer": 1}) == "q"
    assert question_of({"anything": "text", "n": 3}) == "text"
    assert texts_of({"messages": [{"role": "user", "content": "hi"}], "task": "t"}) == ["hi"]


def test_rows_are_counted_by_source(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": LONG}, {"text": "other"}, {"text": f"x {LONG} y"}])
    found = search(Index({"a": LONG, "b": SHORT}), resolve(str(tmp_path / "train.jsonl"), "train").parts)
    assert found.by_source() == {"train.jsonl": (1, 2)} and found.hits["a"] == [("train.jsonl", 1), ("train.jsonl", 3)]
    cut = search(Index({"a": LONG}), resolve(str(tmp_path / "train.jsonl"), "train").parts, limit=2)
    assert cut.read == {"train.jsonl": 2} and "first 2 rows" in cut.skipped["train.jsonl"]


def run_json(folder, model, data):
    arguments = {"model_name_or_path": {"value": str(model)}, "data": {"value": list(map(str, data))}}
    write(folder / "run.json", [{"arguments": arguments}])


def test_a_checkpoint_is_checked_against_all_it_was_trained_on(tmp_path):
    first = write(tmp_path / "first" / "train.jsonl", [{"text": LONG}])
    second = write(tmp_path / "second" / "train.jsonl", [{"text": SHORT}])
    run_json(tmp_path / "sft", "hub/model", [first])
    run_json(tmp_path / "dpo", tmp_path / "sft", [second, tmp_path / "gone.jsonl"])
    found = check(tmp_path / "dpo", {"a": LONG, "b": SHORT, "c": "nobody knows"})
    assert (found["rows"], found["found"], found["ids"]) == (3, 2, ["a", "b"])
    assert list(found["read"].values()) == [1, 1] and str(tmp_path / "gone.jsonl") in found["skipped"]
    assert "2 of the 3 rows overlap with the 2 rows of its training data; not read: " in sentence(found)
    assert check(tmp_path / "sft", {"b": SHORT})["found"] == 0
    assert check(tmp_path / "nothing", {"b": SHORT}) is None
    assert MOST_ROWS > 10_000


def test_a_broken_run_json_is_said(tmp_path):
    (tmp_path / "run.json").write_text("{")
    found = check(tmp_path, {"a": LONG})
    assert not found["read"] and "cannot be read" in sentence(found)


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["contamination.py", *map(str, words)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    runpy.run_path(str(ROOT / "data" / "contamination.py"), run_name="__main__")


def test_the_script_drops_the_rows_and_says_how_many(monkeypatch, tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", [{"text": LONG}, {"text": "other"}, {"text": SHORT}])
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "sums_test.csv").write_text(f'"{SHORT}",1,2,3,24,D\n"{LONG}",1,2,3,5,D\n')
    words = ["--data", train, "--benchmark", tmp_path / "bench", "--drop", tmp_path / "clean.jsonl"]
    call(monkeypatch, *words, "--output", tmp_path / "found.json")
    out = capsys.readouterr().out
    assert "3 read, 1 kept, 2 dropped" in out and "2 of 2" in out
    assert [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()] == [{"text": "other"}]
    (found,) = json.loads((tmp_path / "found.json").read_text())["benchmarks"].values()
    assert found["hits"] == {
        "bench/sums_test.csv:1": [["train.jsonl", 3]],
        "bench/sums_test.csv:2": [["train.jsonl", 1]],
    }
    assert max(map(len, out.splitlines())) <= 100 + len(str(tmp_path))
    with pytest.raises(InputError, match="exists"):
        call(monkeypatch, *words)


def test_a_share_that_makes_no_sense_is_refused():
    with pytest.raises(InputError, match="share"):
        Index({"a": LONG}, share=0)
    assert Found().by_source() == {}
