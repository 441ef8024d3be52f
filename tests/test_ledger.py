"""The ledger adds up: for any rows, any splitting, and after what happens to the rows later."""

import io
import json
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from alignment.config import DataArguments
from alignment.data import load_splits
from alignment.errors import InputError
from alignment.ledger import Ledger, LedgerError

GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}
BAD = {
    "chosen equals rejected": {"prompt": "q", "chosen": "a", "rejected": "a"},
    "prompt empty": {"prompt": " ", "chosen": "a", "rejected": "b"},
    "chosen missing": {"prompt": "q", "chosen": None, "rejected": "b"},
    "row cannot be read": None,
}
SOURCES = st.lists(
    st.lists(st.sampled_from(["good"] * 4 + list(BAD)), min_size=1, max_size=25).map(lambda rows: ["good", *rows]),
    min_size=1,
    max_size=3,
)


def lay_out(folder, sources, amounts):
    """Write one file per source and a declaration over them; return the declaration's path."""
    lines = ["sources:"]
    for i, rows in enumerate(sources):
        texts = ["{broken" if r == "row cannot be read" else json.dumps(BAD.get(r, GOOD)) for r in rows]
        (folder / f"s{i}.jsonl").write_text("\n".join(texts))
        lines.append(f"  - path: s{i}.jsonl")
        lines += [f"    {key}: {values[i]}" for key, values in amounts.items()]
    (folder / "mix.yaml").write_text("\n".join(lines))
    return folder / "mix.yaml"


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sources=SOURCES,
    numbers=st.lists(st.integers(1, 60), min_size=3, max_size=3),
    how=st.sampled_from(["all", "weight", "rows"]),
    test_size=st.sampled_from([0, 0.1, 0.5, 1, 3]),
    kind=st.sampled_from(["preference", "unpaired_preference", "prompt"]),
    streaming=st.booleans(),
)
def test_rows_in_are_rows_accounted_for(tmp_path, sources, numbers, how, test_size, kind, streaming):
    path = lay_out(tmp_path, sources, {} if how == "all" else {how: numbers})
    data = DataArguments([str(path)], test_size=test_size, on_bad_row="drop", streaming=streaming)
    train = SimpleNamespace(seed=1, data_seed=None)
    try:
        splits = load_splits(SimpleNamespace(data=data, train=train, sources={}, also=()), kind)
    except InputError as error:
        assert "leaves nothing" in error.what or "cannot be used" in error.what
        return
    splits.ledger.check()
    rows = {"train": list(splits.train), "test": list(splits.test or [])}
    splits.ledger.check()
    counted = splits.ledger.to_dict()["sources"]
    for i, written in enumerate(sources):
        name = f"s{i}.jsonl"
        account = counted.get(name, {"read": 0, "repeated": 0, "train": 0, "test": 0, "unsampled": 0, "dropped": {}})
        for split, got in rows.items():
            assert sum(r["source"] == name for r in got) == account[split]
        if streaming and how == "rows":
            assert account["read"] <= len(written)
            continue
        assert account["read"] == len(written)
        causes = Counter(r for r in written if r in BAD and not (kind == "prompt" and r in PROMPT_CAN_USE))
        assert {c: d["rows"] for c, d in account["dropped"].items()} == causes
        numbers_dropped = [d["row"] for d in splits.ledger.dropped_rows() if d["source"] == name]
        wanted = [n for n, r in enumerate(written, 1) if r in causes]
        assert sorted(numbers_dropped) == wanted
    train_places = {(r["source"], r["row"]) for r in rows["train"]}
    assert not train_places & {(r["source"], r["row"]) for r in rows["test"]}


# A prompt alone needs no answers: rows with useless answers are fine there.
PROMPT_CAN_USE = ("chosen equals rejected", "chosen missing")


def full_ledger():
    ledger = Ledger()
    ledger.read("a.jsonl", 10)
    ledger.drop("a.jsonl", None, "empty assistant turn", rows=[3])
    ledger.keep("a.jsonl", "train", 7)
    ledger.keep("a.jsonl", "test", 2)
    return ledger


def test_rows_dropped_after_the_split_leave_it():
    ledger = full_ledger()
    ledger.drop("a.jsonl", "train", "longer than max_length", rows=[4, 5], tokens=900)
    ledger.check()
    got = ledger.to_dict()["sources"]["a.jsonl"]
    assert (got["train"], got["test"]) == (5, 2) and ledger.rows("train") == 5
    assert got["dropped"]["longer than max_length"] == {"rows": 2, "tokens": 900}
    assert [d["row"] for d in ledger.dropped_rows()] == [3, 4, 5]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.read("a.jsonl", 1),
        lambda x: x.keep("a.jsonl", "train", 1),
        lambda x: x.drop("a.jsonl", None, "why", rows=[9]),
        lambda x: x.repeat("a.jsonl", 1),
        lambda x: x.drop("a.jsonl", "test", "why", rows=[1, 2, 3]),
        lambda x: x.tokens("a.jsonl", "train", tokens=5, trained=6),
        lambda x: x.padding("train", computed=5, real=6),
    ],
)
def test_books_that_do_not_balance_are_noticed(spoil):
    ledger = full_ledger()
    ledger.check()
    spoil(ledger)
    with pytest.raises(LedgerError):
        ledger.check()


def test_to_dict_is_json_and_holds_every_number():
    ledger = full_ledger()
    ledger.cut("a.jsonl", "train", "longer than max_length", rows=2, tokens=50)
    ledger.tokens("a.jsonl", "train", tokens=1000, trained=400)
    ledger.padding("train", computed=1100, real=1000)
    got = json.loads(json.dumps(ledger.to_dict()))
    account = got["sources"]["a.jsonl"]
    assert account["cut"] == [{"split": "train", "cause": "longer than max_length", "rows": 2, "tokens": 50}]
    assert account["tokens"] == {"train": {"tokens": 1000, "trained": 400}}
    assert got["padding"] == {"train": {"computed": 1100, "real": 1000}}


def test_the_table_fits_a_hundred_columns_and_cuts_no_number():
    ledger = Ledger()
    for name in ("a_rather_long_organisation/a_rather_long_dataset_name:config@train_sft", "b.jsonl"):
        ledger.read(name, 9_999_999)
        ledger.repeat(name, 1_000_000)
        ledger.drop(name, None, "empty assistant turn", rows=list(range(1234)))
        ledger.keep(name, "train", 8_765_432)
        ledger.keep(name, "test", 1_000_000)
        ledger.keep(name, "unsampled", 9_999_999 + 1_000_000 - 1234 - 8_765_432 - 1_000_000)
        ledger.cut(name, "train", "longer than max_length", rows=7_654_321, tokens=5)
        ledger.tokens(name, "train", tokens=10, trained=7)
    ledger.padding("train", computed=11, real=10)
    ledger.check()
    out = io.StringIO()
    Console(width=100, file=out).print(ledger.table(), ledger.caption(), sep="\n")
    text = out.getvalue()
    assert max(map(len, text.split("\n"))) <= 100 and "…" not in text
    for number in ("9,999,999", "8,765,432", "7,654,321", "1,000,000", "1,234 rows dropped", "1.10 x", "70%"):
        assert number in text
