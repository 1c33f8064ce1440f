"""The adaptive weight of the adversarial loss (Esser et al. 2021, arXiv 2012.09841, equation 7)."""

import torch
import torch.distributed as dist
from torch import Tensor

EPS = 1e-4  # the reference implementation's


def balance_of(reconstruction: Tensor, adversarial: Tensor, largest: float) -> Tensor:
    """min(|grad rec| / (|grad adv| + EPS), largest), a scalar without graph.

    Args:
        reconstruction, adversarial: gradients in the decoder's last layer, of this rank's part of the batch. They are
            averaged over all ranks first: each rank by its own ratio would train on a loss that is nobody's, and
            another number of ranks on another one.
    """
    both = torch.stack([reconstruction, adversarial]).detach()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(both)
        both /= dist.get_world_size()
    norms = torch.linalg.vector_norm(both.flatten(1), dim=1)
    ratio: Tensor = (norms[0] / (norms[1] + EPS)).clamp(max=largest)
    return ratio
