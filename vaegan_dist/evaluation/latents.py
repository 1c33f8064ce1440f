"""The latent space over a data set: active units, KL per unit, moments of the aggregate posterior, MIG and DCI."""

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from vaegan_dist.evaluation.ranks import Ranks
from vaegan_dist.models import Posterior

ACTIVE: Final = 0.01  # Burda et al. 2016, section 5.2
MOST_DIMS: Final = 1024
"""dimensions of z up to which the covariance is kept"""
BINS: Final = 20  # Locatello et al. 2019, arXiv 1811.12359
PROBE_STEPS: Final = 300


class LatentSums:
    """Adds up posteriors, in float64. A unit is a dimension of z or, where z is a picture, a channel."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, dims = shape, int(torch.Size(shape).numel())
        self.count = torch.zeros(1, dtype=torch.float64, device=device)
        self.rows = torch.zeros(4, dims, dtype=torch.float64, device=device)  # mu, mu^2, sigma^2, KL
        self.outer = torch.zeros(dims, dims, dtype=torch.float64, device=device) if dims <= MOST_DIMS else None

    def add(self, posterior: Posterior) -> None:
        """A batch of posteriors, `[b, *shape]`."""
        mu, variance = posterior.mu.double().flatten(1), posterior.logvar.double().exp().flatten(1)
        self.count += len(mu)
        self.rows += torch.stack(
            [mu.sum(0), mu.square().sum(0), variance.sum(0), posterior.kl_per_dim().double().sum(0)]
        )
        if self.outer is not None:
            self.outer += mu.T @ mu

    def finish(self, ranks: Ranks) -> dict[str, Any]:
        """Over all ranks; a collective.

        Returns:
            `active_units` of `units`, `kl_per_unit` in nats per image, and the aggregate posterior q(z): norm of its
            mean, mean variance, and where z is small enough the extreme eigenvalues of its covariance and the KL of
            the Gaussian with these moments from N(0, I).
        """
        count = ranks.sum(self.count)
        mean, square, variance, kl = ranks.sum(self.rows) / count
        spread = (square - mean.square()).clamp_min(0)
        units = self.shape[0]
        active = spread.view(units, -1).mean(1) > ACTIVE
        found: dict[str, Any] = {
            "active_units": int(active.sum()),
            "units": units,
            "kl_per_unit": kl.view(units, -1).sum(1).tolist(),
            "aggregate_mean_norm": float(mean.norm()),
            "aggregate_variance": float((spread + variance).mean()),
        }
        if self.outer is not None:
            covariance = ranks.sum(self.outer) / count - torch.outer(mean, mean) + torch.diag(variance)
            eigenvalues = torch.linalg.eigvalsh(covariance).clamp_min(1e-12)
            found["aggregate_eigenvalue_min"] = float(eigenvalues[0])
            found["aggregate_eigenvalue_max"] = float(eigenvalues[-1])
            gap = eigenvalues.sum() + mean.square().sum() - len(mean) - eigenvalues.log().sum()
            found["aggregate_kl"] = float(0.5 * gap)
        return found


def mutual_information_gap(codes: Tensor, factors: Tensor) -> float:
    """MIG (Chen et al. 2018, arXiv 1802.04942, equation 6), mean over factors.

    Args:
        codes: `[n, d]`, cut into 20 bins each.
        factors: int64 `[n, f]`, labels from 0.
    """
    gaps = []
    for factor in factors.T:
        one_hot = F.one_hot(factor).double()
        information = torch.stack([_information(_bins(code), one_hot) for code in codes.double().T])
        share = one_hot.mean(0)
        entropy = -(share * share.clamp_min(1e-300).log()).sum()
        best = information.sort(descending=True).values
        second = best[1] if len(best) > 1 else best.new_zeros(())
        gaps.append(float((best[0] - second) / entropy) if entropy > 0 else 0.0)
    return sum(gaps) / len(gaps)


def _bins(code: Tensor) -> Tensor:
    low, high = code.min(), code.max()
    return ((code - low) / (high - low).clamp_min(1e-12) * BINS).long().clamp_max(BINS - 1)


def _information(bins: Tensor, one_hot: Tensor) -> Tensor:
    """Mutual information in nats of a binned code `[n]` and a factor `[n, classes]`."""
    joint = F.one_hot(bins, BINS).double().T @ one_hot / len(bins)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return torch.where(joint > 0, joint * (joint / apart.clamp_min(1e-300)).clamp_min(1e-300).log(), 0.0).sum()


def dci(codes: Tensor, factors: Tensor) -> dict[str, float | None]:
    """Disentanglement, completeness, informativeness (Eastwood & Williams 2018), importances from linear probes.

    Disentanglement, which asks how many factors a dimension speaks of, needs more than one factor (else None).

    Args:
        codes: `[n, d]`. factors: int64 `[n, f]`. Every second row trains the probe, the others score it.
    """
    codes = codes.double()
    codes = (codes - codes.mean(0)) / codes.std(0).clamp_min(1e-12)
    importances, scores = [], []
    for factor in factors.T:
        weight, accuracy = _probe(codes, factor)
        importances.append(weight.abs().mean(0))
        scores.append(accuracy)
    matrix = torch.stack(importances, 1)  # [d, f]
    complete = 1 - _entropy(matrix.T) / torch.log(torch.tensor(float(max(len(matrix), 2))))
    disentanglement = None
    if matrix.shape[1] > 1:
        apart = 1 - _entropy(matrix) / torch.log(torch.tensor(float(matrix.shape[1])))
        share = matrix.sum(1) / matrix.sum()
        disentanglement = float((share * apart).sum())
    return {
        "disentanglement": disentanglement,
        "completeness": float(complete.mean()),
        "informativeness": sum(scores) / len(scores),
    }


def _entropy(rows: Tensor) -> Tensor:
    share = rows / rows.sum(1, keepdim=True).clamp_min(1e-300)
    return -(share * share.clamp_min(1e-300).log()).sum(1)


@torch.enable_grad()
def _probe(codes: Tensor, factor: Tensor) -> tuple[Tensor, float]:
    """Weights `[classes, d]` and held-out accuracy of a multinomial logistic regression."""
    classes = int(factor.max()) + 1
    weight = torch.zeros(classes, codes.shape[1], dtype=codes.dtype, device=codes.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=codes.dtype, device=codes.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=PROBE_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = codes[::2] @ weight.T + bias
        value = F.cross_entropy(logits, factor[::2]) + 1e-4 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        right = (codes[1::2] @ weight.T + bias).argmax(1) == factor[1::2]
        return weight.detach(), float(right.double().mean())
