"""Adapters for a model at hand: PEFT's configuration, quantisation, limits in plain words, and a good start."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignment import targets
from alignment.errors import InputError
from alignment.methods import (
    LORA_FLAGS,
    NAMES,
    PROMPT_LEARNING,
    all_names,
    default_learning_rate,
    did_you_mean,
    explicit,
    family,
    lora_flags,
    method,
    name_of,
    resolve,
)

if TYPE_CHECKING:
    from alignment.config import Arguments

__all__ = [
    "NAMES",
    "all_names",
    "default_learning_rate",
    "explicit",
    "family",
    "lora_flags",
    "name_of",
    "resolve",
]
# Set by us or by PEFT itself; a value from the command line would contradict the recipe.
_RESERVED = {
    "peft_type", "task_type", "inference_mode", "base_model_name_or_path", "auto_mapping", "peft_version"
}  # fmt: skip
# These name their own layers (norms, biases, embeddings): "all-linear" would be another method.
_OWN_TARGETS = {
    "ia3",
    "ln_tuning",
    "beft",
    "trainable_tokens",
    "adaption_prompt",
    "xlora",
    "shadow",
    "osf",
    "poly",
}


@dataclass(frozen=True)
class Limit:
    """Something a method cannot do or does differently; a refusal when nothing sensible can be run."""

    text: str
    refuse: bool = False
    fix: str = ""


def quantization(args: Arguments, name: str) -> BitsAndBytesConfig | None:
    """Return how the base is quantised: NF4 with double quantisation for qlora, as the flags say otherwise."""
    model = args.model
    if model.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if name != "qlora" and not model.load_in_4bit:
        return None
    nested = model.use_bnb_nested_quant if explicit(args, "use_bnb_nested_quant") else True
    return nf4(model.bnb_4bit_quant_type, nested, model.bnb_4bit_quant_storage)


def nf4(kind: str = "nf4", nested: bool = True, storage: str | None = None) -> BitsAndBytesConfig:
    """Return QLoRA's quantisation (Dettmers et al. 2023): 4-bit normal floats, scales quantised once more."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=compute_dtype(),
        bnb_4bit_quant_storage=storage,
    )


def compute_dtype() -> torch.dtype:
    """Return bfloat16 where the hardware has it (every CPU PyTorch supports, GPUs from Ampere on), else float32."""
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return torch.bfloat16


def peft_config(
    args: Arguments, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: str
) -> tuple[peft.PeftConfig | None, list[str]]:
    """Return the configuration of an adapter for this model, and what was decided for the user.

    Args:
        args: the parsed arguments; `peft_args` and the LoRA flags the user set win over our values.
        name: the method, as `resolve` returned it.
        model: the model it goes onto, loaded; its layers decide the targets.
        head: "causal" or "sequence".
        tokenizer: tells which control tokens the chat template writes.

    Raises:
        InputError: an argument that the method does not have, or a value that it refuses.
    """
    if name == "none":
        return None, []
    chosen, notes = method(name), []
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(chosen.peft_type)]
    known = {f.name for f in dataclasses.fields(config_class) if f.init}
    user = {LORA_FLAGS[flag]: vars(args.model)[flag] for flag in lora_flags(args)}
    user |= _checked(args.peft.peft_args, known, name)
    values = chosen.values | _from_model(name, model, known)
    if head == "sequence" and "modules_to_save" in known:
        values["modules_to_save"] = targets.head_modules(model)
    rows = targets.untrained_tokens(model, tokenizer) if head == "causal" else []
    if rows and chosen.peft_type == "LORA" and "trainable_token_indices" not in user:
        values["trainable_token_indices"] = _token_layers(model, rows)
        tokens = ", ".join(tokenizer.convert_ids_to_tokens(rows))
        notes.append(f"the rows of {tokens} were never trained in this base: trained beside the adapter")
    elif rows:
        notes.append(
            f"the base never trained the rows of {tokenizer.convert_ids_to_tokens(rows)}; {name} cannot either"
        )
    values = _adalora_steps(args, values) if name == "adalora" else values
    task = {"causal": "CAUSAL_LM", "sequence": "SEQ_CLS"}[head]
    try:
        return config_class(task_type=task, **(values | user)), notes
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} refuses these values: {error}", where="--peft_args") from error


