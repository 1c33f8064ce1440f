"""Exported models compute what they computed here: under diffusers, under onnxruntime, and with a card that is read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from vaegan_dist import load
from vaegan_dist.cli import main
from vaegan_dist.errors import InputError
from vaegan_dist.use import Model
from vaegan_dist.use.export import export


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def test_diffusers_opens_the_folder_and_computes_the_same(kl_model: Model, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    export(kl_model, tmp_path / "vae", "diffusers")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    x = noise(2, 3, 64, 64)
    with torch.no_grad():
        posterior, ours = theirs.encode(x).latent_dist, kl_model.posterior(x)
        assert (posterior.mean - ours.mu).abs().max() < 1e-5
        assert (posterior.logvar - ours.logvar).abs().max() < 1e-5
        assert (theirs.decode(ours.mu).sample - kl_model.decode(ours.mu)).abs().max() < 1e-5
    assert theirs.config.scaling_factor == 1.0
    again = tmp_path / "again"
    theirs.save_pretrained(again)
    with safe_open(again / "diffusion_pytorch_model.safetensors", "pt") as file:
        names = set(file.keys())
    with safe_open(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert set(file.keys()) == names


def test_onnxruntime_computes_the_same_at_any_batch_size(run: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = load(run)
    assert main(["export", str(run), str(tmp_path / "onnx"), "--format", "onnx"]) == 0
    encoder, decoder = (onnxruntime.InferenceSession(tmp_path / "onnx" / f"{n}.onnx") for n in ("encoder", "decoder"))
    for batch in (1, 7):
        x = noise(batch, 1, 28, 28, seed=batch)
        mu, logvar = encoder.run(None, {"x": x.numpy()})
        assert np.abs(mu - model.encode(x).numpy()).max() < 1e-4
        assert np.abs(logvar - model.posterior(x).logvar.numpy()).max() < 1e-4
        (made,) = decoder.run(None, {"z": mu})
        assert np.abs(made - model.reconstruct(x).numpy()).max() < 1e-4


def test_onnx_of_the_latent_diffusion_networks(kl_model: Model, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    remarks = export(kl_model, tmp_path / "onnx", "onnx")
    assert any("onnxruntime agrees to" in line for line in remarks)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "decoder.onnx")
    z = noise(7, *kl_model.latent_shape)
    assert np.abs(session.run(None, {"z": z.numpy()})[0] - kl_model.decode(z).numpy()).max() < 1e-4


def test_the_card_says_what_hubs_read(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "mine")]) == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert {"license", "library_name", "pipeline_tag", "tags", "datasets"} <= set(fields)
    assert fields["library_name"] == "vaegan_dist" and fields["license"] == "other"
    for picture in ("samples.png", "reconstructions.png"):
        assert f"]({picture})" in body and (tmp_path / "mine" / picture).is_file()
    # Another test may have evaluated the shared run before.
    evaluated = any(run.glob("evaluations/*/evaluation.json"))
    assert "vaegan_dist.load(" in body and ("Not evaluated yet" in body) is not evaluated
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert config["latent_shape"] == [8]
    with safe_open(tmp_path / "mine" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt" and not any(key.startswith("discriminator") for key in file.keys())  # noqa: SIM118


def test_what_cannot_be_exported_is_named(run: Path, tmp_path: Path) -> None:
    model = load(run)
    with pytest.raises(InputError, match=r"model.network=mlp has no counterpart in diffusers.*safetensors or onnx"):
        export(model, tmp_path / "vae", "diffusers")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        export(model, tmp_path / "full", "safetensors")
