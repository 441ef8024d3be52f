"""Adapters for a model at hand: PEFT's configuration, quantisation, limits in plain words."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_fsdp_enabled

from alignment import targets
from alignment.config import beside_recipe
from alignment.errors import InputError
from alignment.heads import TASK_TYPES
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
    method_of,
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
# One switch under two names since transformers 5.23; trainers read either.
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
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

# A size of 256 in PEFT that must divide the width of every layer.
_DIVIDES_WIDTHS = {"c3a": "block_size", "vblora": "vector_length"}


@dataclass(frozen=True)
class Limit:
    """Something a method cannot do or does differently; a refusal when nothing sensible can be run."""

    text: str
    refuse: bool = False
    switch: str = ""  # the argument to switch off


def quantization(args: Arguments, name: str) -> BitsAndBytesConfig | None:
    """Return how the base is quantised: NF4 with double quantisation for qlora, else as the flags say."""
    model = args.model
    if model.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if name != "qlora" and not model.load_in_4bit:
        return None
    nested = model.use_bnb_nested_quant if explicit(args, "use_bnb_nested_quant") else True
    # FSDP divides 4-bit numbers only when they are stored in the type of the other weights
    storage = model.bnb_4bit_quant_storage or ("bfloat16" if is_fsdp_enabled() else None)
    return nf4(model.bnb_4bit_quant_type, nested, storage)


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
    """Return bfloat16 where the hardware has it (CPUs, GPUs from Ampere on), else float32."""
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
        head: "causal", "sequence", "token" or "span".
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
    if head in ("token", "span"):
        values |= _beside_head(name, head, model, values)
    if head != "causal" and "modules_to_save" in known:
        values["modules_to_save"] = targets.head_modules(model)
    if head == "causal" and "trainable_token_indices" not in user:
        layers, notes = _untrained_rows(name, model, tokenizer)
        values |= {"trainable_token_indices": layers} if layers and "trainable_token_indices" in known else {}
    if name == "adalora":  # the true total is known to the trainer: see warmstart.RankSchedule
        values["total_step"] = max(args.train.max_steps, 1_000)
    if user.get("target_modules"):
        user["target_modules"] = targets.named(model, user["target_modules"])
    try:
        return config_class(task_type=TASK_TYPES[head], **(values | user)), notes
    except ImportError as error:  # AdaMSS wants scikit-learn, others may want more
        raise InputError(str(error), where=f"--peft {name}", fix="install it, or choose another method") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} refuses these values: {error}", where="--peft_args") from error


def _checked(given: dict[str, Any], known: set[str], name: str) -> dict[str, Any]:
    """Return the user's `peft_args`; raises InputError for one that the method does not have."""
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
    if size := _DIVIDES_WIDTHS.get(name):
        values[size] = targets.common_block(model)
    if name in ("prefix", "ptuning"):
        values["encoder_hidden_size"] = model.config.get_text_config().hidden_size
    if "exclude_modules" in known and targets.has_vision(model):
        values["exclude_modules"] = targets.NOT_TEXT
    return values


def _beside_head(name: str, head: str, model: PreTrainedModel, values: dict[str, Any]) -> dict[str, Any]:
    """Return the targets without the head, which PEFT's "all-linear" spares in a sequence classifier only.

    Raises:
        InputError: the method puts tokens into the sequence, and this head scores each token.
    """
    if name in PROMPT_LEARNING and name not in ("prefix", "cartridge"):
        raise InputError(
            f"--peft {name} does not fit --head {head}",
            where="--peft",
            why="PEFT puts virtual tokens in front of the row, where scores and positions of its tokens then are off",
            fix="--peft prefix, whose tokens stand beside the row, or lora",
        )
    if values.get("target_modules") != "all-linear":
        return {}
    return {"target_modules": targets.linear_layers(model, targets.head_modules(model))}


