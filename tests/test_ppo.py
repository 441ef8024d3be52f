"""PPO: each formula against plain loops, then the trainer's properties on toys."""

import json
import math
import random
import subprocess
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from test_recipes import launch
from toy_runs import same_weights, say, weights
from transformers import AutoConfig

from alignment import ppo_math
from alignment.answers import AnswerTable, statistics
from alignment.checkpoints import load_adapter, load_base, load_checkpoint, load_tokenizer
from alignment.config import parse
from alignment.critic import CRITIC, POLICY, REFERENCE
from alignment.diagnosis import diagnose
from alignment.errors import InputError
from alignment.ppo import EpochSampler, PPOConfig, PPOTrainer
from alignment.rewarding import RewardModel
from alignment.rewards import last_text
from alignment.sampling import SamplingRules, row_draws, sample
from alignment.tokenization import load_texts

CLOSE = dict(rtol=1e-6, atol=1e-6)
LORA = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def answers(rows=6, width=11, seed=0):
    """A mask of answers that start and end anywhere, and random numbers under it."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, width)
    for row in range(rows):
        start = int(torch.randint(0, width - 1, (1,), generator=generator))
        end = int(torch.randint(start + 1, width + 1, (1,), generator=generator))
        mask[row, start:end] = 1
    return mask, lambda: torch.randn(rows, width, generator=generator)


def places(mask):
    return [[t for t in range(mask.shape[1]) if mask[row, t]] for row in range(mask.shape[0])]


# The formulas


@pytest.mark.parametrize("seed", range(3))
def test_kl_estimators(seed):
    mask, numbers = answers(seed=seed)
    p, q = -numbers().abs(), -numbers().abs()
    k1, k3 = ppo_math.kl_per_token(p, q, "k1"), ppo_math.kl_per_token(p, q, "k3")
    for row, line in enumerate(places(mask)):
        for t in line:
            ratio = math.exp(float(q[row, t]) - float(p[row, t]))
            assert float(k1[row, t]) == pytest.approx(-math.log(ratio), abs=1e-6)
            assert float(k3[row, t]) == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-5, abs=1e-6)
    assert (k3 >= 0).all()
    with pytest.raises(ValueError, match="k2"):
        ppo_math.kl_per_token(p, q, "k2")


def test_kl_estimators_are_unbiased():
    """Their mean under p is the true divergence of two distributions."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.5, 0.3]).log()
    true = (p.exp() * (p - q)).sum()
    for name in ppo_math.KL_ESTIMATORS:
        torch.testing.assert_close((p.exp() * ppo_math.kl_per_token(p, q, name)).sum(), true)


@pytest.mark.parametrize("seed", range(3))
def test_token_rewards_and_gae(seed):
    mask, numbers = answers(seed=seed)
    kl, values, scores = numbers(), numbers() * 3, numbers()[:, 0]
    gamma, lam, coef = 0.97, 0.9, 0.3
    rewards = ppo_math.token_rewards(kl * mask, scores, mask, coef)
    advantages, returns = ppo_math.gae(rewards, values, mask, gamma, lam)
    for row, line in enumerate(places(mask)):
        wanted = [-coef * float(kl[row, t]) for t in line]
        wanted[-1] += float(scores[row])
        torch.testing.assert_close(rewards[row, line], torch.tensor(wanted), **CLOSE)
        value = [float(values[row, t]) for t in line] + [0.0]
        delta = [wanted[i] + gamma * value[i + 1] - value[i] for i in range(len(line))]
        for i, t in enumerate(line):  # the definition: a sum over all that follows
            advantage = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(line)))
            assert float(advantages[row, t]) == pytest.approx(advantage, rel=1e-5, abs=2e-6)
            assert float(returns[row, t]) == pytest.approx(advantage + value[i], rel=1e-5, abs=2e-6)
    assert not advantages[mask == 0].any() and not returns[mask == 0].any() and not rewards[mask == 0].any()


def test_gae_at_its_ends_is_the_return_and_the_error_of_one_step():
    mask, numbers = answers()
    rewards, values = numbers() * mask, numbers()
    _, returns = ppo_math.gae(rewards, values, mask, 1.0, 1.0)
    left = rewards.flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, left, rtol=1e-5, atol=2e-6)


