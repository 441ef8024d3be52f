"""GRPO and RLOO: the prompts they get, the rewards they are given, the rehearsal, and runs of both recipes."""

import asyncio
import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHATML, ROOT, toy_tokenizer
from test_recipes import launch, results
from toy_runs import same_weights

from alignment.errors import InputError
from alignment.rehearsal import Rehearsal, Trial, _about_length, _about_rewards, rehearse, untouched
from alignment.rewarding import Checked, RewardModel, call, checked
from alignment.rewards import steps_of
from alignment.supervision import step_advantages, step_ends
from alignment.templates import ChatEncoder

ANSWERED = {"role": "assistant", "content": "b"}
SMALL = (
    "--max_steps", 2, "--per_device_train_batch_size", 8, "--num_generations", 4, "--max_completion_length", 8,
    "--eval_strategy", "no", "--no_eval_on_start", "--logging_steps", 1, "--rehearsal_prompts", 2, "--test_size", 0,
)  # fmt: skip


def prompt_row(number, **columns):
    content = f"Add {number} and 2."
    return {"prompt": [{"role": "user", "content": content}], "answer": str(number + 2), "verifier": "number"} | columns


def write(folder, rows, name="prompts"):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path, [prompt_row(n) for n in range(12)])


@pytest.fixture
def letters(monkeypatch):
    """The recipes' reward becomes the number of letters of an answer, which differs from answer to answer."""
    from alignment import online

    def letters(completions):
        return [sum(map(str.isalpha, answer[0]["content"])) / 8 for answer in completions]

    monkeypatch.setattr(online, "reward_functions", lambda functions, args: [letters])
    return letters


def start(recipe, toy, file, out, *flags):
    return launch(recipe, "--model_name_or_path", toy, "--data", file, "--output_dir", out, *SMALL, *flags)


