"""Process supervision: a reward for each step of an answer, and from them an advantage for each token.

Steps are the lines of an answer that are not empty. As in DeepSeekMath (Shao et al. 2024, 4.1.3) the rewards of all
steps of all answers to one prompt are normalised together, and a token's advantage is the sum of those of the steps
that end at or after it.
"""

from collections.abc import Sequence

import torch

EPSILON = 1e-4  # TRL's, in the division by the standard deviation


def step_ends(pieces: Sequence[str]) -> list[int]:
    """Return the place of the last token of each step.

    Args:
        pieces: the text of each token of one answer; control tokens are empty texts. What follows the last step, the
            token that stops the answer, belongs to it.
    """
    ends, line = [], ""
    for place, piece in enumerate(pieces):
        first, *rest = piece.split("\n")
        line += first
        for following in rest:
            if line.strip():
                ends.append(place)
            line = following
    if line.strip():
        ends.append(len(pieces) - 1)
    if ends:
        ends[-1] = len(pieces) - 1
    return ends


def step_advantages(
    rewards: Sequence[Sequence[float]], ends: Sequence[Sequence[int]], width: int, scale: bool = True
) -> torch.Tensor:
    """Return the advantages of the tokens of one group of answers, shape (answers, width).

    Args:
        rewards: of each answer, the rewards of its steps; empty where there are none.
        ends: the place of the last token of each of these steps.
        width: tokens of the longest answer of the batch; behind an answer's last step the advantage is 0.
        scale: divide by the standard deviation over the group, too.
    """
    advantages = torch.zeros(len(rewards), width)
    every = torch.tensor([reward for steps in rewards for reward in steps])
    if not len(every):
        return advantages
    spread = every.std() + EPSILON if scale and len(every) > 1 else 1.0
    for row, (steps, places) in enumerate(zip(rewards, ends, strict=True)):
        for reward, place in zip(steps, places, strict=True):
            advantages[row, : place + 1] += (reward - every.mean()) / spread
    return advantages
