"""Answers depend on the model and the row: not on the batch, the neighbours, the padding or the processes."""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from alignment.errors import InputError
from alignment.evaluation import choose_rows
from alignment.generation import Decoding, SampleByRow, generate_answers
from alignment.journal import Journal
from alignment.models import load_checkpoint
from alignment.questions import examples_of, read_questions
from alignment.report import read_result

WORDS = ["The", "boat", "crossed", "the", "river", "before", "rain", "came", "and", "seven", "brown", "foxes"]


@pytest.fixture(scope="module")
def model_and_tokenizer(toy):
    return load_checkpoint(toy)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 25, size=21)
    return [[{"role": "user", "content": " ".join(rng.choice(WORDS, size=size))}] for size in sizes]


def greedy_by_hand(model, ids: list[int], count: int, stops: set[int]) -> list[int]:
    """The reference: no cache, no batch, no padding."""
    new = []
    for _ in range(count):
        token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in stops:
            break
        new.append(token)
    return new


def test_greedy_equals_a_loop_without_batch_cache_and_padding(model_and_tokenizer, prompts):
    model, tokenizer = model_and_tokenizer
    stop = tokenizer.eos_token_id
    answers = generate_answers(model, tokenizer, prompts, Decoding(12), batch_size=8)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            new = greedy_by_hand(model, ids, 12, {stop})
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert (answer.tokens, answer.prompt_tokens) == (len(new), len(ids))
        assert answer.stopped == (len(new) < 12)


@pytest.mark.parametrize(
    "decoding",
    [Decoding(16), Decoding(16, 1.0), Decoding(16, 0.7, 20, 0.9, seed=3), Decoding(16, num_beams=3)],
    ids=["greedy", "sampled", "top-k and top-p", "beams"],
)
def test_answers_do_not_depend_on_the_batch_size(model_and_tokenizer, prompts, decoding):
    model, tokenizer = model_and_tokenizer
    one, five, all_at_once = (
        generate_answers(model, tokenizer, prompts, decoding, batch_size=size) for size in (1, 5, 64)
    )
    assert one == five == all_at_once
    assert len({answer.text for answer in one}) > 10


def test_answers_do_not_depend_on_other_rows_and_come_back_in_order(model_and_tokenizer, prompts):
    model, tokenizer = model_and_tokenizer
    together = generate_answers(model, tokenizer, prompts, Decoding(8))
    alone = [generate_answers(model, tokenizer, [prompt], Decoding(8))[0] for prompt in prompts[:4]]
    assert together[:4] == alone


def test_the_seed_decides_the_sample(model_and_tokenizer, prompts):
    model, tokenizer = model_and_tokenizer
    first, again, other = (
        generate_answers(model, tokenizer, prompts[:6], Decoding(16, 1.0, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    twice = generate_answers(model, tokenizer, [prompts[0]] * 2, Decoding(16, 1.0))
    assert twice[0] != twice[1], "two rows with the same prompt must draw independently"


def test_sampling_draws_from_the_model_distribution():
    """The share of each token over many rows is its probability after temperature and top-k."""
    rows, logits = 20_000, torch.tensor([2.0, 1.0, 0.0, -1.0])
    draw = SampleByRow(list(range(rows)), Decoding(1, temperature=0.5, top_k=3), torch.device("cpu"))
    tokens = draw(None, logits.repeat(rows, 1)).argmax(-1)
    shares = torch.bincount(tokens, minlength=4) / rows
    expected = torch.tensor([4.0, 2.0, 0.0, -torch.inf]).softmax(-1)
    assert torch.allclose(shares, expected, atol=4 * 0.5 / rows**0.5)
    assert shares[3] == 0


def test_a_stop_token_ends_an_answer_and_is_not_in_it(model_and_tokenizer, prompts):
    model, tokenizer = model_and_tokenizer
    kept = model.generation_config.eos_token_id
    free = generate_answers(model, tokenizer, prompts, Decoding(8))
    ids = tokenizer.apply_chat_template(prompts[0], add_generation_prompt=True, return_dict=False)
    third = greedy_by_hand(model, ids, 3, set())[2]
    model.generation_config.eos_token_id = [kept, third]
    try:
        stopped = generate_answers(model, tokenizer, prompts, Decoding(8))
    finally:
        model.generation_config.eos_token_id = kept
    assert stopped[0].stopped and stopped[0].tokens <= 2
    assert all(a.tokens <= b.tokens for a, b in zip(stopped, free, strict=True))


def test_penalties_in_the_generation_config_of_a_model_are_not_applied(model_and_tokenizer, prompts):
    model, tokenizer = model_and_tokenizer
    plain = generate_answers(model, tokenizer, prompts, Decoding(12))
    own = model.generation_config
    own.repetition_penalty, own.do_sample, own.temperature, own.top_k = 5.0, True, 2.0, 3
    try:
        assert generate_answers(model, tokenizer, prompts, Decoding(12)) == plain
        assert model.generation_config is own, "the model's own config is put back"
    finally:
        own.repetition_penalty, own.do_sample, own.temperature, own.top_k = None, None, None, None


@pytest.mark.parametrize("method", ["lora", "ia3", "prefix", "prompt", "ptuning"])
def test_adapters_answer_the_same_in_every_batch(toy, prompts, method):
    import peft

    base, tokenizer = load_checkpoint(toy)
    plain = generate_answers(base, tokenizer, prompts, Decoding(8))
    kind = {"task_type": "CAUSAL_LM"}
    config = {
        "lora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **kind),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, **kind),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, **kind),
        "ptuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, **kind),
        "ia3": lambda: peft.IA3Config(init_ia3_weights=False, **kind),
    }[method]()
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config).eval()
    one, many = (generate_answers(model, tokenizer, prompts, Decoding(8), batch_size=n) for n in (1, 21))
    assert one == many
    assert one != plain, "the adapter changes the answers"
    for prompt, answer in list(zip(prompts, one, strict=True))[:4]:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            new = greedy_by_hand(model, ids, 8, {tokenizer.eos_token_id})
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_texts_are_continued_and_conversations_answered(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    text, chat = generate_answers(
        model, tokenizer, ["The boat", [{"role": "user", "content": "The boat"}]], Decoding(4)
    )
    assert text.prompt_tokens == len(tokenizer("The boat")["input_ids"]) < chat.prompt_tokens


def test_a_prompt_without_room_for_its_answer_is_refused(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    with pytest.raises(InputError, match="512 positions"):
        generate_answers(model, tokenizer, ["The boat", "x" * 505], Decoding(64))
    with pytest.raises(InputError, match="no tokens"):
        generate_answers(model, tokenizer, [""], Decoding(4))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "num_beams": 2},
        {"top_k": 5},
    ],
)
def test_decoding_that_makes_no_sense_is_refused(settings):
    with pytest.raises(InputError):
        Decoding(**settings)


# --- the script, as a user runs it ---


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory, prompts):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    tasks = ["a", "b", "b"]
    lines = [
        {"prompt": p, "answer": str(i), "verifier": "contains", "task": tasks[i % 3]} for i, p in enumerate(prompts)
    ]
    path.write_text("\n".join(map(json.dumps, [*lines, lines[0]])))
    return path


