"""What a change of losses is worth to Birdie's controller of the mixture."""

from __future__ import annotations

import math

from torch import Tensor


def reward(old: Tensor, new: Tensor) -> Tensor:
    """Losses (...) in nats before and after an action -> rewards (...) in [-1, 1], positive when the loss fell.

        r = (new - old) / old,   reward = -100 e tanh(e sqrt(new old) r^3), clipped; 0 where it is not a number

    The sign is the released code's; the paper's text has the change and the minus both the other way round.
    Source: Blouir et al. 2024 (arXiv 2411.01030), section 3.3; samblouir/birdie.
    """
    r = (new - old) / (old + 1e-8)
    value = -100 * math.e * (math.e * (new * old).sqrt() * r**3).tanh()
    return value.clamp(-1, 1).nan_to_num(0.0)
