"""Distances between two sets of pictures in a network's features: FID, KID, precision, recall, density, coverage.

Written here and not taken from torchmetrics, whose FID and KID own the network and would run it once for each metric,
and whose KID draws from the global generator; the tests compare with torch-fidelity's functions, scipy and prdc.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vaegan_dist.evaluation.ranks import Ranks

KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020  # torch-fidelity's
NEIGHBOURS = 5  # Naeem et al. 2020, arXiv 2002.09797
BLOCK = 1024


@dataclass(frozen=True)
class FeatureSet:
    """What is kept of the features of a set of pictures, over all ranks."""

    count: int
    mean: Tensor
    """float64 [d]"""
    covariance: Tensor
    """float64 [d, d], with count - 1"""
    kept: Tensor
    """features of the first pictures, float32 [k, d], the same on every rank"""


class Collector:
    """Gathers the features of one set of pictures, batch by batch, on one rank.

    Args:
        keep: features of pictures with a number below it are kept whole, for what compares pairs.
    """

    def __init__(self, dim: int, keep: int, device: torch.device) -> None:
        self.keep = keep
        self.count = torch.zeros(1, dtype=torch.float64, device=device)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.kept: list[Tensor] = [torch.zeros(0, dim, device=device)]

    def add(self, features: Tensor, numbers: Tensor) -> None:
        """Features `[b, d]` of the pictures with these numbers, int64 `[b]`."""
        wide = features.double()
        self.count += len(wide)
        self.total += wide.sum(0)
        self.outer += wide.T @ wide
        self.kept.append(features[numbers.to(features.device) < self.keep].float())

    def finish(self, ranks: Ranks) -> FeatureSet:
        """The set over all ranks; a collective."""
        count = int(ranks.sum(self.count))
        mean = ranks.sum(self.total) / count
        outer = ranks.sum(self.outer)
        covariance = (outer - count * torch.outer(mean, mean)) / max(count - 1, 1)
        return FeatureSet(count, mean, covariance, ranks.gather(torch.cat(self.kept)))


def frechet_distance(one: FeatureSet, other: FeatureSet) -> float:
    """FID: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, equation 6).

    The trace of the root through symmetric matrices: (S1 S2)^(1/2) has the eigenvalues of (R S2 R)^(1/2), R^2 = S1.
    """
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    trace = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp_min(0).sqrt().sum()
    distance = (one.mean - other.mean).square().sum()
    distance = distance + one.covariance.trace() + other.covariance.trace() - 2 * trace
    return float(distance)


def kernel_distance(real: Tensor, fake: Tensor, subsets: int = KID_SUBSETS) -> tuple[float, float]:
    """KID: mean and deviation of the unbiased MMD^2 over subsets, kernel (x y / d + 1)^3 (Binkowski et al. 2018,
    arXiv 1801.01401).

    Subsets are drawn as torch-fidelity draws them, so that 100 of them give its numbers; with fewer than 1,000 features
    of a kind a subset is all of the smaller set.
    """
    first, second = real.double(), fake.double()
    size = min(KID_SUBSET_SIZE, len(first), len(second))
    draw = np.random.RandomState(KID_SEED)
    values = []
    for _ in range(subsets):
        x = first[torch.from_numpy(draw.choice(len(first), size, replace=False)).to(first.device)]
        y = second[torch.from_numpy(draw.choice(len(second), size, replace=False)).to(second.device)]
        values.append(_mmd(x, y))
    return float(np.mean(values)), float(np.std(values))


def _mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD^2 of two equally large sets (Gretton et al. 2012, lemma 6)."""
    count, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1.0).pow(3)

    within = [(matrix.sum() - matrix.trace()) / (count * (count - 1)) for matrix in (kernel(x, x), kernel(y, y))]
    return float(within[0] + within[1] - 2 * kernel(x, y).mean())


@dataclass(frozen=True)
class Manifold:
    """How two sets of features overlap."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(real: Tensor, fake: Tensor, ranks: Ranks, pulse: Callable[[], None], k: int = NEIGHBOURS) -> Manifold:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), density and coverage
    (Naeem et al. 2020, arXiv 2002.09797), with balls that reach to the k-th neighbour of their own kind.

    Args:
        real, fake: features `[n, d]`, `[m, d]`, the same on every rank; the ranks share the rows.
        pulse: called between blocks, equally often on every rank.
    """
    real, fake = real.double(), fake.double()
    real_radii, fake_radii = (_radii(features, ranks, pulse, k) for features in (real, fake))
    hits = torch.zeros(len(fake), dtype=torch.float64, device=real.device)
    reached = covered = hits.new_zeros(())
    for numbers in ranks.steps(len(real), BLOCK * ranks.world_size):
        pulse()
        mine = slice(numbers.start, numbers.stop)
        distances = torch.cdist(real[mine], fake)
        inside = distances < real_radii[mine, None]
        hits += inside.sum(0)
        reached = reached + (distances < fake_radii).any(1).sum()
        covered = covered + inside.any(1).sum()
    hits, reached, covered = ranks.sum(hits), ranks.sum(reached), ranks.sum(covered)
    return Manifold(
        precision=float((hits > 0).double().mean()),
        recall=float(reached) / len(real),
        density=float(hits.mean()) / k,
        coverage=float(covered) / len(real),
    )


def _radii(features: Tensor, ranks: Ranks, pulse: Callable[[], None], k: int) -> Tensor:
    """Distance of each row to its k-th neighbour, itself not counted, `[n]`, on every rank."""
    found = [features.new_zeros(0)]
    for numbers in ranks.steps(len(features), BLOCK * ranks.world_size):
        pulse()
        if len(numbers):
            distances = torch.cdist(features[numbers.start : numbers.stop], features)
            found.append(distances.kthvalue(min(k + 1, len(features)), dim=1).values)
    return ranks.gather(torch.cat(found))
