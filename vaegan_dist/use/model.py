"""A trained model in use: `load` it from a run, a checkpoint or an exported folder; encode, decode, sample."""

import json
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vaegan_dist.config import Config
from vaegan_dist.config_source import validate
from vaegan_dist.data.dataset import ShardDataset, open_dataset
from vaegan_dist.data.urls import is_remote, local_path
from vaegan_dist.errors import InputError
from vaegan_dist.evaluation.pictures import to_float, to_uint8
from vaegan_dist.models import Decoder, Encoder, ImageShape, Posterior, build_networks, latent_shape
from vaegan_dist.seeding import standard_normal
from vaegan_dist.training.best import best_checkpoint
from vaegan_dist.training.checkpoint import SEAL, load_networks
from vaegan_dist.training.pictures import require_size

EXPORT_FORMAT = "vaegan_dist"
EXPORT_CONFIG = "config.json"
EXPORT_WEIGHTS = "model.safetensors"
DECODE_BATCH = 64
LARGEST = 2.0  # beyond it, pictures are certainly not in [-1, 1]; unbounded decoders overshoot a little


class Model(nn.Module):
    """Encoder and decoder of a trained model, frozen. Make one with `load`; `.to(device)` moves it.

    Attributes:
        config: the configuration that it was trained with.
        image: size of its pictures.
        latent_shape: size of one z.
        source: the checkpoint or exported folder that it came from.
        weights: "ema" or "raw".
        images_seen: images that its weights have been trained on.
    """

    def __init__(
        self,
        networks: nn.ModuleDict,
        config: Config,
        image: ImageShape,
        *,
        source: Path,
        weights: str,
        images_seen: int,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({name: networks[name] for name in ("encoder", "decoder")})
        self.networks.requires_grad_(False).eval()
        self.config, self.image = config, image
        self.latent_shape = latent_shape(config.model, image)
        self.source, self.weights, self.images_seen = source, weights, images_seen

    @property
    def encoder(self) -> Encoder:
        return cast(Encoder, self.networks["encoder"])

    @property
    def decoder(self) -> Decoder:
        return cast(Decoder, self.networks["decoder"])

    def train(self, mode: bool = True) -> "Model":
        """A loaded model is used, not trained: it stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def posterior(self, x: Tensor) -> Posterior:
        """q(z|x) with `mu` and `logvar`, each `[B, *latent_shape]`.

        Args:
            x: pictures `[B, C, H, W]`: uint8, or floating point in [-1, 1].

        Raises:
            InputError: pictures of another size or range than the model's.
        """
        posterior: Posterior = self.encoder(self._pictures(x))
        return posterior

    def encode(self, x: Tensor) -> Tensor:
        """The latent of pictures, the mean of q(z|x): `[B, C, H, W]` -> `[B, *latent_shape]`; see `posterior`."""
        return self.posterior(x).mu

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures `[B, C, H, W]` in [-1, 1] of latents `[B, *latent_shape]`.

        Raises:
            InputError: latents of another size than the model's.
        """
        if tuple(z.shape[1:]) != self.latent_shape:
            raise InputError(f"latents of shape {list(z.shape)}; the model takes [B, {_text(self.latent_shape)}]")
        reference = next(self.decoder.parameters())
        pictures: Tensor = self.decoder(z.to(reference))
        return pictures

    def reconstruct(self, x: Tensor) -> Tensor:
        """`decode(encode(x))`."""
        return self.decode(self.encode(x))

    def prior(self, count: int, *, seed: int = 0, first: int = 0) -> Tensor:
        """Latents of N(0, I) `[count, *latent_shape]`.

        One draw per picture, so that picture i of a seed is the same however many are asked for, anywhere.
        """
        draws = [standard_normal(self.latent_shape, seed, "samples", first + number) for number in range(count)]
        return torch.stack(draws) if draws else torch.empty(0, *self.latent_shape)

    def sample(self, count: int, *, seed: int = 0) -> Tensor:
        """Pictures `[count, C, H, W]` decoded from N(0, I), the same for the same seed."""
        if count < 1:
            raise InputError(f"{count} samples were asked for; give a number above 0")
        z = self.prior(count, seed=seed)
        return torch.cat([self.decode(z[at : at + DECODE_BATCH]) for at in range(0, count, DECODE_BATCH)])

    def _pictures(self, x: Tensor) -> Tensor:
        wanted = self.image
        if x.ndim != 4 or tuple(x.shape[1:]) != (wanted.channels, wanted.height, wanted.width):
            raise InputError(
                f"pictures of shape {list(x.shape)}; the model takes [B, {wanted.channels}, {wanted.height}, "
                f"{wanted.width}]"
            )
        reference = next(self.encoder.parameters())
        if x.dtype == torch.uint8:
            return to_float(x.to(reference.device), reference.dtype)
        if not x.is_floating_point():
            raise InputError(f"pictures of type {x.dtype}; give uint8, or floating point in [-1, 1]")
        if x.numel() and not float(x.abs().max()) <= LARGEST:
            raise InputError(
                f"pictures with values from {float(x.min()):g} to {float(x.max()):g}; floating point pictures lie in "
                f"[-1, 1] (uint8 ones are converted: x / 127.5 - 1)"
            )
        return x.to(reference)


def _text(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def load(path: str | Path, *, weights: str = "ema", which: str = "newest", device: torch.device | str = "cpu") -> Model:
    """A trained model, ready for use.

    Args:
        path: a run's folder, a checkpoint's folder, or a folder that `vaegan-dist export --format safetensors` wrote;
            of a run or checkpoint also its URL (s3:// gs:// az:// abfs://).
        weights: "ema", the moving average that a run keeps of its weights, or "raw", the weights themselves.
        which: of a run's checkpoints, the "newest" whole one or the "best" by `checkpoint.best_metric`.
        device: where the model is put.

    Raises:
        InputError: there is no model, it is damaged, or it does not hold these weights.
    """
    if which not in ("newest", "best"):
        raise InputError(f"which={which}: choose newest or best")
    if is_remote(str(path)):
        from vaegan_dist.training.remote import (
            fetch_checkpoint,
        )  # the object stores' client: only who needs it loads it

        path = fetch_checkpoint(str(path), which)
    path = Path(local_path(str(path))).expanduser()
    if weights not in ("ema", "raw"):
        raise InputError(f"weights={weights}: choose ema or raw")
    if (path / EXPORT_CONFIG).is_file():
        return _load_exported(path, weights).to(device)
    if not path.is_dir():
        raise InputError(f"no model at '{path}': no such folder; give a run, a checkpoint or an exported folder")
    if which == "best" and not (path / SEAL).is_file():
        best = best_checkpoint(path)
        if best is None:
            raise InputError(f"no best checkpoint at '{path}': train with checkpoint.best_metric, or take the newest")
        path = best
    checkpoint, networks = load_networks(path, weights)
    model = Model(
        networks,
        checkpoint.config,
        checkpoint.image,
        source=checkpoint.path,
        weights=weights,
        images_seen=checkpoint.progress.images_seen,
    )
    return model.to(device)


def _load_exported(path: Path, weights: str) -> Model:
    try:
        card = json.loads((path / EXPORT_CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path / EXPORT_CONFIG}: cannot be read: {error}; export the model again") from None
    if not isinstance(card, dict) or card.get("format") != EXPORT_FORMAT:
        diffusers = isinstance(card, dict) and "_class_name" in card
        remedy = "open it with diffusers' AutoencoderKL.from_pretrained" if diffusers else "give a run or a checkpoint"
        raise InputError(f"'{path}' was not written by `vaegan-dist export --format safetensors`; {remedy}")
    if weights != card["weights"]:
        raise InputError(f"'{path}' holds the {card['weights']} weights only; load them, or export the {weights} ones")
    config, image = validate(card["config"]), ImageShape(**card["image"])
    networks = build_networks(config.model, image, seed=config.run.seed)
    del networks["discriminator"]
    try:
        networks.load_state_dict(load_file(path / EXPORT_WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{path / EXPORT_WEIGHTS} does not fit its {EXPORT_CONFIG}: {reason}; export it again"
        ) from None
    return Model(networks, config, image, source=path, weights=weights, images_seen=card["images_seen"])


def open_for(model: Model, data: str | None, split: str) -> ShardDataset:
    """A data set whose pictures fit the model: `data`, or the one that it was trained on.

    Raises:
        InputError: there is none, or its pictures have another size.
    """
    settings = model.config.data
    path = data or settings.path
    dataset = open_dataset(path, split, cache_dir=settings.cache_dir, cache_bytes=settings.cache_bytes)
    require_size(dataset, model.image, path)
    return dataset


def generate(path: str | Path, weights: str, count: int, seed: int) -> Tensor:
    """Pictures decoded from N(0, I): uint8 `[count, C, H, W]`, the same for the same seed anywhere."""
    return to_uint8(load(path, weights=weights).sample(count, seed=seed))


def reconstruct(path: str | Path, weights: str, data: str | None, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first pictures of a data set and their reconstructions from the posterior's mean, uint8 `[n, C, H, W]`."""
    model = load(path, weights=weights)
    dataset = open_for(model, data, split)
    originals = dataset.read(range(min(count, len(dataset)))).images
    return originals, to_uint8(model.reconstruct(originals))