@pytest.mark.parametrize(("recipe", "flags"), [("grpo", ("--beta", 0.1)), ("rloo", ("--peft", "lora"))])
def test_two_steps(recipe, flags, toy, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    trainer, _, _, rows = start(recipe, toy, prompts, out, *flags)
    record, said = results(out)
    assert record["status"] == "finished" and record["steps"] == 2
    assert record["groups"] == 4 and 0 <= record["groups_without_difference"] <= 4
    assert rows.train.column_names == ["prompt", "answer", "verifier", "source", "row", "prompt_ids"]
    assert "2 prompts x 4 answers, then 1 update; 2 updates in all" in said
    assert "rehearsal: mean reward" in said and "rewards: reward" in said
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all("rewards/reward/mean" in entry and "kl" in entry for entry in logged)
    shown = capsys.readouterr().out
    assert "Rehearsal: 2 prompts x 4 answers, untrained" in shown and "spread in groups" in shown
    assert "of 4 groups had answers of one and the same reward" in shown
    weights = "adapter_model.safetensors" if "--peft" in flags else "model.safetensors"
    assert {weights, "README.md", "generation_config.json"} <= {file.name for file in out.iterdir()}


def test_evaluation_and_the_card(toy, prompts, tmp_path):
    out = tmp_path / "out"
    flags = ("--eval_strategy", "steps", "--eval_steps", 1, "--eval_on_start", "--test_size", 4)
    start("grpo", toy, prompts, out, *flags, "--per_device_eval_batch_size", 4)
    metrics = results(out)[0]["metrics"]
    assert {"reward", "completions/mean_length"} <= metrics["before"].keys() & metrics["after"].keys()
    card = (out / "README.md").read_text()
    assert "GRPO" in card and "| reward | -0.2" in card


def test_dry_run_rehearses_and_writes_nothing(toy, prompts, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    start("rloo", toy, prompts, tmp_path / "out", "--dry_run")
    shown = capsys.readouterr().out
    assert "Rehearsal" in shown and "Dry run" in shown and "never stops" in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tuned_model_is_not_asked_in_plain_text_unsaid(toy, tmp_path, capsys):
    flags = ("--model_name_or_path", toy, "--output_dir", tmp_path / "out", "--dry_run", *SMALL)
    launch("grpo", *flags)
    assert "this model has a chat template" in " ".join(capsys.readouterr().out.split())
    launch("grpo", *flags, "--data", ROOT / "data" / "tiny" / "prompts")
    assert "this model has a chat template" not in " ".join(capsys.readouterr().out.split())


def test_the_rehearsal_does_not_change_the_run(toy, prompts, tmp_path, letters):
    for name, size in (("with", 2), ("without", 0)):
        start("grpo", toy, prompts, tmp_path / name, "--learning_rate", 0.01, "--rehearsal_prompts", size)
    assert same_weights(tmp_path / "with", tmp_path / "without")
    assert not same_weights(tmp_path / "with", toy)


def test_random_numbers_go_on_as_before():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    with untouched(7):
        inside = draw()
    with pytest.raises(ZeroDivisionError), untouched(7):
        assert draw() == inside != expected
        raise ZeroDivisionError
    assert draw() == expected


def test_full_training_from_an_adapter_has_the_adapter_in_its_reference(toy, prompts, tmp_path):
    start("grpo", toy, prompts, tmp_path / "lora", "--peft", "lora", "--learning_rate", 0.05)
    trainer, _, loaded, _ = start(
        "grpo", tmp_path / "lora", prompts, tmp_path / "full", "--peft", "none", "--beta", 0.1
    )
    assert loaded.ref_model is not None and trainer.beta == trainer.args.beta == 0.1
    first = next(entry for entry in trainer.state.log_history if "kl" in entry)
    assert abs(first["kl"]) < 1e-5


# The prompts


def test_control_tokens_in_somebodys_text_stay_text(toy, tmp_path):
    rows = [prompt_row(1)] * 3
    rows[1] = prompt_row(1, prompt=[{"role": "user", "content": "Say <|im_end|> now."}])
    trainer, _, loaded, made = start("grpo", toy, write(tmp_path, rows), tmp_path / "out", "--dry_run")
    end = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [ids.count(end) for ids in made.train["prompt_ids"]] == [1, 1, 1]  # the template's own
    assert made.counts["train escaped"] == 1
    trainer._rows = [made.train[1]]
    assert trainer._tokenize_prompts([made.train[1]["prompt"]])[0] == [made.train[1]["prompt_ids"]]


def test_plain_prompts_are_continued(toy, tmp_path):
    rows = [prompt_row(n, prompt=f"{n} and 2 make <|im_end|>") for n in range(4)]
    _, _, loaded, made = start("rloo", toy, write(tmp_path, rows), tmp_path / "out")
    assert made.train["prompt_ids"][0] == loaded.tokenizer("0 and 2 make <|im_end|>")["input_ids"]
    assert "4 control tokens in plain prompts are read as control tokens" in results(tmp_path / "out")[1]


def test_prompts_without_room_for_an_answer_are_counted(toy, tmp_path):
    long = prompt_row(1, prompt=[{"role": "user", "content": "river " * 600}])
    file = write(tmp_path, [prompt_row(n) for n in range(4)] + [long])
    _, _, _, made = start("grpo", toy, file, tmp_path / "out")
    record, said = results(tmp_path / "out")
    assert len(made.train) == 4 and "1 prompts dropped (20.0%)" in said
    assert [row["row"] for row in made.ledger.dropped_rows()] == [5]
    with pytest.raises(InputError, match="exceeds the model's positions") as caught:
        start("grpo", toy, write(tmp_path, [long] * 2, "long"), tmp_path / "no")
    assert "max_completion_length" in caught.value.fix
    with pytest.raises(InputError, match="leave no room"):
        start("grpo", toy, file, tmp_path / "no", "--max_completion_length", 512)
    with pytest.raises(InputError, match="cannot be cut"):
        start("grpo", toy, file, tmp_path / "no", "--on_long_row", "cut")


def test_rows_can_be_a_stream(toy, prompts, tmp_path):
    trainer, _, _, made = start("rloo", toy, prompts, tmp_path / "out", "--streaming")
    assert next(iter(made.train)).keys() == {"prompt", "answer", "verifier", "source", "row", "prompt_ids"}
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows|cannot be used|empty"),
        (
            [prompt_row(1, prompt=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])],
            "assistant",
        ),
        ([prompt_row(1, prompt="")], "prompt empty"),
        ([prompt_row(1, prompt_ids=[1])], "a column 'prompt_ids'"),
        ([{"prompt": "a", "answer": "b", "verifer": "exact"}], "needs a column 'verifier'(.|\n)*did you mean verifer"),
        ([prompt_row(1, verifier="numbr")] * 4, "unknown verifier 'numbr'"),
    ],
    ids=["none", "answered", "empty", "taken", "missing", "unknown"],
)
def test_rows_that_cannot_be_used(rows, message, toy, tmp_path):
    with pytest.raises(InputError, match=message):
        start("grpo", toy, write(tmp_path, rows), tmp_path / "out")
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_generations", 1), "num_generations is 1"),
        (("--num_generations", 0), "num_generations is 0"),
        (("--beta", -0.1), "beta is -0.1"),
        (("--max_completion_length", 0), "max_completion_length is 0"),
        (("--per_device_train_batch_size", 64), "12 prompts are fewer than the 16"),
        (("--reward_weights", 1, 2), "2 weights for 1 rewards"),
        (("--reward_model", "data/tiny/model"), "no score head"),
        (("--reward_modle", "x"), "did you mean --reward_model"),
    ],
)
@pytest.mark.parametrize("recipe", ["grpo", "rloo"])
def test_flags_that_cannot_be_meant(recipe, flags, message, toy, prompts, tmp_path):
    with pytest.raises(InputError, match=message):
        start(recipe, toy, prompts, tmp_path / "out", *flags)