def test_what_is_masked_changes_nothing():
    mask, numbers = answers()
    kl, values, scores = numbers(), numbers(), numbers()[:, 0]
    noise = numbers() * 100 * (1 - mask)
    one = ppo_math.gae(ppo_math.token_rewards(kl, scores, mask, 0.1), values, mask)
    two = ppo_math.gae(ppo_math.token_rewards(kl + noise, scores, mask, 0.1), values + noise, mask)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    sums = ppo_math.moments(values, mask)
    assert torch.equal(sums, ppo_math.moments(values + noise, mask))
    assert torch.equal(ppo_math.whiten(values, mask, sums), ppo_math.whiten(values + noise, mask, sums))


@pytest.mark.parametrize("shift", [True, False])
def test_whitening(shift):
    mask, numbers = answers()
    values = numbers() * 4 + 2
    chosen = [float(values[row, t]) for row, line in enumerate(places(mask)) for t in line]
    mean = sum(chosen) / len(chosen)
    std = math.sqrt(sum((x - mean) ** 2 for x in chosen) / len(chosen) + 1e-8)
    halves = ppo_math.moments(values[:3], mask[:3]) + ppo_math.moments(values[3:], mask[3:])  # two processes
    white = ppo_math.whiten(values, mask, halves, shift)
    wanted = torch.tensor([(x - mean) / std + (0 if shift else mean) for x in chosen])
    torch.testing.assert_close(white[mask == 1], wanted, **CLOSE)
    assert not white[mask == 0].any()


def test_losses():
    mask, numbers = answers()
    new, old, advantages = numbers() * 0.3, numbers() * 0.3, numbers()
    values, before, returns = numbers(), numbers(), numbers()
    policy, clipped = ppo_math.policy_loss(new, old, advantages, 0.2)
    value, held = ppo_math.value_loss(values, before, returns, 0.2)
    for row, line in enumerate(places(mask)):
        for t in line:
            a = float(advantages[row, t])
            ratio = math.exp(float(new[row, t]) - float(old[row, t]))
            bounded = min(max(ratio, 0.8), 1.2)
            assert float(policy[row, t]) == pytest.approx(-min(ratio * a, bounded * a), abs=1e-6)
            assert bool(clipped[row, t]) == (bounded * a < ratio * a)
            v, b, r = float(values[row, t]), float(before[row, t]), float(returns[row, t])
            near = min(max(v, b - 0.2), b + 0.2)
            assert float(value[row, t]) == pytest.approx(0.5 * max((v - r) ** 2, (near - r) ** 2), rel=1e-5, abs=1e-6)
            assert bool(held[row, t]) == ((near - r) ** 2 > (v - r) ** 2)


def test_explained_variance_and_repetition():
    mask, numbers = answers()
    returns, values = numbers(), numbers()
    chosen = [(float(returns[r, t]), float(values[r, t])) for r, line in enumerate(places(mask)) for t in line]

    def variance(numbers):
        mean = sum(numbers) / len(numbers)
        return sum((x - mean) ** 2 for x in numbers) / len(numbers)

    wanted = 1 - variance([r - v for r, v in chosen]) / variance([r for r, _ in chosen])
    errors, spread = ppo_math.moments(returns - values, mask), ppo_math.moments(returns, mask)
    assert ppo_math.explained_variance(errors, spread) == pytest.approx(wanted, rel=1e-6)
    assert ppo_math.explained_variance(spread, ppo_math.moments(torch.ones_like(mask), mask)) == 0.0
    assert ppo_math.repetition([1, 2, 3, 4] * 3) == pytest.approx(1 - 4 / 9)
    assert ppo_math.repetition([1, 2, 3]) == 0.0 == ppo_math.repetition(list(range(9)))
    assert statistics([5, 6, 2], [2]) == [3.0, 1.0, 0.0]


