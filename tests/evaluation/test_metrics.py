"""FID, KID and neighbours against torch-fidelity's numbers, scipy and prdc; quality and bounds by formula."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vaegan_dist.config import MlpModel
from vaegan_dist.evaluation.latents import LatentSums, dci, mutual_information_gap
from vaegan_dist.evaluation.likelihood import Likelihood, importance_bound
from vaegan_dist.evaluation.metrics import Collector, FeatureSet, frechet_distance, kernel_distance, manifold
from vaegan_dist.evaluation.quality import Reconstruction
from vaegan_dist.evaluation.ranks import Ranks
from vaegan_dist.models import ImageShape, Posterior
from vaegan_dist.models.mlp import MlpDecoder

ALONE = Ranks()


def features(count: int, seed: int, shift: float, dim: int = 24) -> Tensor:
    """Correlated features, the same in every process."""
    draw = np.random.default_rng(seed)
    mix = draw.normal(size=(dim, dim)) / math.sqrt(dim)
    return torch.from_numpy(draw.normal(size=(count, dim)) @ mix + shift)


REAL, FAKE = features(1500, 1, 0.0), features(1300, 2, 0.3)


def collected(rows: Tensor, batch: int = 300) -> FeatureSet:
    collector = Collector(rows.shape[1], len(rows), torch.device("cpu"))
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        collector.add(part, torch.arange(first, first + len(part)))
    return collector.finish(ALONE)


def test_fid_and_kid_are_those_of_torch_fidelity() -> None:
    """The constants are what torch-fidelity 0.4.0's own functions give for these features."""
    assert frechet_distance(collected(REAL), collected(FAKE)) == pytest.approx(13.85959213046334, rel=1e-9)
    mean, deviation = kernel_distance(REAL, FAKE)
    assert mean == pytest.approx(0.5441674606764808, rel=1e-9)
    assert deviation == pytest.approx(0.010246375814273699, rel=1e-9)


@pytest.mark.parametrize(("count", "shift"), [(1500, 0.3), (20, 0.1)])
def test_fid_is_the_formula_with_scipys_root(count: int, shift: float) -> None:
    """Also with fewer pictures than features, where the covariance has no full rank."""
    from scipy.linalg import sqrtm

    real, fake = features(count, 3, 0.0).numpy(), features(count, 4, shift).numpy()
    s1, s2 = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    # A little on the diagonal keeps scipy's Schur method away from singular matrices; it moves the result by less.
    root = sqrtm((s1 + 1e-10 * np.eye(len(s1))) @ (s2 + 1e-10 * np.eye(len(s2)))).real
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    found = frechet_distance(collected(torch.from_numpy(real)), collected(torch.from_numpy(fake)))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_set_has_no_distance_from_itself() -> None:
    assert abs(frechet_distance(collected(REAL), collected(REAL, batch=77))) < 1e-9
    alike = manifold(REAL, REAL, ALONE, lambda: None)
    assert alike.precision == alike.recall == alike.coverage == 1


@pytest.mark.parametrize("shift", [0.0, 0.3, 3.0])
def test_neighbour_metrics_are_those_of_prdc(shift: float) -> None:
    from prdc import compute_prdc

    real, fake = features(700, 5, 0.0), features(500, 6, shift)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    found = manifold(real, fake, ALONE, lambda: None)
    assert vars(found) == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4)


def test_reconstruction_quality_by_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(6, 1, 32, 32, generator=draw) * 2 - 1
    x_rec = (x + 0.2 * torch.randn(x.shape, generator=draw)).clamp(-1, 1)
    pairs = Reconstruction(32, 32, torch.device("cpu"))
    pairs.add(x[:2], x_rec[:2])
    pairs.add(x[2:], x_rec[2:])
    found = pairs.finish(ALONE)
    mse = float(((x - x_rec) / 2).double().square().mean())
    assert found["mse"] == pytest.approx(mse, rel=1e-6)
    assert found["psnr"] == pytest.approx(-10 * math.log10(mse), rel=1e-6)
    assert found["ssim"] is not None and 0.3 < found["ssim"] < 0.99
    assert found["ms_ssim"] is None and "161" in pairs.missing["ms_ssim"] and "--lpips" in pairs.missing["lpips"]
    same = Reconstruction(32, 32, torch.device("cpu"))
    same.add(x, x)
    assert same.finish(ALONE)["ssim"] == pytest.approx(1.0)


