"""Pictures of the latent space: ways between two latents, single units turned, nearest pictures of a data set."""

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vaegan_dist.evaluation.pictures import grid, to_uint8
from vaegan_dist.evaluation.reference import Batches

Decode = Callable[[Tensor], Tensor]
REACH: Final = 3.0  # standard deviations of the prior


def interpolations(decode: Decode, starts: Tensor, ends: Tensor, steps: int) -> Image.Image:
    """A row for each pair: pictures on the way from one latent to the other.

    On a great circle and not a straight line, whose middle would be shorter than latents of the prior are
    (Shoemake 1985; White 2016, arXiv 1609.04468).

    Args:
        starts, ends: `[n, *latent]`.
        steps: pictures per row, both ends included.
    """
    shares = torch.linspace(0, 1, steps)
    rows = [slerp(start, end, share) for start, end in zip(starts, ends, strict=True) for share in shares]
    return grid(to_uint8(decode(torch.stack(rows))), columns=steps)


def slerp(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """The point `share` of the way on the great circle through two latents; a straight line where they are parallel."""
    cosine = torch.nn.functional.cosine_similarity(start.flatten(), end.flatten(), dim=0).clamp(-1, 1)
    angle = cosine.double().arccos()
    if angle.sin() < 1e-6:
        return torch.lerp(start, end, share)
    before, after = ((1 - share) * angle).sin() / angle.sin(), (share * angle).sin() / angle.sin()
    return before.to(start) * start + after.to(end) * end


def traversals(decode: Decode, z: Tensor, units: Sequence[int], steps: int) -> Image.Image:
    """A row for each unit: the picture of one latent, that unit going from -3 to 3.

    Args:
        z: `[*latent]`. A unit of a spatial latent is a channel, and its mean moves.
    """
    values = torch.linspace(-REACH, REACH, steps)
    rows = []
    for unit in units:
        for value in values:
            turned = z.clone()
            turned[unit] += value - turned[unit].mean()
            rows.append(turned)
    return grid(to_uint8(decode(torch.stack(rows))), columns=steps)


@torch.no_grad()
def nearest(
    samples: Tensor, pictures: Batches, count: int, pulse: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """The pictures of a data set that are closest to samples, by squared distance of pixels.

    Args:
        samples: uint8 `[n, C, H, W]`.
        pictures: a pass over the data set.

    Returns:
        uint8 `[n, count, C, H, W]`, closest first, and their root mean squared distances on [0, 1], `[n, count]`.
    """
    wanted = samples.float().flatten(1)
    best = torch.full((len(samples), count), torch.inf)
    found = torch.zeros(len(samples), count, *samples.shape[1:], dtype=torch.uint8)
    for batch, mask in pictures():
        pulse()
        some = batch.images[mask]
        distances = torch.cdist(wanted, some.float().flatten(1))
        everything = torch.cat([best, distances], 1)
        best, places = everything.topk(min(count, everything.shape[1]), largest=False)
        candidates = torch.cat([found, some.unsqueeze(0).expand(len(samples), *some.shape)], 1)
        found = torch.stack([row[place] for row, place in zip(candidates, places, strict=True)])
    return found, best / (255 * wanted.shape[1] ** 0.5)


def neighbour_sheet(samples: Tensor, neighbours: Tensor) -> Image.Image:
    """A row for each sample: itself, then its neighbours."""
    rows = torch.cat([samples.unsqueeze(1), neighbours], 1)
    return grid(rows.flatten(0, 1), columns=rows.shape[1])


def rate_distortion(points: Iterable[tuple[str, float, float]]) -> Image.Image:
    """Distortion over rate of one or more evaluations, in nats per image, with lines of equal evidence bound."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    rates, distortions = [], []
    for label, rate, distortion in points:
        axes.scatter([rate], [distortion], s=36)
        axes.annotate(label, (rate, distortion), textcoords="offset points", xytext=(6, 5), fontsize=8)
        rates.append(rate)
        distortions.append(distortion)
    width = max(max(rates) - min(rates), 0.2 * max(rates), 1.0)
    left, right = max(0.0, min(rates) - 0.5 * width), max(rates) + width
    line = np.linspace(left, right, 2)
    for bound in sorted({round(rate + distortion, 1) for rate, distortion in zip(rates, distortions, strict=True)}):
        axes.plot(line, bound - line, color="0.8", linewidth=0.8, zorder=0)
    axes.set(xlabel="rate, KL(q(z|x) | N(0, I)), nats per image", ylabel="distortion, -log p(x|z), nats per image")
    axes.set_title("on a grey line the evidence bound is the same", fontsize=9)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    return Image.open(buffer)