def test_controllers():
    kl = ppo_math.KLController(0.1, target=6.0, horizon=1000)
    kl.update(60.0, answers=100)  # far above: the error is cut at 0.2
    assert kl.coef == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    kl.update(5.7, answers=100)
    assert kl.coef == pytest.approx(0.102 * (1 - 0.05 * 0.1))
    fixed = ppo_math.KLController(0.1)
    fixed.update(99.0, 99)
    assert fixed.coef == 0.1
    spread, scores = ppo_math.RunningStd(), torch.randn(100, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for part in scores.split(17):
        spread.update(part)
    assert (spread.count, spread.std) == (100, pytest.approx(float(scores.std(correction=0)), rel=1e-6))
    assert ppo_math.RunningStd().std == 1.0


# Sampling


def test_answers_do_not_depend_on_their_neighbours(toy):
    model, tokenizer = load_base(toy)[0].eval(), load_tokenizer(toy)
    prompts = [tokenizer(text)["input_ids"] for text in ("The boat", "Add", "Spell the word", "The boat", "A quick")]
    rules = SamplingRules(12, 1.0, 0, 1.0, (tokenizer.eos_token_id, 7), tokenizer.pad_token_id)
    draws = row_draws((3, 0), list(range(5)), 12)
    together, log_probs = sample(model, prompts, draws, rules)
    assert len({tuple(answer) for answer in together}) > 2 and together[0] != together[3]
    for row, prompt in enumerate(prompts):
        alone, _ = sample(model, [prompt], row_draws((3, 0), [row], 12), rules)
        assert alone[0] == together[row]
        ids = torch.tensor([prompt + together[row]])
        wanted = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].float(), -1)
        wanted = wanted.gather(1, torch.tensor(together[row])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(log_probs[row]), wanted, rtol=1e-5, atol=2e-5)
        assert all(token not in rules.stops for token in together[row][:-1])


def test_sampling_follows_the_probabilities(toy):
    model, tokenizer = load_base(toy)[0].eval(), load_tokenizer(toy)
    prompt = tokenizer("The boat")["input_ids"]
    count = 4000
    for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.5)):
        rules = SamplingRules(1, 0.7, top_k, top_p, (0,), tokenizer.pad_token_id)
        drawn, _ = sample(model, [prompt] * count, row_draws((1,), list(range(count)), 1), rules)
        probs = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].float() / 0.7, -1)
        ranked = probs.sort(descending=True)
        kept = top_k or int((ranked.values.cumsum(0) - ranked.values < top_p).sum())
        wanted = torch.zeros_like(probs).scatter(0, ranked.indices[:kept], ranked.values[:kept])
        found = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(probs)) / count
        assert (found - wanted / wanted.sum()).abs().max() < 0.04
        assert not found[wanted == 0].any()


# The trainer


def prompts(count=32):
    generator = random.Random("ppo")
    return Dataset.from_list([{"prompt": say(generator, generator.randint(2, 6)), "row": i} for i in range(count)])


def many_e(prompts, completions, **columns):
    return [completion.count("e") / 10 for completion in completions]


def trainer(toy, folder, reward=many_e, adapter=None, model=None, rows=None, **settings):
    settings = {
        "per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2, "max_completion_length": 8,
        "max_steps": 8, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "bf16": False, "activation_checkpointing": False, "disable_tqdm": True, **settings,
    }  # fmt: skip
    texts = settings.pop("text_dataset", None)
    return PPOTrainer(
        model or load_base(toy)[0], reward, PPOConfig(str(folder), **settings), rows or prompts(),
        text_dataset=texts, processing_class=load_tokenizer(toy),
        peft_config=peft.LoraConfig(**LORA) if adapter else None,
    )  # fmt: skip


def batch_of(toy):
    tokenizer = load_tokenizer(toy)
    rows = [tokenizer(text)["input_ids"] for text in ("The boat crossed the river", "Add seven", "A quick brown fox")]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill((mask == 0) | (torch.arange(width) < 2), -100)
    return ids, mask, labels


