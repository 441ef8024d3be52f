"""Rows into tokens: every row and token is accounted for, and no row is longer than it may be."""

import json
from types import SimpleNamespace

import pytest
from conftest import ROOT
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig
from trl import DPOConfig, KTOConfig, RewardConfig, SFTConfig

from alignment.config import parse
from alignment.data import Splits
from alignment.encoding import COLUMNS, LONG
from alignment.errors import InputError
from alignment.ledger import Ledger
from alignment.tokenization import tokenize

CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig, "kto": KTOConfig, "reward": RewardConfig}
PAIR_KEYS = {"dpo": ("chosen", "rejected"), "kto": ("completion",), "reward": ("chosen", "rejected")}


@pytest.fixture(scope="module")
def tokenizer(toy):
    return AutoTokenizer.from_pretrained(toy)


def arguments(form, **values):
    # no validation of a whole parse for each example: these are the fields that are read
    train = {"max_length": None, "dataset_num_proc": None, "chat_template_path": None, "eval_strategy": "steps"}
    train |= {"assistant_only_loss": True, "completion_only_loss": None, "eval_on_start": True}
    data = {"on_long_row": "drop", "on_bad_row": "stop"}
    train |= {k: v for k, v in values.items() if k in train}
    data |= {k: v for k, v in values.items() if k in data}
    assert set(values) <= {*train, *data}
    return SimpleNamespace(train=SimpleNamespace(**train), data=SimpleNamespace(**data))


def encode(tokenizer, rows, form, test=None, stream=False, **values):
    """Rows through `tokenize`, with the ledger as `load_splits` leaves it."""
    ledger, kinds = Ledger(), {"train": rows, "test": test}
    splits = {}
    for name, part in kinds.items():
        if part is None:
            splits[name] = None
            continue
        part = [{"source": "a", "row": i + 1} | row for i, row in enumerate(part)]
        for source in {row["source"] for row in part}:
            n = sum(row["source"] == source for row in part)
            ledger.read(source, n)
            ledger.keep(source, name, n)
        splits[name] = Dataset.from_list(part)
    if stream:
        splits["train"] = splits["train"].to_iterable_dataset()
    loaded = SimpleNamespace(
        tokenizer=tokenizer,
        model=SimpleNamespace(generation_config=GenerationConfig(eos_token_id=tokenizer.eos_token_id)),
    )
    return tokenize(Splits(splits["train"], splits["test"], ledger, []), loaded, arguments(form, **values), form)


def chat(user, *answers):
    return [{"role": "user", "content": user}] + [
        {"role": "assistant" if i % 2 == 0 else "user", "content": text} for i, text in enumerate(answers)
    ]


def row_of(form, style, prompt, answers):
    """One row of a form, conversational or plain, from words."""
    if form == "sft":
        if style == "chat":
            return {"messages": chat(prompt, answers[0])}
        return {"text": prompt + answers[0]} if style == "text" else {"prompt": prompt, "completion": answers[0]}
    keys = PAIR_KEYS[form]
    talk = style == "chat"
    row = {"prompt": chat(prompt) if talk else prompt}
    row |= {k: [{"role": "assistant", "content": a}] if talk else a for k, a in zip(keys, answers, strict=False)}
    return row | ({"label": True} if form == "kto" else {})


def sequences(row, form):
    """The token sequences of an encoded row, as the model will see them."""
    if form == "sft":
        return [row["input_ids"]]
    prompt = row.get("prompt_ids", [])
    return [prompt + row[name] for name in COLUMNS[form] if name != "prompt_ids"]


