"""A trained model for use elsewhere: safetensors, a folder for diffusers, or ONNX; each with a model card."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

import vaegan_dist
from vaegan_dist.config import KlModel
from vaegan_dist.data.latents import read_latent_manifest
from vaegan_dist.errors import InputError, VaeganError
from vaegan_dist.evaluation.pictures import comparison, grid, save_png, to_uint8
from vaegan_dist.files import write_whole
from vaegan_dist.models.diffusers_layout import diffusers_config, to_diffusers
from vaegan_dist.seeding import standard_normal
from vaegan_dist.use.model import EXPORT_CONFIG, EXPORT_FORMAT, EXPORT_WEIGHTS, Model, open_for
from vaegan_dist.use.model_card import model_card

Format = Literal["safetensors", "diffusers", "onnx"]
FORMATS: Final[tuple[Format, ...]] = ("safetensors", "diffusers", "onnx")
DIFFUSERS_VERSION: Final = "0.30.0"  # whose AutoencoderKL this layout is; newer ones read it
TOLERANCE: Final = 1e-4
BATCHES: Final = (1, 7)
SHOWN: Final = 16


def export(model: Model, output: Path, kind: Format, *, latents: str | None = None) -> list[str]:
    """Write a model, its card and its pictures into a folder.

    Args:
        kind: safetensors opens with `vaegan_dist.load`; diffusers with `AutoencoderKL.from_pretrained`; onnx is an
            encoder and a decoder for any batch size, checked here against onnxruntime.
        latents: folder of `vaegan-dist encode`, whose scaling factor goes into the diffusers configuration.

    Returns:
        Remarks for the user.

    Raises:
        InputError: the folder holds something else, the network has no such format, or a package is missing.
        VaeganError: the exported networks compute something else than the model.
    """
    if output.is_dir() and any(output.iterdir()) and not (output / "README.md").exists():
        raise InputError(f"{output}: holds other files; choose another --output")
    writers: dict[Format, Callable[[], list[str]]] = {
        "safetensors": lambda: _write_safetensors(model, output),
        "diffusers": lambda: _write_diffusers(model, output, latents),
        "onnx": lambda: _write_onnx(model, output),
    }
    remarks = writers[kind]()
    remarks += _write_pictures(model, output)
    write_whole(output / "README.md", model_card(model, kind, output).encode())
    return remarks


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode())


def _weights(model: Model) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in model.networks.state_dict().items()}


def _metadata(model: Model) -> dict[str, str]:
    return {
        "format": "pt",
        "vaegan.version": vaegan_dist.__version__,
        "vaegan.weights": model.weights,
        "vaegan.images_seen": str(model.images_seen),
    }


def _write_safetensors(model: Model, output: Path) -> list[str]:
    write_whole(output / EXPORT_WEIGHTS, save(_weights(model), _metadata(model)))
    config = {
        "format": EXPORT_FORMAT,
        "format_version": 1,
        "weights": model.weights,
        "images_seen": model.images_seen,
        "image": vars(model.image),
        "latent_shape": list(model.latent_shape),
        "config": model.config.model_dump(mode="json"),
    }
    _write_json(output / EXPORT_CONFIG, config)
    return []


def _write_diffusers(model: Model, output: Path, latents: str | None) -> list[str]:
    section = model.config.model
    if not isinstance(section, KlModel):
        raise InputError(
            f"--format diffusers: model.network={section.network} has no counterpart in diffusers, only kl has "
            f"(presets kl-f4-64, kl-f8-256); choose safetensors or onnx"
        )
    remarks, factor = [], 1.0
    if latents is not None:
        factor = read_latent_manifest(latents).scaling_factor
    else:
        remarks.append("scaling_factor is 1: give --latents FOLDER of `vaegan-dist encode` for that of a data set")
    config = {"_class_name": "AutoencoderKL", "_diffusers_version": DIFFUSERS_VERSION}
    config |= diffusers_config(section, model.image, scaling_factor=factor)
    write_whole(output / "diffusion_pytorch_model.safetensors", save(to_diffusers(_weights(model)), {"format": "pt"}))
    _write_json(output / "config.json", config)
    return remarks


class _EncoderGraph(nn.Module):
    """Pictures in [-1, 1] -> mean and log-variance of q(z|x)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.encoder = model.encoder

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.encoder(x)
        return posterior.mu, posterior.logvar


class _DecoderGraph(nn.Module):
    """z -> pictures."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(self, z: Tensor) -> Tensor:
        pictures: Tensor = self.decoder(z)
        return pictures


def _write_onnx(model: Model, output: Path) -> list[str]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise InputError(f"--format onnx: {error}; pip install 'vaegan-dist[export]'") from None
    image = model.image
    graphs: dict[str, tuple[nn.Module, tuple[int, ...], list[str], list[str]]] = {
        "encoder": (_EncoderGraph(model), (image.channels, image.height, image.width), ["x"], ["mu", "logvar"]),
        "decoder": (_DecoderGraph(model), model.latent_shape, ["z"], ["x"]),
    }
    output.mkdir(parents=True, exist_ok=True)
    worst = 0.0
    for name, (graph, shape, inputs, outputs) in graphs.items():
        graph = graph.cpu().eval()
        path = output / f"{name}.onnx"
        example = standard_normal((2, *shape), 0, "export", name).clamp(-1, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own libraries
            torch.onnx.export(
                graph,
                (example,),
                str(path),
                input_names=inputs,
                output_names=outputs,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        worst = max(worst, _check(name, graph, session, shape, inputs[0]))
    return [f"onnxruntime agrees to {worst:.1e} at batch sizes {' and '.join(map(str, BATCHES))}"]


@torch.no_grad()
def _check(name: str, graph: nn.Module, session: Any, shape: tuple[int, ...], argument: str) -> float:
    """Largest difference of the exported graph from the model, relative to the largest output above 1."""
    worst = 0.0
    for batch in BATCHES:
        given = standard_normal((batch, *shape), 0, "check", name, batch).clamp(-1, 1)
        expected = graph(given)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for found, wanted in zip(session.run(None, {argument: given.numpy()}), expected, strict=True):
            scale = max(1.0, float(wanted.abs().max()))
            worst = max(worst, float(np.abs(found - wanted.numpy()).max()) / scale)
    if not worst <= TOLERANCE:
        raise VaeganError(
            f"{name}.onnx differs from the model by {worst:.1e} under onnxruntime; do not use it, and report this"
        )
    return worst


def _write_pictures(model: Model, output: Path) -> list[str]:
    """Samples, and reconstructions where the data set is at hand."""
    save_png(grid(to_uint8(model.sample(64, seed=0)).cpu()), output / "samples.png")
    try:
        dataset = open_for(model, None, "train")
    except InputError as error:
        return [f"no reconstructions in the card: {error}"]
    originals = dataset.read(range(min(SHOWN, len(dataset)))).images
    rebuilt = to_uint8(model.reconstruct(originals)).cpu()
    save_png(comparison(originals, rebuilt), output / "reconstructions.png")
    return []