def launch(*words, start=()):
    return subprocess.run(
        [sys.executable, *map(str, start or ["eval/generate.py"]), *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def script_run(toy, rows_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    models = [f"first={toy}", f"second={toy}"]
    done = launch("--model", *models, "--data", rows_file, "--max_new_tokens", 12, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_script_writes_what_compare_needs(script_run, model_and_tokenizer, prompts):
    folder, done = script_run
    first, second = read_result(folder / "first.json"), read_result(folder / "second.json")
    assert [row["id"] for row in first.rows] == [row["id"] for row in second.rows]
    assert first.rows == second.rows
    answers = generate_answers(*model_and_tokenizer, prompts, Decoding(12))
    assert [row["text"] for row in first.rows] == [answer.text for answer in [*answers, answers[0]]]
    assert first.rows[21]["id"] == first.rows[0]["id"] + "#2", "a row that is there twice has two ids"
    assert first.metrics["score"]["n"] == 22
    assert first.metrics["score/a"]["n"] == 8 and first.metrics["score/b"]["n"] == 14
    by_hand = np.mean([float(row["answer"] in row["text"].split()) for row in first.rows])
    assert first.metrics["score"]["value"] == pytest.approx(by_hand, abs=0.2)
    table = [line for line in done.stdout.splitlines() if not line.startswith(("written:", "next:"))]
    assert max(map(len, table)) <= 100
    assert "score/a" in done.stdout and "±" in done.stdout


@pytest.mark.slow
def test_two_processes_write_what_one_writes(script_run, toy, rows_file, tmp_path):
    folder, _ = script_run
    script = tmp_path / "counted.py"
    script.write_text(
        "import pathlib, runpy\nrunpy.run_path('eval/generate.py', run_name='__main__')\n"
        "from accelerate import PartialState\nstate = PartialState()\n"
        f"pathlib.Path({str(tmp_path)!r}, f'rank{{state.process_index}}of{{state.num_processes}}').touch()\n"
    )
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    start = ["-m", "accelerate.commands.launch", "--config_file", config, script]
    words = ["--data", rows_file, "--max_new_tokens", 12, "--output", tmp_path / "two.json"]
    done = launch("--model", toy, *words, start=start)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rank0of2").exists() and (tmp_path / "rank1of2").exists()
    one, two = read_result(folder / "first.json"), read_result(tmp_path / "two.json")
    assert one.rows == two.rows and one.metrics == two.metrics
    assert done.stdout.count("written:") == 1


def call_main(monkeypatch, *words):
    """Run the script's main() in this process: for what is refused before a model is loaded."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, words)])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    runpy.run_path(str(ROOT / "eval" / "generate.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_new_token", "3", "--beam_size", "2"], "unknown option --beam_size"),
        (["--batchsize", "2"], "did you mean --batch_size"),
        (["--limit", "0"], "--limit is 0"),
        (["--dtype", "float8"], "float16"),
        (["--model", "a/x", "b/x"], "two models are called x"),
        (["--model", "a/x", "b/y", "--output", "z.json"], "2 models and one result file"),
        (["--top_p", "0.5"], "temperature 0"),
    ],
)
def test_a_wrong_command_line_is_refused(monkeypatch, tmp_path, words, message):
    words = words if "--model" in words else ["--model", "a/x", *words]
    extra = [] if "--output" in words else ["--output", tmp_path / "r.json"]
    with pytest.raises(InputError, match=message):
        call_main(monkeypatch, *words, *extra)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "no reference answer"),
        ({"prompt": "a", "answer": None}, "the answer is None"),
        ({"prompt": "a", "answer": "b", "verifier": "exakt"}, "did you mean exact"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(monkeypatch, tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [{**row, "answer": "b"} if "answer" in row else row, row])))
    with pytest.raises(InputError, match=message):
        call_main(monkeypatch, "--model", "x", "--data", path, "--output", tmp_path / "r.json")


@pytest.mark.parametrize(
    ("row", "words", "prompt", "verifier"),
    [
        ({"prompt": "hi", "answer": 4, "verifier": "number"}, [], "hi", "number"),
        ({"prompt": "hi", "answer": "4"}, ["--verifier", "contains"], "hi", "contains"),
        ({"question": "hi", "answer": "4"}, [], [{"role": "user", "content": "hi"}], "exact"),
        ({"instruction": "hi", "input": "", "output": "4"}, [], [{"role": "user", "content": "hi"}], "exact"),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "4"}]},
            [],
            [{"role": "user", "content": "hi"}],
            "exact",
        ),
    ],
)
def test_rows_of_several_formats_have_a_prompt_and_a_reference(tmp_path, row, words, prompt, verifier):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [row, row])))
    first, second = read_questions(str(path), words[1] if words else "exact")
    assert (first["prompt"], first["answer"], first["verifier"]) == (prompt, "4", verifier)
    assert second["id"] == first["id"] + "#2" and (first["source"], second["row"]) == ("rows.jsonl", 2)


def test_a_limit_chooses_the_same_rows_every_time_and_keeps_their_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "q", "answer": str(i)}) for i in range(50)))
    rows = read_questions(str(path), "exact")
    chosen = [[int(row["answer"]) for row in choose_rows(rows, n)] for n in (10, 10, 20)]
    assert chosen[0] == chosen[1] == sorted(chosen[0]) != list(range(10))
    assert set(chosen[0]) < set(chosen[2]), "a larger limit adds rows"


def test_a_result_file_is_not_overwritten_by_accident(monkeypatch, tmp_path):
    path = tmp_path / "r.json"
    path.write_text("{}")
    with pytest.raises(InputError, match="exists"):
        call_main(monkeypatch, "--model", "x", "--output", path)


def test_an_interrupted_evaluation_goes_on_where_it_was(monkeypatch, toy, rows_file, tmp_path):
    words = ["--model", toy, "--data", rows_file, "--max_new_tokens", 8, "--temperature", 1, "--batch_size", 4]
    call_main(monkeypatch, *words, "--output", tmp_path / "whole.json")
    path, add, batches = tmp_path / "r.json", Journal.add, []

    def interrupted(self, rows):
        if len(batches) == 3:
            raise KeyboardInterrupt
        rows = list(rows)
        batches.append([row["id"] for row in rows])
        add(self, rows)

    monkeypatch.setattr(Journal, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call_main(monkeypatch, *words, "--output", path)
    (part,) = tmp_path.glob(".r.json.part*")
    part.write_text(part.read_text() + '{"id": "cut')
    first = [*batches]
    batches[:] = [None] * 100
    with pytest.raises(InputError, match="settings differ|key is another"):
        call_main(monkeypatch, *words, "--output", path, "--seed", 1, "--resume")
    batches.clear()
    monkeypatch.setattr(Journal, "add", lambda self, rows: (batches.append(rows := list(rows)), add(self, rows)))
    call_main(monkeypatch, *words, "--output", path, "--resume")
    made = {row["id"] for batch in batches for row in batch}
    assert len(first) == 3 and not made & {name for batch in first for name in batch}, "finished rows are not redone"
    assert read_result(path).rows == read_result(tmp_path / "whole.json").rows
    assert not list(tmp_path.glob(".r.json.part*"))
    call_main(monkeypatch, *words, "--output", path, "--resume")
    assert {row["id"] for batch in batches for row in batch} == made, "nothing is left to do"


def test_examples_for_a_file_come_from_the_training_file_beside_it(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": "q", "answer": "a"}))
    assert examples_of(str(tmp_path / "test.jsonl")) == str(tmp_path / "train.jsonl")
    assert examples_of(str(tmp_path)) == f"{tmp_path}@train"
    with pytest.raises(InputError, match="--fewshot_data"):
        examples_of(str(tmp_path / "train.jsonl"))


def test_an_interrupted_script_says_how_to_go_on():
    code = "from alignment.config import install_excepthook as i; i('go on'); raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted: go on")
