"""Loading: files, folders, declarations, hub ids; sampling, splitting and mixing that every rank repeats."""

import csv
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from alignment.config import DataArguments, RewardArguments
from alignment.data import load_rows, load_splits
from alignment.errors import InputError
from alignment.sources import resolve

ROOT = Path(__file__).resolve().parents[1]


def arguments(*data, sources=None, seed=42, data_seed=None, also=(), **options):
    train = SimpleNamespace(seed=seed, data_seed=data_seed)
    return SimpleNamespace(
        data=DataArguments(data=[str(d) for d in data], **options), train=train, sources=sources or {}, also=also
    )


def chat(text):
    return {"messages": [{"role": "user", "content": f"q {text}"}, {"role": "assistant", "content": f"a {text}"}]}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def places(dataset):
    return [(row["source"], row["row"]) for row in dataset]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [{"instruction": f"q{i}", "output": "two\nlines, and a comma" if i == 1 else f"a{i}"} for i in range(4)]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "d.json").write_text(json.dumps({"version": 1, "data": rows}))
    with gzip.open(tmp_path / "e.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    for name, delimiter in (("f.csv", ","), ("g.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["instruction", "output"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "h.parquet")
    (tmp_path / "i.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode())
    wanted = load_splits(arguments(tmp_path / "a.jsonl", test_size=0), "sft").train["messages"]
    for path in sorted(tmp_path.iterdir()):
        splits = load_splits(arguments(path, test_size=0), "sft")
        assert list(splits.train["messages"]) == list(wanted), path.name
        assert list(splits.train["row"]) == [1, 2, 3, 4], path.name
        assert set(splits.train["source"]) == {path.name}


def test_text_is_read_by_paragraphs_and_numbered_by_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    train = load_splits(arguments(tmp_path / "a.txt", test_size=0), "sft").train
    assert [(r["text"], r["row"]) for r in train] == [("one\ntwo", 1), ("three", 5)]


def test_a_line_separator_inside_a_json_string_is_no_new_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_splits(arguments(path, test_size=0), "sft").train["text"][0] == "a\u2028b\x85c"


def test_a_broken_line_in_the_middle_has_its_number(tmp_path):
    path = write(tmp_path / "a.jsonl", [chat(1), "", chat(2), '{"messages": [{"role"', chat(3)])
    with pytest.raises(InputError, match=r"row 4, row: no valid JSON") as caught:
        load_splits(arguments(path), "sft")
    assert "--on_bad_row drop" in caught.value.fix
    splits = load_splits(arguments(path, on_bad_row="drop", test_size=0), "sft")
    assert list(splits.train["row"]) == [1, 3, 5]
    assert splits.ledger.dropped_rows() == [{"source": "a.jsonl", "row": 4, "cause": "row cannot be read"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"prompt,completion\n", "has no rows"),
        ("a.txt", b"\n\n", "has no rows"),
        ("a.json", b'[{"text": "x"},\n{"text": ]', "line 2, column 10"),
        ("a.json", b"3", "holds a int, not rows"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xfc"}\n', "line 2, byte 24: 0xfc"),
        ("a.txt", "früh".encode("utf-16"), "iconv -f UTF-16"),
        ("a.csv", b"a,a\n1,2\n", "'a' twice"),
        ("a.csv", b"instruction,output\nq,a\nq,a,more\n", "3 cells where the header has 2"),
        ("a.parquet", b"PAR1 nonsense", "cannot be read"),
        ("a.jsonl.gz", b"no gzip", "Not a gzipped file"),
        ("a.xlsx", b"x", "no kind that can be read"),
        ("a.jsonl", b'{"promt": "q", "completion": "a"}\n', "promt: prompt"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_splits(arguments(tmp_path / name), "sft")
    assert name in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "rows.jsonl", [chat(1)])
    with pytest.raises(InputError, match="did you mean .*rows.jsonl"):
        load_splits(arguments(tmp_path / "rosw.jsonl"), "sft")
    with pytest.raises(InputError, match="did you mean data/tiny"):
        load_splits(arguments("data/tniy"), "sft")
    with pytest.raises(InputError, match="hub sets are named in full"):
        load_splits(arguments("squad"), "sft")


def test_relative_paths_start_here_and_then_at_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("data/tiny/chat", "train").parts[0].where == str(ROOT / "data/tiny/chat/train.jsonl")
    write(tmp_path / "data/tiny/chat/train.jsonl", [chat(1)])
    assert resolve("data/tiny/chat", "train").parts[0].where == str(tmp_path / "data/tiny/chat/train.jsonl")


def test_bad_rows_are_counted_by_cause_with_three_examples(tmp_path):
    empty = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}
    strange = {"messages": [{"role": "uzer", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = write(tmp_path / "a.jsonl", [chat(1), empty, empty, strange, {"messages": []}, {"other": 1}, empty])
    with pytest.raises(InputError) as caught:
        load_splits(arguments(path), "sft")
    error = caught.value
    assert "6 of 7 rows" in error.what and "3 x empty assistant turn" in error.what
    assert "2 x messages: no turns" in error.what and "1 x unknown role" in error.what
    assert error.where.count("row ") == 3 and "row 2, messages[1].content" in error.where
    assert "row 4, messages[0].role: unknown role 'uzer'" in error.where and "did you mean user" in error.fix
    splits = load_splits(arguments(path, on_bad_row="drop", test_size=0), "sft")
    assert places(splits.train) == [("a.jsonl", 1)]
    assert Counter(d["cause"] for d in splits.ledger.dropped_rows())["empty assistant turn"] == 3


def test_nothing_left_is_an_error_even_when_dropping(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": []}])
    with pytest.raises(InputError, match="1 of 1 rows") as caught:
        load_splits(arguments(path, on_bad_row="drop"), "sft")
    assert "on_bad_row" not in caught.value.fix


def test_labels_of_a_csv_are_read_and_those_of_json_text_are_not(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,label\nq,a,True\nq,b,false\n")
    splits = load_splits(arguments(tmp_path / "a.csv", test_size=0), "unpaired_preference")
    assert list(splits.train["label"]) == [True, False] and "true and false" in splits.notes[0]
    path = write(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a", "label": "true"}])
    with pytest.raises(InputError, match="write true without quotes"):
        load_splits(arguments(path), "unpaired_preference")


def test_a_conversion_is_announced_once_per_source(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "q", "input": "", "output": "a"}] * 3)
    notes = load_splits(arguments(path, test_size=0), "sft").notes
    assert notes == ["a.jsonl: Alpaca rows (instruction, input, output) read as messages"]
    path = write(tmp_path / "b.jsonl", [chat(1)])
    assert load_splits(arguments(path, test_size=0), "sft").notes == []


def test_a_folder_gives_its_own_splits(tmp_path):
    for split, n in (("train", 6), ("test", 4)):
        write(tmp_path / f"set/{split}.jsonl", [chat(f"{split} {i}") for i in range(n)])
    splits = load_splits(arguments(tmp_path / "set"), "sft")
    assert (len(splits.train), len(splits.test)) == (6, 4)
    assert set(splits.test["source"]) == {"set/test.jsonl"}
    assert len(load_splits(arguments(tmp_path / "set", test_size=3), "sft").test) == 3
    assert load_splits(arguments(tmp_path / "set", test_size=0), "sft").test is None
    write(tmp_path / "set/validation.jsonl", [chat("validation")])
    assert set(load_splits(arguments(tmp_path / "set"), "sft").test["source"]) == {"set/validation.jsonl"}
    assert set(load_rows(str(tmp_path / "set"), "sft")["source"]) == {"set/test.jsonl"}
    assert set(load_rows(f"{tmp_path / 'set'}@train", "sft")["source"]) == {"set/train.jsonl"}
    with pytest.raises(InputError, match="did you mean validation"):
        load_rows(f"{tmp_path / 'set'}@validaton", "sft")


def test_a_folder_of_files_and_a_folder_of_save_to_disk(tmp_path):
    for i in range(3):
        write(tmp_path / f"many/part{i}.jsonl", [chat(f"{i} {j}") for j in range(2)])
    splits = load_splits(arguments(tmp_path / "many", test_size=0), "sft")
    assert Counter(splits.train["source"]) == {f"many/part{i}.jsonl": 2 for i in range(3)}
    both = {s: datasets.Dataset.from_list([chat(f"{s} {i}") for i in range(3)]) for s in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "disk")
    splits = load_splits(arguments(tmp_path / "disk"), "sft")
    assert (set(splits.train["source"]), set(splits.test["source"])) == ({"disk/train"}, {"disk/test"})
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no rows"):
        load_splits(arguments(tmp_path / "none"), "sft")
    write(tmp_path / "kinds/a.jsonl", [chat(1)])
    (tmp_path / "kinds/b.csv").write_text("x\n1\n")
    with pytest.raises(InputError, match="several kinds"):
        load_splits(arguments(tmp_path / "kinds"), "sft")


@pytest.mark.parametrize("name", ["test.jsonl", "set_test.jsonl", "test-00000-of-00001.jsonl", "set/test.jsonl"])
def test_a_test_split_is_no_training_data_unless_told_so(tmp_path, name):
    path = write(tmp_path / name, [chat(i) for i in range(4)])
    with pytest.raises(InputError, match="is called test"):
        load_splits(arguments(path), "sft")
    assert len(load_splits(arguments(path, allow_test_split=True, test_size=0), "sft").train) == 4
    assert len(load_rows(str(path), "sft")) == 4


def test_a_folder_called_test_is_no_training_data(tmp_path):
    write(tmp_path / "test/part.jsonl", [chat(1)])
    for path in (tmp_path / "test", tmp_path / "test/part.jsonl"):
        with pytest.raises(InputError, match="is called test"):
            load_splits(arguments(path), "sft")
        assert len(load_rows(str(path), "sft")) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_turns_that_do_not_alternate_are_bad_rows_where_the_template_says_so(tmp_path, streaming):
    twice = {"messages": [{"role": "user", "content": "q"}, *chat(1)["messages"]]}
    path = write(tmp_path / "a.jsonl", [chat(0), twice])
    options = {"test_size": 0, "on_bad_row": "drop", "streaming": streaming}
    assert len(list(load_splits(arguments(path, **options), "sft").train)) == 2
    splits = load_splits(arguments(path, **options), "sft", alternate=True)
    assert places(splits.train) == [("a.jsonl", 1)]
    assert splits.ledger.dropped_rows()[0]["cause"] == "two user turns in a row"


@pytest.mark.parametrize("name", ["latest.jsonl", "contest.jsonl", "attestation.jsonl"])
def test_a_name_that_only_contains_the_letters_is_fine(tmp_path, name):
    path = write(tmp_path / name, [chat(i) for i in range(4)])
    assert len(load_splits(arguments(path, test_size=0), "sft").train) == 4


def test_evaluation_rows_may_come_from_elsewhere(tmp_path):
    train = write(tmp_path / "set/train.jsonl", [chat(i) for i in range(4)]).parent
    write(tmp_path / "set/test.jsonl", [chat("unused")])
    other = write(tmp_path / "other_test.jsonl", [chat("x"), chat("y")])
    splits = load_splits(arguments(train, eval_data=[str(other)], test_size=0), "sft")
    assert len(splits.train) == 4 and places(splits.test) == [
        ("other_test.jsonl", 1),
        ("other_test.jsonl", 2),
    ]


@pytest.mark.parametrize(("size", "held"), [(0, 0), (0.25, 5), (7, 7), (1, 1)])
def test_rows_are_held_out_once_and_in_file_order(tmp_path, size, held):
    path = write(tmp_path / "a.jsonl", [chat(i) for i in range(20)])
    splits = load_splits(arguments(path, test_size=size), "sft")
    test = places(splits.test) if splits.test else []
    assert len(test) == held and places(splits.train) == sorted(places(splits.train))
    assert sorted(places(splits.train) + test) == [("a.jsonl", i) for i in range(1, 21)]


def test_holding_out_everything_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [chat(i) for i in range(3)])
    with pytest.raises(InputError, match="leaves nothing of 3 rows"):
        load_splits(arguments(path, test_size=3), "sft")


def test_the_seed_decides_and_data_seed_goes_before_it(tmp_path):
    path = write(tmp_path / "a.jsonl", [chat(i) for i in range(50)])

    def held(**seeds):
        return places(load_splits(arguments(path, test_size=10, **seeds), "sft").test)

    assert held(seed=1) == held(seed=1) == held(seed=5, data_seed=1)
    assert held(seed=1) != held(seed=2)


PROCESS = """
import sys; sys.path.insert(0, "tests")
from test_data import arguments, places
from alignment.data import load_splits
for streaming in (False, True):
    s = load_splits(arguments(sys.argv[1], test_size=9, streaming=streaming), "sft")
    print(places(s.train), places(s.test))
"""


def test_every_rank_gets_the_same_rows(tmp_path):
    declaration = mixture(tmp_path, [30, 40], weight=[1, 2])
    outs = []
    for rank in "01":
        environment = os.environ | {"PYTHONHASHSEED": rank, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", PROCESS, str(declaration)]
        outs.append(
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout
        )
    assert outs[0] == outs[1] and outs[0].count("a.jsonl") > 5


def mixture(folder, sizes, seed=None, **per_source):
    text = [] if seed is None else [f"seed: {seed}"]
    text.append("sources:")
    for i, (name, size) in enumerate(zip("abcd", sizes, strict=False)):
        write(folder / f"{name}.jsonl", [chat(f"{name} {j}") for j in range(size)])
        text.append(f"  - path: {name}.jsonl")
        text += [f"    {key}: {values[i]}" for key, values in per_source.items()]
    (folder / "mix.yaml").write_text("\n".join(text) + "\n")
    return folder / "mix.yaml"


@pytest.mark.parametrize(
    ("sizes", "weights", "wanted"),
    [
        ([30, 40], [1, 1], [30, 30]),
        ([30, 40], [1, 2], [20, 40]),
        ([30, 40, 100], [0.3, 0.2, 0.5], [30, 20, 50]),
        ([10, 1000], [3, 1], [9, 3]),
    ],
)
def test_weights_are_shares_of_the_largest_mixture_without_repeats(tmp_path, sizes, weights, wanted):
    splits = load_splits(arguments(mixture(tmp_path, sizes, weight=weights), test_size=0), "sft")
    counts = Counter(splits.train["source"])
    got = [counts[f"{name}.jsonl"] for name in "abcd"[: len(sizes)]]
    assert all(abs(g - w) <= 1 for g, w in zip(got, wanted, strict=True)), got
    assert len(set(places(splits.train))) == len(splits.train)
    assert list(splits.train["source"]) != sorted(splits.train["source"]), "the sources are not mixed"


def test_row_counts_sample_or_repeat_and_repeated_rows_are_not_held_out(tmp_path):
    declaration = mixture(tmp_path, [10, 40], rows=[25, 8])
    splits = load_splits(arguments(declaration, test_size=6), "sft")
    train, test = places(splits.train), places(splits.test)
    assert not set(train) & set(test) and len(test) == 6
    counts = Counter(source for source, _ in train + test)
    assert counts == {"a.jsonl": 25, "b.jsonl": 8}
    repeats = Counter(train)
    assert max(repeats.values()) - min(v for (s, _), v in repeats.items() if s == "a.jsonl") <= 1
    assert any("repeated" in note for note in splits.notes)
    account = splits.ledger.account("a.jsonl")
    assert (account.read, account.repeated, account.kept["unsampled"]) == (10, 15, 0)


def test_a_declaration_has_a_seed_that_the_user_overrides(tmp_path):
    declaration = mixture(tmp_path, [30, 30], seed=1, weight=[1, 1])

    def order(**options):
        return places(load_splits(arguments(declaration, test_size=0, **options), "sft").train)

    assert order(seed=7) == order(seed=8)
    assert order(seed=7, sources={"seed": "flag"}) != order(seed=8, sources={"seed": "flag"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sorces:\n  - path: a.jsonl\n", "did you mean sources"),
        ("sources:\n  - path: a.jsonl\n    wieght: 1\n", "did you mean weight"),
        ("sources: a.jsonl\n", "lists no sources"),
        ("sources: []\n", "lists no sources"),
        ("sources:\n  - weight: 1\n", "without a path"),
        ("sources:\n  - path: a.jsonl\n    weight: -1\n", "weight is -1"),
        ("sources:\n  - path: a.jsonl\n    rows: 1.5\n", "rows is 1.5"),
        ("sources:\n  - path: a.jsonl\n    rows: 1\n    weight: 1\n", "both weight and rows"),
        ("sources:\n  - path: a.jsonl\n    weight: 1\n  - path: a.jsonl\n", "1 of 2 sources have a weight"),
        ("sources:\n  - path: a.jsonl\n    columns: [x]\n", "no mapping of names"),
        ("sources:\n  - path: a.jsonl\n    columns: {mesages: prompt}\n", "did you mean messages"),
        ("sources:\n  - path: b.jsonl\n", "did you mean a.jsonl"),
        ("sources:\n  - path: mix.yaml\n", "declaration inside a declaration"),
        ("seed: x\nsources:\n  - path: a.jsonl\n", "seed is 'x'"),
        ("- path: a.jsonl\n", "not a mapping"),
        ("sources:\n  - path: a.jsonl\n    path: b.jsonl\n", "written twice"),
    ],
)
def test_a_declaration_that_cannot_be_meant(tmp_path, text, message):
    write(tmp_path / "a.jsonl", [chat(1)])
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_splits(arguments(tmp_path / "mix.yaml"), "sft")
    assert str(tmp_path) in str(caught.value)


def test_columns_are_renamed(tmp_path):
    write(tmp_path / "a.jsonl", [{"ask": "q", "say": "a", "prompt": "other"}] * 3)
    (tmp_path / "mix.yaml").write_text("sources:\n  - path: a.jsonl\n    columns: {ask: prompt, say: completion}\n")
    train = load_splits(arguments(tmp_path / "mix.yaml", test_size=0), "sft").train
    assert (train[0]["prompt"], train[0]["completion"]) == ("q", "a")


def test_text_and_conversations_together_become_conversations(tmp_path):
    one = write(tmp_path / "a.jsonl", [chat(1)] * 3)
    two = write(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a"}] * 3)
    splits = load_splits(arguments(one, two, test_size=0), "sft")
    assert splits.train.column_names == ["messages", "source", "row"]
    assert any("read as turns" in note for note in splits.notes)
    three = write(tmp_path / "c.jsonl", [{"text": "x"}])
    with pytest.raises(InputError, match="c.jsonl is plain text and a.jsonl is not"):
        load_splits(arguments(one, three), "sft")


def test_pairs_for_thumbs_are_split_after_holding_out(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b", "task": "t"} for i in range(10)]
    splits = load_splits(arguments(write(tmp_path / "a.jsonl", rows), test_size=3), "unpaired_preference")
    assert (len(splits.train), len(splits.test)) == (14, 6)
    assert not set(places(splits.train)) & set(places(splits.test))
    assert Counter(splits.train["label"]) == {True: 7, False: 7}
    assert "10 preference pairs" in splits.notes[0] and "20 rows" in splits.notes[0]


def test_the_recipes_function_maps_rows_of_any_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"ask": f"q{i}", "good": "a", "bad": "b"} for i in range(4)])

    def to_pair(row):
        return {"prompt": row["ask"], "chosen": row["good"], "rejected": row["bad"]}

    splits = load_splits(arguments(path, test_size=0), "preference", to_pair)
    assert splits.train.column_names == ["prompt", "chosen", "rejected", "source", "row"]
    assert splits.train[3]["row"] == 4 and "left to the recipe" in splits.notes[0]

    def wrong(row):
        return {"prompt": row["question"], "chosen": row["good"], "rejected": row["bad"]}

    with pytest.raises(InputError, match="asked for 'question' by wrong"):
        load_splits(arguments(path), "preference", wrong)


def test_what_the_recipes_function_makes_is_checked_too(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(3)])
    with pytest.raises(InputError, match="3 x chosen equals rejected"):
        load_splits(arguments(path), "preference", lambda row: row | {"chosen": row["rejected"]})
    splits = load_splits(arguments(path, test_size=0), "preference", lambda row: row | {"margin": 0.5})
    assert splits.train[0]["margin"] == 0.5


def test_prompts_keep_their_other_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "answer": "4", "verifier": "number", "level": 3}])
    assert load_rows(str(path), "prompt")[0] == {
        "prompt": "q",
        "answer": "4",
        "verifier": "number",
        "level": 3,
        "source": "a.jsonl",
        "row": 1,
    }


def test_rows_without_a_verifier_get_the_one_of_the_flag(tmp_path):
    rows = [{"question": "q", "answer": "#### 4"}, {"question": "r", "answer": "x", "verifier": "exact"}]
    path = write(tmp_path / "a.jsonl", rows)
    named = load_splits(arguments(path, test_size=0, also=(RewardArguments(verifier="number"),)), "prompt")
    assert named.train["verifier"] == ["number", "exact"] and named.train["answer"] == ["#### 4", "x"]
    asked = arguments(path, test_size=0, also=(RewardArguments(verifier="number"),))
    mapped = load_splits(asked, "prompt", lambda row: row | {"verifier": None, "kept": 1})
    assert mapped.train["verifier"] == ["number"] * 2 and mapped.train["kept"] == [1, 1]
    assert load_splits(arguments(path, test_size=0, also=(RewardArguments(),)), "prompt").train["verifier"][0] is None


def test_columns_of_several_kinds_say_which_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "answer": "4"}, {"prompt": "q", "answer": [4]}])
    with pytest.raises(InputError, match="answer: str in a.jsonl row 1, list in a.jsonl row 2"):
        load_rows(str(path), "prompt")