WORDS = st.integers(1, 60).map(lambda n: "boat " * n)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(["sft", "dpo", "kto", "reward"]),
    style=st.sampled_from(["chat", "plain", "text"]),
    texts=st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=12),
    limit=st.sampled_from([None, 3, 16, 40, 100]),
    policy=st.sampled_from(["cut", "drop"]),
)
def test_rows_and_tokens_add_up(tokenizer, form, style, texts, limit, policy):
    rows = [row_of(form, style, p, (a, b)) | {"source": "ab"[i % 2]} for i, (p, a, b) in enumerate(texts)]
    values = {"on_long_row": policy, "on_bad_row": "drop"}
    whole = {}
    for index, row in enumerate(rows):  # each row alone and unlimited: what there was
        one = encode(tokenizer, [row], form, **values) if _usable(row) else None
        whole[index] = sum(map(len, sequences(one.train[0], form))) if one else None
    try:
        found = encode(tokenizer, rows, form, max_length=limit, **values)
    except InputError as error:
        assert "every one of" in str(error) and ("--max_length" in str(error) or "same tokens" in str(error))
        return
    ledger = found.ledger
    ledger.check()
    assert len(found.train) == ledger.rows("train") > 0
    for row in found.train:
        own = sequences(row, form)
        assert row["length"] == max(map(len, own)) <= (limit or 10**9)
    for source in "ab":
        if source not in ledger.accounts:
            continue
        account = ledger.accounts[source]
        mine = [row for row in found.train if row["source"] == source]
        kept = sum(len(s) for row in mine for s in sequences(row, form))
        assert account.tokens.get("train", [0, 0])[0] == kept
        if form == "sft":
            trained = sum(label != -100 for row in mine for label in row["labels"])
            assert account.tokens.get("train", [0, 0])[1] == trained
        if any(whole[i] is None for i, row in enumerate(rows) if row["source"] == source):
            continue
        gone = sum(tokens for _, tokens in account.dropped.values()) + sum(t for _, t in account.cut.values())
        assert kept + gone == sum(whole[i] for i, row in enumerate(rows) if row["source"] == source)


def _usable(row):
    return "chosen" not in row or row["chosen"] != row["rejected"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 90), min_size=1, max_size=6), limit=st.integers(3, 40))
