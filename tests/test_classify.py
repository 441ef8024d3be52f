"""recipes/classify.py: three heads on encoders and decoders, what comes back from disk, what is refused and why."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_recipes import held_out, launch, results, script
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, set_seed

from alignment.checkpoints import load_checkpoint, load_tokenizer
from alignment.classifier import ClassificationTrainer, ClassifyConfig, predict, score_spans
from alignment.classifying import Collator, first_tokens
from alignment.config import parse
from alignment.errors import InputError
from alignment.generation import process_state
from alignment.labels import Labels, find_names, label_findings
from alignment.spans import Reading, best_spans, place_answer, windows

SHORT = ("--max_steps", 2, "--eval_strategy", "epoch", "--save_strategy", "no", "--logging_steps", 1, "--test_size", 4)
SMALL = ("--per_device_train_batch_size", 4, "--max_length", 64)
NAMES, PLACES, VERBS = ("Tom", "Lily", "Ben Hill", "Zoe"), ("Rome", "the mill", "Oslo"), ("saw", "met", "left")


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def sentences(count=24):
    return [{"sentence": f"The soup number {i} was {('bad', 'good')[i % 2]}.", "label": i % 2} for i in range(count)]


def tagged(count, seed=0):
    """Sentences with people and places, tagged in BIO."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        tokens, tags = [], []
        for words, kind in ((NAMES, "PER"), (VERBS, ""), (NAMES, "PER"), (("in",), ""), (PLACES, "LOC"), ((".",), "")):
            part = str(rng.choice(words)).split()
            tokens += part
            tags += ["O"] * len(part) if not kind else [f"B-{kind}", *[f"I-{kind}"] * (len(part) - 1)]
        rows.append({"tokens": tokens, "tags": tags})
    return rows