def test_tool_calls_with_different_arguments_stay_apart(tmp_path):
    def call(arguments):
        made = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }
        return {"messages": [{"role": "user", "content": "q"}, made], "tools": [{"name": "f"}]}

    path = write(tmp_path / "a.jsonl", [call({"x": 1}), call({"y": "z"})])
    train = load_splits(arguments(path, test_size=0), "sft").train
    calls = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in train]
    assert calls == [{"x": 1}, {"y": "z"}]


def test_evaluation_rows_that_are_also_trained_on_are_counted(tmp_path):
    write(tmp_path / "set/train.jsonl", [chat(i) for i in range(5)])
    write(tmp_path / "set/test.jsonl", [chat(i) for i in (3, 4, 9)])
    notes = load_splits(arguments(tmp_path / "set"), "sft").notes
    assert [n for n in notes if n.startswith("2 of 3 rows to evaluate on are also in the training rows")]


def test_the_same_file_twice_and_two_files_of_one_name_are_told_apart(tmp_path):
    one = write(tmp_path / "x/a.jsonl", [chat(1)])
    two = write(tmp_path / "y/a.jsonl", [chat(2)])
    names = set(load_splits(arguments(one, two, one, test_size=0), "sft").train["source"])
    assert names == {str(one), str(two), f"{one} (2)"}


