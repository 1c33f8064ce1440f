"""A batch of pictures on its way to the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vaegan_dist.data.decode import Pixels

Ids = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Pictures with their ids."""

    images: Tensor
    """uint8 [b, C, H, W], in channels-last memory order"""
    ids: Tensor
    """int64 [b]: places in the manifest; a substitute carries the id of what it stands for"""
    labels: Tensor | None
    """int64 [b]; None where the data set has no classes"""

    @classmethod
    def of(cls, pixels: Pixels, ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64] | None) -> "Batch":
        """A batch around arrays, pixels `[b, H, W, C]`, without a copy."""
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return cls(images, torch.from_numpy(ids), None if labels is None else torch.from_numpy(labels))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, in the same memory order."""
        pixels = self.images.permute(0, 2, 3, 1).pin_memory().permute(0, 3, 1, 2)
        return Batch(pixels, self.ids.pin_memory(), None if self.labels is None else self.labels.pin_memory())