def _checked(given: dict[str, Any], known: set[str], name: str) -> dict[str, Any]:
    """Return the user's `peft_args` when the method has each of them; raises InputError with the nearest name."""
    allowed = sorted(known - _RESERVED)
    for key in given:
        if key not in allowed:
            raise InputError(
                f"{name} has no argument {key!r}",
                where="--peft_args",
                why="the recipe sets it" if key in _RESERVED else "",
                fix=did_you_mean(key, allowed) or f"one of {', '.join(allowed)}",
            )
    return dict(given)


def _from_model(name: str, model: PreTrainedModel, known: set[str]) -> dict[str, Any]:
    """Return the values that depend on the model: target layers, widths, parts to leave alone."""
    values: dict[str, Any] = {}
    if name == "ia3":
        values["target_modules"], values["feedforward_modules"] = targets.attention_and_feedforward(model)
    elif "target_modules" in known and name not in _OWN_TARGETS:
        values["target_modules"] = "all-linear"
    if name in ("prefix", "ptuning"):
        values["encoder_hidden_size"] = model.config.get_text_config().hidden_size
    if "exclude_modules" in known and targets.has_vision(model):
        values["exclude_modules"] = targets.NOT_TEXT
    return values


def _token_layers(model: PreTrainedModel, rows: list[int]) -> dict[str, list[int]]:
    """Return the layers whose rows to train: the input embedding, and the output head when it is not the same."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = {names[id(embedding)].split(".")[-1]: rows}
    if head is not None and head.weight is not embedding.weight:
        layers[names[id(head)].split(".")[-1]] = rows
    return layers


def _adalora_steps(args: Arguments, values: dict[str, Any]) -> dict[str, Any]:
    """Return AdaLoRA's values with a schedule; `finish` replaces the total by the trainer's."""
    return values | {"total_step": max(args.train.max_steps, 1_000)}


def limits(name: str, recipe: str, train_args: Any) -> list[Limit]:
    """Return what this method cannot do, or does differently, in this recipe."""
    found = []
    fields = vars(train_args)
    if name in ("prefix", "cartridge") and fields.get("gradient_checkpointing"):
        text = f"{name} tuning does not work with gradient checkpointing: the prefix lives in the key-value cache"
        found.append(Limit(text, True, "--gradient_checkpointing false"))
    if name in PROMPT_LEARNING:
        for key in ("packing", "padding_free"):
            if fields.get(key):
                text = f"{key} does not work with {name}: packed rows would see each other"
                found.append(Limit(text, True, f"--{key} false"))
        if recipe in ("dpo", "kto"):
            text = f"{name}: the untrained virtual tokens move the policy at once, so the loss does not start at its "
            found.append(Limit(text + ("ln 2" if recipe == "dpo" else "usual 0.5")))
    if name == "prompt":
        found.append(
            Limit("prompt tuning learns slowly below about a billion parameters: prefix or lora learn more")
        )
    return found


def apply_defaults(args: Arguments, name: str, model: PreTrainedModel) -> list[str]:
    """Adjust `args.train` to the method where the user left it open, and return what was changed, in words.

    A learning rate of the recipe belongs to the recipe's own model and method: it is replaced when the user chose
    either and set no rate.

    Raises:
        InputError: the user asked for something that the method cannot do.
    """
    notes = []
    train = args.train
    for limit in limits(name, args.recipe, train):
        key = limit.fix.removeprefix("--").split(" ")[0]
        if not limit.refuse:
            notes.append(limit.text)
        elif explicit(args, key):
            raise InputError(limit.text, where=f"--{key}", fix=limit.fix)
        else:
            setattr(train, key, False)
            args.sources[key] = f"adapter {name}"
            notes.append(f"{limit.text}; switched off")
    chosen = explicit(args, "peft") or explicit(args, "model_name_or_path") or explicit(args, "load_in_4bit")
    if chosen and not explicit(args, "learning_rate"):
        train.learning_rate = default_learning_rate(
            name, model.config.get_text_config().hidden_size, args.recipe
        )
        args.sources["learning_rate"] = f"adapter {name}"
        notes.append(
            f"learning rate {train.learning_rate:g}, a first value for {name} on a model of this width"
        )
    return notes