def fake_hub(monkeypatch, splits):
    calls = []

    def load(name, config=None, split=None, streaming=False):
        if split is None:
            return splits
        calls.append((name, config, split, streaming))
        if split not in splits:
            raise ValueError(f"Unknown split {split!r}.")
        return datasets.Dataset.from_list(splits[split])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config=None: list(splits))
    return calls


def test_a_hub_id_may_name_config_and_split(monkeypatch):
    rows = {"train": [chat(i) for i in range(5)], "test": [chat("t")], "extra": [chat("e")]}
    calls = fake_hub(monkeypatch, rows)
    splits = load_splits(arguments("org/name:main"), "sft")
    assert set(calls) == {("org/name", "main", "train", False), ("org/name", "main", "test", False)}
    assert set(splits.train["source"]) == {"org/name:main@train"} and len(splits.test) == 1
    assert set(load_rows("org/name@extra", "sft")["source"]) == {"org/name@extra"}
    assert set(load_rows("org/name", "sft")["source"]) == {"org/name@test"}
    with pytest.raises(InputError, match="is called test"):
        load_splits(arguments("org/name@test"), "sft")
    with pytest.raises(InputError, match="cannot be read") as caught:
        load_splits(arguments("org/name@nope"), "sft")
    assert "Unknown split" in caught.value.why