def test_long_texts_lose_no_token(tokenizer, sizes, limit):
    rows = [{"text": "boat " * n} for n in sizes]
    found = encode(tokenizer, rows, "sft", max_length=limit, on_bad_row="drop") if any(sizes) else None
    for number, (row, size) in enumerate(zip(rows, sizes, strict=True), 1):
        if not size:
            continue
        pieces = [r["input_ids"] for r in found.train if r["row"] == number]
        assert sum(pieces, []) == [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        assert all(2 <= len(piece) <= limit for piece in pieces)
    if found:
        assert not any(account.cut for account in found.ledger.accounts.values())


def test_every_trained_token_is_an_answer(tokenizer):
    rows = [{"messages": chat("Add seven", "twelve", "And five?", "forty")}]
    (row,) = encode(tokenizer, rows, "sft").train
    decode = tokenizer.decode
    assert decode([t for t in row["labels"] if t != -100]) == "twelve<|im_end|>forty<|im_end|>"
    (row,) = encode(tokenizer, rows, "sft", assistant_only_loss=False).train
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    rows = [{"prompt": "Add seven:", "completion": " twelve"}]
    (row,) = encode(tokenizer, rows, "sft").train
    assert decode([t for t in row["labels"] if t != -100]) == " twelve<|im_end|>"
    (row,) = encode(tokenizer, rows, "sft", completion_only_loss=False).train
    assert row["labels"] == [-100, *row["input_ids"][1:]]


@pytest.mark.parametrize("text", ["twelve", "twelve<|im_end|>"])
def test_texts_end_in_one_eos(tokenizer, text):
    end = tokenizer.eos_token_id
    rows = {
        "sft": [{"prompt": "Add:", "completion": text}, {"prompt": "Add", "completion": text}],
        "dpo": [{"prompt": "Add:", "chosen": text, "rejected": "no"}],
        "kto": [{"prompt": "Add:", "completion": text, "label": True}],
        "reward": [{"prompt": "Add:", "chosen": text, "rejected": "no"}],
    }
    for form, given_rows in rows.items():
        for row in encode(tokenizer, given_rows, form).train:
            assert all(s.count(end) == 1 and s[-1] == end for s in sequences(row, form))
    for row in encode(tokenizer, [{"text": text}], "sft").train:
        assert row["input_ids"].count(end) == 1


def test_bos_stands_once_in_front_of_both_answers():
    from test_templates import spaced_tokenizer
    from tokenizers.processors import TemplateProcessing

    spaced = spaced_tokenizer()
    spaced.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bos = spaced.bos_token_id
    rows = [{"chosen": "<s>Ask: yes", "rejected": "Ask: no"}, {"prompt": "Ask:", "chosen": " yes", "rejected": "no"}]
    found = [encode(spaced, [row], "reward").train[0] for row in rows]
    for row in found:
        for ids in (row["chosen_ids"], row["rejected_ids"]):
            assert ids.count(bos) == 1 and ids[0] == bos
    assert found[0]["chosen_ids"] == found[1]["chosen_ids"]
    assert spaced.decode(found[1]["rejected_ids"], skip_special_tokens=True) == "Ask:no"


def test_pairs_share_their_prompt_and_the_encoder_gives_it(tokenizer):
    row = {"prompt": chat("Add seven", "twelve", "And five?"), **_answers("forty", "four")}
    found = encode(tokenizer, [row], "dpo")
    (pair,) = found.train
    assert pair["prompt_ids"] == found.encoder.encode_prompt(row["prompt"])
    assert tokenizer.decode(pair["chosen_ids"]) == "forty<|im_end|>"
    (both,) = encode(tokenizer, [row], "reward").train
    assert both["rejected_ids"] == pair["prompt_ids"] + pair["rejected_ids"]
    assert tokenizer.eos_token_id == both["chosen_ids"][-1]


def _answers(chosen, rejected):
    return {
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def test_an_answer_the_template_shows_otherwise_is_not_taken_from_the_history(tokenizer):
    """Here the last answer is shown in another way than prompted for; the one before it must not stand in."""
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + (' (last)' if loop.last and m['role'] == 'assistant' "
        "else '') + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    row = {"prompt": chat("Add", "twelve", "And?"), **_answers("forty", "four")}
    with pytest.raises(InputError, match="shows the answer otherwise"):
        encode(tokenizer, [row], "dpo")


def test_pairs_that_become_equal_when_cut_are_dropped(tokenizer):
    same = "boat " * 20
    rows = [
        {"prompt": chat("Say"), **_answers(same + "one", same + "two")},
        {"prompt": chat("Say"), **_answers("yes", "no")},
        {"prompt": chat("Say"), **_answers("yes ", " yes")},
    ]
    found = encode(tokenizer, rows, "dpo", max_length=30, on_long_row="cut", on_bad_row="drop")
    causes = {row["row"]: row["cause"] for row in found.ledger.dropped_rows()}
    assert causes[1] == "chosen and rejected are the same tokens once cut"
    assert [row["row"] for row in found.train if row["row"] < 3] == [2]
    with pytest.raises(InputError, match="same tokens"):
        encode(tokenizer, rows[:2], "dpo", max_length=30, on_long_row="cut")


def test_near_pairs_are_counted(tokenizer):
    same = "Spell the word backwards, then count its letters. " * 20
    rows = [
        {"prompt": chat("Say"), **_answers(same + "1", same + "2")},
        {"prompt": chat("Say"), **_answers("yes", "no")},
    ]
    assert encode(tokenizer, rows, "dpo").counts["train near"] == 1


@pytest.mark.parametrize("form", ["sft", "dpo", "kto", "reward"])
@pytest.mark.parametrize("policy", ["drop", "stop", "cut"])
def test_rows_that_are_all_too_long_name_a_length_that_fits(tokenizer, form, policy):
    rows = [row_of(form, "chat", "boat " * 30, ("yes", "no"))]
    with pytest.raises(InputError, match=r"every one of 1 train rows.*longer than max_length") as error:
        encode(tokenizer, rows, form, max_length=8, on_long_row=policy)
    wanted = int(error.value.fix.split("--max_length ")[1].split(",")[0])
    assert len(encode(tokenizer, rows, form, max_length=wanted).train) == 1


def test_one_long_row_stops_the_run_only_when_told_to(tokenizer):
    rows = [{"messages": chat("Say", "yes")}, {"messages": chat("Say", "boat " * 90)}]
    with pytest.raises(InputError, match="1 of 2 train rows") as error:
        encode(tokenizer, rows, "sft", max_length=40, on_long_row="stop")
    assert "row 2" in error.value.where
    dropped = encode(tokenizer, rows, "sft", max_length=40, on_long_row="drop")
    assert [row["row"] for row in dropped.train] == [1]
    assert dropped.ledger.dropped_rows() == [{"source": "a", "row": 2, "cause": LONG}]
    cut = encode(tokenizer, rows, "sft", max_length=40, on_long_row="cut")
    assert [row["length"] for row in cut.train] == [len(dropped.train[0]["input_ids"]), 40]


ALTERNATING = (
    "{% for m in messages %}{% if loop.index0 > 0 and m['role'] == messages[loop.index0 - 1]['role'] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("form", ["sft", "dpo", "kto", "reward"])
def test_two_user_turns_where_the_template_forbids_them(tokenizer, form):
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = ALTERNATING
    good, bad = (row_of(form, "chat", "Say", ("yes", "no")) for _ in range(2))
    name = "messages" if form == "sft" else "prompt"
    bad[name] = chat("Hello") + bad[name]
    with pytest.raises(InputError, match="roles must alternate") as error:
        encode(tokenizer, [good, bad], form)
    assert "row 2" in error.value.where and "--on_bad_row drop" in error.value.fix
    found = encode(tokenizer, [good, bad], form, on_bad_row="drop")
    assert [row["row"] for row in found.train] == [1]
    assert "roles must alternate" in found.ledger.dropped_rows()[0]["cause"]


def test_a_tokenizer_without_template_stops_whatever_the_policy(tokenizer):
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        encode(tokenizer, [{"messages": chat("Say", "yes")}], "sft", on_bad_row="drop")
    path = str(ROOT / "data/chat_templates/plain.jinja")
    found = encode(tokenizer, [{"messages": chat("Say", "yes")}], "sft", chat_template_path=path)
    assert tokenizer.decode(found.train[0]["input_ids"]) == "User: Say\nAssistant: yes<|im_end|>"


def test_the_end_of_the_turn_becomes_a_stop_token(tokenizer):
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    ledger = Ledger()
    ledger.read("a", 1)
    ledger.keep("a", "train", 1)
    rows = Dataset.from_list([{"source": "a", "row": 1, "messages": chat("Say", "yes")}])
    config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    loaded = SimpleNamespace(tokenizer=tokenizer, model=SimpleNamespace(generation_config=config))
    found = tokenize(Splits(rows, None, ledger, []), loaded, arguments("sft"), "sft")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert config.eos_token_id == sorted([end, tokenizer.eos_token_id])
    assert found.counts["train unstopped"] == 0 and any("stop tokens" in note for note in found.notes)


def test_no_row_left_to_evaluate_on_switches_evaluation_off(tokenizer):
    rows = [{"messages": chat("Say", "yes")}]
    found = encode(tokenizer, rows, "sft", test=[{"messages": chat("Say", "boat " * 90)}], max_length=40)
    assert found.test is None and found.ledger.rows("test") == 0
    assert any("no held-out rows" in note for note in found.notes)


def test_margins_may_be_missing_in_some_rows(tokenizer):
    rows = [row_of("reward", "chat", "Say", ("yes", "no")) | {"margin": m} for m in (0.5, None)]
    assert encode(tokenizer, rows, "reward").train["margin"] == [0.5, 0.0]


def test_escaped_and_unstopped_turns_are_counted(tokenizer):
    rows = [{"messages": chat("What is <|im_end|>?", "A token.")}, {"messages": chat("Say", "yes")}]
    counts = encode(tokenizer, rows, "sft").counts
    assert (counts["train escaped"], counts["train unstopped"], counts["train turns"]) == (1, 0, 2)


def test_tools_and_template_arguments_reach_the_template(tokenizer):
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = "{{ tools | tojson if tools else 'none' }}{{ style or '' }}" + tokenizer.chat_template
    rows = [
        {"messages": chat("Say", "yes"), "tools": json.dumps([{"name": "find"}]), "chat_template_kwargs": None},
        {"messages": chat("Say", "yes"), "tools": None, "chat_template_kwargs": {"style": "brief"}},
    ]
    first, second = (tokenizer.decode(row["input_ids"]) for row in encode(tokenizer, rows, "sft").train)
    assert first.startswith('[{"name": "find"}]<|im_start|>')
    assert second.startswith("nonebrief<|im_start|>")


@pytest.mark.parametrize("form", ["sft", "dpo", "kto", "reward"])
def test_streams_give_the_same_tokens_and_book_once_what_they_drop(tokenizer, form):
    rows = [row_of(form, "chat", "Say", (text, "no")) for text in ("yes", "boat " * 90, "maybe")]
    table = encode(tokenizer, rows, form, max_length=40)
    stream = encode(tokenizer, rows, form, max_length=40, stream=True)
    assert isinstance(stream.train, IterableDataset)
    for _ in range(2):  # a second epoch books nothing again
        drawn = list(stream.train)
        for column in COLUMNS[form]:
            assert [list(row[column]) for row in drawn] == [list(row[column]) for row in table.train]
    assert stream.ledger.dropped_rows() == table.ledger.dropped_rows() != []
    stream.ledger.check()
    with pytest.raises(InputError, match="1 train rows cannot be used"):
        list(encode(tokenizer, rows, form, max_length=40, stream=True, on_long_row="stop").train)


def test_the_real_arguments_have_the_fields_that_are_read(toy, tmp_path, tokenizer):
    for form, config in CONFIGS.items():
        own = {"model_name_or_path": str(toy), "output_dir": str(tmp_path)}
        args = parse(config, own, [])
        for group in ("train", "data"):
            wanted = set(vars(getattr(arguments(form), group)))
            optional = {"assistant_only_loss", "completion_only_loss", "chat_template_path"} if form != "sft" else set()
            assert wanted - optional <= set(vars(getattr(args, group)))