# The training step


@pytest.mark.parametrize("method", ["none", "lora", "prefix", "prompt", "ptuning"])
def test_the_training_step_sees_what_the_sampling_saw(method, toy, prompts, tmp_path):
    """The log-probability of each sampled token: of the sampler, in the padded batch, and of a row all alone."""
    rows = [prompt_row(n, prompt=[{"role": "user", "content": "word " * (n + 1)}]) for n in range(4)]
    flags = ("--peft", method, "--dry_run", "--rehearsal_prompts", 0)
    trainer, *_ = start("grpo", toy, write(tmp_path, rows), tmp_path / "out", *flags)
    model, pad = trainer.model.eval(), trainer.processing_class.pad_token_id
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad and method != "none":
            parameter.data += 0.1 * torch.randn_like(parameter)
    given = [list(ids) for ids in trainer.train_dataset["prompt_ids"]]
    seen, generate = [], type(model).generate

    def listen(self, **inputs):
        out = generate(self, **inputs, output_scores=True, return_dict_in_generate=True)
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        scores = torch.stack(out.scores, 1).log_softmax(-1).gather(-1, new[..., None])[..., 0]
        seen.extend(
            (inputs["input_ids"][i][inputs["attention_mask"][i] > 0].tolist(), scores[i]) for i in range(len(new))
        )
        return out.sequences

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "generate", listen)
        answers, _ = trainer._generate_single_turn(given, None, {}, 1)
    assert sorted(ids for ids, _ in seen) == sorted(given)
    sampled = {tuple(ids): scores for ids, scores in seen}
    front, back = max(map(len, given)), max(map(len, answers))
    tokens = [[pad] * (front - len(p)) + p + a + [pad] * (back - len(a)) for p, a in zip(given, answers, strict=True)]
    mask = [
        [0] * (front - len(p)) + [1] * len(p + a) + [0] * (back - len(a)) for p, a in zip(given, answers, strict=True)
    ]
    with torch.no_grad():
        args = torch.tensor(tokens), torch.tensor(mask), back
        batch, entropies, _ = trainer._get_per_token_logps_and_entropies(model, *args, compute_entropy=True)
        for i, (prompt, answer) in enumerate(zip(given, answers, strict=True)):
            row = torch.tensor([prompt + answer])
            alone, entropy, _ = trainer._get_per_token_logps_and_entropies(
                model, row, torch.ones_like(row), len(answer), compute_entropy=True
            )
            size = len(answer)
            torch.testing.assert_close(batch[i, :size], alone[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(entropies[i, :size], entropy[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(sampled[tuple(prompt)][:size], alone[0], atol=1e-4, rtol=1e-4)


# What a reward function may return

BATCH = {"prompts": ["p", "q", "r"], "completions": ["a", "b", "c"], "source": ["rows.jsonl"] * 3, "row": [4, 5, 6]}


def returns(value):
    def grade(completions, **columns):
        return value

    return checked(grade)


def fails_on_b(completions, **columns):
    return [1.0 / (text != "b") for text in completions]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], "grade returned 2 values for 3 answers"),
        ([1.0, "2.0", 3.0], "grade returned '2.0', which is no number"),
        ([1.0, float("nan"), 3.0], "grade returned nan"),
        ([1.0, 2.0, float("-inf")], "grade returned -inf"),
        ([1.0, [2.0], 3.0], "rewards per step are for GRPO"),
        (1.0, "returned 1.0, not a list"),
        (None, "returned None, not a list"),
        ("abc", "not a list"),
    ],
)
def test_a_wrong_value_is_named(value, message):
    with pytest.raises(InputError, match=message) as caught:
        returns(value)(**BATCH)
    if isinstance(value, list) and len(value) == 3 and value[1] != 2.0:
        assert "rows.jsonl, row 5" in caught.value.where and "'b'" in caught.value.where


