"""Formats: what people have becomes what trainers want; what is wrong in a row is said."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.errors import InputError
from alignment.formats import convert, problems, recognise, to_chat, unknown_columns, unpair


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def read(row, kind):
    form = recognise(list(row), [row], kind)
    assert form is not None, row
    return convert(row, form, kind)


CHAT = [user("q"), bot("a")]
SFT = [
    ({"messages": CHAT}, {"messages": CHAT}),
    ({"messages": [user("q"), bot("a"), user("r"), bot("b")]}, {"messages": [*CHAT, user("r"), bot("b")]}),
    ({"conversations": [human("q"), gpt("a")]}, {"messages": CHAT}),
    ({"conversations": [human("q"), gpt("a")], "system": "s"}, {"messages": [system("s"), *CHAT]}),
    ({"conversations": [human("q"), gpt("a")], "system": ""}, {"messages": CHAT}),
    (
        {"conversation": [{"role": "user", "value": "q"}, {"from": "assistant", "content": "a"}]},
        {"messages": CHAT},
    ),
    ({"instruction": "q", "output": "a"}, {"messages": CHAT}),
    (
        {"instruction": "q", "input": "i", "output": "a", "text": "x"},
        {"messages": [user("q\n\ni"), bot("a")]},
    ),
    ({"instruction": "q", "input": " ", "output": "a"}, {"messages": CHAT}),
    ({"instruction": "q", "context": "c", "response": "a"}, {"messages": [user("q\n\nc"), bot("a")]}),
    (
        {"instruction": "r", "output": "b", "system": "s", "history": [["q", "a"]]},
        {"messages": [system("s"), *CHAT, user("r"), bot("b")]},
    ),
    ({"question": "q", "answer": "a"}, {"messages": CHAT}),
    ({"query": "q", "response": "a"}, {"messages": CHAT}),
    ({"problem": "q", "solution": "a"}, {"messages": CHAT}),
    ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}),
    ({"prompt": "q", "response": "a"}, {"prompt": "q", "completion": "a"}),
    ({"prompt": [user("q")], "completion": [bot("a")]}, {"messages": CHAT}),
    ({"prompt": [user("q")], "answer": "a"}, {"messages": CHAT}),
    ({"text": "words"}, {"text": "words"}),
    ({"text": "words", "label": 1}, {"text": "words"}),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, bot("a")]},
        {"messages": CHAT},
    ),
    (
        {"messages": [{"role": "human", "content": "q"}, {"role": "model", "content": "a"}]},
        {"messages": CHAT},
    ),
]
PAIR = {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("b")]}
LONG = {"prompt": [user("q"), bot("a"), user("r")], "chosen": [bot("c")], "rejected": [bot("d")]}
PREFERENCE = [
    ({"prompt": "q", "chosen": "a", "rejected": "b"},) * 2,
    (PAIR, PAIR),
    ({"prompt": "q", "chosen": [bot("a")], "rejected": [bot("b")]}, PAIR),
    ({"prompt": [user("q")], "chosen": "a", "rejected": "b"}, PAIR),
    ({"prompt": "ignored", "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]}, PAIR),
    ({"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]}, PAIR),
    ({"conversations": [human("q")], "chosen": gpt("a"), "rejected": gpt("b")}, PAIR),
    ({"conversations": [human("q"), gpt("a"), human("r")], "chosen": gpt("c"), "rejected": gpt("d")}, LONG),
    ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, PAIR),
    ({"question": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b"}),
    (
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        PAIR | {"prompt": [system("s"), user("q")]},
    ),
    ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, PAIR),
    (
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: c",
            "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: d",
        },
        LONG,
    ),
]
THUMB = [
    ({"prompt": "q", "completion": "a", "label": True},) * 2,
    ({"prompt": [user("q")], "completion": [bot("a")], "label": False},) * 2,
    ({"prompt": "q", "completion": "a", "label": 0}, {"prompt": "q", "completion": "a", "label": False}),
    ({"messages": CHAT, "label": True}, {"prompt": [user("q")], "completion": [bot("a")], "label": True}),
    (PAIR, PAIR),
]
PROMPT = [
    ({"prompt": "q", "verifier": "exact"}, {"prompt": "q", "verifier": "exact"}),
    ({"prompt": [user("q")], "answer": "a"}, {"prompt": [user("q")], "answer": "a"}),
    ({"question": "q", "answer": "a"}, {"prompt": [user("q")], "answer": "a"}),
    ({"messages": [system("s"), *CHAT]}, {"prompt": [system("s"), user("q")], "answer": "a"}),
    (PAIR, {"prompt": [user("q")]}),
]
CASES = [
    (kind, *case)
    for kind, cases in (
        ("sft", SFT),
        ("preference", PREFERENCE),
        ("unpaired_preference", THUMB),
        ("prompt", PROMPT),
    )
    for case in cases
]


@pytest.mark.parametrize(("kind", "row", "wanted"), CASES)
def test_conversion(kind, row, wanted):
    before = json.dumps(row)
    got = read(row, kind)
    assert {k: got[k] for k in wanted} == wanted
    assert json.dumps(row) == before, "the raw row was changed"
    pair = kind == "unpaired_preference" and "chosen" in got
    assert problems(got, "preference" if pair else kind) == []


@pytest.mark.parametrize(
    ("row", "kind", "recipe"),
    [
        (PAIR, "sft", "dpo.py"),
        ({"messages": CHAT, "label": True}, "sft", "kto.py"),
        ({"messages": CHAT}, "preference", "sft.py"),
        ({"messages": CHAT, "label": True}, "preference", "kto.py"),
        ({"question": "q", "answer": "a"}, "unpaired_preference", "sft.py"),
        ({"text": "x"}, "prompt", "sft.py"),
        ({"prompt": "x"}, "sft", "generates its own answers"),
    ],
)
def test_rows_for_another_recipe_name_it(row, kind, recipe):
    with pytest.raises(InputError) as caught:
        read(row, kind)
    assert recipe in caught.value.fix


def test_columns_of_no_format_name_what_there_is_and_the_nearest():
    assert recognise(["promt", "chosn", "rejected"], [{}], "preference") is None
    error = unknown_columns(["promt", "chosn", "rejected"], "preference", "x.jsonl")
    assert "promt, chosn, rejected" in error.what
    assert "promt: prompt" in error.fix and "chosn: chosen" in error.fix


@pytest.mark.parametrize(
    ("kind", "columns", "near"),
    [
        ("preference", ["prompt", "choosen", "rejected"], "choosen: chosen"),
        ("unpaired_preference", ["prompt", "completion", "lable"], "lable: label"),
        ("sft", ["prompt", "completions"], "completions: completion"),
    ],
)
def test_a_misspelt_column_is_named_and_not_another_recipe(kind, columns, near):
    assert recognise(columns, [{}], kind) is None
    assert near in unknown_columns(columns, kind, "x.jsonl").fix


def test_spare_columns_ride_along_but_never_under_a_name_trl_reads():
    got = read({"messages": CHAT, "prompt": "x", "task": "t", "tools": [{"name": "f"}]}, "sft")
    assert got == {"messages": CHAT, "task": "t", "tools": '[{"name": "f"}]'}


def test_function_calls_of_sharegpt_become_tool_calls():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    row = {"conversations": [human("q"), call, {"from": "observation", "value": "2"}, gpt("a")]}
    got = read(row, "sft")["messages"]
    assert got[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert [m["role"] for m in got] == ["user", "assistant", "tool", "assistant"]
    assert problems({"messages": got}, "sft", alternate=True) == []


def test_text_becomes_turns_beside_conversations():
    assert to_chat({"prompt": "q", "completion": "a", "task": "t"}) == {"messages": CHAT, "task": "t"}
    assert to_chat({"prompt": "q", "chosen": "a", "rejected": "b"}) == PAIR
    thumb = to_chat({"prompt": "q", "completion": "a", "label": True})
    assert thumb == {"prompt": [user("q")], "completion": [bot("a")], "label": True}
    assert to_chat({"text": "x"}) == {"text": "x"}


def test_a_pair_becomes_two_thumbs():
    up, down = unpair(PAIR | {"task": "t"})
    assert (up["completion"], up["label"], up["task"]) == (PAIR["chosen"], True, "t")
    assert (down["completion"], down["label"], down["prompt"]) == (PAIR["rejected"], False, PAIR["prompt"])
    assert not {"chosen", "rejected"} & {*up, *down}


BAD = [
    ("sft", {"messages": [user("q"), bot(3)]}, "messages[1].content", "content is no text"),
    ("sft", {"messages": [user("q"), bot(None)]}, "messages[1].content", "content is no text"),
    ("sft", {"messages": [user("q"), bot("")]}, "messages[1].content", "empty assistant turn"),
    ("sft", {"messages": [user("q"), bot(" \n")]}, "messages[1].content", "empty assistant turn"),
    ("sft", {"messages": [user(""), bot("a")]}, "messages[0].content", "empty user turn"),
    (
        "sft",
        {"messages": [{"role": "assistent", "content": "a"}, bot("a")]},
        "messages[0].role",
        "unknown role",
    ),
    ("sft", {"messages": [{"content": "a"}, bot("a")]}, "messages[0].role", "unknown role"),
    ("sft", {"messages": [user("q")]}, "messages", "no assistant turn"),
    ("sft", {"messages": []}, "messages", "messages: no turns"),
    ("sft", {"messages": None}, "messages", "messages: no turns"),
    ("sft", {"messages": "text"}, "messages", "messages: no turns"),
    ("sft", {"messages": ["q", "a"]}, "messages[0]", "turn is no mapping"),
    (
        "sft",
        {"messages": [user([{"type": "image_url"}]), bot("a")]},
        "messages[0].content",
        "content is not only text",
    ),
    ("sft", {"text": "  "}, "text", "text empty"),
    ("sft", {"text": None}, "text", "text missing"),
    ("sft", {"text": 5}, "text", "text is no text"),
    ("sft", {"prompt": "q", "completion": None}, "completion", "completion missing"),
    (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        "chosen, rejected",
        "chosen equals rejected",
    ),
    ("preference", PAIR | {"rejected": [bot("a")]}, "chosen, rejected", "chosen equals rejected"),
    ("preference", PAIR | {"prompt": [user("q"), bot("x")]}, "prompt", "prompt does not end with the user"),
    ("preference", PAIR | {"prompt": []}, "prompt", "prompt: no turns"),
    ("preference", PAIR | {"chosen": [user("a")]}, "chosen", "answer is not the assistant's"),
    ("preference", {"prompt": "q", "chosen": " ", "rejected": "b"}, "chosen", "chosen empty"),
    ("unpaired_preference", {"prompt": "q", "completion": "a", "label": "false"}, "label", "label is text"),
    ("unpaired_preference", {"prompt": "q", "completion": "a", "label": None}, "label", "label missing"),
    ("unpaired_preference", {"prompt": "q", "completion": "a", "label": 0.5}, "label", "label is no bool"),
    ("prompt", {"prompt": [system("s")]}, "prompt", "prompt does not end with the user"),
    ("prompt", {"prompt": ""}, "prompt", "prompt empty"),
]


@pytest.mark.parametrize(("kind", "row", "column", "cause"), BAD)
def test_what_is_wrong_in_a_row(kind, row, column, cause):
    found = problems(row, kind)
    assert (column, cause) in [(p.column, p.cause) for p in found]
    assert all(p.what and str(p).startswith(p.column) for p in found)


def test_text_labels_say_how_to_fix_them():
    (found,) = problems({"prompt": "q", "completion": "a", "label": "False"}, "unpaired_preference")
    assert found.fix == "write false without quotes"


def test_turns_need_to_alternate_only_where_the_template_says_so():
    row = {"messages": [user("q"), user("r"), bot("a")]}
    assert problems(row, "sft") == []
    assert [p.cause for p in problems(row, "sft", alternate=True)] == ["two user turns in a row"]
    assert problems({"messages": [system("s"), *CHAT, user("r"), bot("b")]}, "sft", alternate=True) == []


WORDS = st.text("abc XYZ.\n", min_size=1, max_size=12).filter(lambda s: s.strip() == s and "\n\n" not in s)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), max_size=3), WORDS, WORDS, WORDS)
def test_the_shared_beginning_is_the_prompt(history, last, chosen, rejected):
    prompt = [m for q, a in history for m in (user(q), bot(a))] + [user(last)]
    sides = {"chosen": [*prompt, bot(chosen)], "rejected": [*prompt, bot(rejected)]}
    got = read(sides, "preference")
    assert got == {"prompt": prompt, "chosen": [bot(chosen)], "rejected": [bot(rejected)]}
    same = [p.cause for p in problems(got, "preference")]
    assert same == (["chosen equals rejected"] if chosen == rejected else [])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), max_size=3), WORDS, WORDS, WORDS)
def test_human_assistant_text_reads_as_the_same_turns(history, last, chosen, rejected):
    prompt = [m for q, a in history for m in (user(q), bot(a))] + [user(last)]
    names = {"user": "Human", "assistant": "Assistant"}

    def text(messages):
        return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages)

    row = {"chosen": text([*prompt, bot(chosen)]), "rejected": text([*prompt, bot(rejected)])}
    assert read(row, "preference") == {"prompt": prompt, "chosen": [bot(chosen)], "rejected": [bot(rejected)]}


def test_one_conversation_that_is_the_beginning_of_the_other_keeps_an_answer():
    row = {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("a"), user("r"), bot("b")]}
    got = read(row, "preference")
    assert got["prompt"] == [user("q")] and got["chosen"] == [bot("a")] and len(got["rejected"]) == 3


def test_prompt_with_completion_keeps_the_reference_answer():
    row = {"prompt": "How much is 2 plus 2?", "completion": "4"}
    assert "4" in str(convert(row, recognise(list(row), [row], "prompt"), "prompt"))
