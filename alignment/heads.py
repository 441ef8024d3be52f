"""Heads on a backbone: language model, or scores for a sequence, its tokens or a span of it; their names on disk."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from alignment.errors import InputError
from alignment.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_model, fetch, is_adapter

MAPPINGS = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING,
    "sequence": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "token": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "span": MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}
TASK_TYPES = {"causal": "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}
ENDINGS = {
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
# What a new head is called in the models of transformers; these weights are drawn anew in every run.
NEW_HEADS = ("score", "classifier", "qa_outputs", "pooler", "pre_classifier")


def class_for(config: PretrainedConfig, head: str, trusted: bool) -> type:
    """Return the model class of this configuration (a class of its own code when that is trusted).

    Raises:
        InputError: transformers has no such head for this family.
    """
    mapping = MAPPINGS[head]
    if type(config) in mapping:
        found = mapping[type(config)]
        return found[0] if isinstance(found, tuple) else found
    if trusted:
        import transformers

        return getattr(transformers, f"AutoModel{ENDINGS.get(head, 'ForCausalLM')}")
    raise InputError(
        f"transformers has no {head} head for {config.model_type}",
        where="--model_name_or_path",
        fix="take a model whose family has one (Llama, Qwen, Gemma, BERT, …)",
    )


def has_head(config: PretrainedConfig, head: str) -> bool:
    """Say whether the checkpoint of this configuration was saved with such a head."""
    return head in ENDINGS and any(name.endswith(ENDINGS[head]) for name in config.architectures or [])


def name_outputs(config: PretrainedConfig, head: str, labels: Sequence[str] | None, path: str | Path) -> None:
    """Write the outputs of a head into the configuration of its model.

    Args:
        config: of the model that is about to be loaded.
        head: "causal", "sequence", "token" or "span".
        labels: the names of the outputs; None keeps those of a head that is there, and gives a new one one output.
        path: where the model comes from.

    Raises:
        InputError: the head that is there tells as many other classes apart.
    """
    if head not in ("sequence", "token"):
        return
    if labels is None:
        if not has_head(config, head):
            config.num_labels = 1
        return
    before = [config.id2label[i] for i in sorted(config.id2label)] if has_head(config, head) else []
    plain = all(name == f"LABEL_{i}" for i, name in enumerate(before))
    if len(before) == len(labels) and before != list(labels) and not plain:
        raise InputError(
            f"the head of {path} tells {', '.join(before)} apart, and the rows {', '.join(labels)}",
            where="--model_name_or_path",
            why="it would go on with its outputs under other names",
            fix="rows with the same labels, --label_names in their order, or the model it was made from",
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}


def key_mapping(config: PretrainedConfig, head: str, trusted: bool) -> dict[str, str] | None:
    """Return how to rename the backbone's weights where a head's class calls it otherwise (Llama's span head does)."""
    if head != "span":
        return None
    prefix = class_for(config, head, trusted).base_model_prefix
    causal = MAPPINGS["causal"].get(type(config), None)
    if causal is None or causal.base_model_prefix == prefix:
        return None
    return {rf"^{causal.base_model_prefix}\.": f"{prefix}."}


def kind_of(config: PeftConfig) -> str:
    """Return the head an adapter was trained under."""
    return next((head for head, task in TASK_TYPES.items() if task == config.task_type), "causal")


def adapter_config(path: str | Path) -> PeftConfig:
    """Return the configuration of an adapter folder; raises InputError when it cannot be read."""
    if not (Path(path) / ADAPTER_WEIGHTS).is_file():
        raise InputError(
            f"no {ADAPTER_WEIGHTS} in {path}",
            where=str(path),
            why="there is a configuration without weights (or only a pickle, which is not read)",
            fix="save the adapter again with save_pretrained()",
        )
    try:
        return PeftConfig.from_pretrained(str(path))
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{Path(path) / ADAPTER_CONFIG} cannot be read: {error}", where=str(path)) from error


def head_of(path: str | Path) -> str:
    """Return the head a checkpoint was saved with: "causal" for a language model, "sequence", "token" or "span"."""
    path = fetch(path)
    if is_adapter(path):
        return kind_of(adapter_config(path))
    check_model(path)
    names = PretrainedConfig.get_config_dict(str(path))[0].get("architectures") or []
    return next((head for head, end in ENDINGS.items() if any(name.endswith(end) for name in names)), "causal")


def saved_labels(path: str | Path) -> list[str] | None:
    """Return the names of the outputs an adapter was trained with; None where it kept none (a reward model's)."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    names = json.loads(file.read_text(encoding="utf-8")).get("id2label") or {}
    return [names[key] for key in sorted(names, key=int)] or None


def prepare_head(model: PreTrainedModel) -> None:
    """Make a new head work on quantised bases and on prompts given as embeddings."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and {*name.split(".")} & {*NEW_HEADS}:
            layer.float()
            layer.register_forward_pre_hook(to_weight)
    if "score" in dict(model.named_children()):
        model.register_forward_pre_hook(_pad_left, with_kwargs=True)


def to_weight(layer: torch.nn.Module, inputs: tuple) -> tuple:
    """Hand a layer its input in the type of its weights."""
    return (inputs[0].to(layer.weight.dtype), *inputs[1:])


def _pad_left(model: PreTrainedModel, args: tuple, kwargs: dict):
    """Move padding to the left of rows that come as embeddings, whose score is read at the last place.

    Prompt and p-tuning hand embeddings, among which padding cannot be told from text: the score of a
    padded row would be read at its padding and depend on the other rows of the batch.
    """
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    if embeds is None or mask is None or mask.ndim != 2 or mask.shape[1] != embeds.shape[1]:
        return args, kwargs
    # stable sort: padding (0) first, the rest in its order
    order = mask.long().argsort(dim=1, stable=True)
    kwargs["inputs_embeds"] = embeds.gather(1, order.unsqueeze(-1).expand_as(embeds))
    kwargs["attention_mask"] = mask.gather(1, order)
    kwargs["position_ids"] = (kwargs["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
    return args, kwargs
