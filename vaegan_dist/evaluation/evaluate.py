"""One evaluation: pictures through encoder and decoder, samples of the prior, and everything that is measured of them.

Every rank calls it with its part of the data; sums are added up in float64, features that are compared pair by pair
are gathered, and all noise is a function of (seed, number of the picture). So every rank returns the same numbers,
and so does every number of ranks, to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from vaegan_dist.evaluation.features import FeatureNetwork
from vaegan_dist.evaluation.latents import LatentSums, dci, mutual_information_gap
from vaegan_dist.evaluation.likelihood import IW_IMAGES, IW_SAMPLES, Likelihood, importance_bound
from vaegan_dist.evaluation.metrics import KID_SUBSETS, Collector, frechet_distance, kernel_distance, manifold
from vaegan_dist.evaluation.pictures import to_float, to_uint8
from vaegan_dist.evaluation.quality import Lpips, Reconstruction
from vaegan_dist.evaluation.ranks import Ranks
from vaegan_dist.evaluation.reference import Batches, Reference
from vaegan_dist.models import Decoder, Encoder, ImageShape, Posterior
from vaegan_dist.seeding import standard_normal

KEPT: Final = 10_000
"""pictures of each kind whose features are compared pair by pair (KID and the neighbours' metrics)"""
CODES: Final = 10_000
"""pictures whose latents are held against their labels"""

Report = dict[str, Any]
Pulse = Callable[[], None]


@dataclass(frozen=True)
class Subject:
    """The networks that are judged."""

    encoder: Encoder
    decoder: Decoder
    image: ImageShape
    latent_shape: tuple[int, ...]
    likelihood: Likelihood


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    samples: int
    """pictures that are generated"""
    batch_size: int
    """pictures at a time, over all ranks"""
    seed: int = 0
    thorough: bool = True
    """also the importance-weighted bound, MIG and DCI, and all subsets of KID"""


@torch.no_grad()
def evaluate(
    subject: Subject,
    real: Batches,
    extent: Extent,
    reference: Reference | None,
    ranks: Ranks,
    *,
    lpips: Lpips | None = None,
    pulse: Pulse = lambda: None,
) -> Report:
    """The whole report, equal on every rank; a collective.

    Args:
        real: the pictures to reconstruct; with a reference, those that it was made of.
        reference: what samples and reconstructions are compared with in features; None: nothing is.
        pulse: called between batches, equally often on every rank; may raise to end the evaluation.
    """
    features = reference.features if reference else None
    data = _over_data(subject, real, extent, features, ranks, lpips, pulse)
    report: Report = {key: data[key] for key in ("reconstruction", "likelihood", "latent")}
    report["generation"] = {"samples": extent.samples}
    if reference is not None and features is not None:
        subsets = KID_SUBSETS if extent.thorough else KID_SUBSETS // 10
        made, counts = _over_prior(subject, extent, features, ranks, pulse)
        report["reconstruction"]["rfid"] = frechet_distance(reference.real, data["rebuilt"])
        report["generation"] |= _compare(reference, made, subsets, ranks, pulse)
        report["features"] = reference.describe()
        if features.classes:
            report["labels"] = _label_shift(reference.labels, ranks.sum(counts))
    report["missing"] = data["missing"]
    return report


def _over_data(
    subject: Subject,
    real: Batches,
    extent: Extent,
    features: FeatureNetwork | None,
    ranks: Ranks,
    lpips: Lpips | None,
    pulse: Pulse,
) -> dict[str, Any]:
    """What needs real pictures."""
    device, image = ranks.device, subject.image
    pairs = Reconstruction(image.height, image.width, device, lpips)
    latents = LatentSums(subject.latent_shape, device)
    bounds = torch.zeros(5, dtype=torch.float64, device=device)  # distortion, rate, images, weighted bound, its images
    rebuilt = Collector(features.dim, 0, device) if features else None
    codes: list[Tensor] = []
    labels: list[Tensor] = []
    for batch, mask in real():
        pulse()
        kept = mask.nonzero().squeeze(1)
        pictures, ids = batch.images[kept].to(device), batch.ids[kept]
        if not len(ids):
            continue
        x = to_float(pictures, next(subject.decoder.parameters()).dtype)
        posterior = subject.encoder(x)
        latents.add(posterior)
        x_rec = subject.decoder(posterior.mu)
        pairs.add(x, x_rec)
        if features is not None and rebuilt is not None:
            rebuilt.add(features(to_uint8(x_rec)), ids)
        z = posterior.sample(_noise(ids, subject.latent_shape, extent.seed, "posterior").to(posterior.mu))
        distortion = subject.likelihood.distortion(subject.decoder, subject.decoder.pre_image(z), x)
        rate = posterior.kl_per_dim().double().sum(1)
        bounds[:3] += torch.stack([distortion.sum(), rate.sum(), bounds.new_tensor(len(x))])
        some = (ids < IW_IMAGES).nonzero().squeeze(1) if extent.thorough else ids[:0]
        if len(some):
            part = Posterior(posterior.mu[some], posterior.logvar[some])
            eps = _noise(ids[some], (IW_SAMPLES, *subject.latent_shape), extent.seed, "importance")
            weighted = importance_bound(subject.likelihood, subject.decoder, part, x[some], eps)
            bounds[3:] += torch.stack([weighted.sum(), bounds.new_tensor(len(some))])
        if batch.labels is not None and extent.thorough:
            first = ids < CODES
            codes.append(posterior.mu[first.to(device)].flatten(1).double())
            labels.append(batch.labels[kept][first].to(device))
    found: dict[str, Any] = {"reconstruction": pairs.finish(ranks), "missing": dict(pairs.missing)}
    found["likelihood"] = _likelihood(subject, ranks.sum(bounds).tolist())
    found["reconstruction"]["pictures"] = found["likelihood"].pop("pictures")
    found["latent"] = latents.finish(ranks)
    if rebuilt is not None:
        found["rebuilt"] = rebuilt.finish(ranks)
    found["latent"] |= _factors(subject, codes, labels, ranks)
    return found


def _noise(ids: Tensor, shape: tuple[int, ...], seed: int, purpose: str) -> Tensor:
    """Standard normal numbers of each picture, a function of its number alone, `[b, *shape]`."""
    return torch.stack([standard_normal(shape, seed, "evaluation", purpose, number) for number in ids.tolist()])


def _likelihood(subject: Subject, sums: list[float]) -> dict[str, Any]:
    distortion, rate, images, weighted, weighted_images = sums
    distortion, rate = distortion / images, rate / images
    image, likelihood = subject.image, subject.likelihood
    dims = image.channels * image.height * image.width
    bits = likelihood.bits_per_dim
    bound = weighted / weighted_images if weighted_images else None
    return {
        "pictures": int(images),
        "kind": likelihood.kind,
        "weight": likelihood.weight,
        "distortion": distortion,
        "rate": rate,
        "elbo": -distortion - rate,
        "distortion_bits_per_dim": bits(distortion, dims),
        "rate_bits_per_dim": bits(distortion + rate, dims) - bits(distortion, dims),
        "elbo_bits_per_dim": bits(distortion + rate, dims),
        "importance_bound": bound,
        "importance_bound_bits_per_dim": None if bound is None else bits(-bound, dims),
        "importance_samples": IW_SAMPLES if weighted_images else 0,
        "importance_pictures": int(weighted_images),
    }


def _factors(subject: Subject, codes: list[Tensor], labels: list[Tensor], ranks: Ranks) -> dict[str, Any]:
    """MIG and DCI of the labels, where there are any and z is a vector."""
    counted = torch.tensor([float(sum(map(len, labels)))], dtype=torch.float64, device=ranks.device)
    if not ranks.sum(counted) or len(subject.latent_shape) > 1:
        return {}
    dims = int(torch.Size(subject.latent_shape).numel())
    everyone = ranks.gather(torch.cat([*codes, torch.zeros(0, dims, dtype=torch.float64, device=ranks.device)]))
    truth = ranks.gather(torch.cat([*labels, torch.zeros(0, dtype=torch.int64, device=ranks.device)])).unsqueeze(1)
    return {"mig": mutual_information_gap(everyone, truth), "dci": dci(everyone, truth)}


def _over_prior(
    subject: Subject, extent: Extent, features: FeatureNetwork, ranks: Ranks, pulse: Pulse
) -> tuple[Collector, Tensor]:
    """Features and counted classes of pictures decoded from N(0, I), those that `sample` gives for the seed."""
    collector = Collector(features.dim, KEPT, ranks.device)
    counts = torch.zeros(features.classes, dtype=torch.float64, device=ranks.device)
    like = next(subject.decoder.parameters())
    for numbers in ranks.steps(extent.samples, extent.batch_size):
        pulse()
        if not len(numbers):
            continue
        draws = [standard_normal(subject.latent_shape, extent.seed, "samples", number) for number in numbers]
        found = features(to_uint8(subject.decoder(torch.stack(draws).to(like))))
        collector.add(found, torch.tensor(list(numbers)))
        counts += features.count(found)
    return collector, counts


def _compare(reference: Reference, made: Collector, subsets: int, ranks: Ranks, pulse: Pulse) -> dict[str, Any]:
    """Generated against real."""
    fake = made.finish(ranks)
    kid, deviation = kernel_distance(reference.real.kept, fake.kept, subsets)
    overlap = manifold(reference.real.kept, fake.kept, ranks, pulse)
    return {
        "fid": frechet_distance(reference.real, fake),
        "kid": kid,
        "kid_deviation": deviation,
        **vars(overlap),
        "neighbour_samples": len(fake.kept),
    }


def _label_shift(real: Tensor, fake: Tensor) -> dict[str, Any]:
    """Shares of the classes among real and generated pictures, as the classifier sees them."""
    shares = fake / fake.sum()
    truth = real / real.sum()
    gap = torch.where(shares > 0, shares * (shares.clamp_min(1e-300) / truth.clamp_min(1e-12)).log(), 0.0).sum()
    return {"samples": shares.tolist(), "real": truth.tolist(), "divergence": float(gap)}