def test_lpips_is_the_formula_on_the_backbone_and_zero_for_equal_pictures(tmp_path: pytest.TempPathFactory) -> None:
    from vaegan_dist.evaluation.quality import Lpips

    draw = torch.Generator().manual_seed(1)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    weights = {}
    for layer, (after, before, kernel) in shapes.items():
        scale = math.sqrt(2 / (before * kernel**2))
        weights[f"features.{layer}.weight"] = scale * torch.randn(after, before, kernel, kernel, generator=draw)
        weights[f"features.{layer}.bias"] = torch.zeros(after)
    file = str(tmp_path) + "/alexnet.pth"
    torch.save(weights, file)
    lpips = Lpips(file)
    x = torch.rand(2, 1, 64, 64, generator=draw) * 2 - 1
    assert lpips(x, x).tolist() == [0, 0]
    near, far = lpips(x, (x + 0.05).clamp(-1, 1)), lpips(x, -x)
    assert (near > 0).all() and (far > near).all()


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_densities_add_up_to_one(kind: str) -> None:
    """exp(-distortion) of one pixel, integrated over all its values."""
    model = MlpDecoder(MlpModel(latent_dim=2, hidden=(4,)), ImageShape(1, 1, 1))
    likelihood = Likelihood(kind, 1.7)  # type: ignore[arg-type]
    values = torch.linspace(-40, 40, 200_001, dtype=torch.float64).view(-1, 1, 1, 1)
    nats = likelihood.distortion(model, torch.zeros_like(values), values)
    assert float(torch.trapezoid((-nats).exp(), values.flatten())) == pytest.approx(1.0, rel=1e-5)
    assert likelihood.bits_per_dim(0.0, 1) == pytest.approx(math.log2(127.5))


def test_the_weighted_bound_lies_between_the_evidence_bound_and_the_evidence() -> None:
    """With a linear decoder and a Gaussian everything is known in closed form."""

    class Linear(MlpDecoder):
        bounded = False

        def pre_image(self, z: Tensor) -> Tensor:
            return (z @ matrix.T).view(-1, 1, 1, 3)

    matrix = torch.tensor([[1.0, 0.5], [0.2, -0.7], [0.3, 0.9]], dtype=torch.float64)
    decoder = Linear(MlpModel(latent_dim=2, hidden=(4,)), ImageShape(1, 1, 3))
    x = torch.tensor([0.4, -0.2, 0.8], dtype=torch.float64).view(1, 1, 1, 3)
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros(3).double(), matrix @ matrix.T + torch.eye(3).double()
    )
    precision = torch.eye(2).double() + matrix.T @ matrix
    mean = torch.linalg.solve(precision, matrix.T @ x.flatten())
    q = Posterior(mean.unsqueeze(0), torch.full((1, 2), -0.5).double())  # right mean, wrong covariance
    likelihood = Likelihood("l2", 1.0)
    eps = torch.randn(1, 4000, 2, generator=torch.Generator().manual_seed(0)).double()
    bounds = [float(importance_bound(likelihood, decoder, q, x, eps[:, :count])) for count in (1, 4000)]
    truth = float(evidence.log_prob(x.flatten()))
    average = torch.stack([importance_bound(likelihood, decoder, q, x, eps[:, [k]]) for k in range(300)]).mean()
    assert float(average) < truth - 0.01
    assert bounds[1] == pytest.approx(truth, abs=0.03)


def test_latent_sums_are_the_moments_of_the_aggregate_posterior() -> None:
    draw = torch.Generator().manual_seed(0)
    mu = torch.randn(4000, 3, generator=draw) * torch.tensor([1.0, 0.5, 0.01]) + torch.tensor([0.3, 0.0, 0.0])
    logvar = torch.tensor([-1.0, -2.0, 0.0]).expand_as(mu)
    sums = LatentSums((3,), torch.device("cpu"))
    for first in range(0, 4000, 1000):
        sums.add(Posterior(mu[first : first + 1000], logvar[first : first + 1000]))
    found = sums.finish(ALONE)
    assert found["active_units"] == 2 and found["units"] == 3
    covariance = torch.cov(mu.T.double(), correction=0) + torch.diag(logvar[0].double().exp())
    assert found["aggregate_eigenvalue_max"] == pytest.approx(float(torch.linalg.eigvalsh(covariance)[-1]), rel=1e-6)
    q = torch.distributions.MultivariateNormal(mu.double().mean(0), covariance)
    prior = torch.distributions.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    assert found["aggregate_kl"] == pytest.approx(float(torch.distributions.kl_divergence(q, prior)), rel=1e-5)
    assert sum(found["kl_per_unit"]) == pytest.approx(float(Posterior(mu, logvar).kl_per_dim().sum(1).mean()), rel=1e-5)


def test_mig_and_dci_tell_codes_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    factors = torch.randint(0, 4, (2000, 2), generator=draw)
    noise = torch.randn(2000, 4, generator=draw)
    apart = noise.clone()
    apart[:, :2] = factors + 0.01 * noise[:, :2]
    mixed = apart @ torch.linalg.qr(torch.randn(4, 4, generator=draw)).Q
    assert mutual_information_gap(apart, factors) > 0.9 > 0.3 > mutual_information_gap(mixed, factors)
    clean, blurred = dci(apart, factors), dci(mixed, factors)
    assert clean["disentanglement"] is not None and blurred["disentanglement"] is not None
    assert clean["disentanglement"] > 0.7 > blurred["disentanglement"]
    assert clean["completeness"] > blurred["completeness"]  # type: ignore[operator]
    assert clean["informativeness"] == pytest.approx(1.0, abs=0.01)
    assert dci(apart, factors[:, :1])["disentanglement"] is None