def test_numbers_of_every_kind_are_taken():
    given = [None, 1, True], [np.float32(0.5), np.int64(2), torch.tensor(3.0)]
    assert [returns(value)(**BATCH) for value in given] == [[None, 1.0, 1.0], [0.5, 2.0, 3.0]]
    assert returns(torch.tensor([1.0, 2.0, 3.0]))(**BATCH) == returns(np.arange(1, 4))(**BATCH) == [1.0, 2.0, 3.0]


def test_a_function_that_raises_is_named_with_its_row():
    with pytest.raises(InputError, match=r"fails_on_b raised ZeroDivisionError: .*\(line \d+\)") as caught:
        checked(fails_on_b)(**BATCH)
    assert "row 5" in caught.value.where and "'q'" in caught.value.where and "'b'" in caught.value.where
    assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def whole(completions):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(InputError, match="too many") as caught:
        checked(whole)(**BATCH)
    assert "a whole batch does" in caught.value.where

    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checked(interrupted)(**BATCH)


def test_asynchronous_functions_are_checked_too():
    async def slow(completions, **columns):
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    async def wrong(completions, **columns):
        return ["no"] * 3

    assert call(checked(slow), **BATCH) == [1.0, 1.0, 1.0]
    with pytest.raises(InputError, match="wrong returned 'no'"):
        call(checked(wrong), **BATCH)


def test_a_function_gets_what_it_asks_for():
    def grade(ended, row):
        return [float(end) + number for end, number in zip(ended, row, strict=True)]

    reward = checked(grade, stops=[9])
    assert reward(**BATCH, completion_ids=[[1, 9], [1], []], trainer_state=None) == [5.0, 5.0, 6.0]
    reward.check_columns(["prompt", "row"])
    with pytest.raises(InputError, match="needs a column 'row'(.|\n)*did you mean rows"):
        reward.check_columns(["prompt", "rows"], "the rows")
    with pytest.raises(InputError, match="is no reward function"):
        checked(7)


