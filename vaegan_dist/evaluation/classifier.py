"""A small classifier of a labelled data set: features for FID where no pretrained network fits, and labels of samples.

Trained once with a fixed seed and kept with its accuracy. The same data on the same kind of machine give the same
weights; their hash, reported beside every number, says so.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from vaegan_dist.evaluation.pictures import to_float
from vaegan_dist.files import write_whole
from vaegan_dist.models.layers import draw_weights
from vaegan_dist.seeding import derive_seed

log = logging.getLogger(__name__)

CLASSIFIER_VERSION: Final = 1
CHANNELS: Final = (16, 32)
FEATURES: Final = 128
SEED: Final = 0
BATCH: Final = 128
IMAGES: Final = 180_000
"""images that it is trained on, over all passes"""
MOST_PICTURES: Final = 60_000
"""pictures of the data set that it is trained on"""
RATE: Final = 2e-3
TESTED: Final = 1024

Labelled = tuple[Tensor, Tensor]
"""pictures uint8 [n, C, H, W], labels int64 [n]"""


class Classifier(nn.Module):
    """Two convolutions of stride 2 and a hidden layer of 128, whose output is the features."""

    def __init__(self, channels: int, height: int, width: int, classes: int) -> None:
        super().__init__()
        first, second = CHANNELS
        self.stages = nn.Sequential(
            nn.Conv2d(channels, first, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        low = -(-height // 4) * -(-width // 4)
        self.hidden = nn.Linear(second * low, FEATURES)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """uint8 pictures -> features `[B, 128]`."""
        return F.relu(self.hidden(self.stages(to_float(pictures)).flatten(1)))

    def logits(self, features: Tensor) -> Tensor:
        """Features -> `[B, classes]`."""
        logits: Tensor = self.head(features)
        return logits


def trained_classifier(
    path: Path | None,
    shape: tuple[int, int, int],
    classes: int,
    read: Callable[[], tuple[Labelled, Labelled]],
    pulse: Callable[[], None] = lambda: None,
) -> tuple[Classifier, float]:
    """The classifier and its accuracy, from its file or trained now.

    Args:
        path: where it is kept; its name must depend on the data. None: nowhere.
        shape: channels, height, width.
        read: pictures to train on, and others to measure the accuracy on.
        pulse: called between batches.
    """
    with torch.device("meta"):
        network = Classifier(*shape, classes)
    network.to_empty(device="cpu")
    accuracy = _load(network, path)
    if accuracy is None:
        draw_weights(network, torch.Generator().manual_seed(derive_seed(SEED, "classifier", "weights")))
        training, testing = read()
        _train(network, *training, pulse)
        accuracy = _accuracy(network, *testing)
        if path is not None:
            try:
                write_whole(path, save(network.state_dict(), {"format": "pt", "vaegan.accuracy": repr(accuracy)}))
            except OSError as error:
                log.warning("classifier not kept in %s (%s)", path.parent, error.strerror)
    return network.requires_grad_(False).eval(), accuracy


def _load(network: Classifier, path: Path | None) -> float | None:
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            accuracy = float(file.metadata()["vaegan.accuracy"])
            network.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        log.warning("classifier %s is damaged (%s); it is trained again", path, error)
        return None
    return accuracy


def _train(network: Classifier, pictures: Tensor, labels: Tensor, pulse: Callable[[], None]) -> None:
    """Adam on the cross-entropy, the rate falling to zero."""
    steps = max(IMAGES // BATCH, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, fused=True)
    order = torch.Generator().manual_seed(derive_seed(SEED, "classifier", "order"))
    waiting = torch.zeros(0, dtype=torch.int64)
    for step in range(steps):
        pulse()
        while len(waiting) < BATCH:
            waiting = torch.cat([waiting, torch.randperm(len(pictures), generator=order)])
        chosen, waiting = waiting[:BATCH], waiting[BATCH:]
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        loss = F.cross_entropy(network.logits(network(pictures[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@torch.no_grad()
def _accuracy(network: Classifier, pictures: Tensor, labels: Tensor) -> float:
    right = 0
    for first in range(0, len(pictures), TESTED):
        guess = network.logits(network(pictures[first : first + TESTED])).argmax(1)
        right += int((guess == labels[first : first + TESTED]).sum())
    return right / len(pictures)
