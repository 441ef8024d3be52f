"""Load what a recipe trains: a model or an adapter to continue, its tokenizer, a new adapter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignment import adapters
from alignment.checkpoints import (
    check_vocabulary,
    load_adapter,
    load_base,
    load_checkpoint,
    load_tokenizer,
    set_padding,
)
from alignment.errors import InputError
from alignment.folders import check_model, fetch, find_base, is_adapter
from alignment.heads import adapter_config, kind_of, saved_labels
from alignment.memory import memory_estimate, parameters
from alignment.merging import merge, merge_in_memory

if TYPE_CHECKING:
    from alignment.config import Arguments

__all__ = [
    "LoadedModel",
    "load_checkpoint",
    "load_model",
    "load_tokenizer",
    "memory_estimate",
    "merge",
    "parameters",
    "save_base",
]


@dataclass
class LoadedModel:
    """What a trainer is given.

    Attributes:
        model: the model, or a PeftModel whose adapter goes on being trained (then `peft_config` is None).
        tokenizer: its tokenizer, with a padding token.
        peft_config: the new adapter the trainer puts on the model, or None.
        ref_model: the frozen reference for DPO and KTO where the trainer could not find it by itself, or
            None.
        method: the name of the PEFT method, "none" for full fine-tuning.
        notes: what was decided for the user, one sentence each.
        merged_from: the adapter folder that was merged into the base in memory; `save_base` then writes
            that base
            next to the new adapter.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    peft_config: peft.PeftConfig | None = None
    ref_model: PreTrainedModel | None = None
    method: str = "none"
    notes: list[str] = field(default_factory=list)
    merged_from: str | None = None


def load_model(args: Arguments, head: str = "causal", labels: Sequence[str] | None = None) -> LoadedModel:
    """Load the model of a run and decide on its adapter; what `args.train` left open is set to suit it.

    Args:
        args: the parsed arguments. `--model_name_or_path` is a model or an adapter, in a folder or on the hub.
        head: "causal" for a language model, "sequence" for scores per row (one for a reward model), "token" for scores
            per token, "span" for the first and last token of an answer.
        labels: names of the scores of a classifier.

    Raises:
        InputError: the model cannot be used, or the flags contradict each other or the method.
    """
    path = args.model.model_name_or_path
    if not path:
        raise InputError("no model", where="--model_name_or_path", fix="give a folder or a hub id")
    path = fetch(path, args.model.model_revision)
    if is_adapter(path):
        return _from_adapter(args, path, head, labels)
    name = adapters.resolve(args)
    check_model(path, args.model.model_revision)
    model, new = load_base(
        path,
        head,
        labels=labels,
        dtype=_dtype(args, name),
        quantization=adapters.quantization(args, name),
        **_options(args),
    )
    if head == "sequence" and labels is None and model.config.num_labels != 1:
        raise InputError(
            f"{path} tells {model.config.num_labels} classes apart",
            where="--model_name_or_path",
            why="a reward model has one score",
            fix="give the language model it was made from",
        )
    tokenizer = load_tokenizer(path, args.model.model_revision, args.train.trust_remote_code)
    return _with_new_adapter(args, name, LoadedModel(model, tokenizer, method=name), head, new)


def _options(args: Arguments) -> dict:
    """Return the loading options that come straight from flags."""
    return {
        "revision": args.model.model_revision,
        "trust_remote_code": args.train.trust_remote_code,
        "attn_implementation": args.model.attn_implementation,
    }


def _dtype(args: Arguments, name: str) -> str | torch.dtype:
    """Return the type to hold the weights in.

    What is trained in full is held in 32 bits unless the user says otherwise (small updates vanish in
    16). A frozen base only computes: on a GPU the checkpoint's own type, under a quantised base the type
    of its arithmetic.
    """
    if adapters.explicit(args, "dtype") or name == "none":
        return args.model.dtype or "auto"
    if adapters.quantization(args, name):
        return adapters.compute_dtype()
    return "auto" if torch.cuda.is_available() and not args.train.use_cpu else "float32"


def _with_new_adapter(args: Arguments, name: str, loaded: LoadedModel, head: str, new: list[str]) -> LoadedModel:
    """Complete a loaded model: padding, values of the method, the configuration of its adapter."""
    check_vocabulary(loaded.model, loaded.tokenizer, args.model.model_name_or_path)
    if name == "none" and "quantization_config" in vars(loaded.model.config):
        raise InputError(
            f"the weights in {args.model.model_name_or_path} are quantised: no full fine-tuning",
            where="--peft none",
            why="quantised weights are frozen: nothing would be trained",
            fix="--peft qlora, or give the 16-bit model",
        )
    set_padding(loaded.model, loaded.tokenizer)
    loaded.notes += adapters.apply_defaults(args, name, loaded.model)
    loaded.peft_config, notes = adapters.peft_config(args, name, loaded.model, loaded.tokenizer, head)
    loaded.notes += notes
    if loaded.peft_config is not None and new and head != "causal":
        saved = loaded.peft_config.modules_to_save
        loaded.peft_config.modules_to_save = [*saved, *(n for n in new if n not in saved)]
    if new:
        loaded.notes.append(f"new, trained from scratch: {', '.join(new)}")
    return loaded