def asked(count, seed=0, filler=0):
    """Questions on who was seen where, the answer somewhere in the context."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        first, second = rng.choice(NAMES, 2, replace=False)
        place = str(rng.choice(PLACES))
        context = "It was a long day. " * int(rng.integers(0, filler + 1))
        context += f"{first} met {second} in {place} after lunch."
        start = context.index(f" in {place}") + 4
        answers = {"text": [place], "answer_start": [start]}
        rows.append({"id": str(i), "question": f"Where was {second}?", "context": context, "answers": answers})
    return rows


ROWS = {"sequence": sentences, "token": lambda: tagged(24), "span": lambda: asked(24)}


def classify(folder, head, model, *flags):
    """Run the recipe on toy rows; returns trainer, arguments, loaded model and rows."""
    file = write(folder / f"{head}.jsonl", ROWS[head]())
    words = ("--model_name_or_path", model, "--data", file, "--head", head, "--output_dir", folder / "out")
    return launch("classify", *words, *SHORT, *SMALL, *flags)


def outputs(model, ids):
    with torch.no_grad():
        out = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    return torch.stack([out["start_logits"], out["end_logits"]]) if "start_logits" in out else out["logits"]


@pytest.mark.parametrize("peft", ["none", "lora"])
@pytest.mark.parametrize("family", ["toy", "toy_bert"])
@pytest.mark.parametrize("head", ["sequence", "token", "span"])
def test_head_trains_and_comes_back(head, family, peft, request, tmp_path):
    trainer, _, _, rows = classify(tmp_path, head, request.getfixturevalue(family), "--peft", peft)
    record, said = results(tmp_path / "out")
    assert record["status"] == "finished" and record["metrics"]["after"].keys() >= {"loss"}
    assert rows.ledger.rows("train") + rows.ledger.rows("test") == 24 and rows.ledger.rows("test") == 4
    assert "new, trained from scratch" in said
    ids = torch.tensor([[5, 6, 7, 8, 40, 41, 42]])
    again, _ = load_checkpoint(tmp_path / "out", head=head)
    torch.testing.assert_close(outputs(again, ids), outputs(trainer.model, ids), rtol=1e-4, atol=1e-5)
    if head != "span":
        names = {"sequence": ["0", "1"], "token": ["O", "B-LOC", "B-PER", "I-LOC", "I-PER"]}[head]
        assert [again.config.id2label[i] for i in range(len(names))] == names


@pytest.mark.parametrize(
    ("head", "peft", "family"),
    [("sequence", "ia3", "toy_bert"), ("sequence", "prefix", "toy_bert"), ("sequence", "prompt", "toy_bert"),
     ("sequence", "ptuning", "toy_bert"), ("sequence", "qlora", "toy_bert"), ("token", "ia3", "toy_bert"),
     ("token", "prefix", "toy_bert"), ("token", "prefix", "toy"), ("span", "prefix", "toy_bert"),
     ("span", "prefix", "toy"), ("span", "qlora", "toy")],
)  # fmt: skip
def test_other_methods_train_and_come_back(head, peft, family, request, tmp_path):
    trainer, _, loaded, _ = classify(tmp_path, head, request.getfixturevalue(family), "--peft", peft)
    ids = torch.tensor([[5, 6, 7, 8, 40, 41, 42]])
    again, _ = load_checkpoint(tmp_path / "out", dtype=loaded.model.dtype, head=head, load_in_4bit=peft == "qlora")
    torch.testing.assert_close(outputs(again, ids).float(), outputs(trainer.model, ids).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["token", "span"])
@pytest.mark.parametrize("peft", ["prompt", "ptuning"])
def test_virtual_tokens_in_front_do_not_fit_scores_of_tokens(head, peft, toy_bert, tmp_path):
    with pytest.raises(InputError, match=f"--peft {peft} does not fit --head {head}"):
        classify(tmp_path, head, toy_bert, "--peft", peft)


def test_prefix_reaches_an_encoder(toy_bert, tmp_path):
    trainer, *_ = classify(tmp_path, "sequence", toy_bert, "--peft", "prefix", "--learning_rate", 0.05)
    ids = torch.tensor([[5, 6, 7, 8, 40, 41, 42]])
    with_prefix = outputs(trainer.model, ids)
    without = outputs(trainer.model.get_base_model(), ids)
    assert not torch.allclose(with_prefix, without, atol=1e-4)


def test_classifier_goes_on_from_full_weights_and_adapter(toy_bert, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    classify(first, "sequence", toy_bert, "--peft", "lora")
    _, _, loaded, _ = classify(second, "sequence", first / "out", "--max_steps", 1)
    assert loaded.method == "lora" and "continuing the lora adapter" in results(second / "out")[1]
    named = write(tmp_path / "named.jsonl", [row | {"label": "xyz"[i % 3]} for i, row in enumerate(sentences())])
    flags = ("--data", named, "--output_dir", tmp_path / "third", "--peft", "none", "--learning_rate", 1e-4)
    trainer, *_ = launch("classify", "--model_name_or_path", first / "out", *flags, *SHORT, *SMALL)
    assert trainer.model.config.num_labels == 3  # another number of classes: a new head
    with pytest.raises(InputError, match="tells x, y, z apart, and the rows a, b, c"):
        other = write(tmp_path / "abc.jsonl", [row | {"label": "abc"[i % 3]} for i, row in enumerate(sentences())])
        words = ("--model_name_or_path", tmp_path / "third", "--data", other, "--output_dir", tmp_path / "fourth")
        launch("classify", *words, *SHORT, *SMALL)


def batch_loss(folder, toy, accumulate, size, head="sequence"):
    """The weights after one update of eight rows."""
    folder.mkdir()
    flags = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulate, "--max_steps", 1)
    flags += ("--train_sampling_strategy", "sequential", "--learning_rate", 1e-3, "--eval_strategy", "no")
    flags += ("--eval_on_start", "false", "--optim", "sgd", "--max_grad_norm", 1e9)
    file = write(folder / "rows.jsonl", ROWS[head]()[:8])
    words = ("--model_name_or_path", toy, "--data", file, "--head", head, "--test_size", 0)
    trainer, *_ = launch("classify", *words, "--output_dir", folder / "out", "--save_strategy", "no", *flags)
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("head", ["sequence", "token", "span"])
def test_accumulation_changes_nothing(head, toy, tmp_path):
    one = batch_loss(tmp_path / "one", toy, 1, 8, head)
    four = batch_loss(tmp_path / "four", toy, 4, 2, head)
    assert all(torch.allclose(one[key], four[key], atol=1e-6) for key in one)


def test_losses_are_the_textbook_ones():
    trainer = object.__new__(ClassificationTrainer)
    trainer.args = ClassifyConfig("unused", use_cpu=True)
    logits = torch.tensor([[2.0, 0.0], [0.5, 1.5]])
    trainer.labels = Labels("sequence", ["a", "b"])
    by_hand = -(logits.log_softmax(-1)[0, 0] + logits.log_softmax(-1)[1, 1]) / 2
    torch.testing.assert_close(trainer.loss({"logits": logits}, torch.tensor([0, 1])), by_hand)
    tokens = torch.stack([logits, logits])
    targets = torch.tensor([[0, -100], [-100, 1]])
    trainer.labels = Labels("token", ["a", "b"])
    torch.testing.assert_close(trainer.loss({"logits": tokens}, targets), by_hand)
    trainer.labels = Labels("sequence", [])
    loss = trainer.loss({"logits": torch.tensor([[1.0], [3.0]])}, torch.tensor([2.0, 3.5]))
    torch.testing.assert_close(loss, torch.tensor((1 + 0.25) / 2))


def test_a_bare_trainer_learns_the_same(toy_bert, tmp_path):
    """Same rows, seed and order: transformers' own loss, collator and padding give the same weights."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    calm = shutil.copytree(toy_bert, tmp_path / "calm")  # without dropout
    config = json.loads((calm / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (calm / "config.json").write_text(json.dumps(config))
    rows = [row | {"sentence": row["sentence"] + " Yes." * (i % 7)} for i, row in enumerate(sentences(20))]
    file = write(tmp_path / "s.jsonl", rows)
    flags = ("--data", file, "--model_name_or_path", calm, "--output_dir", tmp_path / "out", "--test_size", 0)
    flags += ("--learning_rate", 1e-3, "--warmup_steps", 0, "--max_steps", 6)
    trainer, _, loaded, rows = launch("classify", *flags, "--save_strategy", "no", "--per_device_train_batch_size", 4)

    set_seed(42)
    model = AutoModelForSequenceClassification.from_pretrained(calm, num_labels=2)
    columns = [name for name in ("input_ids", "token_type_ids", "labels") if name in rows.train.column_names]
    settings = TrainingArguments(
        tmp_path / "bare", learning_rate=1e-3, max_steps=6, seed=42, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    collator = DataCollatorWithPadding(loaded.tokenizer)
    bare = Trainer(model, settings, collator, rows.train.select_columns(columns))
    bare.train()
    ours, theirs = trainer.model.state_dict(), bare.model.state_dict()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in theirs)
    assert trainer.token_count.padding < 0.1  # of random batches padded to their longest row it is more than 0.2


@pytest.mark.parametrize("family", ["toy", "toy_bert"])
def test_scores_do_not_depend_on_the_batch(family, request):
    from datasets import Dataset

    set_seed(0)
    folder = request.getfixturevalue(family)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    tokenizer = load_tokenizer(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    rng = np.random.default_rng(0)
    rows = Dataset.from_dict({"input_ids": [rng.integers(5, 99, n).tolist() for n in (3, 17, 5, 9, 4, 30)]})
    tokenizer.padding_side = "left"  # must not matter
    found = [predict(model, tokenizer, rows, process_state(), batch_size=size) for size in (1, 2, 6)]
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)


def test_pairs_of_a_decoder_are_parted_by_a_line_break(toy, tmp_path):
    file = write(tmp_path / "p.jsonl", [{"premise": "a b", "hypothesis": f"c {i}", "label": i % 2} for i in range(12)])
    flags = ("--data", file, "--output_dir", tmp_path / "out", "--model_name_or_path", toy)
    *_, rows = launch("classify", *flags, *SHORT, *SMALL)
    text = rows.encoder.tokenizer.decode(rows.train[0]["input_ids"])
    assert text.startswith("a b\nc ")


def test_numbers_are_a_regression(toy_bert, tmp_path):
    lines = ["text,label", *(f"number {i},{i / 4}" for i in range(20))]  # a csv has only text
    (tmp_path / "r.csv").write_text("\n".join(lines) + "\n")
    flags = ("--data", tmp_path / "r.csv", "--output_dir", tmp_path / "out", "--model_name_or_path", toy_bert)
    trainer, *_ = launch("classify", *flags, *SHORT, *SMALL)
    record, said = results(tmp_path / "out")
    assert trainer.model.config.num_labels == 1 and "a regression" in said
    assert {"pearsonr", "spearmanr"} <= record["metrics"]["after"].keys()


def test_names_of_labels():
    notes = []
    assert find_names(["b", "a"], None, "sequence", notes) == ["a", "b"]
    assert find_names(["10", "2", "1"], None, "sequence", notes) == ["1", "2", "10"]
    assert find_names([3, 1, 5], None, "sequence", notes) == ["1", "3", "5"]
    assert find_names(["B-X", "O", "I-X"], None, "token", notes) == ["O", "B-X", "I-X"]
    assert find_names([0, 1], ["bad", "good"], "sequence", notes) == ["bad", "good"]
    assert find_names([0.5, 1.0], None, "sequence", notes) == [] and len(notes) == 1
    labels = Labels("sequence", ["1", "3", "5"])
    assert [labels.number(value) for value in (1, 3, 5)] == [0, 1, 2]
    assert Labels("sequence", ["bad", "good"]).number(1) == 1
    with pytest.raises(InputError, match="did you mean good"):
        find_names(["goood"], ["bad", "good"], "sequence", notes)


def test_what_is_said_of_the_labels(toy_bert, tmp_path):
    labels = Labels("sequence", ["a", "b", "c"])
    found = label_findings([0, 0, 1], [0, 2], labels)
    assert [level for level, *_ in found] == ["fact", "fact", "warning"]
    assert "a 2 (67%)" in found[0][1] and "right in 50.0%" in found[1][1] and "c (1)" in found[2][1]
    train, test = sentences(12), [row | {"label": 2} for row in sentences(4)]
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl", train), write(folder / "test.jsonl", test)
    flags = ("--data", folder, "--output_dir", tmp_path / "out", "--model_name_or_path", toy_bert)
    launch("classify", *flags, *SHORT[:-2], *SMALL)
    said = results(tmp_path / "out")[1]
    assert (
        "labels of held-out rows that no training row has: 2 (4)" in said
        and "before training: loss of the first batch" in said
    )


def test_books_add_up_when_rows_are_cut_and_dropped(toy_bert, tmp_path):
    rows = sentences(20)
    rows[3] = {"sentence": "long " * 200, "label": 0}
    rows[5] = {"sentence": "", "label": 1}
    file = write(tmp_path / "s.jsonl", rows)
    flags = ("--data", file, "--output_dir", tmp_path / "out", "--model_name_or_path", toy_bert)
    *_, made = launch("classify", *flags, *SHORT[:-2], "--test_size", 0, *SMALL, "--on_bad_row", "drop")
    account = made.ledger.accounts["s.jsonl"]
    assert account.read == 20 and account.kept["train"] == 19
    assert sum(n for n, _ in account.dropped.values()) == 1 and sum(n for n, _ in account.cut.values()) == 1
    assert max(made.train["length"]) == 64


@pytest.mark.parametrize(
    ("head", "change", "said"),
    [
        ("sequence", {"label": "one"}, ("several kinds", "str in", "int in")),
        ("sequence", {"label": None}, ("label missing",)),
        ("token", {"tags": ["O"]}, ("tags do not fit tokens", "1 for")),
        ("span", {"answers": {"text": ["Rome"], "answer_start": [1]}}, ("answer_start does not fit", "'Rome' is not")),
        ("span", {"answers": "Rome"}, ("SQuAD's form",)),
    ],
)
def test_bad_rows(head, change, said, toy_bert, tmp_path):
    rows = ROWS[head]()
    rows[2] |= change
    file = write(tmp_path / "bad.jsonl", rows)
    flags = ("--data", file, "--head", head, "--output_dir", tmp_path / "out", "--model_name_or_path", toy_bert)
    with pytest.raises(InputError) as error:
        launch("classify", *flags)
    assert all(words in str(error.value) for words in said), error.value


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--task", "colla"), "did you mean cola"),
        (("--head", "tokn"), "token"),
        (("--streaming",), "labels have to be known"),
        (("--task", "rte", "--head", "span"), "is a task on sequences"),
        (("--max_length", "4"), "a length is too small"),
        (("--label_names", "only"), "not among --label_names"),
    ],
)
def test_bad_flags(flags, said, toy_bert, tmp_path):
    file = write(tmp_path / "s.jsonl", sentences())
    with pytest.raises(InputError, match=said):
        words = ("--data", file, "--output_dir", tmp_path / "out", "--model_name_or_path", toy_bert)
        launch("classify", *words, *flags)