# The rehearsal


def test_a_failing_reward_stops_the_run_before_its_first_step(toy, prompts, tmp_path, monkeypatch):
    from alignment import online

    def grade(prompts, completions, **columns):
        return [float(prompt[-1]["content"].split()[1] != "0") or float("nan") for prompt in prompts]

    monkeypatch.setattr(online, "reward_functions", lambda functions, args: [*functions, grade])
    with pytest.raises(InputError, match="reward function grade returned nan(.|\n)*row 1"):
        start("grpo", toy, prompts, tmp_path / "out")


def heard(values, lengths=None, ended=None, silent=None):
    values = np.array(values, dtype=float)
    lengths = np.ones(values.shape) if lengths is None else np.array(lengths)
    ended = np.ones(values.shape, dtype=bool) if ended is None else np.array(ended)
    total, silent = Trial("all", values, 0.0), np.zeros(values.shape) if silent is None else np.array(silent)
    found = Rehearsal(lengths=lengths, ended=ended)
    findings = _about_rewards(total, silent) + _about_length(found, total, SimpleNamespace(max_completion_length=8))
    return "\n".join(f"{finding.level}: {finding.what}" for finding in findings)


def test_what_a_rehearsal_says():
    assert heard([[0, 1], [1, 0]]) == "fact: rehearsal: mean reward 0.500, 0% of 2 groups without a difference"
    assert "every answer has the same reward" in heard([[0, 0], [0, 0]])
    assert "100% of 2 groups without a difference: these teach nothing" in heard([[0, 0], [1, 1]])
    assert "100% of the answers do not end within" in heard([[0, 1], [1, 0]], ended=[[False] * 2] * 2)
    assert "this policy never stops" in heard([[0, 1], [1, 0]], ended=[[False] * 2] * 2)
    assert "longer answers will be learnt first" in heard([[0, 1], [1, 0]], lengths=[[1, 9], [9, 1]])
    assert "no reward applies to 50%" in heard([[0, 1], [1, 0]], silent=[[True, False]] * 2)
    trial = Trial("one", np.array([[0.0, 2.0], [1.0, 1.0], [np.nan, 3.0]]), 0.0)
    assert trial.spread == pytest.approx(1 / 3) and trial.flat == pytest.approx(1 / 3)


def test_no_rehearsal_when_none_is_wanted():
    found = rehearse(None, 0)
    assert not found.trials and not found.findings and not found.examples


# A reward model as a reward


@pytest.fixture(scope="module")
def score_model(tmp_path_factory, toy):
    """The folder of a toy reward model with one score, full weights."""
    return classifier(tmp_path_factory.mktemp("scores") / "model", toy, labels=1)


def classifier(folder, toy, labels):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(toy, num_labels=labels)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


CHATS = [[{"role": "user", "content": text}] for text in ("Hi", "Add one and two, please.", "Why?", "x" * 50)]
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("Hello", "3", "Because <|im_end|> it is.", "")]


