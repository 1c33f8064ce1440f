"""Augmentation of training batches: mirrored and cropped pictures, on the device, the whole batch at once.

What happens to a picture is a function of (seed, epoch, sample id): not of the rank that reads it, of what else is in
its batch, or of a restart.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from vaegan_dist.data.batch import Batch
from vaegan_dist.seeding import derive_seed

DRAWS = 4  # flip, area, top, left


@dataclass(frozen=True)
class Augmentation:
    """Random mirroring and random resized crops.

    Args:
        seed: of the run.
        flip: mirror a picture, left and right, with probability 1/2.
        random_crop: smallest share of a picture's area that is cut out, in the picture's own shape and at a uniformly
            drawn place, and enlarged to the whole by bilinear interpolation; the share is uniform up to 1. 1: no crop.
        device: where it is done.
    """

    seed: int
    flip: bool
    random_crop: float
    device: torch.device

    def __call__(self, batch: Batch, epoch: int) -> Tensor:
        """The batch's pictures, uint8 [b, C, H, W] on the device; untouched where nothing is to be done."""
        images = batch.images
        if not self.flip and self.random_crop == 1:
            return images
        draws = uniforms(self.seed, epoch, batch.ids.numpy())
        images = images.to(self.device, non_blocking=True)
        mirrored = self._send(draws[:, 0] < 0.5) if self.flip else None
        if mirrored is not None:
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if self.random_crop < 1:
            side = np.sqrt(self.random_crop + (1 - self.random_crop) * draws[:, 1])
            corner = draws[:, 2:4] * (1 - side)[:, None]
            images = crop_resized(images, self._send(np.column_stack([side, corner]).astype(np.float32)))
        return images

    def _send(self, values: npt.NDArray[np.generic]) -> Tensor:
        """A small array on the device, without waiting for it."""
        tensor = torch.from_numpy(values)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def crop_resized(images: Tensor, boxes: Tensor) -> Tensor:
    """Cut a box out of each picture and enlarge it to the picture's size, bilinearly, pixels being little squares.

    Args:
        images: uint8 [b, C, H, W].
        boxes: float32 [b, 3]: side, top and left, as shares of height and width.

    Returns:
        uint8 [b, C, H, W], rounded to the nearest.
    """
    side, top, left = boxes.unbind(1)
    zero = torch.zeros_like(side)
    # From the unit square of the output, -1 to 1, to the box in that of the input.
    columns = torch.stack([side, zero, 2 * left + side - 1], 1)
    rows = torch.stack([zero, side, 2 * top + side - 1], 1)
    shape = list(images.shape)
    grid = functional.affine_grid(torch.stack([columns, rows], 1), shape, align_corners=False)
    sampled = functional.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.round_().clamp_(0, 255).to(torch.uint8)


def uniforms(seed: int, epoch: int, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Draws in [0, 1) for each sample of an epoch: float64 [b, DRAWS], the same for ever.

    A counter hashed by the finaliser of SplitMix64 (Steele et al. 2014): every sample its own counter, so that nothing
    depends on which samples are drawn together.
    """
    words = np.repeat(ids.astype(np.uint64)[:, None], DRAWS, axis=1)
    words *= np.uint64(DRAWS)
    words += np.arange(1, DRAWS + 1, dtype=np.uint64)
    words *= np.uint64(0x9E3779B97F4A7C15)
    words += np.uint64(derive_seed(seed, "augment", epoch))
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    draws: npt.NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return draws
