"""DiffAugment (Zhao et al. 2020, arXiv 2006.10738): the discriminator sees real and fake pictures altered alike.

Every alteration is a linear map of the picture plus a constant, so that gradients pass through it to the generator, to
any order. What it does to which picture is a function of the noise that the step draws, hence of the place in the run.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vaegan_dist.models.precision import wide, without_autocast
from vaegan_dist.objectives.base import uniform

NUMBERS = 7  # brightness, saturation, contrast, translation (rows, columns), cutout (rows, columns)
TRANSLATION = 0.125  # largest shift, as a share of the side (the paper's appendix B, as the next)
CUTOUT = 0.5  # side of the square
View = Callable[[Tensor], Tensor]


def view_of(policy: Sequence[str], normal: Tensor | None) -> View:
    """What shows pictures `[B, C, H, W]` to the discriminator.

    Args:
        policy: `color`, `translation`, `cutout`; none of them leaves pictures as they are.
        normal: standard normal numbers `[B, NUMBERS]`; not needed without a policy.
    """
    if not policy or normal is None:
        return lambda x: x
    share = uniform(wide(normal)).unbind(1)

    def view(x: Tensor) -> Tensor:
        if "color" in policy:
            x = _color(x, *(part.to(x.dtype).view(-1, 1, 1, 1) for part in share[:3]))
        if "translation" in policy:
            x = _translate(x, share[3], share[4])
        if "cutout" in policy:
            x = x * _kept(x, share[5], share[6])
        return x

    return view


def _color(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Adds -0.5 to 0.5; differences of channels times 0 to 2; differences of pixels times 0.5 to 1.5."""
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2.0 * saturation) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def _translate(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Shift each picture; what comes in is 0, the middle grey."""
    down, right = (_shift_matrix(share, size, x.dtype) for share, size in ((rows, x.shape[2]), (columns, x.shape[3])))
    with without_autocast(x):  # a half precision would round the picture
        return down.unsqueeze(1) @ x @ right.transpose(1, 2).unsqueeze(1)


def _shift_matrix(share: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """`[B, size, size]`: a product with it moves index i to i + shift. Exact, since its entries are 0 and 1."""
    most = int(size * TRANSLATION + 0.5)
    shift = _integer(share, 2 * most + 1) - most
    index = torch.arange(size, device=share.device)
    return (index.view(1, -1, 1) - index.view(1, 1, -1) == shift.view(-1, 1, 1)).to(dtype)


def _kept(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`[B, 1, H, W]`: 0 in a square of half the side around a random pixel, 1 elsewhere."""
    height, width = x.shape[2:]
    cut = _cut(rows, height).unsqueeze(2) & _cut(columns, width).unsqueeze(1)
    return (~cut).to(x.dtype).unsqueeze(1)


def _cut(share: Tensor, size: int) -> Tensor:
    """`[B, size]`: whether an index lies in the square's range."""
    side = int(size * CUTOUT + 0.5)
    first = _integer(share, size + 1 - side % 2).view(-1, 1) - side // 2
    index = torch.arange(size, device=share.device)
    return (index >= first) & (index < first + side)


def _integer(share: Tensor, count: int) -> Tensor:
    """0 to count - 1, each as likely."""
    return (share * count).long().clamp(max=count - 1)
