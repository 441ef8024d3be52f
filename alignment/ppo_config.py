"""The settings of PPO: TRL's GRPOConfig for everything about sampling, and what PPO adds under TRL 1.12's names."""

import dataclasses
from dataclasses import dataclass, field

from trl import GRPOConfig

from alignment.errors import InputError
from alignment.ppo_math import KL_ESTIMATORS

# What GRPOConfig has for its own objective, and where PPO has the like.
_OF_GRPO = {
    "beta": "kl_coef", "epsilon": "cliprange", "epsilon_high": "cliprange", "delta": "cliprange", "loss_type": "",
    "scale_rewards": "reward_scaling", "importance_sampling_level": "", "top_entropy_quantile": "",
    "use_adaptive_entropy": "entropy_coef", "off_policy_mask_threshold": "max_approx_kl",
    "mask_truncated_completions": "missing_eos_penalty", "sync_ref_model": "", "use_bias_correction_kl": "kl_estimator",
    "multi_objective_aggregation": "reward_weights",
}  # fmt: skip
_BOUNDS = {
    "kl_coef": (0, None), "cliprange": (1e-9, None), "cliprange_value": (1e-9, None), "vf_coef": (0, None),
    "gamma": (0, 1), "lam": (0, 1), "missing_eos_penalty": (0, None), "reward_clip": (1e-9, None),
    "target_kl": (1e-9, None), "kl_horizon": (1e-9, None), "max_approx_kl": (1e-9, None), "ptx_coef": (0, None),
    "critic_learning_rate": (0, None), "num_generations": (1, None), "num_iterations": (1, None),
    "temperature": (1e-9, None), "max_completion_length": (1, None),
}  # fmt: skip


class _Alone(int):
    """The number 1, which passes GRPO's test for groups of two: PPO compares an answer with the critic's forecast."""

    def __lt__(self, other: int) -> bool:
        return False


@dataclass
class PPOConfig(GRPOConfig):
    """Settings of `PPOTrainer`; fields of GRPOConfig keep their names and meaning unless they are of GRPO's objective.

    A rollout is `generation_batch_size` answers (or `steps_per_generation` batches); `num_iterations` is the number of
    epochs over it (TRL 1.12: num_ppo_epochs); a minibatch is what one update sees; `entropy_coef` is the bonus.
    """

    num_generations: int = field(default=1, metadata={"help": "Answers per prompt; PPO needs no more than one."})
    num_iterations: int = field(default=4, metadata={"help": "Epochs over each rollout."})
    disable_dropout: bool = field(default=True, metadata={"help": "Dropout would make the ratio start off 1."})
    kl_coef: float = field(default=0.05, metadata={"help": "Pull towards the reference; 0 needs no reference."})
    kl_estimator: str = field(default="k1", metadata={"help": "k1 (unbiased) or k3 (never negative)."})
    target_kl: float | None = field(
        default=None, metadata={"help": "KL per answer (nats) that kl_coef is moved to keep; none: kl_coef is fixed."}
    )
    kl_horizon: float = field(default=10_000, metadata={"help": "Answers over which kl_coef moves by e^0.2 at most."})
    max_approx_kl: float | None = field(
        default=None, metadata={"help": "End a rollout's updates when the policy is this far (nats a token) from it."}
    )
    cliprange: float = field(default=0.2, metadata={"help": "How far the probability ratio counts."})
    cliprange_value: float = field(default=0.2, metadata={"help": "How far a value may move from the rollout's."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda: 1 trusts rewards, 0 the critic."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Bring the rewards per token to variance 1."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score of an answer that does not end by itself."}
    )
    reward_scaling: bool = field(default=False, metadata={"help": "Divide scores by their running deviation."})
    reward_clip: float | None = field(default=None, metadata={"help": "Scores are cut at plus and minus this."})
    ptx_coef: float = field(default=0.0, metadata={"help": "Weight of the language model loss on text_data."})
    text_data: str | None = field(
        default=None, metadata={"help": "Plain text for ptx_coef: what the policy must not forget (rows of text)."}
    )
    critic_model: str | None = field(
        default=None, metadata={"help": "Reward model the critic starts from; none: it starts from the policy."}
    )
    critic_learning_rate: float | None = field(default=None, metadata={"help": "None: as learning_rate."})
    num_completions_log_steps: int = field(
        default=0, metadata={"help": "Every so many updates show and keep (completions/) sampled answers; 0: never."}
    )

    def __post_init__(self):
        """Check the values, then let TRL complete them.

        Raises:
            InputError: a value out of its bounds, or a setting that belongs to GRPO's objective.
        """
        for name, (low, high) in _BOUNDS.items():
            value = vars(self)[name]
            if value is not None and not (low <= value and (high is None or value <= high)):
                wanted = f"{'above 0' if low == 1e-9 else f'{low} or more'}" + (f", at most {high}" if high else "")
                raise InputError(f"{name} is {value}", where=f"--{name}", fix=wanted)
        if self.kl_estimator not in KL_ESTIMATORS:
            raise InputError(
                f"no KL estimator {self.kl_estimator!r}", where="--kl_estimator", fix=" or ".join(KL_ESTIMATORS)
            )
        if self.target_kl is not None and not self.kl_coef:
            raise InputError(
                "target_kl with kl_coef 0",
                where="--target_kl",
                why="the coefficient is moved by factors",
                fix="--kl_coef 0.05",
            )
        self._refuse_grpo()
        if alone := self.num_generations == 1:
            self.num_generations = _Alone(1)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained weight is used in each step
        super().__post_init__()
        if alone:
            self.num_generations = 1
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise InputError(
                f"a rollout of {self.steps_per_generation} batches is no whole number of updates of "
                f"{self.gradient_accumulation_steps} batches",
                where="--steps_per_generation, --gradient_accumulation_steps",
                fix="make the first a multiple of the second",
            )

    def _refuse_grpo(self) -> None:
        """Raise InputError for a setting of GRPO's objective, which would be read by nothing."""
        defaults = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
        for name, ours in _OF_GRPO.items():
            if name in defaults and vars(self)[name] != defaults[name]:
                raise InputError(
                    f"{name} belongs to GRPO",
                    where=f"--{name}",
                    why="PPO's objective has no such part, and it would change nothing",
                    fix=f"--{ours}" if ours else "leave it out, or take recipes/grpo.py",
                )
