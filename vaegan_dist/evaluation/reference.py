"""What generated pictures are compared with: features of real ones, and how far real ones are from each other."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vaegan_dist.evaluation.features import FeatureNetwork
from vaegan_dist.evaluation.metrics import Collector, FeatureSet, frechet_distance
from vaegan_dist.evaluation.ranks import Ranks


class Pictures(Protocol):
    """A batch of a data set."""

    @property
    def images(self) -> Tensor:
        """uint8 [b, C, H, W]"""

    @property
    def ids(self) -> Tensor:
        """int64 [b], numbers from 0"""

    @property
    def labels(self) -> Tensor | None:
        """int64 [b]"""


Batches = Callable[[], Iterable[tuple[Pictures, Tensor]]]
"""begins a pass over this rank's part: batches, each with a mask, False where a row only fills up"""


@dataclass(frozen=True)
class Reference:
    """Real pictures in a feature network."""

    features: FeatureNetwork
    real: FeatureSet
    floor: float
    """FID of real against real pictures"""
    floor_pictures: tuple[int, int]
    """how many of them"""
    floor_of: str
    """which ones"""
    labels: Tensor
    """pictures of each class, as a classifier sees them, float64 [classes]; empty without one"""

    def describe(self) -> dict[str, Any]:
        """What every FID is reported with."""
        return {
            "network": self.features.name,
            "hash": self.features.hash,
            "dims": self.features.dim,
            "accuracy": self.features.accuracy,
            "real_pictures": self.real.count,
            "fid_floor": self.floor,
            "fid_floor_pictures": list(self.floor_pictures),
            "fid_floor_of": self.floor_of,
        }


def measure_reference(
    features: FeatureNetwork,
    real: Batches,
    other: Batches | None,
    *,
    pictures: int,
    keep: int,
    ranks: Ranks,
    pulse: Callable[[], None] = lambda: None,
) -> Reference:
    """Features of the real pictures and the floor; a collective.

    Args:
        real: a pass over this rank's part of the real pictures; those numbered `pictures` and above serve the floor
            alone.
        other: real pictures of another split for the floor.
        pictures: how many of `real` are the reference.
        keep: pictures whose features are kept whole.
    """
    sets = {name: Collector(features.dim, keep if name == "real" else 0, ranks.device) for name in ("real", "rest")}
    halves = {name: Collector(features.dim, 0, ranks.device) for name in ("even", "odd")}
    counts = torch.zeros(features.classes, dtype=torch.float64, device=ranks.device)
    for batch, mask in real():
        pulse()
        ids = batch.ids[mask]
        found = features(batch.images[mask].to(ranks.device)) if len(ids) else None
        if found is None:
            continue
        inside = ids < pictures
        parts = {"real": inside, "rest": ~inside, "even": inside & (ids % 2 == 0), "odd": inside & (ids % 2 == 1)}
        for name, collector in (sets | halves).items():
            chosen = parts[name]
            collector.add(found[chosen.to(found.device)], ids[chosen])
        counts += features.count(found[inside.to(found.device)])
    for batch, mask in other() if other else ():
        pulse()
        ids = batch.ids[mask]
        if len(ids):
            sets["rest"].add(features(batch.images[mask].to(ranks.device)), ids)
    done = sets["real"].finish(ranks)
    if int(ranks.sum(sets["rest"].count)) > features.dim // 8:
        pair = (done, sets["rest"].finish(ranks))
        floor_of = "the pictures of the other split" if other else "further pictures of the split"
    else:
        pair = (halves["even"].finish(ranks), halves["odd"].finish(ranks))
        floor_of = "halves of the pictures"
    floor = frechet_distance(*pair)
    return Reference(features, done, floor, (pair[0].count, pair[1].count), floor_of, ranks.sum(counts))