def _from_adapter(args: Arguments, path: str, head: str, labels: Sequence[str] | None) -> LoadedModel:
    """Continue an adapter when the run asks for the same kind, else go on from the base with it merged in."""
    config = adapter_config(path)
    kind = kind_of(config)
    if kind != "causal" and head == "causal":
        raise InputError(
            f"{path} is the adapter of a classifier or reward model",
            where="--model_name_or_path",
            why="it was trained with a score head and not to write",
            fix="give the language model or adapter it started from",
        )
    if not adapters.explicit(args, "peft") and not args.model.use_peft:
        args.peft.peft = adapters.name_of(config.peft_type.value)
        args.sources["peft"] = f"adapter {path}"
    name = adapters.resolve(args)
    new_shape = args.peft.peft_args or adapters.lora_flags(args)
    same = kind == head and (labels is None or list(labels) == saved_labels(path))
    if same and adapters.family(name) == config.peft_type.value and not new_shape:
        return _continue(args, name, path, head, labels)
    if config.is_prompt_learning:
        raise InputError(
            f"{path} is a {config.peft_type.value.lower()} adapter: it cannot become part of the base",
            where="--model_name_or_path",
            why=f"virtual tokens are no change of weights, so {name} cannot start from them",
            fix=f"--peft {adapters.name_of(config.peft_type.value)} continues it; or start from the base",
        )
    return _merged(args, name, path, head, labels)


def _continue(args: Arguments, name: str, path: str, head: str, labels: Sequence[str] | None = None) -> LoadedModel:
    """Return the adapter on its base, trainable; DPO and KTO keep a frozen copy of it as the reference."""
    base, _ = load_base(
        find_base(path),
        head,
        labels=labels,
        dtype=_dtype(args, name),
        quantization=adapters.quantization(args, name),
        **_options(args) | {"revision": "main"},
    )
    tokenizer = load_tokenizer(path, trust_remote_code=args.train.trust_remote_code)
    check_vocabulary(base, tokenizer, path)
    set_padding(base, tokenizer)
    notes = [f"continuing the {name} adapter {path} on {base.name_or_path}"]
    notes += adapters.apply_defaults(args, name, base)
    model = load_adapter(base, path, trainable=True)
    early = vars(args.train).get("precompute_ref_log_probs")
    if early and (name == "qlora" or any(key.endswith(".default") for key, _ in model.named_parameters())):
        raise InputError(
            f"the reference cannot be computed beforehand when a {name} adapter goes on",
            where="--precompute_ref_log_probs",
            why="TRL computes it before its copy of the adapter is exact (see warmstart.ready)",
            fix="--precompute_ref_log_probs false",
        )
    kind = model.peft_config["default"].peft_type.value
    if kind != adapters.family(name):
        notes.append(f"{name} saves its virtual tokens without their encoder: they go on as {kind.lower()}")
    return LoadedModel(model, tokenizer, method=name, notes=notes)


def _merged(args: Arguments, name: str, path: str, head: str, labels: Sequence[str] | None = None) -> LoadedModel:
    """Return the base with the adapter merged into it in memory, quantised afterwards when asked."""
    dtype, quantization = _dtype(args, name), adapters.quantization(args, name)
    options = _options(args) | {"revision": "main"}
    model, new = merge_in_memory(path, dtype, options), []
    other = labels is not None and list(labels) != saved_labels(path)
    if head != kind_of(adapter_config(path)) or other or quantization:
        state = {key: value.to("cpu") for key, value in model.state_dict().items()}
        model, new = load_base(
            find_base(path), head, dtype=dtype, quantization=quantization, state_dict=state, labels=labels, **options
        )
    tokenizer = load_tokenizer(path, trust_remote_code=args.train.trust_remote_code)
    note = f"the adapter {path} was merged into its base in memory"
    loaded = LoadedModel(model, tokenizer, method=name, notes=[note])
    if name == "none":
        model.name_or_path = model.config._name_or_path = str(path)
        wants = args.recipe in ("dpo", "kto") or (adapters.samples(args.train) and vars(args.train).get("beta") != 0)
        if wants and not vars(args.train).get("precompute_ref_log_probs"):
            # the trainers would load their reference by name and get the base without the adapter
            loaded.ref_model = copy.deepcopy(model).eval().requires_grad_(False)
    else:
        base = Path(args.train.output_dir) / "base_model"
        model.name_or_path = model.config._name_or_path = str(base)
        loaded.merged_from = str(path)
        loaded.notes.append(f"it is saved as {base}, the base of the new adapter")
    return _with_new_adapter(args, name, loaded, head, new)


def save_base(loaded: LoadedModel, output_dir: str | Path) -> None:
    """Write the merged base next to its new adapter; call it on one process, before training."""
    target = Path(output_dir) / "base_model"
    if loaded.merged_from and not target.exists():
        # in the type it is trained on: rounded, it would be another model than the one the adapter learns on
        merge(loaded.merged_from, target, say=lambda text: None, dtype=loaded.model.dtype)
