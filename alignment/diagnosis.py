"""What the curves of a reinforcement learning run say, in plain words: rules over the last logged numbers."""

from typing import Any

MIN_POINTS = 4


def diagnose(history: list[dict[str, Any]], window: int = 20) -> list[str]:
    """Return the likely causes of trouble, one sentence each; an empty list when nothing stands out.

    Args:
        history: `trainer.state.log_history`: dictionaries with "reward", "kl", "entropy", "answer_length", "ended",
            "repetition", "explained_variance", "kl_coef", "clip_share" where they were logged.
        window: how many of the last entries are looked at; fewer than four say nothing.
    """
    entries = [entry for entry in history if "reward" in entry and "entropy" in entry][-window:]
    if len(entries) < MIN_POINTS:
        return []
    ends = {name: _ends(entries, name) for name in set().union(*entries)}
    rules = (_length, _repeats, _entropy, _divergence, _critic, _endless, _clipped)
    return [text for rule in rules if (text := rule(ends))]


def _ends(entries: list[dict[str, Any]], name: str) -> tuple[float, float] | None:
    """Return the means of the first and the last third of a number's course."""
    values = [entry[name] for entry in entries if isinstance(entry.get(name), int | float)]
    third = len(values) // 3
    if len(values) < MIN_POINTS or not third:
        return None
    return sum(values[:third]) / third, sum(values[-third:]) / third


def _length(ends: dict) -> str:
    reward, length = ends.get("reward"), ends.get("answer_length")
    if not reward or not length or reward[1] <= reward[0] or length[1] < 1.5 * max(length[0], 1):
        return ""
    return (
        f"the reward rises together with the length ({length[0]:.0f} to {length[1]:.0f} tokens): it may pay for length "
        "and not for what is said; read the sampled answers, and let the reward subtract length"
    )


def _repeats(ends: dict) -> str:
    repeated = ends.get("repetition")
    if not repeated or repeated[1] < 0.3 or repeated[1] < 1.5 * repeated[0]:
        return ""
    return (
        f"{repeated[1]:.0%} of the answers' n-grams are repetitions: the reward pays for saying it again; "
        "let it subtract repetition, or raise kl_coef"
    )


def _entropy(ends: dict) -> str:
    entropy = ends.get("entropy")
    if not entropy or entropy[1] > 0.25 * entropy[0] or entropy[0] < 0.05:
        return ""
    return (
        f"the entropy collapsed ({entropy[0]:.2f} to {entropy[1]:.2f} nats a token): nothing new is tried any more; "
        "raise entropy_coef or kl_coef, or lower the learning rate"
    )


def _divergence(ends: dict) -> str:
    kl, reward = ends.get("kl"), ends.get("reward")
    if not kl or kl[1] < 10 or kl[1] < 2 * kl[0]:
        return ""
    better = bool(reward) and reward[1] > reward[0]
    return (
        f"the KL from the reference is out of hand ({kl[0]:.1f} to {kl[1]:.1f} nats an answer"
        + (", while the reward rises: what is rewarded may not be language any more" if better else "")
        + "); raise kl_coef, set target_kl, or lower the learning rate"
    )


def _critic(ends: dict) -> str:
    explained = ends.get("explained_variance")
    if not explained or explained[1] > 0.05:
        return ""
    return (
        f"the critic is not learning (explained variance {explained[1]:.2f}): the advantages are little more than the "
        "reward itself; raise critic_learning_rate or vf_coef, or let it start from the reward model (critic_model)"
    )


def _endless(ends: dict) -> str:
    ended = ends.get("ended")
    if not ended or ended[1] > 0.2:
        return ""
    return (
        f"only {ended[1]:.0%} of the answers end by themselves: they are cut and scored as they are; raise "
        "max_completion_length, set missing_eos_penalty, or start from a model that stops (recipes/sft.py)"
    )


def _clipped(ends: dict) -> str:
    share = ends.get("clip_share")
    if not share or share[1] < 0.4:
        return ""
    return f"{share[1]:.0%} of the tokens are clipped: the updates are too large; lower learning_rate or num_iterations"
