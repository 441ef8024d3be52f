"""PEFT methods by name: type, first values and learning rate of each, and which one the flags ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from alignment.errors import InputError, nearest

if TYPE_CHECKING:
    from alignment.config import Arguments

# The methods with values of our own; every other PEFT type goes by its lower-case name (see `all_names`).
NAMES = ("none", "lora", "qlora", "dora", "rslora", "ia3", "prefix", "prompt", "ptuning")
PROMPT_LEARNING = {"prefix", "prompt", "ptuning", "multitask_prompt_tuning", "cartridge", "cpt"}
LORA_FLAGS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
_ALIASES = {"prefix_tuning": "prefix", "prompt_tuning": "prompt", "p_tuning": "ptuning"}
# Set by us or by PEFT itself; a value from the command line would contradict the recipe.
_RESERVED = {
    "peft_type",
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
    "auto_mapping",
    "peft_version",
}
_NEEDS_MORE = {
    "xlora": "it mixes adapters that exist already",
    "poly": "every row needs a task id",
    "multitask_prompt_tuning": "every row needs a task id",
    "shadow": "it needs a second model",
    "cpt": "it needs the token ids of a context; use --peft prompt",
    "trainable_tokens": "it trains rows of the embedding that you name; LoRA does so beside its own work: "
    "--peft lora --peft_args '{\"trainable_token_indices\": [5, 6]}'",
    "adaption_prompt": "PEFT supports it for a few architectures only, and not for saving new heads",
}


@dataclass(frozen=True)
class Method:
    """A PEFT method under our name: PEFT's type, a learning rate, and the values it starts from."""

    peft_type: str
    rate: float
    values: dict[str, Any] = field(default_factory=dict)


_LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
# The rates are for supervised fine-tuning at a hidden size of 2,000 (see `default_learning_rate`): LoRA's
# from "LoRA Without Regret", those of prefix, prompt and IA3 from PEFT's method comparison (Llama-3.2-3B,
# GSM8K), where they and the values below beat PEFT's defaults by a factor of 1.5 to 6. The others are
# common first values.
METHODS = {
    "lora": Method("LORA", 5e-4, _LORA),
    "qlora": Method("LORA", 5e-4, _LORA),
    "dora": Method("LORA", 5e-4, _LORA | {"use_dora": True}),
    # alpha/sqrt(r) = 2, the same scale as LoRA's alpha/r, at four times the rank
    "rslora": Method("LORA", 2.5e-4, _LORA | {"r": 64, "lora_alpha": 16, "use_rslora": True}),
    "ia3": Method("IA3", 7e-3),
    "prefix": Method("PREFIX_TUNING", 7e-3, {"num_virtual_tokens": 32}),
    "prompt": Method("PROMPT_TUNING", 1.5e-3, {"num_virtual_tokens": 32, "prompt_tuning_init": "SAMPLE_VOCAB"}),
    "ptuning": Method("P_TUNING", 1.5e-3, {"num_virtual_tokens": 32}),
    "adalora": Method("ADALORA", 1e-3, {"init_r": 24, "target_r": 16, "lora_alpha": 32}),
    "vera": Method("VERA", 4e-3, {"r": 256}),
    "ln_tuning": Method("LN_TUNING", 1e-3),
    "oft": Method("OFT", 2e-4),
    "boft": Method("BOFT", 2e-4),
    # PEFT starts these two from noise: the policy of DPO and KTO would not start at its reference
    "c3a": Method("C3A", 2e-4, {"init_weights": True}),
    "fourierft": Method("FOURIERFT", 2e-4, {"init_weights": True}),
    "cartridge": Method("CARTRIDGE", 7e-3, {"num_virtual_tokens": 32}),
}
_OTHER_RATE = 2e-4
_FULL_RATE = 2e-5
_CLASSIFIER_RATE = 5e-5  # the upper end of the grid in BERT's paper (Devlin et al. 2019), and transformers' default
# Preference optimisation and reinforcement learning move an already trained model: a small part of the rate.
_RECIPE_SCALE = {"dpo": 0.03, "kto": 0.03, "grpo": 0.1, "rloo": 0.1, "ppo": 0.1, "reward": 0.5, "classify": 0.5}


def all_names() -> list[str]:
    """Return every name `--peft` takes: ours first, then PEFT's other types in lower case."""
    ours = {"NONE", *(method.peft_type for method in METHODS.values())}
    rest = sorted(kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value not in ours)
    return [*NAMES, *(name for name in METHODS if name not in NAMES), *rest]


def explicit(args: Arguments, name: str) -> bool:
    """Say whether the user set this field, in a file or by a flag."""
    return args.sources.get(name, "library").startswith(("file", "flag"))