@pytest.mark.parametrize("adapter", [False, True])
def test_four_models_begin_as_one(toy, tmp_path, adapter):
    """Policy, critic and reference give the base's numbers; nothing of the base exists twice with an adapter."""
    whole = trainer(toy, tmp_path, adapter=adapter).model.eval()
    base, (ids, mask, labels) = load_base(toy)[0].eval(), batch_of(toy)
    with torch.no_grad():
        whole.head.weight.normal_()
        out = whole(ids, mask, labels, ("policy", "values", "reference"))
        kept = labels != -100
        logits = base(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        wanted = logits.gather(2, ids[:, 1:, None])[..., 0]
        hidden = base.model(ids, attention_mask=mask).last_hidden_state[:, :-1]
        entropy = -(logits.exp() * logits).sum(-1)
    for name, value in {
        "log_probs": wanted, "reference": wanted, "values": whole.head(hidden)[..., 0], "entropy": entropy,
    }.items():  # fmt: skip
        torch.testing.assert_close(out[name][kept], value[kept[:, 1:]], rtol=1e-5, atol=2e-5)
        assert not out[name][~kept].any()
    size = sum(p.numel() for p in base.parameters())
    frozen = sum(p.numel() for p in whole.parameters() if not p.requires_grad)
    assert frozen == size  # shared: the base once; full: the reference
    assert (sum(p.numel() for p in whole.parameters()) < 2 * size) == adapter


def test_shared_backbone_equals_separate_models(toy, tmp_path):
    """With weights of their own in both adapters, switching gives what two models with one adapter each give."""
    whole = trainer(toy, tmp_path, adapter=True).model.eval()
    ids, mask, labels = batch_of(toy)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "lora_B" in name or name.startswith("head"):
                parameter.normal_(std=0.1)
        out = whole(ids, mask, labels, ("policy", "values"))
        for name in (POLICY, CRITIC):
            single = peft.get_peft_model(load_base(toy)[0], peft.LoraConfig(**LORA)).eval()
            own = dict(whole.policy.named_parameters())
            for key, parameter in single.named_parameters():
                parts = [name if part == "default" else part for part in key.split(".")]
                parameter.copy_(own[".".join(parts)] if "default" in key else own[key])
            got = single.get_base_model().model(ids, attention_mask=mask).last_hidden_state[:, :-1]
            if name == CRITIC:
                wanted, found = whole.head(got)[..., 0], out["values"]
            else:
                logits = single.get_base_model().lm_head(got).log_softmax(-1)
                wanted, found = logits.gather(2, ids[:, 1:, None])[..., 0], out["log_probs"]
            kept = labels != -100
            torch.testing.assert_close(found[kept], wanted[kept[:, 1:]], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_policy_and_critic_move_and_the_reference_does_not(toy, tmp_path, adapter):
    run = trainer(toy, tmp_path, adapter=adapter, critic_learning_rate=1e-2)
    ids, mask, labels = batch_of(toy)
    frozen = {name: p.detach().clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        before = run.model.eval()(ids, mask, labels, ("policy", "values", "reference"))
    run.train()
    with torch.no_grad():
        after = run.model.eval()(ids, mask, labels, ("policy", "values", "reference"))
    assert torch.equal(before["reference"], after["reference"])
    assert (before["log_probs"] - after["log_probs"]).abs().max() > 1e-3
    assert (before["values"] - after["values"]).abs().max() > 1e-3
    own = dict(run.model.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in frozen.items())
    assert {group["initial_lr"] for group in run.optimizer.param_groups} == {1e-3, 1e-2}
    names = "reward score kl kl_coef entropy clip_share value_clip_share explained_variance answer_length ended"
    first = run.state.log_history[0]
    assert set(f"{names} repetition rewards/many_e approx_kl policy_loss value_loss".split()) <= first.keys()
    assert abs(first["kl"]) < 1e-4 and first["approx_kl"] < 1e-6 and first["clip_share"] == 0  # nobody has moved yet
    run.save_model(str(tmp_path / "out"))
    saved, _ = load_checkpoint(tmp_path / "out")
    with torch.no_grad():
        logits = saved.eval()(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    kept = labels != -100
    found = logits.gather(2, ids[:, 1:, None])[..., 0][kept[:, 1:]]
    torch.testing.assert_close(after["log_probs"][kept], found, rtol=1e-5, atol=2e-5)


def test_adapter_that_goes_on_is_its_own_reference(toy, tmp_path):
    first = peft.get_peft_model(load_base(toy)[0], peft.LoraConfig(**LORA))
    torch.manual_seed(0)
    for name, parameter in first.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    first.save_pretrained(tmp_path / "sft")
    run = trainer(toy, tmp_path / "run", model=load_adapter(load_base(toy)[0], tmp_path / "sft", trainable=True))
    ids, mask, labels = batch_of(toy)
    with torch.no_grad():
        out = run.model.eval()(ids, mask, labels, ("policy", "reference"))
    assert torch.equal(out["log_probs"], out["reference"])
    assert {POLICY, CRITIC, REFERENCE} == set(run.model.policy.peft_config)
    run.train()
    with torch.no_grad():
        after = run.model.eval()(ids, mask, labels, ("policy", "reference"))
    assert torch.equal(out["reference"], after["reference"])
    assert not torch.equal(out["log_probs"], after["log_probs"])


@pytest.mark.parametrize("adapter", [False, True])
def test_accumulated_is_one_batch(toy, tmp_path, adapter):
    """1 x 4 = 4 x 1: every token of an update counts the same."""
    runs = [
        trainer(
            toy, tmp_path, adapter=adapter, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
            steps_per_generation=16 // size, max_steps=4, entropy_coef=0.01, max_approx_kl=10.0,
            optim="sgd", learning_rate=0.05,
        )
        for size in (8, 2)
    ]  # fmt: skip
    for run in runs:
        run.train()
    for one, two in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    logs = [run.state.log_history for run in runs]
    for name in ("loss", "grad_norm", "entropy", "policy_loss", "value_loss", "reward", "approx_kl"):
        wanted = [entry[name] for entry in logs[0] if name in entry]
        assert [entry[name] for entry in logs[1] if name in entry] == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_recomputed_layers_keep_their_adapter(toy, tmp_path):
    """Activation checkpointing runs a layer again in the backward pass, under the adapter it had."""
    grads = []
    for again in (False, True):
        run = trainer(toy, tmp_path, adapter=True, activation_checkpointing=again, max_steps=2)
        run.train()
        grads.append([p.detach().clone() for p in run.model.parameters() if p.requires_grad])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_updates_end_when_the_policy_is_too_far_away(toy, tmp_path):
    run = trainer(toy, tmp_path, max_approx_kl=1e-7, num_iterations=4, max_steps=16, learning_rate=1e-2)
    moved = []
    step = run.training_step

    def watched(model, inputs, *args, **kwargs):
        before = [p.detach().clone() for p in model.parameters()]
        moved.append(before)
        return step(model, inputs, *args, **kwargs)

    run.training_step = watched
    run.train()
    same = [all(map(torch.equal, one, two)) for one, two in zip(moved, moved[1:], strict=False)]
    # The first update of a rollout moves, the second finds that it did, the rest of the rollout stands still.
    assert same == ([False, False] + [True] * 6 + [False, False] + [True] * 5)
    skipped = [entry["skipped"] for entry in run.state.log_history if "skipped" in entry]
    assert skipped == [0.0, 0.0] + [1.0] * 6 + [0.0, 0.0] + [1.0] * 6


def test_scores_are_penalised_scaled_and_clipped(toy, tmp_path):
    run = trainer(toy, tmp_path, missing_eos_penalty=2.0, reward_weights=[0.5], reward_clip=1.5)
    stop = run.eos_token_ids[0]
    per_function = torch.tensor([[2.0], [2.0], [8.0]])
    scores, raw = run._scores(per_function, [[5, stop], [5, 6], [stop]])
    assert raw.tolist() == [1.0, 1.0, 4.0]
    assert scores.tolist() == [1.0, -1.0, 1.5]
    run = trainer(toy, tmp_path, reward_scaling=True)
    scores, _ = run._scores(per_function, [[stop]] * 3)
    torch.testing.assert_close(scores, per_function[:, 0] / per_function.std(correction=0))


def test_pretraining_mix_holds_the_texts(toy, tmp_path):
    tokenizer = load_tokenizer(toy)
    texts = Dataset.from_list([tokenizer("The boat crossed the river before the rain came.") for _ in range(5)])
    run = trainer(toy, tmp_path, ptx_coef=5.0, text_dataset=texts.select_columns("input_ids"), max_steps=12)
    run.train()
    losses = [entry["text_loss"] for entry in run.state.log_history if "text_loss" in entry]
    model, ids = load_base(toy)[0].eval(), torch.tensor([texts[0]["input_ids"]])
    assert losses[0] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-4)
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(InputError, match="pretraining mix"):
        trainer(toy, tmp_path, ptx_coef=1.0)


def test_critic_starts_from_a_reward_model(toy, tmp_path):
    ids, mask, labels = batch_of(toy)
    judge, _ = load_base(toy, "sequence")
    torch.nn.init.normal_(judge.score.weight)
    judge.save_pretrained(tmp_path / "full")
    run = trainer(toy, tmp_path, critic_model=str(tmp_path / "full"))
    with torch.no_grad():
        out = run.model.eval()(ids, mask, labels, ("values",))["values"]
        wanted = judge.eval().score(judge.model(ids, attention_mask=mask).last_hidden_state)[:, :-1, 0]
    kept = labels != -100
    torch.testing.assert_close(out[kept], wanted[kept[:, 1:]], rtol=1e-5, atol=2e-5)

    config = peft.LoraConfig(**LORA | {"task_type": "SEQ_CLS", "modules_to_save": ["score"]})
    judge = peft.get_peft_model(load_base(toy, "sequence")[0], config)
    with torch.no_grad():
        for name, parameter in judge.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    judge.save_pretrained(tmp_path / "adapter")
    run = trainer(toy, tmp_path, adapter=True, critic_model=str(tmp_path / "adapter"))
    with torch.no_grad():
        out = run.model.eval()(ids, mask, labels, ("values",))["values"]
        inner = judge.eval().get_base_model()
        wanted = inner.score(inner.model(ids, attention_mask=mask).last_hidden_state)[:, :-1, 0]
    torch.testing.assert_close(out[kept], wanted[kept[:, 1:]], rtol=1e-5, atol=2e-5)
    with pytest.raises(InputError, match="trained in full"):
        trainer(toy, tmp_path, critic_model=str(tmp_path / "adapter"))
    with pytest.raises(InputError, match="no reward model for this policy"):
        trainer(toy, tmp_path, critic_model=str(toy))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda **k: 1 / 0, "raised ZeroDivisionError"),
        (lambda prompts, completions, **k: [1.0], r"returned 1 values for 8 answers"),
        (lambda prompts, completions, **k: ["good"] * len(prompts), "returned 'good'"),
        (lambda prompts, completions, **k: [math.nan] * len(prompts), "returned nan"),
        (lambda prompts, completions, **k: [math.inf] * len(prompts), "returned inf"),
        (lambda **k: None, "returned None"),
        (lambda colour, **k: None, "needs a column 'colour'"),
    ],
)
def test_bad_rewards_are_named(toy, tmp_path, reward, message):
    with pytest.raises(InputError, match=f"reward function <lambda> {message}"):
        trainer(toy, tmp_path, reward=reward).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_coef": -0.1}, "kl_coef is -0.1"),
        ({"lam": 1.5}, "lam is 1.5"),
        ({"kl_estimator": "k2"}, "no KL estimator 'k2'"),
        ({"beta": 0.1}, "beta belongs to GRPO"),
        ({"target_kl": 6.0, "kl_coef": 0.0}, "target_kl with kl_coef 0"),
        ({"gradient_accumulation_steps": 3}, "no whole number of updates"),
        ({"per_device_train_batch_size": 64}, "32 prompts, and one rollout takes 128"),
    ],
)
def test_bad_settings_are_refused(toy, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        trainer(toy, tmp_path, **settings)


def test_prompt_learning_is_refused(toy, tmp_path):
    model = peft.get_peft_model(load_base(toy)[0], peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(InputError, match="PPO does not work with prompt_tuning"):
        trainer(toy, tmp_path, model=model)


def test_answers_are_shown_and_kept(tmp_path, capsys):
    table = AnswerTable(str(tmp_path), every=2)
    table.keep(["What?"] * 6, [[{"role": "assistant", "content": "That."}]] * 6, [0.5] * 6)
    for step in (1, 2, 3):
        table.show(step)
    lines = [json.loads(line) for line in table.file.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"step": 2, "prompt": "What?", "answer": "That.", "reward": 0.5}] * 4
    assert capsys.readouterr().out.count("That.") == 4


def test_diagnosis_names_the_cause():
    def course(**ends):
        """A log in which each number goes straight from one end to the other; the rest is healthy."""
        healthy = {
            "reward": (0.1, 0.5), "entropy": (2.0, 1.5), "kl": (0.0, 3.0), "answer_length": (20, 20), "ended": (1, 1),
            "repetition": (0, 0), "explained_variance": (0.0, 0.6), "clip_share": (0.1, 0.1),
        } | ends  # fmt: skip
        return [{k: a + (b - a) * i / 8 for k, (a, b) in healthy.items()} for i in range(9)]

    assert diagnose(course()) == []
    assert diagnose(course()[:3]) == []
    for ends, words in (
        ({"answer_length": (10, 60)}, "rises together with the length"),
        ({"entropy": (2.0, 0.1)}, "entropy collapsed"),
        ({"kl": (0, 60)}, "out of hand"),
        ({"explained_variance": (0.0, -0.1)}, "critic is not learning"),
        ({"ended": (0.9, 0.0)}, "end by themselves"),
        ({"repetition": (0.0, 0.9)}, "repetitions"),
        ({"clip_share": (0.2, 0.7)}, "updates are too large"),
    ):
        found = diagnose(course(**ends))
        assert len(found) == 1 and words in found[0]


def test_order_of_prompts_is_that_of_the_epoch():
    def order(epochs):
        sampler = EpochSampler(range(20), 1, 4, 1, True, 7)
        for epoch in epochs:
            sampler.set_epoch(epoch)
            found = list(sampler)
        return found

    assert order([0, 1]) == order([1]) != order([0])


# Slow: whole runs


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("at", [3, 4, 6])
def test_resumed_is_never_stopped(toy, tmp_path, adapter, at):
    """Stopped inside a rollout (3, 6) and between two (4): bit for bit what a run without a stop gives."""
    settings = dict(
        adapter=adapter, max_steps=10, save_strategy="steps", save_steps=at, target_kl=0.5, reward_scaling=True,
        critic_learning_rate=3e-3, num_generations=2,
    )  # fmt: skip
    whole = trainer(toy, tmp_path / "whole", **settings)
    whole.train()
    whole.save_model(str(tmp_path / "whole" / "end"))
    again = trainer(toy, tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    again.save_model(str(tmp_path / "again" / "end"))
    for folder in ("", "critic"):
        assert same_weights(tmp_path / "whole" / "end" / folder, tmp_path / "again" / "end" / folder)
    assert again.kl.coef == whole.kl.coef != 0.05 and again.spread == whole.spread
    last = [[entry for entry in run.state.log_history if "reward" in entry][-1] for run in (whole, again)]
    assert last[0]["reward"] == last[1]["reward"] and last[0]["policy_loss"] == last[1]["policy_loss"]


TWO = """
import sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
import torch
from test_ppo import trainer
adapter = sys.argv[1] == "True"
run = trainer(
    Path(sys.argv[2]) / "model", Path(sys.argv[2]) / "two", adapter=adapter, per_device_train_batch_size=2,
    steps_per_generation=4, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.05, max_approx_kl=5.0,
    target_kl=0.5, max_grad_norm=0.5, max_steps=6, whiten_rewards=True,
)
run.train()
run.save_model(str(Path(sys.argv[2]) / "two" / "end"))
assert run.accelerator.num_processes == 2
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_two_processes_are_one(toy, tmp_path, adapter):
    """The same answers, advantages and updates, whether one process holds all rows or two hold half of them."""
    (tmp_path / "model").symlink_to(toy)
    (tmp_path / "two.py").write_text(TWO, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [tmp_path / "two.py", adapter, tmp_path, ROOT / "tests", ROOT]
    done = subprocess.run([*torchrun, *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one = trainer(
        toy, tmp_path / "one", adapter=adapter, per_device_train_batch_size=4, steps_per_generation=4,
        gradient_accumulation_steps=2, optim="sgd", learning_rate=0.05, max_approx_kl=5.0, target_kl=0.5,
        max_grad_norm=0.5, max_steps=6, whiten_rewards=True,
    )  # fmt: skip
    one.train()
    one.save_model(str(tmp_path / "one" / "end"))
    for folder in ("", "critic"):
        alone, both = weights(tmp_path / "one" / "end" / folder), weights(tmp_path / "two" / "end" / folder)
        assert alone.keys() == both.keys()
        for name, value in alone.items():
            torch.testing.assert_close(value, both[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "adapter"), [(0, False), (1, False), (2, False), (0, True)])
def test_reward_rises(tmp_path, seed, adapter):
    """The share of the letter e in the answers rises by more than half, and the critic explains something of it."""
    folder = ROOT / "data" / "tiny" / "model"
    rows = [json.loads(line) for line in (ROOT / "data/tiny/prompts/train.jsonl").read_text().splitlines()]
    run = trainer(
        folder, tmp_path, lambda completions, **k: [last_text(c).count("e") / 10 for c in completions],
        adapter=adapter, rows=Dataset.from_list(rows), per_device_train_batch_size=16, steps_per_generation=4,
        num_iterations=2, max_steps=96, logging_steps=8, learning_rate=5e-3 if adapter else 1e-3, kl_coef=0.005,
        critic_learning_rate=1e-2 if adapter else 2e-3, vf_coef=0.5, max_completion_length=12, seed=seed,
    )  # fmt: skip
    run.train()
    log = [entry for entry in run.state.log_history if "reward" in entry]
    first, last = (sum(entry["reward"] for entry in part) / 2 for part in (log[:2], log[-2:]))
    print(f"seed {seed}, adapter {adapter}: {first:.3f} to {last:.3f}, KL {log[-1]['kl']:.1f},",
          [round(entry["explained_variance"], 2) for entry in log])  # fmt: skip
    assert last > 1.5 * first
    assert max(entry["explained_variance"] for entry in log[-6:]) > 0.1


@pytest.mark.parametrize("flags", [[], ["--peft", "lora"]])
def test_recipe_leaves_a_checkpoint_and_goes_on_from_one(tmp_path, flags):
    rows = (ROOT / "data/tiny/prompts/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:32]
    (tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    common = [
        "--data", tmp_path / "rows.jsonl", "--test_size", 0, "--output_dir", tmp_path / "out", "--rehearsal_prompts", 2,
        "--per_device_train_batch_size", 4, "--steps_per_generation", 2, "--max_completion_length", 6,
        "--save_strategy", "steps", "--save_steps", 3, "--save_total_limit", 2, "--max_steps", 4,
        "--num_completions_log_steps", 2, *flags,
    ]  # fmt: skip
    launch("ppo", *common)
    model, tokenizer = load_checkpoint(tmp_path / "out")
    assert model.generation_config.eos_token_id and tokenizer.chat_template
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "finished" and record["ledger"] and not record.get("groups")
    assert (tmp_path / "out" / "completions" / "answers.jsonl").is_file()
    assert (tmp_path / "out" / "critic").is_dir() and (tmp_path / "out" / "generation_config.json").is_file()
    before = weights(tmp_path / "out") | weights(tmp_path / "out" / "critic")
    launch("ppo", *common, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-3")
    after = weights(tmp_path / "out") | weights(tmp_path / "out" / "critic")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_texts_of_the_pretraining_mix_end_in_the_end_token(tmp_path):
    tokenizer = load_tokenizer(ROOT / "data/tiny/model")
    model = SimpleNamespace(config=AutoConfig.from_pretrained(ROOT / "data/tiny/model"))
    loaded = SimpleNamespace(tokenizer=tokenizer, model=model)
    given = ["--text_data", str(ROOT / "data/tiny/text"), "--ptx_coef", "1", "--output_dir", str(tmp_path / "out")]
    rows = load_texts(parse(PPOConfig, {}, given), loaded)
    assert len(rows) == 500 and rows[0]["input_ids"][-1] == tokenizer.eos_token_id
    assert load_texts(parse(PPOConfig, {}, given[-2:]), loaded) is None
    given[1] = str(ROOT / "data/tiny/chat")
    with pytest.raises(InputError, match="no plain text") as caught:
        load_texts(parse(PPOConfig, {}, given), loaded)
    assert "--text_data" in str(caught.value)


def test_a_reward_adapter_scores_on_the_policys_backbone(toy, tmp_path):
    config = peft.LoraConfig(**LORA | {"task_type": "SEQ_CLS", "modules_to_save": ["score"]})
    judge = peft.get_peft_model(load_base(toy, "sequence")[0], config)
    with torch.no_grad():
        for name, parameter in judge.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    judge.save_pretrained(tmp_path / "judge")
    load_tokenizer(toy).save_pretrained(tmp_path / "judge")
    alone = RewardModel(tmp_path / "judge")
    given = {"prompts": ["Add seven"] * 3, "completions": [" and", " the quick brown", ""]}
    wanted = alone(**given)
    run = trainer(toy, tmp_path, reward=[many_e, RewardModel(tmp_path / "judge")], adapter=True, max_steps=4)
    assert "reward" in run.model.policy.peft_config and "backbone" in run.notes[-1]
    shared = run.rewards[1].function
    assert shared.model is not alone.model and shared(**given) == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    before = {name: value.clone() for name, value in run.model.policy.state_dict().items()}
    run.train()
    assert shared(**given) == pytest.approx(wanted, rel=1e-5, abs=1e-6)  # the policy moved, its judge did not
    after = run.model.policy.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    run.save_model(tmp_path / "out")
    saved = peft.load_peft_weights(tmp_path / "out")
    assert saved and not [name for name in saved if "reward" in name or "critic" in name]
