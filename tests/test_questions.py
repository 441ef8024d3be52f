"""What is asked: references of several kinds of rows, examples in front, wordings; GSM8K's prompt is lm-eval's."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from eval_runs import run_script, write_rows

from alignment.errors import InputError
from alignment.questions import BENCHMARKS, Asking, choose_shots, read_questions, read_wordings, single
from alignment.report import read_result
from alignment.rewards import verifier
from alignment.text_metrics import gsm8k_equal, gsm8k_flexible

GSM8K = [{"question": f"How much is {i} and 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(6)]


def check_prompts(train, test, count):
    """Compare our prompts with those of lm-eval's own task on the same files, its examples taken in order."""
    import lm_eval
    import yaml
    from lm_eval.api.task import ConfigurableTask

    config = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
    files = {"train": str(train), "test": str(test)}
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    task = ConfigurableTask(config=config | {"fewshot_config": {"sampler": "first_n"}, "tag": None})
    known = BENCHMARKS["gsm8k"]
    assert set(known.stop_strings) <= set(config["generation_kwargs"]["until"])
    rows = read_questions(str(test), known.verifier)
    for shots in (0, 5):
        ask = Asking(known.wording, tuple(choose_shots(str(train), known.verifier, shots, rows)), plain=True)
        theirs = [task.fewshot_context(doc, shots) for doc in list(task.dataset["test"])[:count]]
        assert [ask(row["prompt"]) for row in rows[:count]] == theirs
    assert {row["verifier"] for row in rows} == {"gsm8k"}


