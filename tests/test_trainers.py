"""The trainers compute what TRL's own do, on fewer padded tokens, and stop before a bad step."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from test_adapters import arguments
from test_tokenization import CONFIGS, Splits, row_of

from alignment import trainers
from alignment.errors import InputError
from alignment.ledger import Ledger
from alignment.models import load_model
from alignment.tokenization import tokenize

FORMS = ("sft", "dpo", "kto", "reward")
OURS = {
    "sft": trainers.SFTTrainer,
    "dpo": trainers.DPOTrainer,
    "kto": trainers.KTOTrainer,
    "reward": trainers.RewardTrainer,
}
TRLS = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer, "kto": trl.KTOTrainer, "reward": trl.RewardTrainer}
WORDS = ["boat", "river", "rain", "seven", "twelve", "letters", "larger", "forty", "quick", "brown", "lazy", "dog"]


def raw_rows(form, n=16):
    """Conversational rows of very different lengths, each prompt its own."""
    rows = []
    for i in range(n):
        prompt = f"{i} " + " ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + 7 * (i % 3)))
        answers = [" ".join(WORDS[(i * k + j) % len(WORDS)] for j in range(1 + (5 * i * k) % 13)) for k in (1, 3)]
        rows.append(row_of(form, "chat", prompt, (answers[0] + " yes", answers[1] + " no")))
        if form == "kto":
            rows[-1]["label"] = i % 2 == 0
    return rows


def build(toy, out, form, rows=None, stock=False, stream=False, tight=False, **values):
    """A trainer of ours, or TRL's own on the raw rows."""
    rows = raw_rows(form) if rows is None else rows
    own = {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    own |= {"learning_rate": 1e-2, "gradient_checkpointing": False, "max_length": 128, "max_steps": 2}
    own |= {"lr_scheduler_type": "constant", "eval_strategy": "no", "dataloader_pin_memory": False}
    args = arguments(toy, out, train=CONFIGS[form], recipe=form, **own | values)
    loaded = load_model(args, "sequence" if form == "reward" else "causal")
    if tight:  # nothing behind the end of a turn
        loaded.tokenizer.chat_template = loaded.tokenizer.chat_template.replace("<|im_end|>\\n", "<|im_end|>")
    with torch.no_grad():  # a new head is random: the same in every trainer of a test
        for name, weight in loaded.model.named_parameters():
            if name.endswith("score.weight"):
                weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
    if stock:
        if form == "sft":
            rows = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in rows]
        data = Dataset.from_list(rows)
        kind = TRLS[form]
    else:
        ledger = Ledger()
        ledger.read("a", len(rows))
        ledger.keep("a", "train", len(rows))
        data = Dataset.from_list([{"source": "a", "row": i + 1} | row for i, row in enumerate(rows)])
        splits = Splits(data.to_iterable_dataset() if stream else data, None, ledger, [])
        data, kind = tokenize(splits, loaded, args, form).train, OURS[form]
    more = {"ref_model": loaded.ref_model} if form in ("dpo", "kto") else {}
    return kind(
        model=loaded.model, args=args.train, train_dataset=data, processing_class=loaded.tokenizer,
        peft_config=loaded.peft_config, **more,
    )  # fmt: skip


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def batch_of(trainer, n=4):
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(n)]))