def test_a_hub_set_with_several_training_splits_needs_one_named(monkeypatch):
    rows = {f"{a}_{b}": [chat(f"{a} {b}")] * 3 for a in ("train", "test") for b in ("sft", "gen")}
    fake_hub(monkeypatch, rows)
    with pytest.raises(InputError, match="not clear which split to train on") as caught:
        load_splits(arguments("org/name"), "sft")
    assert caught.value.fix == "…@train_sft"
    assert len(load_splits(arguments("org/name@train_sft", test_size=0), "sft").train) == 3
    with pytest.raises(InputError, match="is called test"):
        load_splits(arguments("org/name@test_gen"), "sft")


def test_no_network_is_an_input_error():
    with pytest.raises(InputError, match="the hub set org/nothing cannot be read"):
        load_splits(arguments("org/nothing"), "sft")


def test_a_stream_has_the_rows_of_the_file(tmp_path):
    rows = [chat(i) if i % 5 else {"messages": []} for i in range(1, 41)]
    path = write(tmp_path / "a.jsonl", rows)
    whole = load_splits(arguments(path, on_bad_row="drop", test_size=0), "sft")
    stream = load_splits(arguments(path, on_bad_row="drop", test_size=0, streaming=True), "sft")
    assert sorted(places(stream.train)) == places(whole.train)
    assert stream.ledger.to_dict() == whole.ledger.to_dict()
    stream.ledger.check()
    with pytest.raises(InputError, match="row 5, messages"):
        list(load_splits(arguments(path, test_size=0, streaming=True), "sft").train)


