"""Shared fixtures: a toy model made on the spot, the public rows beside the checkout, and who skips what."""

import os

# Before anything imports the stack: no hub, no telemetry, one thread per process, quiet tokenizers.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    DO_NOT_TRACK="1",
    TRACKIO_DISABLED="1",
    WANDB_MODE="disabled",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("PLUMBLINE_REAL_DATA", ROOT.parent / "shared" / "data"))

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SENTENCES = [
    "The boat crossed the river before the rain came.",
    "Add seven and five and you have twelve.",
    "Spell the word backwards, then count its letters.",
    "Which is larger, forty or fourteen? Forty is larger.",
    "You are a helpful assistant. Answer the question and stop.",
    "A quick brown fox jumps over the lazy dog near the old mill.",
]


# Deprecations are errors (setup.cfg), save those that the pinned libraries raise against each other.
NOT_OURS = (r"ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",)  # PEFT 0.21 asks transformers 5.23


def pytest_configure(config):
    """Add the warnings that no code of ours can avoid."""
    for line in NOT_OURS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(config, items):
    """Skip `gpu` and `real_data` tests, saying why, where their means are absent."""
    import torch

    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "no CUDA device on this machine"
    if not REAL_DATA.is_dir():
        missing["real_data"] = f"no public rows at {REAL_DATA} (set PLUMBLINE_REAL_DATA)"
    for item in items:
        for mark, reason in missing.items():
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def toy_tokenizer():
    """A byte-level BPE tokenizer with the ChatML control tokens; every text is encodable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    control = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public rows (tests that use it are marked `real_data`)."""
    return REAL_DATA


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """The folder of a saved toy: a random Llama of 2 layers, width 64, untied head, with its tokenizer."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("toy") / "model"
    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_bert(tmp_path_factory) -> Path:
    """The folder of a saved toy encoder: a random BERT of 2 layers, width 64, with the same tokenizer."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("toy_bert") / "model"
    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