def nudge(trainer):
    """Move the policy off its reference, the same way in every trainer, so that losses differ from ln 2."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def answer_log_probs(model, rows, prompt, answer):
    """Sum of log-probabilities of the answers' tokens: one row at a time, no padding, no library."""
    sums = []
    for row in rows:
        ids = torch.tensor([row[prompt] + row[answer]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
        picked = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        sums.append(picked[len(row[prompt]) - 1 :].sum())
    return torch.stack(sums)


def loss_of(trainer, batch):
    trainer.model.eval()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch).item()


@pytest.mark.parametrize("form", FORMS)
def test_tokens_and_loss_are_trls_on_the_raw_rows_and_the_papers(toy, tmp_path, form):
    """TRL also trains what a template puts after the end of a turn; with one that puts nothing all is equal."""
    extra = {"beta": 0.3} if form in ("dpo", "kto") else {}
    masked = {"packing": False, "assistant_only_loss": True} if form == "sft" else {}
    mine = build(toy, tmp_path, form, tight=True, **extra, **masked)
    stock = build(toy, tmp_path, form, tight=True, stock=True, **extra)
    nudge(mine)
    nudge(stock)
    rows = [mine.train_dataset[i] for i in range(4)]
    columns = [c for c in stock.train_dataset.column_names if c.endswith("_ids") and not c.startswith("KL")]
    places = [row - 1 for row in mine.train_dataset["row"]]
    for name in columns:  # thumbs stand in an order of ours
        assert mine.train_dataset[name] == [stock.train_dataset[i][name] for i in places]
    ours = loss_of(mine, batch_of(mine))
    # the other prompts' answers are ours too: TRL pairs the rows as they happen to stand
    theirs = batch_of(stock) if form != "kto" else stock._prepare_inputs(stock.data_collator(rows))
    assert ours == pytest.approx(loss_of(stock, theirs), abs=2e-5)
    assert ours == pytest.approx(reference_loss(form, mine, rows), abs=5e-5)


@torch.no_grad()
def reference_loss(form, trainer, rows):
    """The loss as its paper writes it, in a few lines."""
    model = trainer.model.eval()
    if form == "sft":
        trained = [[t for t in row["labels"] if t != -100] for row in rows]
        split = [
            {"prompt": row["input_ids"][: -len(answer)], "answer": answer}
            for row, answer in zip(rows, trained, strict=True)
        ]
        return -answer_log_probs(model, split, "prompt", "answer").sum().item() / sum(map(len, trained))
    if form == "reward":
        scores = [
            torch.stack([model(input_ids=torch.tensor([row[key]])).logits[0, 0] for row in rows])
            for key in ("chosen_ids", "rejected_ids")
        ]
        return -torch.nn.functional.logsigmoid(scores[0] - scores[1]).mean().item()
    reference, beta = trainer.ref_model, trainer.beta

    def ratio(answer):
        return answer_log_probs(model, rows, "prompt_ids", answer) - answer_log_probs(
            reference, rows, "prompt_ids", answer
        )

    if form == "dpo":
        return -torch.nn.functional.logsigmoid(beta * (ratio("chosen_ids") - ratio("rejected_ids"))).mean().item()
    z = ratio("KL_completion_ids").mean().clamp(min=0)
    sign = torch.tensor([1.0 if row["label"] else -1.0 for row in rows])
    return (1 - torch.sigmoid(sign * beta * (ratio("completion_ids") - z))).mean().item()


def test_packed_rows_have_the_loss_of_single_rows(toy, tmp_path):
    apart = build(toy, tmp_path, "sft", packing=False, assistant_only_loss=True)
    packed = build(toy, tmp_path, "sft", packing=True, assistant_only_loss=True)
    assert packed.packed and not apart.packed and len(packed.train_dataset) < len(apart.train_dataset)

    def total(trainer):
        n = len(trainer.train_dataset)
        batch = batch_of(trainer, n)
        tokens = (batch["labels"][:, 1:] != -100).sum().item()
        return loss_of(trainer, batch) * tokens, tokens

    (a, n), (b, m) = total(apart), total(packed)
    assert n == m
    assert b == pytest.approx(a, rel=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix", "ptuning"])
def test_rows_are_not_packed_where_virtual_tokens_would_stand_once(toy, tmp_path, method):
    trainer = build(toy, tmp_path, "sft", packing=True, peft=method)
    assert not trainer.packed
    config = trainer.model.active_peft_config
    plain = trainer.model.get_base_model()
    for model, new in ((trainer.model, None), (plain, config)):  # an adapter that goes on, and a new one
        assert "virtual tokens" in trainers._why_not_packed(model, new, trainer.args)
    if method == "prefix":
        return
    # what the refusal is for: the second of two packed rows sees the first one, positions or not
    ids, positions = torch.arange(5, 29).view(2, 12), torch.arange(12).repeat(2)[None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it drops the positions
        packed = trainer.model.eval()(input_ids=ids.view(1, -1), position_ids=positions, use_cache=False).logits[
            0, -12:
        ]
        alone = trainer.model(input_ids=ids[1:], use_cache=False).logits[0, -12:]
    assert (packed - alone).abs().max() > 0.05


@pytest.mark.parametrize("values", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}, {"pad_to_multiple_of": 8}])
@pytest.mark.parametrize("packing", [True, False])
def test_sft_options_of_trl_work(toy, tmp_path, values, packing):
    found = losses(build(toy, tmp_path, "sft", packing=packing, max_steps=1, **values))
    assert len(found) == 1 and 0 < found[0] < 50


DPO_LOSSES = {
    "hinge": {}, "ipo": {}, "exo_pair": {"label_smoothing": 0.1}, "nca_pair": {}, "robust": {"label_smoothing": 0.1},
    "bco_pair": {}, "sppo_hard": {}, "aot": {}, "apo_zero": {}, "apo_down": {}, "discopop": {}, "sigmoid_norm": {},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_losses_of_dpo_are_reachable(toy, tmp_path, loss_type):
    trainer = build(toy, tmp_path, "dpo", loss_type=[loss_type], max_steps=1, **DPO_LOSSES[loss_type])
    before = weights(trainer)
    (loss,) = losses(trainer)
    assert loss == loss and any(not torch.equal(before[k], v) for k, v in weights(trainer).items())


def test_losses_of_kto_without_a_reference_point_keep_their_order(toy, tmp_path):
    trainer = build(toy, tmp_path, "kto", loss_type="apo_zero_unpaired", max_steps=1)
    assert "KL_completion_ids" not in trainer.train_dataset.column_names
    assert len(losses(trainer)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dpo", "kto"])
def test_precomputed_reference_changes_nothing(toy, tmp_path, form):
    plain = losses(build(toy, tmp_path, form))
    early = losses(build(toy, tmp_path, form, precompute_ref_log_probs=True))
    assert early == pytest.approx(plain, abs=1e-4)
    assert plain[1] != pytest.approx(plain[0], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_accumulation_equals_a_larger_batch(toy, tmp_path, form):
    """KTO's reference point belongs to a micro-batch: its loss is compared without one."""
    values = {"optim": "sgd", "seed": 7, "max_steps": 3, "max_grad_norm": 0.0, "learning_rate": 1e-3}
    values |= {"loss_type": "apo_zero_unpaired"} if form == "kto" else {"packing": False} if form == "sft" else {}
    found = {}
    for size, steps in ((4, 1), (1, 4)):
        trainer = build(
            toy, tmp_path, form, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **values
        )
        losses(trainer)
        found[size] = weights(trainer)
    start = weights(build(toy, tmp_path, form, **values))
    moved = max((found[4][k] - start[k]).abs().max().item() for k in start)
    apart = max((found[4][k] - found[1][k]).abs().max().item() for k in start)
    assert moved > 1e-4 and apart < 1e-3 * moved + 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_nan_loss_ends_the_run_with_the_weights_as_they_were(toy, tmp_path, form):
    trainer = build(toy, tmp_path, form, max_steps=3)
    forward, before = trainer.model.forward, weights(trainer)

    def broken(**inputs):
        out = forward(**inputs)
        name = "logits" if form == "reward" else "log_probs"
        out[name] = out[name] * float("nan")
        return out

    trainer.model.forward = broken
    with pytest.raises(InputError, match="the loss is nan.*\n.*step 1 of 3"):
        trainer.train()
    after = weights(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_infinite_gradient_ends_the_run_with_the_weights_as_they_were(toy, tmp_path, clip):
    trainer = build(toy, tmp_path, "dpo", max_grad_norm=clip)
    before = weights(trainer)
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(InputError, match="gradient norm is (inf|nan)"):
        trainer.train()
    after = weights(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("form", ["sft", "dpo", "reward"])
def test_rows_of_like_lengths_come_together(toy, tmp_path, form):
    """Groups within a batch are far narrower than chance; the lengths are those of the whole rows."""
    values = {"packing": False} if form == "sft" else {}
    rows = raw_rows(form, 64)

    def widths(strategy):
        trainer = build(toy, tmp_path, form, rows, train_sampling_strategy=strategy, **values)
        sizes = trainer.train_dataset["length"]
        order = list(trainer._get_train_sampler())
        assert sorted(order) == list(range(64))
        return sum(max(sizes[i] for i in order[k : k + 4]) for k in range(0, 64, 4))

    assert widths("group_by_length") < 0.85 * widths("random")


@pytest.mark.parametrize("form", ["sft", "dpo", "reward"])
def test_streams_train(toy, tmp_path, form):
    found = losses(build(toy, tmp_path, form, stream=True))
    assert len(found) == 2 and all(loss == loss for loss in found)


def test_a_stream_of_thumbs_is_refused_with_a_way_out(toy, tmp_path):
    with pytest.raises(InputError, match="apo_zero_unpaired"):
        build(toy, tmp_path, "kto", stream=True)


def test_padding_is_counted_and_logged(toy, tmp_path):
    trainer = build(toy, tmp_path, "dpo")
    losses(trainer)
    logged = [entry["padding"] for entry in trainer.state.log_history if "padding" in entry]
    assert len(logged) == 2 and logged[-1] == round(trainer.token_count.padding, 4)
    assert 0 <= trainer.token_count.padding < 0.15
    packed = build(toy, tmp_path, "sft", packing=True, max_steps=-1, num_train_epochs=1)
    losses(packed)
    assert int(packed.token_count.real) == sum(len(ids) for ids in packed.train_dataset["input_ids"])


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import conftest
from test_trainers import build, losses
trainer = build({toy!r}, {out!r}, "sft", packing=False, train_sampling_strategy="sequential", max_steps=3,
    per_device_train_batch_size=int(sys.argv[1]), assistant_only_loss=True)
found = losses(trainer)
if trainer.accelerator.is_main_process:
    print("LOSSES", json.dumps([trainer.accelerator.num_processes, found]))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(toy, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), toy=str(toy), out=str(tmp_path / "out")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    found = {}
    for launch, size in (
        ([sys.executable], 4),
        ([*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"], 2),
    ):
        done = subprocess.run([*launch, str(script), str(size)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("LOSSES"))
        processes, found[size] = json.loads(line.removeprefix("LOSSES "))
        assert processes == 4 // size
    assert found[2] == pytest.approx(found[4], rel=2e-4)
