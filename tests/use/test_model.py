"""A trained model in its user's hands: loaded from wherever, the same numbers everywhere, clear words for mistakes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vaegan_dist
from vaegan_dist.cli import main
from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.errors import InputError
from vaegan_dist.evaluation.pictures import to_float
from vaegan_dist.training.checkpoint import checkpoints, load_networks
from vaegan_dist.use import Model
from vaegan_dist.use.export import export

REPOSITORY = Path(__file__).resolve().parents[2]


def test_run_checkpoint_and_export_hold_the_same_model(run: Path, tmp_path: Path) -> None:
    newest = checkpoints(run)[0]
    export(vaegan_dist.load(run), tmp_path / "exported", "safetensors")
    models = [vaegan_dist.load(path) for path in (run, newest, tmp_path / "exported")]
    x = models[0].sample(3, seed=1)
    for model in models:
        assert torch.equal(model.sample(3, seed=1), x)
        assert model.images_seen == 2560 and model.latent_shape == (8,)
    _, networks = load_networks(newest, "ema")
    assert torch.equal(models[0].encode(x), networks["encoder"](x).mu)


def test_ema_and_raw_weights_differ_and_are_named(run: Path) -> None:
    averaged, raw = vaegan_dist.load(run), vaegan_dist.load(run, weights="raw")
    _, networks = load_networks(run, "raw")
    z = averaged.prior(2)
    assert not torch.equal(averaged.decode(z), raw.decode(z))
    assert torch.equal(raw.decode(z), networks["decoder"](z))


def test_a_seed_gives_the_same_picture_however_many_are_asked_for(run: Path) -> None:
    model = vaegan_dist.load(run)
    many, few = model.sample(70, seed=5), model.sample(3, seed=5)
    assert torch.allclose(many[:3], few, atol=1e-6)
    assert not torch.allclose(few, model.sample(3, seed=6), atol=1e-2)
    before = torch.get_rng_state()
    model.sample(2)
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"


def test_uint8_and_float_pictures_mean_the_same(run: Path, digits: Path) -> None:
    model = vaegan_dist.load(run)
    pictures = open_dataset(str(digits)).read(range(4)).images
    assert torch.equal(model.encode(pictures), model.encode(to_float(pictures)))
    posterior = model.posterior(pictures)
    assert torch.equal(posterior.mu, model.encode(pictures)) and posterior.logvar.shape == (4, 8)
    assert model.train().training is False
    assert torch.equal(model.reconstruct(pictures), model.decode(model.encode(pictures)))


@pytest.mark.parametrize(
    ("x", "named"),
    [
        (torch.zeros(2, 3, 28, 28), r"shape \[2, 3, 28, 28\]; the model takes \[B, 1, 28, 28\]"),
        (torch.zeros(1, 28, 28), r"shape \[1, 28, 28\]"),
        (torch.full((1, 1, 28, 28), 255.0), r"from 255 to 255; floating point pictures lie in \[-1, 1\]"),
        (torch.full((1, 1, 28, 28), torch.nan), "nan"),
        (torch.zeros(1, 1, 28, 28, dtype=torch.int64), "give uint8"),
    ],
)
def test_wrong_pictures_are_named(run: Path, x: torch.Tensor, named: str) -> None:
    with pytest.raises(InputError, match=named):
        vaegan_dist.load(run).encode(x)


def test_wrong_latents_weights_and_places_are_named(run: Path, tmp_path: Path, kl_model: Model) -> None:
    model = vaegan_dist.load(run)
    with pytest.raises(InputError, match=r"latents of shape \[2, 9\]; the model takes \[B, 8\]"):
        model.decode(torch.zeros(2, 9))
    with pytest.raises(InputError, match="no such folder"):
        vaegan_dist.load(tmp_path / "absent")
    with pytest.raises(InputError, match="no folder named checkpoint"):
        vaegan_dist.load(tmp_path)
    with pytest.raises(InputError, match="choose ema or raw"):
        vaegan_dist.load(run, weights="best")
    export(model, tmp_path / "ours", "safetensors")
    with pytest.raises(InputError, match="holds the ema weights only"):
        vaegan_dist.load(tmp_path / "ours", weights="raw")
    (tmp_path / "ours" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="export it again"):
        vaegan_dist.load(tmp_path / "ours")
    export(kl_model, tmp_path / "theirs", "diffusers")
    with pytest.raises(InputError, match=r"AutoencoderKL\.from_pretrained"):
        vaegan_dist.load(tmp_path / "theirs")


def test_a_broken_checkpoint_is_not_used(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = checkpoints(copy)[0]
    (newest / "ema.safetensors").write_bytes(b"cut")
    assert vaegan_dist.load(copy).images_seen < 2560
    with pytest.raises(InputError, match=r"ema\.safetensors"):
        vaegan_dist.load(newest)


def test_the_commands_draw_the_same_pictures_again(run: Path, tmp_path: Path) -> None:
    for name in ("sample", "reconstruct", "interpolate", "traverse"):
        files = [tmp_path / f"{name}-{number}.png" for number in range(2)]
        for file in files:
            assert main([name, str(run), "--output", str(file)]) == 0
        assert files[0].read_bytes() == files[1].read_bytes()
    other = tmp_path / "other.png"
    assert main(["interpolate", str(run), "--seed", "1", "--output", str(other)]) == 0
    assert other.read_bytes() != (tmp_path / "interpolate-0.png").read_bytes()
    assert main(["interpolate", str(run), "--pictures", "--rows", "2", "--output", str(other)]) == 0


def test_the_readme_loads_a_model_as_it_says(run: Path, tmp_path: Path) -> None:
    """The Python of the README that loads a model, run as it stands, in a folder where `runs/mine` is a run."""
    readme = (REPOSITORY / "README.md").read_text()
    blocks = [block.split("```")[0] for block in readme.split("```python\n")[1:]]
    wanted = [block for block in blocks if "vaegan_dist.load(" in block]
    if not wanted:
        pytest.fail("README.md has no Python block with vaegan_dist.load(")
    for block in wanted:
        place = tmp_path / block.split('load("')[1].split('"')[0]
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            shutil.copytree(run, place)
        checks = "\nassert x.shape == (64, 1, 28, 28) and z.shape == (64, 8), (x.shape, z.shape)\n"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", block + checks], cwd=tmp_path, check=True, env=environment, timeout=120)
