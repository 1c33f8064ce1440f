"""The gate that holds back a player who is too far ahead (the code of Larsen et al. 2016, arXiv 1512.09300).

With c_real and c_fake the cross-entropies of the discriminator's judgement of the global batch (ln 2 = 0.69 each when
it guesses), e the equilibrium and m the margin:

    hold the discriminator   if c_real < e - m  or  c_fake < e - m        it knows too well
    hold the decoder         if c_real > e + m  or  c_fake > e + m        it is believed too readily
    hold neither             if that would hold both

A network that is held back takes no optimiser step. It was computed: the decision is made of this step's logits, on the
device and after all ranks have added up theirs, so that nothing waits for the host and no rank decides for itself.
"""

import torch
from torch import Tensor

ADVERSARIAL = ("minimax", "non_saturating")  # losses whose logits are those of a cross-entropy


def held_back(real: Tensor, fake: Tensor, equilibrium: float, margin: float) -> tuple[Tensor, Tensor]:
    """Flags 0 or 1 (decoder, discriminator) from both cross-entropies over all ranks, scalars; nan holds nobody."""
    least, most = torch.minimum(real, fake), torch.maximum(real, fake)
    discriminator, decoder = least < equilibrium - margin, most > equilibrium + margin
    both = discriminator & decoder
    return (decoder & ~both).to(torch.float32), (discriminator & ~both).to(torch.float32)
