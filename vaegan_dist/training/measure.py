"""Judging networks by a data set: opens data and feature network once, then measures any number of weights."""

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vaegan_dist.config import DataSection, EvaluationSection, ObjectiveSection
from vaegan_dist.data.batch import Batch
from vaegan_dist.data.cache import cache_folder, content_key
from vaegan_dist.data.configured import open_configured
from vaegan_dist.data.dataset import ShardDataset
from vaegan_dist.data.loader import evaluation_batches
from vaegan_dist.data.manifest import MANIFEST_NAME
from vaegan_dist.data.urls import is_remote, local_path
from vaegan_dist.errors import InputError
from vaegan_dist.evaluation.classifier import (
    CLASSIFIER_VERSION,
    MOST_PICTURES,
    Classifier,
    Labelled,
    trained_classifier,
)
from vaegan_dist.evaluation.evaluate import KEPT, Extent, Pulse, Report, Subject, evaluate
from vaegan_dist.evaluation.features import FeatureNetwork, automatic, open_features
from vaegan_dist.evaluation.likelihood import likelihood_of
from vaegan_dist.evaluation.quality import Lpips
from vaegan_dist.evaluation.ranks import Ranks
from vaegan_dist.evaluation.reference import Reference, measure_reference
from vaegan_dist.models import Decoder, Encoder, ImageShape
from vaegan_dist.training.pictures import require_size

log = logging.getLogger(__name__)

TRAIN, VALIDATION = "train", "validation"
TESTED = 10_000


@dataclass(frozen=True)
class Splits:
    """The pictures of an evaluation, and others of the same kind if the data set has them."""

    real: ShardDataset
    other: ShardDataset | None
    name: str


def open_splits(data: DataSection, path: str, split: str, image: ImageShape) -> Splits:
    """The evaluated split, and for the floor of FID the train split beside it.

    Args:
        split: `auto` is validation where there is one, else train.

    Raises:
        InputError: there is no such split, or its pictures are not of the model's size.
    """
    if split == "auto":
        split = VALIDATION if _has_validation(data, path) else TRAIN

    def opened(name: str) -> ShardDataset:
        dataset = open_configured(data, name, path=path)
        require_size(dataset, image, path)
        return dataset

    try:
        other = opened(TRAIN) if split != TRAIN else None
    except InputError as error:
        log.warning("no train split to measure the floor of FID with: %s", error)
        other = None
    return Splits(opened(split), other, split)


def _has_validation(data: DataSection, path: str) -> bool:
    if not is_remote(path):
        return (Path(local_path(path)) / VALIDATION / MANIFEST_NAME).is_file()
    try:
        open_configured(data, VALIDATION, path=path, read=False).close()
    except InputError as error:
        log.info("no validation split: %s", error)
        return False
    return True


class Evaluator:
    """Measures networks on one rank; every rank calls each method equally often.

    Args:
        data, path: the data set (`data.path` or another one), read as training reads it.
        settings: what is measured.
        batch_size: pictures at a time, over all ranks.
        seed: of the noise.
        alive: called now and then on each rank for itself, while the feature network is made ready.
    """

    def __init__(
        self,
        data: DataSection,
        path: str,
        settings: EvaluationSection,
        image: ImageShape,
        *,
        batch_size: int,
        seed: int,
        ranks: Ranks,
        lpips: Lpips | None = None,
        alive: Pulse = lambda: None,
    ) -> None:
        self.image, self.settings, self.ranks, self.seed = image, settings, ranks, seed
        self.batch_size, self.lpips = batch_size, lpips
        self.splits = open_splits(data, path, settings.split, image)
        self.pictures = min(settings.samples, len(self.splits.real))
        self.features = self._open_features(alive)
        self.reference: Reference | None = None

    def measure(
        self, encoder: Encoder, decoder: Decoder, objective: ObjectiveSection, *, thorough: bool, pulse: Pulse
    ) -> Report:
        """The report on these networks; a collective. `pulse` is called between batches, equally often everywhere."""
        if self.features is not None and self.reference is None:
            self.reference = self._measure_reference(self.features, pulse)
        latent_shape = encoder.latent_shape
        subject = Subject(encoder, decoder, self.image, latent_shape, likelihood_of(objective, decoder))
        extent = Extent(self.settings.samples, self.batch_size, self.seed, thorough)
        report = evaluate(
            subject, self._pass(self.splits.real, self.pictures), extent, self.reference, self.ranks,
            lpips=self.lpips, pulse=pulse,
        )  # fmt: skip
        report["data"] = {"split": self.splits.name, "pictures": self.pictures}
        if self.features is None:
            report["missing"]["fid"] = "no feature network (features=none)"
        return report

    def _pass(self, dataset: ShardDataset, limit: int) -> Callable[[], Generator[tuple[Batch, Tensor], None, None]]:
        ranks = self.ranks
        return lambda: evaluation_batches(dataset, self.batch_size, ranks.rank, ranks.world_size, limit)

    def _measure_reference(self, features: FeatureNetwork, pulse: Pulse) -> Reference:
        other = self.splits.other
        return measure_reference(
            features,
            # Without another split the floor is measured with as many pictures after these.
            self._pass(self.splits.real, self.pictures if other else 2 * self.pictures),
            self._pass(other, self.pictures) if other else None,
            pictures=self.pictures,
            keep=KEPT,
            ranks=self.ranks,
            pulse=pulse,
        )

    def _open_features(self, alive: Pulse) -> FeatureNetwork | None:
        classes = self.splits.real.manifest.classes
        name = self.settings.features
        if name == "auto":
            name = automatic(len(classes or ()), max(self.image.height, self.image.width))
        if name == "none":
            return None
        shape = (self.image.channels, self.image.height, self.image.width)
        return open_features(
            name,
            shape,
            self.ranks.device,
            cache=cache_folder("features"),
            classifier=(lambda: self._classifier(shape, len(classes), alive)) if classes else None,
        )

    def _classifier(self, shape: tuple[int, int, int], classes: int, alive: Pulse) -> tuple[Classifier, float]:
        """The data set's classifier, made on rank 0 for all, so that every rank has the same."""
        training, testing = self.splits.other or self.splits.real, self.splits.real
        folder = cache_folder("features")
        shards = [[shard.sha256 for shard in part.manifest.shards] for part in (training, testing)]
        key = content_key("classifier", CLASSIFIER_VERSION, shape, classes, shards)

        def read() -> tuple[Labelled, Labelled]:
            if training is testing:  # the last tenth is held out
                count = min(len(training), MOST_PICTURES)
                return _labelled(training, 0, count - count // 10), _labelled(training, count - count // 10, count)
            return _labelled(training, 0, MOST_PICTURES), _labelled(testing, 0, TESTED)

        def make() -> tuple[Classifier, float]:
            return trained_classifier(folder / f"{key}.safetensors" if folder else None, shape, classes, read, alive)

        return self.ranks.from_first(make)


def _labelled(dataset: ShardDataset, first: int, end: int) -> Labelled:
    """Pictures and labels of a run of samples."""
    parts = [
        dataset.read(range(at, min(at + 1024, end, len(dataset)))) for at in range(first, min(end, len(dataset)), 1024)
    ]
    labels = [part.labels for part in parts if part.labels is not None]
    return torch.cat([part.images for part in parts]), torch.cat(labels)
