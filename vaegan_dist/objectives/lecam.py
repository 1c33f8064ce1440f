"""LeCam regularisation (Tseng et al. 2021, arXiv 2104.03310): logits stay near what they were on the other side.

    penalty = E (D(x) - a_fake)^2 + E (D(x_f) - a_real)^2           (their equation 6)

with a_real, a_fake moving averages of the logits' means, over all ranks and kinds of fakes. (Their code adds a relu to
both differences.) The averages are part of the run's state: they move once per optimiser step and not in a skipped one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SHAPE = (3,)  # weighted sums of the real and of the fake logits' means, and the weight: an unbiased start


def averages(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a_real, a_fake, and 1 once there is a step behind them, else 0."""
    begun = state[2] > 0
    mean = state[:2] / torch.where(begun, state[2], torch.ones_like(state[2]))
    return mean[0], mean[1], begun.to(state.dtype)


def penalty(state: Tensor, real: Tensor, fakes: Sequence[Tensor]) -> Tensor:
    """The penalty, a mean over images (and patches) and a sum over kinds of fakes; 0 before the first step."""
    at_real, at_fake, begun = (value.to(real.dtype) for value in averages(state))
    total = (real - at_fake).square().mean()
    for fake in fakes:
        total = total + (fake - at_real).square().mean()
    return begun * total


def moved(state: Tensor, means: Tensor, decay: float) -> Tensor:
    """The state after one more step with these means (real, fake) over the global batch."""
    news = torch.cat([means.to(state.dtype), torch.ones_like(state[:1])])
    return decay * state + (1.0 - decay) * news
