"""The policy and its critic as one module: with an adapter, four models on one frozen backbone.

With LoRA and its relatives the policy is the base with the adapter "default", the critic the same base with the adapter
"critic" and a scalar head, the reference the base without an adapter (or with "ref", a frozen copy, when the policy
starts from a trained one), and a reward model that is such an adapter on the same base the adapter "reward". Adapters
are switched for a forward pass, and nothing of the base exists twice. Full fine-tuning has a second backbone for the
critic and a third for the reference.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from alignment.batching import TokenCount, split_rows
from alignment.checkpoints import load_base
from alignment.errors import InputError
from alignment.folders import fetch, find_base, is_adapter
from alignment.heads import adapter_config
from alignment.shared_scores import REWARD, SharedScores

CRITIC_FILE = Path("critic") / "critic.safetensors"
POLICY, CRITIC, REFERENCE = "default", "critic", "ref"
PARTS, ROWS = 4, 4  # groups a batch runs as at most, and rows of a group on average at least


class ActorCritic(nn.Module):
    """Everything PPO trains, and the reference it must not.

    What is asked of it and not its own is asked of the policy: its configuration, generation settings, device, ….

    Attributes:
        policy: the language model, patched by TRL's `add_fused_lm_head`.
        critic: a backbone of its own, or None when it is an adapter of the policy.
        head: hidden state -> value, in float32.
        reference: a frozen copy of the policy as it started, or None when it is the policy with other adapters.
        count: tokens that were trained on, and computed.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel, critic: nn.Module | None, head: nn.Linear):
        super().__init__()
        self.policy, self.critic, self.head = policy, critic, head.float()
        self.reference: nn.Module | None = None
        self.count = TokenCount()
        self.base = [policy.get_base_model() if isinstance(policy, PeftModel) else policy]  # a list: no second owner
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self.layers = [module for module in policy.modules() if isinstance(module, kinds)]
        self.adapters = [_names(layer) for layer in self.layers]

    def __getattr__(self, name: str) -> Any:
        """Return what belongs to this module, else what the policy has under this name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "policy":
                raise
            return getattr(super().__getattr__("policy"), name)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        want: tuple[str, ...],
        text: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return what is wanted of each token, aligned with the tokens; 0 where `labels` is -100.

        One call for all of it, so that DDP, FSDP and DeepSpeed see one forward pass; inside, rows of like lengths run
        together, each group as wide as its longest row. The number of groups depends on the number of rows only.

        Args:
            input_ids: (rows, tokens), padded on the right.
            attention_mask: the same shape.
            labels: the tokens themselves where something is wanted, -100 elsewhere.
            want: of "policy" (gives log_probs and entropy), "values", "reference" (gives reference).
            text: input_ids, attention_mask and labels of a batch of texts; gives text_log_probs.
        """
        sizes = attention_mask.sum(1)
        order, found = sizes.argsort(descending=True, stable=True), {}
        lengths, start = tuple(sizes[order].tolist()), 0
        for end in split_rows(lengths, max(1, min(PARTS, len(lengths) // ROWS))):
            rows, width = order[start:end], lengths[start]
            if torch.is_grad_enabled():
                self.count.add(sum(lengths[start:end]), width * (end - start))
            part = [batch[rows, :width] for batch in (input_ids, attention_mask, labels)]
            for name, value in self._part(*part, want).items():
                found.setdefault(name, []).append(nn.functional.pad(value, (0, input_ids.shape[1] - width)))
            start = end
        found = {name: torch.cat(values)[order.argsort()] for name, values in found.items()}
        if text is not None:
            found["text_log_probs"] = _aligned(self.base[0](**text, fused_lm_head=True).log_probs)
        return found

    def _part(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, want: tuple[str, ...]
    ) -> dict[str, torch.Tensor]:
        """Do what `forward` does for rows of like lengths."""
        found = {}
        if "policy" in want:
            out = self.base[0](input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
            found |= {"log_probs": _aligned(out.log_probs), "entropy": _aligned(out.entropy)}
        if "reference" in want:
            with torch.no_grad(), self.using(REFERENCE):
                model = self.base[0] if self.reference is None else self.reference
                out = model(input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
            found["reference"] = _aligned(out.log_probs)
        if "values" in want:
            found["values"] = _aligned(self._values(input_ids, attention_mask)) * (labels != -100)
        return found

    def _values(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the value of the state before each token but the first, (rows, tokens - 1)."""
        backbone = self.base[0].base_model if self.critic is None else self.critic
        with self.using(CRITIC):
            hidden = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden[:, :-1].float()).squeeze(-1)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Switch the adapter of every layer for a while; without an adapter of this name there is none.

        PEFT's own switches (`set_adapter`, `disable_adapter`) also decide what is trained, and would freeze the critic.
        """
        if not self.layers:
            yield
            return
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self.layers]
        known = name in self.policy.peft_config
        for layer, names in zip(self.layers, self.adapters, strict=True):
            layer._active_adapter = [name] if known else layer._active_adapter
            layer._disable_adapters = not known or name not in names
        try:
            yield
        finally:
            for layer, (active, disabled) in zip(self.layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled

    def share_reward(self, path: str | Path) -> SharedScores | None:
        """Return a reward model that runs on this backbone; None where that in `path` needs one of its own."""
        if not self.layers or not is_adapter(path) or not _same_base(self.policy, path):
            return None
        head = _adapter_from(self.policy, str(path), REWARD, "--reward_model")
        for name, parameter in self.policy.named_parameters():
            if REWARD in name.split("."):
                parameter.requires_grad_(False)
        self.adapters = [_names(layer) for layer in self.layers]
        return SharedScores(self, head.to(self.policy.device).requires_grad_(False))

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute layers in the backward pass, each under the adapter it ran with in the forward pass."""
        self.policy.activation_checkpointing_enable(**kwargs)
        if self.critic is not None:
            self.critic.activation_checkpointing_enable(**kwargs)
        if self.layers:
            for module in self.policy.modules():
                if "_gradient_checkpointing_func" in vars(module):
                    module._gradient_checkpointing_func = self._recompute

    def _recompute(self, function: Any, *args: Any) -> Any:
        name = next(iter(self.layers[0]._active_adapter))

        def run(*inputs: Any) -> Any:
            with self.using(name):
                return function(*inputs)

        return checkpoint(run, *args, use_reentrant=False)

    def critic_parameters(self) -> dict[str, nn.Parameter]:
        """Return the critic's weights by name: adapter or backbone, and head."""
        own = dict(self.named_parameters())
        if self.critic is None:
            return {k: v for k, v in own.items() if k.startswith("head.") or CRITIC in k.split(".")}
        return {k: v for k, v in own.items() if k.startswith(("head.", "critic."))}

    def train_critic(self) -> None:
        """Mark the critic as trained; PEFT leaves an adapter that is not active frozen."""
        for parameter in self.critic_parameters().values():
            parameter.requires_grad_(True)

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None, is_main_process: bool = True
    ) -> None:
        """Write the policy into the folder as any model or adapter, and the critic into critic/ beside it.

        Args:
            folder: where.
            state_dict: of the whole module, gathered from a sharded one.
            is_main_process: others write nothing.
        """
        state = self.state_dict() if state_dict is None else state_dict
        policy = {k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")}
        only = {"selected_adapters": [POLICY]} if self.layers else {}
        self.policy.save_pretrained(folder, state_dict=policy, is_main_process=is_main_process, **only)
        if is_main_process:
            weights = {name: state[name].contiguous().cpu() for name in self.critic_parameters()}
            file = Path(folder) / CRITIC_FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(weights, file)

    def load_critic(self, folder: str | Path) -> None:
        """Read the critic that `save_pretrained` wrote; raises InputError when it is missing or another's."""
        file = Path(folder) / CRITIC_FILE
        if not file.is_file():
            raise InputError(
                f"no {CRITIC_FILE} in {folder}",
                where="--resume_from_checkpoint",
                why="without its critic the run would go on as another one",
                fix="start again",
            )
        weights, own = load_file(file), self.critic_parameters()
        if weights.keys() != own.keys() or any(weights[name].shape != own[name].shape for name in own):
            raise InputError(f"{file} is the critic of another model", where="--resume_from_checkpoint")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        self.train_critic()


def policy_of(model: nn.Module) -> nn.Module:
    """Return the policy of an `ActorCritic`, and any other model as it is."""
    return model.policy if isinstance(model, ActorCritic) else model


def _aligned(values: torch.Tensor) -> torch.Tensor:
    """Put a column of zeros in front: the first token is predicted by nothing."""
    return nn.functional.pad(values, (1, 0))


def _names(layer: nn.Module) -> set[str]:
    """Return the adapters that have weights in a layer (and other parts of its weights' names)."""
    return {part for name, _ in layer.named_parameters() for part in name.split(".")}


def build(
    policy: PreTrainedModel | PeftModel, critic_model: str | None, continued: bool, reference: bool
) -> ActorCritic:
    """Put a critic beside a policy, and a reference that does not move.

    Args:
        policy: the model, or the PeftModel whose adapter "default" is trained.
        critic_model: a reward model the critic starts from, full or an adapter on the policy's base; None: the policy.
        continued: the adapter comes from an earlier training, so the reference is a copy of it and not the base.
        reference: whether a reference is needed (kl_coef above 0).

    Raises:
        InputError: the adapter cannot be switched, or the reward model is of another base.
    """
    shared = isinstance(policy, PeftModel)
    critic_model = fetch(critic_model) if critic_model else None
    if shared:
        _refuse_unswitchable(policy)
    if shared and continued and reference:
        _copy_adapter(policy, REFERENCE)
    frozen = copy.deepcopy(policy).requires_grad_(False).eval() if reference and not shared else None
    width = policy.config.get_text_config().hidden_size
    head, critic = nn.Linear(width, 1), None
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if critic_model and shared and is_adapter(critic_model):
        head = _adapter_from(policy, critic_model, CRITIC, "--critic_model")
    elif critic_model:
        critic, head = _backbone_from(critic_model, policy)
    elif shared:
        _copy_adapter(policy, CRITIC)
    else:
        critic = copy.deepcopy(policy.base_model)
    result = ActorCritic(policy, critic, head)
    result.reference = frozen
    result.train_critic()
    return result


def _refuse_unswitchable(policy: PeftModel) -> None:
    config = policy.peft_config[POLICY]
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise InputError(
            f"PPO does not work with {config.peft_type.value.lower()}",
            where="--peft",
            why="policy, critic and reference share one backbone whose layers switch their adapters, and this method "
            "works in front of the layers",
            fix="--peft lora",
        )


def _critic_config(config: peft.PeftConfig) -> peft.PeftConfig:
    """Return the configuration of an adapter without what the critic has no use for: tokens and heads."""
    config = copy.deepcopy(config)
    config.task_type, config.inference_mode = "CAUSAL_LM", False
    for name in {"modules_to_save", "trainable_token_indices"} & vars(config).keys():
        setattr(config, name, None)
    return config


def _copy_adapter(policy: PeftModel, name: str) -> None:
    """Add an adapter that starts as the policy's."""
    config = policy.peft_config[POLICY]
    try:
        policy.add_adapter(name, _critic_config(config) if name == CRITIC else copy.deepcopy(config))
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"PPO does not work with {config.peft_type.value.lower()}",
            where="--peft",
            why=f"policy and critic share one backbone, each with an adapter of its own: {str(error).rstrip('.')}",
            fix="--peft lora",
        ) from error
    own = dict(policy.named_parameters())
    with torch.no_grad():
        for key, value in own.items():
            target = ".".join(name if part == POLICY else part for part in key.split("."))
            if POLICY in key.split(".") and target in own:
                own[target].copy_(value)
                own[target].requires_grad_(False)


def _same_base(policy: PeftModel, path: str | Path) -> bool:
    """Say whether an adapter is of the policy's base and method, and so can be switched to."""
    base, own = Path(find_base(path)), Path(policy.get_base_model().name_or_path)
    return base.resolve() == own.resolve() and adapter_config(path).peft_type == policy.peft_type


def _adapter_from(policy: PeftModel, path: str, name: str, flag: str) -> nn.Linear:
    """Add the adapter of a reward model under a name, and return its score head."""
    config = adapter_config(path)
    if not _same_base(policy, path):
        own = policy.get_base_model().name_or_path
        raise InputError(
            f"the reward model {path} is a {config.peft_type.value.lower()} adapter on {find_base(path)}",
            where=flag,
            why=f"the critic shares the policy's backbone, {own}, and its method, {policy.peft_type.value.lower()}",
            fix="train the reward model with the same --peft on the same base, or give a full reward model",
        )
    policy.add_adapter(name, _critic_config(config))
    weights = peft.load_peft_weights(path, device="cpu")
    scores = {key: weights.pop(key) for key in list(weights) if "score" in key.split(".")}
    report = peft.set_peft_model_state_dict(policy, weights, adapter_name=name)
    if report.unexpected_keys or len(scores) != 1:
        names = ", ".join([*report.unexpected_keys, *scores][:3]) or "no score head"
        raise InputError(f"the reward model {path} does not fit the policy: {names}", where=flag)
    return _head(next(iter(scores.values())))


def _backbone_from(path: str, policy: PreTrainedModel | PeftModel) -> tuple[nn.Module, nn.Linear]:
    """Return backbone and head of a full reward model, both to be trained."""
    if is_adapter(path):
        raise InputError(
            f"{path} is an adapter, and the policy is trained in full",
            where="--critic_model",
            fix="merge it (recipes/merge.py), or train with --peft",
        )
    model, new = load_base(path, "sequence", dtype=policy.dtype)
    if new or model.config.num_labels != 1 or model.config.vocab_size != policy.config.get_text_config().vocab_size:
        raise InputError(
            f"{path} is no reward model for this policy",
            where="--critic_model",
            why="it has no head of one score" if new or model.config.num_labels != 1 else "its vocabulary is another",
            fix="give what recipes/reward.py left",
        )
    return model.base_model.requires_grad_(True), _head(model.score.weight.data)


def _head(weight: torch.Tensor) -> nn.Linear:
    """Return a value head that starts as a score head (1, width) without bias."""
    head = nn.Linear(weight.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(weight.float())
        nn.init.zeros_(head.bias)
    return head