def _untrained_rows(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, list[int]], list[str]]:
    """Return the layers and rows of control tokens the base never trained, and what is done about them."""
    rows = targets.untrained_tokens(model, tokenizer)
    if not rows:
        return {}, []
    tokens = ", ".join(tokenizer.convert_ids_to_tokens(rows))
    if family(name) != "LORA":
        return {}, [f"the base never trained the rows of {tokens}, and {name} cannot: it may not learn to stop"]
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = {names[id(embedding)].split(".")[-1]: rows}
    if head is not None and head.weight is not embedding.weight:
        layers[names[id(head)].split(".")[-1]] = rows
    return layers, [f"the base never trained the rows of {tokens}: they are trained beside the adapter"]


def samples(train_args: Any) -> bool:
    """Say whether the trainer of these arguments samples its own answers (GRPO, RLOO, PPO)."""
    return "max_completion_length" in vars(train_args)


def limits(name: str, recipe: str, train_args: Any) -> list[Limit]:
    """Return what this method cannot do, or does differently, in this recipe."""
    found = []
    fields = vars(train_args)
    if name not in PROMPT_LEARNING:
        return found
    if name in ("prefix", "cartridge") and any(fields.get(key) for key in CHECKPOINTING):
        text = f"{name} tuning does not work with gradient checkpointing: the prefix is a key-value cache"
        found.append(Limit(text, True, "gradient_checkpointing"))
    for key in ("packing", "padding_free"):
        if fields.get(key):
            found.append(Limit(f"{key} does not work with {name}: rows would see each other", True, key))
    if recipe in ("dpo", "kto"):
        usual = "ln 2" if recipe == "dpo" else "its usual 0.5"
        found.append(Limit(f"{name}: untrained virtual tokens move the policy: the loss does not start at {usual}"))
    if name == "prompt":
        found.append(Limit("prompt tuning learns little below a billion parameters: lora or prefix learn more"))
    return found


def apply_defaults(args: Arguments, name: str, model: PreTrainedModel) -> list[str]:
    """Adjust `args.train` to the method where the user left it open, and return what was changed, in words.

    A learning rate of the recipe belongs to the recipe's own model and method: it is replaced when the
    method or the shape of the model is another one and the user set no rate. What one recipe made of that
    model the next one trains at its own rate.

    Raises:
        InputError: the user asked for something that the method cannot do.
    """
    notes = []
    for limit in limits(name, args.recipe, args.train):
        keys = [key for key in _same(limit.switch) if key in vars(args.train)]
        if not limit.refuse:
            notes.append(limit.text)
        elif any(explicit(args, key) for key in keys):
            raise InputError(limit.text, where=f"--{limit.switch}", fix=f"--{limit.switch} false")
        else:
            for key in keys:
                setattr(args.train, key, False)
                args.sources[key] = f"adapter {name}"
            notes.append(f"{limit.text}; switched off")
    other = name != args.defaults.get("peft", "none") or (
        explicit(args, "model_name_or_path") and not _is_shaped_like(model, args.defaults["model_name_or_path"])
    )
    if other and not explicit(args, "learning_rate"):
        width = model.config.get_text_config().hidden_size
        args.train.learning_rate = default_learning_rate(name, width, method_of(args.train))
        args.sources["learning_rate"] = f"adapter {name}"
        notes.append(f"learning rate {args.train.learning_rate:g}: a first value for {name} at width {width}")
    return notes


def _is_shaped_like(model: PreTrainedModel, path: str) -> bool:
    """Say whether a model has the architecture and the sizes of the one in a folder."""
    file = Path(beside_recipe(path)) / "config.json"
    if not file.is_file():
        return False
    theirs, ours = json.loads(file.read_text(encoding="utf-8")), model.config.to_dict()
    sizes = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    return all(theirs.get(key) == ours.get(key) for key in sizes)


def _same(key: str) -> tuple[str, ...]:
    """Return the names under which transformers keeps one switch."""
    return CHECKPOINTING if key in CHECKPOINTING else (key,)