def test_a_stream_sets_its_first_rows_aside(tmp_path):
    declaration = mixture(tmp_path, [30, 50], weight=[1, 3])
    splits = load_splits(arguments(declaration, test_size=8, streaming=True, sources={"test_size": "flag"}), "sft")
    train = places(splits.train)
    assert sorted(places(splits.test)) == [(f"{n}.jsonl", i) for n in "ab" for i in range(1, 5)]
    assert len(train) == 72 and not set(train) & set(places(splits.test))
    before = splits.ledger.to_dict()
    assert train == places(splits.train), "the second epoch has another order of the same rows"
    assert splits.ledger.to_dict() == before, "the second epoch was booked again"
    notes = load_splits(arguments(declaration, streaming=True), "sft").notes
    assert any("--test_size 500 sets the first 500 aside" in note for note in notes)
    with pytest.raises(InputError, match="nobody knows how long a stream is"):
        load_splits(arguments(declaration, test_size=0.1, streaming=True, sources={"test_size": "flag"}), "sft")


DECLARATIONS = sorted((ROOT / "data").glob("*.yaml"))


def test_declarations_are_shipped():
    assert {"mix_tiny.yaml", "mix_chat.yaml", "ultrafeedback.yaml"} <= {p.name for p in DECLARATIONS}