def resolve(args: Arguments) -> str:
    """Return the one method that `--peft`, `--use_peft`, `--load_in_4bit` and the LoRA flags ask for.

    Raises:
        InputError: the name is unknown, or the flags contradict each other.
    """
    asked = args.peft.peft.lower().replace("-", "_")
    name = _ALIASES.get(asked, asked)
    if name not in all_names():
        raise InputError(
            f"unknown PEFT method {args.peft.peft!r}",
            where="--peft",
            fix=did_you_mean(name, all_names()) or f"one of {', '.join(all_names())}",
        )
    if name in _NEEDS_MORE:
        raise InputError(f"--peft {name} does not fit a recipe", where="--peft", why=_NEEDS_MORE[name])
    if name == "none" and not explicit(args, "peft") and (args.model.use_peft or lora_flags(args)):
        name = "lora"
    if name == "none" and args.model.use_peft:
        raise InputError("--use_peft asks for an adapter and --peft none for none", where="--peft", fix="--peft lora")
    _checklora_flags(args, name)
    _check_quantized(args, name)
    if name == "none" and args.peft.peft_args:
        raise InputError("--peft_args without a method", where="--peft_args", fix="add --peft lora (or another)")
    if name == "lora" and args.model.load_in_4bit:
        return "qlora"
    return name


def lora_flags(args: Arguments) -> list[str]:
    """Return the LoRA flags of `trl.ModelConfig` that the user set."""
    return [flag for flag in LORA_FLAGS if explicit(args, flag)]


def _checklora_flags(args: Arguments, name: str) -> None:
    """Raise InputError when LoRA's own flags are given to another method."""
    given = lora_flags(args)
    if given and (name == "none" or method(name).peft_type != "LORA"):
        raise InputError(
            f"--{given[0]} belongs to LoRA, the method is {name}",
            where=f"--{given[0]}",
            fix="--peft lora, or pass the method's own values with --peft_args",
        )


def _check_quantized(args: Arguments, name: str) -> None:
    """Raise InputError when a quantised base cannot be trained this way."""
    bits = "--load_in_4bit" if args.model.load_in_4bit else "--load_in_8bit" if args.model.load_in_8bit else ""
    if bits and name == "none":
        raise InputError(
            f"{bits} with full fine-tuning",
            where=bits,
            why="quantised weights are frozen: nothing would be trained",
            fix="add --peft qlora (or ia3, prefix, …), or drop the flag",
        )
    if name == "qlora" and args.model.load_in_8bit:
        raise InputError("qlora is 4-bit", where="--load_in_8bit", fix="--peft lora --load_in_8bit true")
    if bits and name not in PROMPT_LEARNING and method(name).peft_type not in _quantizable():
        raise InputError(
            f"{name} has no layers for a quantised base in PEFT {peft.__version__}",
            where=bits,
            fix="--peft qlora or ia3, or drop the flag",
        )


def _quantizable() -> set[str]:
    """Return the PEFT types that have layers over bitsandbytes weights."""
    own = {"LORA", "ADALORA", "IA3", "HIRA", "PVERA", "RANDLORA", "ROAD"}
    return own | {"SHIRA", "OFT", "VERA", "MISS", "BOFT"}  # these through PEFT's quantisation backend


def method(name: str) -> Method:
    """Return the method of this name, with PEFT's own values when we have none."""
    return METHODS.get(name) or Method(name.upper(), _OTHER_RATE)


def name_of(peft_type: str) -> str:
    """Return our name for one of PEFT's types: "LORA" is lora, "P_TUNING" ptuning."""
    return next((name for name, it in METHODS.items() if it.peft_type == peft_type), peft_type.lower())


def family(name: str) -> str:
    """Return PEFT's type of a method, the same for lora, qlora, dora and rslora."""
    return method(name).peft_type


def method_of(train: Any) -> str:
    """Return "sft", "dpo", "grpo", … for a trainer's configuration, whatever the script is called."""
    return type(train).__name__.removesuffix("Config").lower()


def default_learning_rate(name: str, hidden_size: int, recipe: str = "sft") -> float:
    """Return a learning rate to start from.

    An adapter's rate falls with the width of the model as `(2000/hidden)^0.78`, the fit for Llama in "LoRA
    Without Regret" (Thinking Machines 2025). Full fine-tuning starts at 2e-5, whatever the width.
    """
    scale = _RECIPE_SCALE.get(recipe, 1.0)
    if name == "none":
        return _CLASSIFIER_RATE if recipe == "classify" else _FULL_RATE * scale
    return float(f"{method(name).rate * (2000 / hidden_size) ** 0.78 * scale:.1e}")


def did_you_mean(name: str, known: list[str]) -> str:
    """Return a question naming the nearest known name, or nothing."""
    close = nearest(name, known)
    return f"did you mean {close!r}?" if close else ""