def test_the_prompts_of_gsm8k_are_those_of_lm_eval(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    train = write_rows(tmp_path / "train.jsonl", GSM8K)
    test = write_rows(tmp_path / "test.jsonl", [{"question": "How much is {2}?", "answer": "2\n#### 2"}, *GSM8K[5:]])
    check_prompts(train, test, 2)


def test_answers_and_scores_of_gsm8k_are_those_of_lm_eval(tmp_path, monkeypatch):
    """Both continue the same texts greedily and stop at the same strings; only outer white space is ours to cut."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from alignment.models import load_checkpoint

    asked = [{"question": f"What is {n} plus {n + 3}?", "answer": f"#### {2 * n + 3}"} for n in (2, 11, 24, 38)]
    rows = write_rows(tmp_path / "test.jsonl", asked)
    words = ["--task", "gsm8k", "--data", rows, "--fewshot_data", write_rows(tmp_path / "train.jsonl", GSM8K)]
    words += ["--shots", 2, "--max_new_tokens", 24, "--batch_size", 3, "--output", tmp_path / "r.json"]
    run_script(monkeypatch, "generate", "--model", "data/tiny/model", *words)
    result = read_result(tmp_path / "r.json")
    assert result.settings["stop_strings"] == ["Question:"] and result.settings["shots"] == 2
    model, tokenizer = load_checkpoint("data/tiny/model")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)
    ask = Asking(BENCHMARKS["gsm8k"].wording, tuple((r["question"], r["answer"]) for r in GSM8K[:2]))
    kwargs = {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False, "max_gen_toks": 24}
    wanted = [Instance("generate_until", {}, (ask(row["question"]), dict(kwargs)), 0) for row in asked]
    theirs = lm.generate_until(wanted, disable_tqdm=True)
    assert [row["text"] for row in result.rows] == [text.strip() for text in theirs]
    assert len({row["text"] for row in result.rows}) > 1
    found = [gsm8k_equal(gsm8k_flexible(text), row["answer"]) for text, row in zip(theirs, asked, strict=True)]
    assert [row["flexible"] for row in result.rows] == found


@pytest.mark.real_data
def test_the_prompts_of_the_real_gsm8k_are_those_of_lm_eval(real_data):
    check_prompts(real_data / "gsm8k" / "train.jsonl", real_data / "gsm8k" / "test.jsonl", 100)


HUMANEVAL = {
    "prompt": 'def add(a, b):\n    """Return the sum."""\n',
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}
MBPP = {"prompt": "Write twice(x).", "test_list": ["assert twice(2) == 4", "assert twice(0) == 0"]}


def test_rows_of_code_are_checked_by_their_tests(tmp_path):
    human, basic = read_questions(str(write_rows(tmp_path / "rows.jsonl", [HUMANEVAL, MBPP])), "exact")
    assert (human["verifier"], human["entry_point"], basic["verifier"]) == ("code", "add", "code")
    check = verifier("code")
    assert check(HUMANEVAL["prompt"] + "    return a + b\n", human["answer"]) == 1.0
    assert check(HUMANEVAL["prompt"] + "    return a - b\n", human["answer"]) == 0.0
    assert check("Here:\n```python\ndef twice(x):\n    return 2 * x\n```\n", basic["answer"]) == 1.0


def test_rows_of_instructions_are_checked_by_them(tmp_path):
    row = {"prompt": "No commas!", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    (row,) = read_questions(str(write_rows(tmp_path / "rows.jsonl", [row])), "exact")
    check = verifier(row["verifier"])
    assert [check(text, row["answer"]) for text in ("fine", "one, two")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("row", "check", "message"),
    [
        ({k: v for k, v in HUMANEVAL.items() if k != "test"}, "exact", "asks for code and has no tests"),
        ({"prompt": "Write twice(x)."}, "code", "asks for code and has no tests"),
        ({"prompt": "a", "text": "b"}, "exact", "no reference answer"),
    ],
)
def test_rows_without_a_reference_are_refused(tmp_path, row, check, message):
    with pytest.raises(InputError, match=message):
        read_questions(str(write_rows(tmp_path / "rows.jsonl", [row, row])), check)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(InputError, match="rows"):
        read_questions(str(tmp_path / "rows.jsonl"), "exact")


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How {old}?"}]


def test_examples_and_wordings_of_conversations_are_turns():
    ask = Asking("Q: {prompt}", (("Who?", "Tom"),), system="Other.")
    said = [(turn["role"], turn["content"]) for turn in ask(CHAT)]
    assert said == [("system", "Be brief."), ("user", "Q: Who?"), ("assistant", "Tom"), ("user", "Q: How {old}?")]
    assert CHAT[1]["content"] == "How {old}?", "the row is left as it is"
    assert [turn["role"] for turn in ask(CHAT[1:])] == ["system", "user", "assistant", "user"]
    assert ask("Why?") == "Q: Who? Tom\n\nQ: Why?", "a text stays a text"
    assert Asking(chat=True)("Why?") == [{"role": "user", "content": "Why?"}]
    longer = [*CHAT, {"role": "assistant", "content": "9"}, {"role": "user", "content": "And now?"}]
    assert ask(longer)[-3:] == [*longer[1:3], {"role": "user", "content": "Q: And now?"}]
    assert single(longer) is None and single(CHAT) == "How {old}?"
    assert Asking("Q: {prompt}\nA:", plain=True)(CHAT) == "Q: How {old}?\nA:"


def test_examples_that_cannot_be_shown_are_refused(tmp_path):
    train = str(write_rows(tmp_path / "train.jsonl", GSM8K))
    asked = read_questions(train, "gsm8k")
    with pytest.raises(InputError, match="7 examples wanted, and .* has 6 rows"):
        choose_shots(train, "gsm8k", 7, [])
    with pytest.raises(InputError, match="1 of the 2 examples are asked as well"):
        choose_shots(train, "gsm8k", 2, asked[1:2])
    code = str(write_rows(tmp_path / "code.jsonl", [MBPP]))
    with pytest.raises(InputError, match="verifier 'code'"):
        choose_shots(code, "exact", 1, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 'Question:'\n", "wording 1 has no {prompt}"),
        ("a: 3\n", "wording a has no {prompt}"),
        ("[]\n", "holds no wordings"),
        ("- [\n", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_wordings_that_cannot_be_used_are_refused(tmp_path, text, message):
    path = tmp_path / "wordings.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_wordings(str(path))


def test_wordings_have_the_names_of_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("- '{prompt}'\n- 'Q: {prompt}'\n")
    (tmp_path / "b.yaml").write_text("plain: '{prompt}'\n")
    assert read_wordings(str(tmp_path / "a.yaml")) == {"1": "{prompt}", "2": "Q: {prompt}"}
    assert read_wordings(str(tmp_path / "b.yaml")) == {"plain": "{prompt}"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_samples", "4"], "4 samples at temperature 0"),
        (["--num_samples", "2", "--temperature", "1", "--pass_at", "1", "3"], "pass@3 needs 3 answers"),
        (["--pass_at", "0"], "pass@0"),
        (["--majority"], "a majority of one answer"),
        (["--num_samples", "0"], "--num_samples 0"),
        (["--shots", "3000"], "3000 examples wanted"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--stop_strings", ""], "stop_strings"),
        (["--verifier", "exakt", "--data", "data/tiny/chat"], "did you mean exact"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        run_script(monkeypatch, "generate", "--model", "none", "--output", tmp_path / "r.json", *words)


def test_a_majority_of_programs_is_refused(monkeypatch, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [MBPP, HUMANEVAL])
    words = ["--majority", "--num_samples", 3, "--temperature", 1, "--data", rows, "--output", tmp_path / "r.json"]
    with pytest.raises(InputError, match="the verifier 'code' has no majority"):
        run_script(monkeypatch, "generate", "--model", "none", *words)


def test_examples_of_the_embedded_prompts_come_from_the_training_split(tmp_path):
    rows = read_questions("data/tiny/prompts", "exact")
    shots = choose_shots("data/tiny/prompts@train", "exact", 3, rows)
    lines = (ROOT / "data/tiny/prompts/train.jsonl").read_text().splitlines()
    train = [json.loads(line) for line in lines]
    known = {(row["prompt"][-1]["content"], row["answer"]) for row in train}
    assert len(shots) == 3 and set(shots) <= known