def test_scores_are_those_of_the_rendered_text_alone_and_in_a_batch(score_model):
    model = RewardModel(score_model, batch_size=3)
    together = model(CHATS, ANSWERS)
    alone = [model([chat], [answer])[0] for chat, answer in zip(CHATS, ANSWERS, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5) and len(set(together)) == 4
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    assert together[0] == pytest.approx(model.model(input_ids=ids).logits.item(), abs=1e-5)
    with pytest.raises(InputError, match="512 positions"):
        model([CHATS[0]], [[{"role": "assistant", "content": "word " * 600}]])


def test_plain_texts_are_joined_and_ended(score_model):
    model = RewardModel(score_model)
    ids = model.tokenizer("One and two<|im_end|>")["input_ids"]
    assert model.encode("One and", " two") == ids
    assert model(["One and"], [" two"]) == model.score([ids])


def test_a_conversation_is_rendered_with_the_models_own_template(score_model, tmp_path):
    folder = shutil.copytree(score_model, tmp_path / "other")
    (folder / "chat_template.jinja").write_text(CHATML.replace("<|im_start|>' +", "SPEAKER ' +"))
    model = RewardModel(folder)
    assert model.tokenizer.decode(model.encode(CHATS[0], ANSWERS[0])).startswith("SPEAKER user")
    assert model.shares_tokenizer(ChatEncoder(toy_tokenizer()).tokenizer)


def test_models_that_give_no_score_are_refused(toy, score_model, tmp_path):
    with pytest.raises(InputError, match="has no score head"):
        RewardModel(toy)
    with pytest.raises(InputError, match="gives 3 numbers a text: it is a classifier"):
        RewardModel(classifier(tmp_path / "three", toy, labels=3))
    folder = shutil.copytree(score_model, tmp_path / "words")
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens([f"word{n}" for n in range(9)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="the model has 2.. embedding rows|embedding rows"):
        RewardModel(folder)
    with pytest.raises(InputError):
        RewardModel(tmp_path / "nowhere")


def test_a_run_with_a_function_and_a_reward_model(toy, prompts, tmp_path):
    """As recipes/reward.py leaves it: an adapter with its head."""
    pairs = [
        {"prompt": row["prompt"], "chosen": [{"role": "assistant", "content": "yes"}]}
        | {"rejected": [{"role": "assistant", "content": "no, never"}]}
        for row in map(prompt_row, range(8))
    ]
    judge = tmp_path / "judge"
    launch("reward", "--model_name_or_path", toy, "--data", write(tmp_path, pairs, "pairs"), "--peft", "lora",
           "--max_steps", 1, "--eval_strategy", "no", "--no_eval_on_start", "--save_strategy", "no", "--test_size", 0,
           "--output_dir", judge)  # fmt: skip
    trainer, *_ = start("grpo", toy, prompts, tmp_path / "out", "--reward_model", judge, "--reward_weights", 1, 0.5)
    logged = trainer.state.log_history[0]
    assert {"rewards/reward/mean", "rewards/reward_model/mean"} <= logged.keys()
    assert "rewards: reward + 0.5 x reward_model" in results(tmp_path / "out")[1]
    with pytest.raises(InputError, match="adapter of a language model"):
        start("grpo", toy, prompts, tmp_path / "lora", "--peft", "lora")
        RewardModel(tmp_path / "lora")


def test_a_loss_that_is_not_finite_ends_the_run(toy, prompts, tmp_path, monkeypatch):
    from trl import GRPOTrainer

    monkeypatch.setattr(GRPOTrainer, "training_step", lambda *args: torch.tensor(float("nan")))
    with pytest.raises(InputError, match="the loss is nan: the run ends before the weights are touched"):
        start("grpo", toy, prompts, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["grpo", "rloo"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reward_rises(recipe, seed, toy, prompts, tmp_path, monkeypatch):
    """The toy learns to say the letter e more often."""
    from alignment import online

    def letter(completions):
        return [answer[0]["content"].count("e") / 8 for answer in completions]

    monkeypatch.setattr(online, "reward_functions", lambda functions, args: [letter])
    flags = ("--max_steps", 60, "--learning_rate", 3e-3, "--per_device_train_batch_size", 32, "--seed", seed)
    trainer, *_ = start(recipe, toy, prompts, tmp_path / "out", *flags, "--num_generations", 8)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2


def test_checked_is_not_wrapped_twice():
    reward = returns([1.0])
    assert checked(reward) is reward and isinstance(reward, Checked)


# Process supervision


def test_steps_end_where_their_lines_do():
    assert step_ends(["a", " b", "\n", "c", "\n\n", "d", ""]) == [2, 4, 6]
    assert step_ends(["a", "\n", ""]) == [2]
    assert step_ends(["\n", "a\nb", "\n"]) == [1, 2]
    assert step_ends(["", "\n"]) == step_ends([]) == []
    text = "one\n two\n\n\nthree"
    assert len(step_ends(list(text))) == len(steps_of(text)) == 3


def test_advantages_by_step_are_those_of_the_paper():
    """DeepSeekMath 4.1.3, written out: normalise over all steps of the group, then sum what is still to come."""
    rewards, ends = [[1.0, 0.0], [0.5], []], [[1, 3], [2], []]
    every = np.array([1.0, 0.0, 0.5])
    tilde = [[(r - every.mean()) / (every.std(ddof=1) + 1e-4) for r in steps] for steps in rewards]
    expected = np.zeros((3, 5))
    for i, (steps, places) in enumerate(zip(tilde, ends, strict=True)):
        for t in range(5):
            expected[i, t] = sum(r for r, end in zip(steps, places, strict=True) if end >= t)
    np.testing.assert_allclose(step_advantages(rewards, ends, 5).numpy(), expected, atol=1e-6)
    plain = step_advantages(rewards, ends, 5, scale=False)
    assert plain[0].tolist() == pytest.approx([0.0, 0.0, -0.5, -0.5, 0.0])


def test_one_step_an_answer_is_outcome_supervision(toy, prompts, tmp_path, monkeypatch):
    """Of answers of one line the two give the same weights."""
    from alignment import online

    def letters(completions):
        return [answer[0]["content"].count("e") / 8 for answer in completions]

    def lines(completions):
        return [
            [score] * len(steps_of(answer)) for score, answer in zip(letters(completions), completions, strict=True)
        ]

    seen = []
    for name, function in (("whole", letters), ("steps", lines)):
        monkeypatch.setattr(online, "reward_functions", lambda functions, args, f=function: [f])
        trainer, *_ = start("grpo", toy, prompts, tmp_path / name, "--seed", 3, "--max_steps", 1)
        trainer.model.train()
        torch.manual_seed(0)
        output = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)
        seen.append(output["advantages"])
        one_line = [
            len(steps_of(text)) == 1 for text in trainer.processing_class.batch_decode(output["completion_ids"])
        ]
    whole, steps = seen
    assert whole.dim() == 1 and steps.shape == output["completion_ids"].shape
    if all(one_line):
        torch.testing.assert_close(steps[:, 0], whole, atol=1e-3, rtol=1e-3)
    assert results(tmp_path / "steps")[0]["status"] == "finished"


def test_wrong_rewards_by_step():
    reward = returns([[1.0, 2.0], [0.5], [0.0]])
    with pytest.raises(InputError, match="rewards per step are for GRPO"):
        reward(**BATCH)
    reward.by_step = True
    with pytest.raises(InputError, match="returned 2 rewards for an answer of 1 steps"):
        reward(**BATCH)
    assert reward(prompts=["p"] * 3, completions=["a\nb", "a", "b"]) == [1.5, 0.5, 0.0]
    assert reward.steps == [[1.0, 2.0], [0.5], [0.0]]
    reward = returns([[float("nan")], None, 1.0])
    reward.by_step = True
    with pytest.raises(InputError, match="returned nan for a step"):
        reward(**BATCH)


# Going on, and several processes


@pytest.mark.parametrize("recipe", ["grpo", "rloo"])
def test_resumed_is_never_stopped(recipe, toy, prompts, tmp_path, letters):
    flags = ("--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 3)
    flags = (*flags, "--learning_rate", 0.01, "--beta", 0.05)
    start(recipe, toy, prompts, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoint-4")
    start(recipe, toy, prompts, tmp_path / "half", *flags, "--resume_from_checkpoint", "last")
    assert same_weights(tmp_path / "whole", tmp_path / "half")
    other = write(tmp_path, [prompt_row(n, answer="7") for n in range(12)], "other")
    with pytest.raises(InputError, match="other data"):
        start(recipe, toy, other, tmp_path / "half", *flags, "--resume_from_checkpoint", "last")
