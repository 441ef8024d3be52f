"""Merge an adapter into its base, and measure that the merged model is the same model."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignment.checkpoints import load_adapter, load_base, load_tokenizer, set_padding
from alignment.errors import InputError
from alignment.folders import fetch, find_base, is_adapter
from alignment.heads import adapter_config, kind_of, saved_labels

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Question: what is seven plus five? Answer: twelve.",
    "Write a short letter to a friend about the weather in spring, and end it with a question.",
    "def area(width, height):\n    return width * height\n",
)
# Bounds on the difference: rounding of merged weights stays far below them, a wrong merge far above. Equal
# first choices alone say little: a model that is unsure changes some of them at a KL of 2e-5.
MAX_KL = 0.02
MIN_AGREEMENT = 0.9


def merge_in_memory(path: str | Path, dtype: str | torch.dtype, options: dict | None = None) -> PreTrainedModel:
    """Return the base of an adapter folder with the adapter added to its weights, in `dtype`.

    The sum is taken in 32 bits and rounded once.

    Raises:
        InputError: the method has no merge (prompt learning), or the base is stored in 4 or 8 bits.
    """
    merged, own = _adapted(path, options)
    merged = merged.merge_and_unload(safe_merge=True).to(own if dtype == "auto" else _as_dtype(dtype))
    return merged.requires_grad_(True)  # PEFT froze it


def merge(
    path: str | Path,
    out: str | Path,
    say: Callable[[str], None] = print,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Write the merged model and its tokenizer to a new folder, and return how far it is from the adapter.

    It is written in `dtype`, or in the type the base is stored in. The folder appears complete or not at all.
    The result is {"max_difference": of logits, "kl": mean per token in nats, "agreement": share of equal
    first choices} over a few probe texts.

    Raises:
        InputError: no adapter, a method without a merge, `out` exists, or the merged model differs too much.
    """
    path, out = Path(fetch(path)), Path(out)
    if not is_adapter(path):
        raise InputError(f"no adapter at {path}", where=str(path), fix="give the output folder of a PEFT run")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists", where="--out", why="it would be overwritten", fix="name a new folder")
    tokenizer = load_tokenizer(path)
    model, own = _adapted(path)
    own = dtype or own
    set_padding(model, tokenizer)
    before = probe(model, tokenizer)
    merged = model.merge_and_unload(safe_merge=True).to(own)
    distance = difference(before, probe(merged.float(), tokenizer))
    merged.to(own)
    say("merged against adapter: " + ", ".join(f"{key} {value:.3g}" for key, value in distance.items()))
    if not (distance["kl"] <= MAX_KL and distance["agreement"] >= MIN_AGREEMENT):
        raise InputError(
            f"merging changed the model: KL {distance['kl']:.3g}, agreement {distance['agreement']:.3f}",
            where=str(path),
            why=f"bounds are KL {MAX_KL} and agreement {MIN_AGREEMENT}",
            fix="keep the adapter and load it with its base",
        )
    generation = path / "generation_config.json"
    if generation.is_file():
        merged.generation_config = GenerationConfig.from_pretrained(str(path))
    _write(merged, tokenizer, out)
    return distance


def _adapted(path: str | Path, options: dict | None = None):
    """Return the adapter on its base in 32 bits, and the type the base is stored in."""
    config = adapter_config(path)
    if config.is_prompt_learning:
        raise InputError(
            f"{path} is a {config.peft_type.value.lower()} adapter, which cannot be merged",
            where=str(path),
            why="virtual tokens are extra input, no change of weights",
            fix="keep the adapter and load it with its base",
        )
    base, _ = load_base(find_base(path), kind_of(config), dtype="auto", labels=saved_labels(path), **(options or {}))
    if base.config.to_dict().get("quantization_config"):
        raise InputError(
            f"the base {base.name_or_path} is stored quantised",
            where=str(path),
            why="adding the adapter to quantised weights rounds it away",
            fix=f"put the 16-bit base at {Path(path) / 'base_model'}",
        )
    own = base.dtype
    model = load_adapter(base.float(), path)
    # BaseTuner.merge_and_unload exists for every tuner; some have no `merge` in their layers
    layers = [m for m in model.modules() if hasattr(m, "active_adapters") and hasattr(m, "get_base_layer")]
    if not all(hasattr(type(m), "merge") and callable(type(m).merge) for m in layers):
        raise InputError(f"PEFT cannot merge {config.peft_type.value.lower()}", where=str(path))
    return model, own


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


@torch.no_grad()
def probe(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Return the logits on each probe text: [tokens, vocabulary], or [1, labels] for a sequence head."""
    model.eval()
    found = []
    for text in PROBES:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :128]
        logits = model(input_ids=ids.to(model.device), attention_mask=torch.ones_like(ids)).logits
        found.append(logits.float().cpu().flatten(0, -2))
    return found


def difference(one: list[torch.Tensor], two: list[torch.Tensor]) -> dict[str, float]:
    """Return the largest difference of logits, mean KL(one ‖ two) in nats, share of equal first choices."""
    first, second = torch.cat(one), torch.cat(two)
    largest = (first - second).abs().max().item()
    if first.shape[-1] == 1:  # one score per text: no distribution to compare, so the scores must agree themselves
        scale = first.abs().mean().clamp(min=1.0).item()
        return {"max_difference": largest, "kl": (largest / scale) ** 2, "agreement": 1.0}
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    agreement = (first.argmax(-1) == second.argmax(-1)).float().mean().item()
    return {"max_difference": largest, "kl": kl, "agreement": agreement}


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Save into a folder beside the target and rename it, so that a half-written model never has the name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)  # mkdtemp makes it private
        if out.exists():
            out.rmdir()  # empty, checked above
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
