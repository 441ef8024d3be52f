"""Read a checkpoint whole, full weights or an adapter on its base, or say what is missing."""

import contextlib
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from alignment.errors import InputError, nearest
from alignment.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TOKENIZER_FILES,
    check_model,
    fetch,
    find_base,
    is_adapter,
)
from alignment.heads import (
    ENDINGS,
    NEW_HEADS,
    adapter_config,
    class_for,
    has_head,
    key_mapping,
    name_outputs,
    prepare_head,
    saved_labels,
    to_weight,
)


def load_tokenizer(
    path: str | Path, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, an adapter (its own, else its base's) or a hub id, padding set.

    Raises:
        InputError: there is no tokenizer, or it has neither a padding nor an end token.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if is_adapter(folder):
            return load_tokenizer(find_base(folder), trust_remote_code=trust_remote_code)
        raise InputError(
            f"no tokenizer in {path}",
            where="--model_name_or_path",
            why="text cannot be turned into this model's token ids without its own tokenizer",
            fix="copy the model's tokenizer.json and tokenizer_config.json there",
        )
    tokenizer = AutoTokenizer.from_pretrained(str(path), revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is None:
        raise InputError(
            f"the tokenizer of {path} has neither a padding nor an end token",
            where=str(folder / "tokenizer_config.json"),
            why="batches need padding, and answers need an end",
            fix="set eos_token in tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # transformers warns of texts longer than the model; the ledger counts them, and they never reach the model
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def read_config(
    path: str | Path, head: str, revision: str = "main", trust_remote_code: bool = False
) -> PretrainedConfig:
    """Return the configuration of a model; raises InputError when it cannot have this head."""
    try:
        config = AutoConfig.from_pretrained(str(path), revision=revision, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:  # no such type, code that is not trusted, no such id on the hub
        raise InputError(
            f"the configuration of {path} cannot be used",
            where="--model_name_or_path",
            why=str(error).strip().split("\n")[0],
            fix="a newer transformers, or --trust_remote_code true for code of its own that you trust",
        ) from error
    kind, names = config.model_type, config.architectures or []
    where = f"{path}, model_type {kind}"
    if config.is_encoder_decoder:
        raise InputError(
            f"{kind} is an encoder-decoder",
            where=where,
            why="these recipes train models that continue one sequence of tokens",
            fix="take a decoder (Llama, Qwen, Gemma, …)",
        )
    if head == "causal" and kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not vars(config).get("is_decoder"):
        raise InputError(
            f"{kind} is an encoder",
            where=where,
            why="it sees the words to come, so it cannot generate",
            fix="take a decoder (Llama, Qwen, Gemma, …), or use the encoder for classification",
        )
    if head == "causal" and any(name.endswith(tuple(ENDINGS.values())) for name in names):
        raise InputError(
            f"{path} is a classifier or reward model ({names[0]})",
            where=where,
            why="it has a score head and no language head",
            fix="give the language model it was made from",
        )
    if head == "causal" and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not trust_remote_code:
        close = nearest(kind, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
        fix = "--trust_remote_code true, if the model brings its own code and you trust it"
        raise InputError(
            f"transformers has no causal language model of type {kind}",
            where=where,
            fix=f"{fix}; or did you mean {close}?" if close else fix,
        )
    return config


def load_base(
    path: str | Path,
    head: str = "causal",
    *,
    dtype: str | torch.dtype = "float32",
    quantization: BitsAndBytesConfig | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    labels: Sequence[str] | None = None,
    **options,
) -> tuple[PreTrainedModel, list[str]]:
    """Return a model from safetensors, and the names of its modules that are new: not in the checkpoint.

    Args:
        path: a folder or a hub id.
        head: "causal", "sequence" for scores per row, "token" for scores per token, "span" for first and last token.
        dtype: of the weights; "auto" is the checkpoint's own.
        quantization: how to quantise the linear layers while loading.
        state_dict: weights to use in place of those in the folder (its configuration still holds).
        labels: names of the outputs of a sequence or token head; None keeps those there are, and gives a new head one.
        options: revision, trust_remote_code, attn_implementation.

    Raises:
        InputError: weights are missing, other than those of a new head.
    """
    if state_dict is None:
        check_model(path, options.get("revision", "main"))
    config = read_config(path, head, options.get("revision", "main"), options.get("trust_remote_code", False))
    is_new_head = head != "causal" and not has_head(config, head)
    trusted = options.get("trust_remote_code", False)
    name_outputs(config, head, labels, path)
    if quantization is not None and head != "causal":  # a new head is trained, which quantised weights cannot be
        quantization = copy.copy(quantization)
        quantization.llm_int8_skip_modules = [rf"(.*\.)?{name}" for name in NEW_HEADS]
    if state_dict is None and (renamed := key_mapping(config, head, trusted)):
        options["key_mapping"] = renamed
    source = None if state_dict else str(path)
    try:
        with _quiet():
            model, report = class_for(config, head, trusted).from_pretrained(
                source, config=config, state_dict=state_dict, dtype=dtype, quantization_config=quantization,
                device_map=_place(quantization), use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
    except SafetensorError as error:
        raise InputError(
            f"the weights in {path} are damaged",
            where=str(path),
            why=str(error),
            fix="copy or download them again",
        ) from error
    new = _check_report(model, report, path, head != "causal", is_new_head)
    model.config._name_or_path = model.name_or_path = str(path)
    if head != "causal":
        prepare_head(model)
    _keep_unpacked(model)
    if "quantization_config" in vars(model.config) and (output := model.get_output_embeddings()) is not None:
        output.register_forward_pre_hook(to_weight)  # IA3 and others hand on 32 bits, the head holds 16
    return model, new


@contextlib.contextmanager
def _quiet():
    """Keep transformers' load report off the screen (we read it), and its progress bar out of log files."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _place(quantization: BitsAndBytesConfig | None) -> dict | None:
    """Return where to put a model: quantising happens on the GPU, the trainer moves the rest."""
    if not quantization or not torch.cuda.is_available():
        return None
    if is_fsdp_enabled() or is_deepspeed_zero3_enabled():  # these place the weights themselves
        return None
    return {"": torch.cuda.current_device()}


def _check_report(model: PreTrainedModel, report: dict, path: str | Path, head: bool, new_head: bool) -> list[str]:
    """Return the modules of a new head; raise InputError when other weights were not in the checkpoint."""
    backbone = f"{model.base_model_prefix}."
    # a new head, and the pooler that belongs to it in BERT, are trained from scratch
    new = [key for key in report["missing_keys"] if not key.startswith(backbone) or "pooler" in key]
    missing = sorted(set(report["missing_keys"]) - set(new if new_head else []))
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
    if head:  # a head of another number of classes gives way to a new one
        new += [key for key in mismatched if not key.startswith(backbone)]
        mismatched = [key for key in mismatched if key.startswith(backbone)]
    if missing or mismatched:
        raise InputError(
            f"the weights in {path} do not fill the model: {len(missing)} missing, {len(mismatched)} of another shape",
            where=(missing + mismatched)[0],
            why="they would stay random and the model would only look like it was loaded",
            fix="check that config.json belongs to these weights",
        )
    return sorted({key.removeprefix(backbone).rpartition(".")[0] for key in new})


def _keep_unpacked(model: PreTrainedModel) -> None:
    """Keep bitsandbytes 0.50 from repacking 4-bit weights for fast CPU arithmetic at the first evaluation.

    Training goes on with the repacked weights and wrong gradients, in silence: an evaluation before the
    first step cost 1.2 nats on the embedded model. Widths that are no multiple of 64 fail outright.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False


def load_adapter(base: PreTrainedModel, path: str | Path, trainable: bool = False) -> peft.PeftModel:
    """Return the base with the adapter of a folder on it, every tensor of the adapter in its place.

    Raises:
        InputError: the adapter is of another base (shapes, names), or incomplete.
    """
    config = _trainable(adapter_config(path), path) if trainable else adapter_config(path)
    config.inference_mode = not trainable
    try:
        # from_pretrained refuses trainable prompt learning, and says nothing of keys that find no place
        if config.is_prompt_learning:  # derived from this base again, so that another base does not fit
            config.token_dim = config.num_layers = config.num_attention_heads = None
        model = peft.get_peft_model(base, config)
        weights = peft.load_peft_weights(str(path), device="cpu")
        peft.set_peft_model_state_dict(model, weights)
    except (RuntimeError, ValueError, KeyError) as error:
        raise _other_base(base, path, str(error).strip().splitlines()[-1].strip()) from error
    with safe_open(Path(path) / ADAPTER_WEIGHTS, "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    loaded = {name: tuple(t.shape) for name, t in peft.get_peft_model_state_dict(model).items()}
    missing, unexpected = sorted(loaded.keys() - saved.keys()), sorted(saved.keys() - loaded.keys())
    wrong = sorted(name for name in saved.keys() & loaded.keys() if saved[name] != loaded[name])
    if missing or unexpected or wrong:
        counts = f"{len(missing)} missing, {len(unexpected)} without a place, {len(wrong)} of another shape"
        raise _other_base(base, path, f"{counts}, first {(missing + unexpected + wrong)[0]}")
    return model if trainable else model.eval()


def _trainable(config: peft.PeftConfig, path: str | Path) -> peft.PeftConfig:
    """Return the configuration under which saved virtual tokens can go on learning.

    PEFT saves what an encoder made (p-tuning, a projected prefix) and not the encoder: p-tuning's tokens
    become plain prompt tuning, which computes the same; a projected prefix becomes a plain one.
    """
    if config.peft_type == peft.PeftType.P_TUNING:
        return peft.PromptTuningConfig(
            task_type=config.task_type,
            num_virtual_tokens=config.num_virtual_tokens,
            modules_to_save=config.modules_to_save,
        )
    if config.peft_type == peft.PeftType.PREFIX_TUNING:
        config.prefix_projection = False
    return config


def _other_base(base: PreTrainedModel, path: str | Path, detail: str) -> InputError:
    return InputError(
        f"the adapter {path} does not fit the base {base.name_or_path}: it was trained on another model",
        where=detail,
        why="an adapter that is put on another base does nothing, or harm",
        fix=f"give the base it was trained on (base_model_name_or_path in {Path(path) / ADAPTER_CONFIG})",
    )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Raise InputError when the tokenizer knows ids for which the model has no embedding row."""
    rows = model.get_input_embeddings().num_embeddings
    top = max(tokenizer.get_vocab().values())
    if top >= rows:
        raise InputError(
            f"the tokenizer has token ids up to {top}, the model has {rows} embedding rows",
            where=str(path),
            why="a text with such a token stops the run, or reads a wrong row",
            fix="use the model's own tokenizer",
        )


def load_checkpoint(
    path: str | Path,
    dtype: str | torch.dtype = "float32",
    head: str = "causal",
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel | peft.PeftModel, PreTrainedTokenizerBase]:
    """Return a model to evaluate and its tokenizer: from full or merged weights, an adapter, 4-bit weights.

    Raises:
        InputError: something is missing, unexpected or of another base.
    """
    from alignment.adapters import nf4

    path = fetch(path)
    quantization = nf4() if load_in_4bit else None
    options = {"dtype": dtype, "quantization": quantization, "trust_remote_code": trust_remote_code}
    if not is_adapter(path):
        check_model(path)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    if is_adapter(path):
        base, _ = load_base(find_base(path), head, labels=saved_labels(path), **options)
        check_vocabulary(base, tokenizer, path)
        set_padding(base, tokenizer)
        model = load_adapter(base, path)
    else:
        model, _ = load_base(path, head, **options)
        check_vocabulary(model, tokenizer, path)
        set_padding(model, tokenizer)
    if head == "causal" and (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(path))
    return model.eval(), tokenizer


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell the model the padding id, which a sequence head needs to find the last real token of a row."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
