"""What an adapter needs once the trainer has put it on the model: a good start, precision, its state."""

from pathlib import Path

import peft
import torch
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from alignment.critic import policy_of
from alignment.errors import InputError
from alignment.models import LoadedModel

# Any text is a better first prefix than noise: its keys and values are ones the model has learnt to read.
PREFIX_TEXT = "Read the question with care, think about what is asked, and give a short and correct answer. "


def ready(trainer: Trainer, loaded: LoadedModel) -> list[str]:
    """Complete the adapter of a constructed trainer, before it trains; returns what was done, in words.

    Prefix tuning starts from the keys and values of a real text (in PEFT's method comparison 0.42 on
    GSM8K in place of 0.19 from random ones); adapters on a quantised base go back to 32 bits, of which
    TRL leaves 16; the reference of DPO and KTO becomes the adapter that is continued; AdaLoRA gets its
    schedule; p-tuning saves its encoder with each checkpoint, without which it cannot be resumed.
    """
    model = policy_of(trainer.accelerator.unwrap_model(trainer.model))
    if not isinstance(model, peft.PeftModel):
        return []
    notes, config = [], model.peft_config["default"]
    if loaded.peft_config is not None and config.peft_type == peft.PeftType.PREFIX_TUNING:
        notes += _start_prefix(model, loaded.tokenizer)
    quantized = {"is_loaded_in_4bit", "is_loaded_in_8bit"} & vars(model.get_base_model()).keys()
    if quantized and not trainer.is_fsdp_enabled:  # FSDP wants one type per group of parameters
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    head = model.get_base_model().get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and head.original_module.bias is None:
        head.bias = None  # TRL reads the head's weight and bias, PEFT hands on the weight only
    if "ref" in model.peft_config:
        _align_reference(model, rounded=bool(quantized))
    if config.peft_type == peft.PeftType.ADALORA:
        trainer.add_callback(RankSchedule())
    if config.peft_type == peft.PeftType.P_TUNING:
        trainer.add_callback(EncoderState())
    return notes


@torch.no_grad()
def _start_prefix(model: peft.PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Fill the prefix with the keys and values of `PREFIX_TEXT`; decoders without a projection only."""
    config = model.peft_config["default"]
    base = model.get_base_model()
    if config.prefix_projection:
        return []
    ids = tokenizer(PREFIX_TEXT, return_tensors="pt")["input_ids"]
    times = -(-config.num_virtual_tokens // ids.shape[1])
    ids = torch.cat([ids, *[ids[:, -(ids.shape[1] - 1) :]] * times], dim=1)[:, : config.num_virtual_tokens]
    training = base.training
    cache = base.eval().base_model(input_ids=ids.to(base.device), use_cache=True).past_key_values
    base.train(training)
    if cache is None:  # an encoder keeps no cache
        return []
    peft.initialize_kv_prefix_from_past_key_values(
        model, past_key_values=cache, num_virtual_tokens=config.num_virtual_tokens
    )
    return [f"the prefix starts from {config.num_virtual_tokens} tokens of real text"]


@torch.no_grad()
def _align_reference(model: peft.PeftModel, rounded: bool) -> None:
    """Make a continued adapter and its frozen copy the same, so that the margin starts at 0.

    TRL copies the weights named `….default.…` and so misses those that end in `.default` (IA3's vectors,
    single token rows): their copy is a fresh adapter. On a quantised base it rounds the adapter after
    copying it.
    """
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "default" in parts:
            copy = model.get_parameter(".".join("ref" if part == "default" else part for part in parts))
            source, target = (copy, parameter) if rounded and ".default." in name else (parameter, copy)
            target.data.copy_(source.data)


class Companion(TrainerCallback):
    """Keep with each checkpoint what PEFT leaves out of it, and read it back when the run goes on.

    Attributes:
        file: its name in the checkpoint's folder. why: it is needed.
    """

    file, why = "", ""

    def tensors(self, model: peft.PeftModel) -> dict[str, torch.Tensor]:
        """Return what is kept."""
        raise NotImplementedError

    def restore(self, model: peft.PeftModel, kept: dict[str, torch.Tensor]) -> None:
        """Put it back."""
        raise NotImplementedError

    def on_save(self, args, state, control, model=None, **kwargs):
        """Write it into the checkpoint."""
        if state.is_world_process_zero:
            tensors = {name: value.detach().contiguous().cpu() for name, value in self.tensors(model).items()}
            save_file(tensors, self._path(args, state))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Read it back when the run goes on from a checkpoint."""
        if not state.global_step:
            return
        path = self._path(args, state)
        if not path.is_file():
            raise InputError(
                f"no {path.name} in {path.parent}", where="--resume_from_checkpoint", why=self.why, fix="start again"
            )
        self.restore(model, load_file(path))

    def _path(self, args, state) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.file


class RankSchedule(Companion):
    """Move AdaLoRA's ranks while it trains (Zhang et al. 2023); else it stays at its first rank.

    While it trains, the ranks in use are known here and not to PEFT, which would cut the weights of a checkpoint to
    them: they would fit no model that goes on from it.
    """

    file, why = "rank_allocator.safetensors", "AdaLoRA's ranks follow running means, which would start anew"
    means = ("ipt", "exp_avg_ipt", "exp_avg_unc")

    def __init__(self):
        """Begin at full rank."""
        self.pattern: dict[str, list[bool]] | None = None

    def tensors(self, model):
        """Return the running means of the importance of weights, and the ranks in use."""
        found = {f"rank_pattern/{name}": torch.tensor(flags) for name, flags in (self.pattern or {}).items()}
        for mean in self.means:
            found |= {f"{mean}/{name}": v for name, v in vars(model.base_model.rankallocator)[mean].items()}
        return found

    def restore(self, model, kept):
        """Put means and ranks back."""
        groups: dict[str, dict] = {}
        for name, value in kept.items():
            group, _, name = name.partition("/")
            groups.setdefault(group, {})[name] = value.to(model.device)
        self.pattern = {name: flags.tolist() for name, flags in groups.pop("rank_pattern", {}).items()} or None
        vars(model.base_model.rankallocator).update(groups)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Spread the schedule over the run: a tenth at full rank, the last third at the final one."""
        config = model.peft_config["default"]
        config.total_step = max(state.max_steps, 3)
        config.tinit, config.tfinal = config.total_step // 10, config.total_step // 3
        model.base_model.rankallocator.reset_ipt()
        model.base_model.rankallocator.set_total_step(config.total_step)
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Allocate the ranks from the gradients of this step, which are still there."""
        config = model.peft_config["default"]
        config.rank_pattern = self.pattern
        model.base_model.update_and_allocate(state.global_step + 1)
        self.pattern, config.rank_pattern = config.rank_pattern, None

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Tell PEFT the ranks: the weights of the finished run are cut to them."""
        model.peft_config["default"].rank_pattern = self.pattern


class EncoderState(Companion):
    """Keep p-tuning's encoder with each checkpoint: PEFT saves only the tokens it made."""

    file = "prompt_encoder.safetensors"
    why = "p-tuning's virtual tokens come from an encoder; without it they would be random"

    def tensors(self, model):
        """Return the encoder's weights."""
        return model.prompt_encoder.state_dict()

    def restore(self, model, kept):
        """Load them."""
        model.prompt_encoder.load_state_dict(kept)