def test_wrong_columns_and_one_class(toy_bert, tmp_path):
    flags = ("--output_dir", tmp_path / "out", "--model_name_or_path", toy_bert)
    file = write(tmp_path / "s.jsonl", [{"sentense": "a", "label": i % 2} for i in range(9)])
    with pytest.raises(InputError) as error:
        launch("classify", "--data", file, *flags)
    assert "sentense: text" in str(error.value)
    file = write(tmp_path / "t.jsonl", [row | {"label": 1} for row in sentences()])
    with pytest.raises(InputError, match="all training rows have the label 1"):
        launch("classify", "--data", file, *flags, "--test_size", 4)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="has no rows"):
        launch("classify", "--data", tmp_path / "empty.jsonl", *flags)


def test_first_token_of_a_word_carries_its_tag():
    words = ["Ben", "Hill", "'s"]
    offsets = [(0, 0), (0, 2), (2, 3), (3, 8), (8, 9), (9, 11), (0, 0)]  # the fourth begins with the space
    assert first_tokens(words, offsets) == {1: 0, 3: 1, 5: 2}


def test_windows_hold_every_answer_and_point_at_it(toy):
    tokenizer = load_tokenizer(toy)
    reading = Reading(max_length=60, doc_stride=20)
    answered = 0
    for row in asked(20, filler=12):
        text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        found = windows(tokenizer, row["question"], row["context"], reading)
        for window in found:
            assert len(window.input_ids) <= 60
            place_answer(window, start, text)
            if window.answered:
                said = row["context"][window.starts[window.start] : window.ends[window.end]]
                assert text in said
                starts, ends = np.zeros((2, len(window.input_ids)))
                starts[window.start] = ends[window.end] = 5
                best = best_spans([(starts, ends, window.starts, window.ends)], row["context"], reading)[0]
                assert text in best["text"]
        answered += any(window.answered for window in found)
    assert answered == 20
    assert windows(tokenizer, "Why? " * 50, "context", reading) == []


