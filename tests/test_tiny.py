"""data/tiny: rows as the generator makes them, train and test apart, right answers, a model that is a base model."""

import datetime
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).resolve().parent.parent / "data"
TINY = DATA / "tiny"
FOLDERS = ["chat", "preferences", "feedback", "prompts", "questions", "sentences", "sentence_pairs", "choices", "text"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def load(folder, split):
    lines = (TINY / folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_tiny_rows", DATA / "make_tiny_rows.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32).eval()


def asked(row):
    """Return the texts of a row that must not be seen twice: what users ask, or the text that is labelled."""
    if isinstance(row.get("prompt"), str):
        return [row["prompt"].removeprefix("Q: ").removesuffix("\nA:")]
    turns = row.get("messages", row.get("prompt", []))
    texts = [turn["content"] for turn in turns if turn["role"] == "user"]
    for column in ("question", "sentence", "sentence1", "text"):
        if column in row:
            texts.append(row[column])
    return texts


def contents(texts):
    """Return whole texts, but no follow-up question: alone it says nothing ("Who is the oldest?")."""
    short = re.compile(r"(Who is the \w+|Who has the \w+ \w+|Where is [\w ]+ now|What colour is \w+'s \w+)\?")
    return {text for text in texts if not short.fullmatch(text)}


@pytest.mark.parametrize("folder", FOLDERS)
def test_test_rows_share_no_question_with_any_training_rows(folder):
    test = contents(text for row in load(folder, "test") for text in asked(row))
    for other in FOLDERS:
        train = contents(text for row in load(other, "train") for text in asked(row))
        assert not test & train, f"{folder}/test and {other}/train share {sorted(test & train)[:3]}"


def test_dev_choices_are_five_per_subject_and_not_in_the_test():
    dev, test = load("choices", "dev"), load("choices", "test")
    subjects = {row["subject"] for row in test}
    assert {subject: sum(row["subject"] == subject for row in dev) for subject in subjects} == dict.fromkeys(
        subjects, 5
    )
    assert not {row["question"] for row in dev} & {row["question"] for row in test}
    assert all(len(set(row["choices"])) == 4 and row["answer"] in range(4) for row in dev + test)


@pytest.mark.parametrize("folder", ["prompts", "questions", "choices"])
def test_committed_rows_are_what_the_generator_makes(generator, folder):
    for split, rows in generator.folder_rows(folder).items():
        assert rows == load(folder, split), f"{folder}/{split} differs: run python data/make_tiny_rows.py"


def test_another_seed_makes_other_rows(generator):
    assert generator.folder_rows("choices", seed=8)["test"] != load("choices", "test")


def test_pretraining_text_asks_no_test_question(generator):
    text = "\n".join(page["text"] for page in generator.pretraining_text(generator.SEED, 400_000))
    questions = contents(text for folder in FOLDERS for row in load(folder, "test") for text in asked(row))
    assert len(questions) > 1500
    assert not [question for question in questions if question in text]


def solve(question):
    """Return the answer, found another way than the generator does; None for questions of facts and language."""
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    words = re.findall(r'"(\w+)"', question)
    if re.search(r" plus | \+ |^Add ", question):
        return str(sum(numbers))
    if re.search(r" minus | - ", question):
        return str(numbers[0] - numbers[1])
    if re.search(r" times \d| x \d", question):
        return str(sum([numbers[0]] * numbers[1]))
    if "gives" in question:
        return str(numbers[0] + numbers[1] - (numbers[2] if "loses" in question else 0))
    if re.match(r"Which number comes next|Continue|What comes after", question):
        return str(2 * numbers[-1] - numbers[-2])
    if "largest" in question or "smallest" in question:
        return str(sorted(numbers)[-1 if "largest" in question else 0])
    if re.match("Sort|Put in order", question):
        return ", ".join(map(str, sorted(numbers)))
    if re.search("How many letters|How long", question):
        return str(sum(1 for _ in words[0]))
    if re.search("How many times", question):
        return str(len(re.findall(question.split("letter ")[1][0], words[0])))
    if "backwards" in question or "back to front" in question:
        return "-".join(words[0][::-1])
    if "pell " in question:
        return "-".join(words[0])
    if day := re.match(r"(?:Which day comes|What day is it) (\d+) days? (after|before) (\w+)\?", question):
        start = datetime.date(2024, 1, 1) + datetime.timedelta(DAYS.index(day[3]))  # 2024 began on a Monday
        step = datetime.timedelta(int(day[1]) * (1 if day[2] == "after" else -1))
        return DAYS[(start + step).weekday()]
    return None


def test_prompt_answers_are_right():
    checked = set()
    for row in load("prompts", "test") + load("prompts", "train"):
        answer = solve(row["prompt"][-1]["content"])
        if answer is None:
            continue
        expected = {answer, f"The answer is {answer}.", f"{answer}, if you please.", answer.upper()}
        assert row["answer"] in expected, row
        checked.add(row["task"])
    assert len(checked) >= 12


def test_pairs_differ_and_the_chosen_answer_is_the_right_one():
    for row in load("preferences", "train") + load("preferences", "test"):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert chosen != rejected
        answer = solve(row["prompt"][-1]["content"])
        if answer is not None and row["prompt"][0]["role"] == "user":
            assert chosen == answer


def test_thumbs_are_balanced():
    labels = [row["label"] for row in load("feedback", "train")]
    assert 0.45 < sum(labels) / len(labels) < 0.55


def test_sizes_stay_small():
    assert sum(file.stat().st_size for file in (TINY / "model").iterdir()) <= 3_000_000
    assert sum(file.stat().st_size for folder in FOLDERS for file in (TINY / folder).iterdir()) <= 4_000_000


def test_model_is_a_small_finite_llama(model, tokenizer):
    parameters = list(model.parameters())
    assert 0.8e6 < sum(weight.numel() for weight in parameters) < 1.2e6
    assert all(torch.isfinite(weight).all() for weight in parameters)
    assert model.config.model_type == "llama"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer("Tom has 12 apples.")["input_ids"][0] != tokenizer.bos_token_id


def continued(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :])


