"""Train and ask classifiers: settings, trainer and metrics of `recipes/classify.py`, predictions for `eval/`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal

import numpy as np
import peft
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn import functional
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.modeling_outputs import ModelOutput

from alignment.batching import TokenCount, narrow
from alignment.classifying import TARGETS, Collator
from alignment.errors import InputError
from alignment.labels import Labels
from alignment.metrics import metric
from alignment.spans import Reading, best_spans
from alignment.trainers import Frugal


@dataclass
class ClassifyConfig(TrainingArguments):
    """Settings of `ClassificationTrainer`: those of transformers' Trainer, the head, and how long a row may be."""

    head: Literal["sequence", "token", "span"] = field(
        default="sequence", metadata={"help": "Label a text or pair, each of its words, or find an answer in it."}
    )
    task: str | None = field(
        default=None, metadata={"help": "A GLUE task: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli."}
    )
    label_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes, in the order of their numbers in the rows."}
    )
    max_length: int = field(default=256, metadata={"help": "Tokens of a row, or of a window of its context."})
    doc_stride: int = field(default=64, metadata={"help": "Tokens that two windows of a context share."})
    max_answer_length: int = field(default=30, metadata={"help": "Tokens of an answer in a context."})
    n_best_size: int = field(default=20, metadata={"help": "Starts and ends of answers that are looked at."})
    null_score_diff_threshold: float | None = field(
        default=None, metadata={"help": "SQuAD 2.0: how much better than an answer no answer has to be; 0 to begin."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self):
        super().__post_init__()
        if self.max_length < 8 or min(self.doc_stride, self.max_answer_length, self.n_best_size) < 1:
            raise InputError(
                "a length is too small",
                where="--max_length, --doc_stride, --max_answer_length, --n_best_size",
                fix="--max_length of 8 or more, the others of 1 or more",
            )


class ClassificationTrainer(Frugal, Trainer):
    """transformers' Trainer on the rows of `alignment.classifying.encode`, with the metrics of their labels.

    The loss is the cross-entropy over rows or scored tokens, the squared error of a regression, or the mean of both
    ends of a span; divided by the rows (or tokens) of the whole update, so that accumulation changes nothing.
    """

    def __init__(
        self,
        model: Any,
        args: ClassifyConfig,
        labels: Labels,
        peft_config: peft.PeftConfig | None = None,
        **kwargs: Any,
    ):
        if peft_config is not None:
            model = peft.get_peft_model(model, peft_config)
        if args.gradient_checkpointing and isinstance(model, peft.PeftModel):
            model.enable_input_require_grads()
        args.label_names, names = list(TARGETS[labels.head]), args.label_names
        self.labels = labels
        tokenizer = kwargs["processing_class"]
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(tokenizer.pad_token_id),
            compute_metrics=self.score,
            preprocess_logits_for_metrics=reduce_logits if labels.head == "token" else None,
            compute_loss_func=None if labels.head == "span" else self.loss,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        self.notes, self.token_count = [], TokenCount()
        self.narrows = labels.head != "span"  # whose scores are weighed against those of the padding, too
        if self.narrows:
            self.model.forward = narrowed(self.model.forward, self._count)
        args.label_names = names

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Return the loss of a batch, as a mean over its items, or over those of the whole update."""
        logits = outputs["logits"].float()
        if self.labels.regression:
            losses = functional.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
            items = labels.numel()
        else:
            labels = labels.view(-1)
            smooth = self.args.label_smoothing_factor
            losses = functional.cross_entropy(
                logits.view(len(labels), -1), labels, reduction="sum", label_smoothing=smooth
            )
            items = (labels != -100).sum()
        return losses / (items if num_items_in_batch is None else num_items_in_batch)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one forward and backward pass, and count the tokens it computes."""
        if not self.narrows:
            self.token_count.add(inputs["attention_mask"].sum(), inputs["attention_mask"].numel())
        return super().training_step(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save as transformers does; beside an adapter also the configuration, which names the head's outputs."""
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, peft.PeftModel):
            model.get_base_model().config.save_pretrained(output_dir or self.args.output_dir)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> SequentialSampler:
        return SequentialSampler(eval_dataset)  # sorted by length already, and the scores are read in this order

    def score(self, found: EvalPrediction) -> dict[str, float]:
        """Return the metrics of the held-out rows."""
        if self.labels.head == "token":
            return score_tokens(found.predictions, found.label_ids, self.labels)
        if self.labels.head == "span":
            return score_spans(*found.predictions[:2], self.eval_dataset, reading_from(self.args))
        scores = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
        return score_sequences(scores, found.label_ids, self.labels)


def narrowed(forward: Callable, count: Callable[[int, int], None]) -> Callable:
    """Wrap a classifier's forward so that a batch runs as up to four narrower ones, with the same scores.

    Batches stay random, as a bare Trainer's are. To put rows of like lengths into one batch is as cheap, but a batch of
    short rows is no sample of all rows: one run on CoLA ended at a Matthews correlation of .227 in place of .291.
    """
    parted = narrow(lambda use_cache, **inputs: forward(**inputs), count, parts=4)

    @wraps(forward)
    def run(*args: Any, **inputs: Any) -> ModelOutput:
        return forward(*args, **inputs) if args else parted(use_cache=False, **inputs)

    return run


def reduce_logits(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return the best class of each token: (rows, tokens), and not its scores, of which there may be very many."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def reading_from(args: ClassifyConfig) -> Reading:
    """Return how answers are chosen, from the trainer's settings."""
    return Reading(
        args.max_length, args.doc_stride, args.max_answer_length, args.n_best_size, args.null_score_diff_threshold
    )


def score_sequences(scores: np.ndarray, truth: np.ndarray, labels: Labels) -> dict[str, float]:
    """Return the task's official metrics, or accuracy and F1 (the mean over classes) of other rows.

    Args:
        scores: (rows, classes), or (rows, 1) of a regression.
        truth: (rows,) classes or numbers.
        labels: what they mean.
    """
    if labels.regression:
        return metric("glue", "stsb").compute(predictions=scores.reshape(-1), references=truth)
    best = scores.argmax(-1)
    found = metric("accuracy").compute(predictions=best, references=truth)
    if labels.task is not None:
        return metric("glue", labels.task.name).compute(predictions=best, references=truth) | found
    return found | {"f1_macro": metric("f1").compute(predictions=best, references=truth, average="macro")["f1"]}


def score_tokens(best: np.ndarray, truth: np.ndarray, labels: Labels) -> dict[str, float]:
    """Return F1, precision and recall of spans where the labels are BIO tags, and the accuracy of the tags.

    Args:
        best: (rows, tokens), the classes found.
        truth: (rows, tokens), the classes wanted; -100 where nothing is scored.
        labels: what they mean.
    """
    sides = [
        [[labels.names[k] for k in row[kept]] for row, kept in zip(side, truth != -100, strict=True)]
        for side in (best, truth)
    ]
    found = metric("seqeval").compute(predictions=sides[0], references=sides[1])
    found = {name.removeprefix("overall_"): value for name, value in found.items()}
    return found if labels.tags else {"accuracy": found["accuracy"]}


def score_spans(starts: np.ndarray, ends: np.ndarray, rows: Dataset, reading: Reading) -> dict[str, float]:
    """Return exact match and F1 in per cent over the questions of a set of windows.

    Args:
        starts: (windows, tokens), scores of the first token.
        ends: (windows, tokens), scores of the last one.
        rows: the windows, in this order, as `encode` made them.
        reading: how answers are chosen.
    """
    by_question: dict[str, list] = {}
    gold, contexts = {}, {}
    columns = [rows[name] for name in ("id", "context", "answers", "starts", "ends")]
    for i, (name, context, answers, first, last) in enumerate(zip(*columns, strict=True)):
        by_question.setdefault(name, []).append((starts[i], ends[i], first, last))
        gold[name], contexts[name] = answers, context
    made = [
        {"id": name, "prediction_text": best_spans(scored, contexts[name], reading)[0]["text"]}
        for name, scored in by_question.items()
    ]
    wanted = [
        {"id": name, "answers": {"text": gold[name], "answer_start": [0] * len(gold[name])}} for name in by_question
    ]
    return metric("squad").compute(predictions=made, references=wanted)


def predict(
    model: PreTrainedModel | peft.PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    state: PartialState,
    batch_size: int = 64,
    label: str = "",
) -> np.ndarray:
    """Return the scores (rows, outputs) of encoded rows in their order, each process doing its share.

    Args:
        model: a model with a sequence head.
        tokenizer: its tokenizer.
        rows: with "input_ids" (and "token_type_ids"), as `encode` makes them.
        state: which of the processes this is.
        batch_size: rows at a time; changes the speed only.
        label: what the progress bar says.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])[state.process_index :: state.num_processes]
    found: dict[int, list[float]] = {}
    whole = sum(lengths[i] for i in order)
    with tqdm(total=whole, desc=label, unit="token", unit_scale=True, leave=False, disable=None) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            scores = scores_of(model, tokenizer, [rows[i] for i in chosen])
            found |= {i: values.tolist() for i, values in zip(chosen, scores, strict=True)}
            bar.update(sum(lengths[i] for i in chosen))
    everyone = dict(gather_object(list(found.items())))
    return np.array([everyone[i] for i in range(len(lengths))], dtype=np.float64)


@torch.inference_mode()
def scores_of(
    model: PreTrainedModel | peft.PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]
) -> list[np.ndarray]:
    """Return the scores of one batch of encoded rows, for each row (outputs,), (tokens, outputs) or, of both ends of a
    span, (2, tokens).

    Args:
        model: with a sequence, token or span head.
        tokenizer: its tokenizer.
        rows: with "input_ids" (and "token_type_ids"), as `encode` makes them.
    """
    names = [name for name in ("input_ids", "token_type_ids") if name in rows[0]]
    batch = Collator(tokenizer.pad_token_id)([{name: row[name] for name in names} for row in rows])
    out = model(**{name: value.to(model.device) for name, value in batch.items()})
    scores = torch.stack([out["start_logits"], out["end_logits"]], 1) if "start_logits" in out else out["logits"]
    made = scores.float().cpu().numpy()
    if made.ndim == 2:
        return list(made)
    sizes = [len(row["input_ids"]) for row in rows]
    return [row[:, :n] if "start_logits" in out else row[:n] for row, n in zip(made, sizes, strict=True)]