def test_only_legal_spans_are_answers():
    context, starts, ends = "ab cd ef", [-1, -1, 0, 3, 6], [-1, -1, 2, 5, 8]
    first, last = np.array([9.0, 9, 2, 2, 0]), np.array([9.0, 9, 3, 1, 2])
    best = best_spans([(first, last, starts, ends)], context, Reading(10, max_answer_length=2))
    assert [answer["text"] for answer in best][:3] == ["ab", "cd ef", "cd"]  # not the question, not backwards
    assert "ab cd ef" not in [answer["text"] for answer in best]
    assert best_spans([(first, last, starts, ends)], context, Reading(10, threshold=0.0))[0]["text"] == ""
    assert best_spans([(first, last, starts, ends)], context, Reading(10, threshold=50.0))[0]["text"] == "ab"


def test_span_head_of_a_decoder_keeps_its_backbone(toy, tmp_path):
    from alignment.checkpoints import load_base

    model, new = load_base(toy, "span")
    assert new == ["qa_outputs"] and isinstance(model, type(AutoModelForQuestionAnswering.from_config(model.config)))
    causal, _ = load_base(toy)
    ours, theirs = dict(model.base_model.named_parameters()), dict(causal.base_model.named_parameters())
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_collator_pads_on_the_right():
    batch = Collator(7)([{"input_ids": [1, 2, 3], "labels": [0, -100, 1]}, {"input_ids": [4], "labels": [1]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]] and batch["attention_mask"].sum() == 4
    assert batch["labels"].tolist() == [[0, -100, 1], [1, -100, -100]]


def test_control_tokens_in_a_text_stay_text(toy, tmp_path):
    rows = [row | {"sentence": row["sentence"] + " <|im_end|>"} for row in sentences()]
    file = write(tmp_path / "s.jsonl", rows)
    *_, made = launch(
        "classify", "--data", file, "--output_dir", tmp_path / "out", "--model_name_or_path", toy, *SHORT, *SMALL
    )
    tokenizer = made.encoder.tokenizer
    assert tokenizer.eos_token_id not in made.train[0]["input_ids"]


def test_parse_takes_the_settings(tmp_path):
    args = parse(ClassifyConfig, {}, ["--head", "span", "--null_score_diff_threshold", "0", "--output_dir", "x"])
    assert args.train.head == "span" and args.train.null_score_diff_threshold == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(("head", "metric", "least"), [("token", "f1", 0.9), ("span", "exact_match", 60.0)])
def test_token_and_span_heads_learn(head, metric, least, tmp_path):
    make = {"token": tagged, "span": asked}[head]
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl", make(600, 1)), write(folder / "test.jsonl", make(60, 2))
    flags = ("--data", folder, "--head", head, "--output_dir", tmp_path / "out", "--num_train_epochs", 6)
    launch("classify", *flags)
    before, after = held_out(tmp_path / "out", metric)
    assert after > max(before, least)


def test_dry_run_looks_and_writes_nothing(toy_bert, tmp_path, capsys):
    file = write(tmp_path / "s.jsonl", sentences())
    flags = ("--data", file, "--model_name_or_path", toy_bert, "--output_dir", tmp_path / "out", "--dry_run")
    launch("classify", *flags, "--label_names", "bad", "good")
    shown = capsys.readouterr().out
    assert (
        "before training: loss of the first batch" in shown
        and "labels: " in shown
        and " -> good" in shown
        and "Dry run" in shown
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.jsonl"]


@pytest.fixture(scope="module")
def measured(toy_bert, tmp_path_factory):
    """head -> folder with rows.jsonl, what was trained (out), and the result of eval/classify.py (result.json)."""
    made = {}
    for head in ROWS:
        folder = made[head] = tmp_path_factory.mktemp(head)
        rows = write(folder / "rows.jsonl", {"sequence": sentences, "token": tagged, "span": asked}[head](40))
        flags = ("--eval_data", rows, "--learning_rate", 1e-3, "--peft", "lora" if head == "sequence" else "none")
        classify(folder, head, toy_bert, *flags, *LEARNT[head])
        measure(folder, rows)
    return made


LEARNT = {"sequence": (), "token": ("--max_steps", 20), "span": ("--doc_stride", 4, "--max_length", 40)}


def measure(folder, rows, *words, output="result.json"):
    """Run eval/classify.py on the checkpoint of a folder."""
    model = () if "--model" in words else ("--model", folder / "out")
    script(ROOT / "eval" / "classify.py", *model, "--data", rows, "--output", folder / output, "--use_cpu", *words)
    return json.loads((folder / output).read_text())


@pytest.mark.parametrize("head", ROWS)
def test_script_finds_what_the_run_found(head, measured):
    result = json.loads((measured[head] / "result.json").read_text())
    run = results(measured[head] / "out")[0]["metrics"]["after"]
    names = {"sequence": ("accuracy", "f1_macro"), "token": ("f1", "precision", "recall", "accuracy")}
    scale = 100 if head == "span" else 1  # SQuAD's script gives per cent
    for name in names.get(head, ("exact_match", "f1")):
        assert scale * result["metrics"][name]["value"] == pytest.approx(run[name]), name
    assert len(result["rows"]) == 40 and len({row["id"] for row in result["rows"]}) == 40
    again = measure(measured[head], measured[head] / "rows.jsonl", "--batch_size", 3, output="small.json")
    assert [row["prediction"] for row in again["rows"]] == [row["prediction"] for row in result["rows"]]
    assert result["contamination"]["read"], "it looked at what the checkpoint was trained on"


def test_script_says_what_it_was_given(measured, toy, toy_bert, tmp_path, capsys):
    folder = measured["sequence"]
    named = write(tmp_path / "named.jsonl", [row | {"label": ("0", "2")[row["label"]]} for row in sentences(8)])
    result = measure(folder, named, "--max_length", 8, output="named.json")
    shown = capsys.readouterr().out
    assert "no output for count as wrong: 2 (4)" in shown and "cut to its max_length" in shown
    assert sum(row["score"] for row in result["rows"]) <= 4
    other = write(tmp_path / "other.jsonl", [row | {"label": "xy"[row["label"]]} for row in sentences(8)])
    with pytest.raises(InputError, match="no label of the rows is one of out's"):
        measure(folder, other, output="x.json")
    with pytest.raises(InputError, match="is no classifier"):
        measure(folder, other, "--model", toy, output="x.json")
    with pytest.raises(InputError, match="answer different questions"):
        measure(folder, other, "--model", f"a={folder}/out", f"b={measured['token']}/out", output="both")


def test_script_measures_a_regression(toy_bert, tmp_path):
    rows = [row | {"label": 0.25 + row["label"] * 2} for row in sentences()]
    file = write(tmp_path / "rows.jsonl", rows)
    flags = ("--data", file, "--eval_data", file, "--output_dir", tmp_path / "out", *SHORT, *SMALL)
    launch("classify", "--model_name_or_path", toy_bert, *flags)
    result = measure(tmp_path, file)
    run = results(tmp_path / "out")[0]["metrics"]["after"]
    assert result["metrics"]["pearsonr"]["value"] == pytest.approx(run["pearsonr"], abs=1e-3)
    assert all(row["score"] == pytest.approx(-((row["prediction"] - row["answer"]) ** 2)) for row in result["rows"])


@pytest.mark.slow
def test_default_learns(tmp_path):
    launch("classify", "--output_dir", tmp_path / "out")
    before, after = held_out(tmp_path / "out", "accuracy")
    assert before < 0.7 and after > 0.95


def test_score_of_spans_takes_the_best_window():
    from datasets import Dataset

    row = {"id": "q", "context": "ab cd", "answers": ["cd"]}
    rows = Dataset.from_list([row | {"starts": [-1, 0], "ends": [-1, 2]}, row | {"starts": [-1, 3], "ends": [-1, 5]}])
    scores = np.array([[0.0, 1.0, -100], [0.0, 3.0, -100]])
    assert score_spans(scores, scores, rows, Reading(10)) == {"exact_match": 100.0, "f1": 100.0}
    assert Counter(rows["id"]) == {"q": 2} and ROOT.is_dir()