def test_base_continues_text_but_does_not_follow_the_chat_format(model, tokenizer):
    rows = [row for row in load("prompts", "test") if row["task"] in ("mood", "add_small", "letter_at", "past")][:12]
    assert len(rows) == 12
    told, chatted = [], []
    for row in rows:
        question = row["prompt"][-1]["content"]
        told.append(continued(model, tokenizer, f"<|im_start|>Q: {question}\nA:"))
        chat = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        chatted.append(continued(model, tokenizer, chat))
    told = [re.split(r"\n|<\|im_end\|>", text)[0].strip() for text in told]
    right = [text in row["answer"] or text.upper() == row["answer"] for text, row in zip(told, rows, strict=True)]
    assert sum(right) >= 8, told
    right = [text.split("<|im_end|>")[0].strip() == row["answer"] for text, row in zip(chatted, rows, strict=True)]
    assert sum(right) <= 2, chatted


def test_chat_template_round_trips_and_marks_the_assistant(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 plus 3?"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "Spell \"hat\"."},
        {"role": "assistant", "content": "h-a-t"},
    ]  # fmt: skip
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", text, re.DOTALL)
    assert turns == [(turn["role"], turn["content"]) for turn in messages]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [token for token, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(trained) == "5<|im_end|>h-a-t<|im_end|>"
    assert text.startswith(tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True))


def test_the_stop_token_is_trained(model, tokenizer):
    """After a whole document the base ends it: the stop token is one it knows."""
    ids = tokenizer('<|im_start|>Q: What is 2 plus 3?\nA: 5\nQ: Spell "hat".\nA: h-a-t', return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits[0, -1].softmax(-1)
    assert probabilities[tokenizer.eos_token_id] > 0.02
