"""A reward model that has no backbone of its own: an adapter and a score head on the backbone that PPO trains on."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

REWARD = "reward"


class SharedScores:
    """The adapter "reward" of an `ActorCritic` with its score head, called as the model of a `RewardModel` is."""

    def __init__(self, whole: Any, head: nn.Linear):
        self.whole, self.head, self.config = whole, head, whole.policy.config

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.whole.policy.device

    def to(self, device: torch.device | str) -> "SharedScores":
        """Move the head; the backbone is moved with the policy."""
        self.head.to(device)
        return self

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        """Return logits (rows, 1) at the last token of each row, padded on the right."""
        training = self.whole.policy.training
        self.whole.policy.eval()
        backbone = self.whole.base[0].base_model
        with self.whole.using(REWARD):
            hidden = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        self.whole.policy.train(training)
        rows, last = torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1
        return SequenceClassifierOutput(logits=self.head(hidden[rows, last].float()))
