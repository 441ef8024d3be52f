"""The formulas of PPO, a few lines each: KL estimators, rewards per token, GAE, whitening, the loss terms.

Every tensor is (rows, tokens), aligned with the tokens: column t holds what belongs to token t (its log-probability
given the tokens before, the value of the state before it). `mask` is 1 at the tokens that were sampled, which stand in
one piece in each row. Nothing here knows a model or a process. Sources: PPO (arXiv:1707.06347), GAE (arXiv:1506.02438),
KL-shaped rewards and the adaptive coefficient (arXiv:1909.08593), estimators (joschu.net/blog/kl-approx.html).
"""

import math
from dataclasses import dataclass

import torch

KL_ESTIMATORS = ("k1", "k3")


def kl_per_token(log_probs: torch.Tensor, reference: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    """Estimate KL(policy || reference) at each sampled token; same shape.

    k1 is log(p/q): unbiased, of either sign. k3 is q/p - 1 - log(q/p): unbiased as well, never negative, less variance.

    Raises:
        ValueError: another name.
    """
    ratio = log_probs - reference
    if estimator == "k1":
        return ratio
    if estimator == "k3":
        return torch.expm1(-ratio) + ratio
    raise ValueError(f"no KL estimator {estimator!r}; there are {', '.join(KL_ESTIMATORS)}")


def token_rewards(kl: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """Return -kl_coef * kl at each sampled token, the answer's score (rows,) added at its last one."""
    rewards = -kl_coef * kl * mask
    places = torch.arange(mask.shape[1], device=mask.device) * mask.long()
    last = places.argmax(1, keepdim=True)
    some = mask.any(1, keepdim=True)
    return rewards.scatter_add(1, last, (scores[:, None] * some).to(rewards.dtype))


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages and returns: A_t = d_t + gamma lam A_{t+1} with d_t = r_t + gamma V_{t+1} - V_t.

    The value after an answer's last token is 0: a cut answer counts as one that ended.
    """
    mask = mask.to(values.dtype)
    values = values * mask
    ahead = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    deltas = (rewards + gamma * ahead - values) * mask
    advantages, running = torch.zeros_like(deltas), torch.zeros_like(deltas[:, 0])
    for t in range(deltas.shape[1] - 1, -1, -1):
        running = (deltas[:, t] + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def moments(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return [count, sum, sum of squares] of the masked values, (3,) in float64; those of processes add up."""
    chosen = values.double() * mask
    return torch.stack([mask.sum().double(), chosen.sum(), (chosen**2).sum()])


def mean_and_variance(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and (population) variance from `moments`; zeros where nothing was counted."""
    count, total, squares = sums
    mean = total / count.clamp(min=1)
    return mean, (squares / count.clamp(min=1) - mean**2).clamp(min=0)


def whiten(values: torch.Tensor, mask: torch.Tensor, sums: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Bring the masked values to variance 1 and, with `shift_mean`, mean 0; 0 outside the mask.

    Args:
        values: of this process.
        mask: of this process.
        sums: `moments` of all processes together.
        shift_mean: without it the mean stays where it was.
    """
    mean, variance = mean_and_variance(sums)
    result = (values.double() - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        result = result + mean
    return (result * mask).to(values.dtype)


def policy_loss(
    log_probs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -min(rho A, clip(rho, 1-e, 1+e) A) per token with rho = p/p_old, and where the clipping bites (0 or 1)."""
    ratio = torch.exp(log_probs - old)
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(free, clipped), (clipped > free).to(ratio.dtype)


def value_loss(
    values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return max((V-R)^2, (clip(V, V_old-e, V_old+e)-R)^2) / 2 per token, and where the clipping bites (0 or 1)."""
    near = old + (values - old).clamp(-cliprange, cliprange)
    free, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(free, clipped), (clipped > free).to(values.dtype)


def explained_variance(errors: torch.Tensor, returns: torch.Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns) from the `moments` of each: 1 knows all, 0 knows the mean.

    0 where the returns do not vary.
    """
    variance = mean_and_variance(returns)[1]
    return float(1 - mean_and_variance(errors)[1] / variance) if variance > 1e-12 else 0.0


def repetition(tokens: list[int], n: int = 4) -> float:
    """Return the share of an answer's n-grams that stood in it before, from 0 to 1; 0 for one shorter than n + 1."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass
class KLController:
    """The coefficient of the KL penalty; with a target it moves (Ziegler et al. 2019, section 2.2).

    Attributes:
        coef: as it is now. target: KL per answer in nats to be kept, or None for a fixed coefficient. horizon: answers
            over which the coefficient moves by a factor of about e^0.2 at most.
    """

    coef: float
    target: float | None = None
    horizon: float = 10_000

    def update(self, kl: float, answers: int) -> None:
        """Move the coefficient after a rollout of so many answers with this mean KL per answer."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * answers / self.horizon


@dataclass
class RunningStd:
    """Mean and spread of all scores so far (Chan's way of joining batches)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared differences from the mean

    def update(self, scores: torch.Tensor) -> None:
        """Add a batch (n,) of scores, that of all processes."""
        scores = scores.double()
        n, mean = scores.numel(), float(scores.mean())
        total, delta = self.count + n, mean - self.mean
        self.squares += float(((scores - mean) ** 2).sum()) + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation; 1 where the scores do not vary."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > 1e-6 else 1.0