@pytest.mark.parametrize("path", DECLARATIONS, ids=lambda p: p.stem)
def test_every_shipped_declaration_resolves_to_training_splits(path):
    plan = resolve(str(path), "train")
    assert plan.parts and not [p.name for p in plan.parts if p.role == "train" and p.is_test]
    on_the_hub = any(p.where.startswith("https://") for p in plan.parts)
    assert on_the_hub == ("not been downloaded" in path.read_text())


def test_the_shipped_mixture_runs():
    splits = load_splits(arguments("data/mix_tiny.yaml"), "sft")
    counts = Counter(splits.train["source"])
    assert counts["chat/train.jsonl"] == pytest.approx(3 * counts["prompts/train.jsonl"], abs=3)
    assert len(splits.test) == 100 and all(row["messages"][-1]["role"] == "assistant" for row in splits.test)


TINY = {
    "chat": "sft",
    "text": "sft",
    "preferences": "preference",
    "feedback": "unpaired_preference",
    "prompts": "prompt",
}


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_embedded_rows_load_without_a_complaint(name):
    splits = load_splits(arguments(f"data/tiny/{name}"), TINY[name])
    assert len(splits.train) > 100 and len(splits.test) > 10
    assert not splits.ledger.dropped_rows()
    assert not [note for note in splits.notes if "also in the training rows" in note]
