"""Evaluations while a run trains: when they are due, what stops them, and the row of the history that they become."""

import time
from collections.abc import Callable
from typing import cast

from vaegan_dist.config import Config
from vaegan_dist.evaluation.evaluate import Report
from vaegan_dist.evaluation.ranks import Ranks
from vaegan_dist.models import Decoder, Encoder, ImageShape
from vaegan_dist.reporting.records import Record
from vaegan_dist.training.measure import Evaluator
from vaegan_dist.training.meter import Agreement
from vaegan_dist.training.runtime import Runtime
from vaegan_dist.training.state import TrainState

# Section of a report, and its numbers that become part of the record.
RECORDED = {
    "generation": ("fid", "kid", "precision", "recall", "density", "coverage", "samples"),
    "reconstruction": ("mse", "psnr", "ssim", "rfid"),
    "likelihood": ("elbo", "rate", "distortion", "elbo_bits_per_dim"),
    "latent": ("active_units", "aggregate_kl"),
    "labels": ("divergence",),
    "features": ("fid_floor",),
}
RENAMED = {"divergence": "label_divergence", "samples": "evaluation_samples"}


class EvaluationStoppedError(Exception):
    """Somebody asked the run to stop while it evaluated; raised on every rank alike."""


class Evaluations:
    """Evaluates the averaged networks every `evaluation.images` images and at the end of a phase, on all ranks.

    It draws from no generator that training draws from and changes no weight, so that a run ends in the same bytes
    with it and without.
    """

    def __init__(self, config: Config, image: ImageShape, runtime: Runtime) -> None:
        self.config, self.image, self.runtime = config, image, runtime
        self.evaluator: Evaluator | None = None

    def open(self) -> None:
        """Make data and feature network ready, on every rank; nothing where no evaluation is asked for."""
        config = self.config
        if config.evaluation.images:
            ranks = Ranks(self.runtime.rank, self.runtime.world_size, self.runtime.device)
            self.evaluator = Evaluator(
                config.data,
                config.data.path,
                config.evaluation,
                self.image,
                batch_size=config.training.batch_size,
                seed=config.run.seed,
                ranks=ranks,
            )

    def due(self, state: TrainState) -> bool:
        """Whether the step that is done asks for an evaluation that has not been made yet."""
        interval, seen = self.config.evaluation.images, state.progress.images_seen
        if not interval or not seen or state.progress.evaluated == seen:
            return False
        return state.phase_done or seen // interval > (seen - self.config.training.batch_size) // interval

    def run(self, state: TrainState, alive: Callable[[str], None]) -> Record:
        """Evaluate; the same numbers on every rank.

        Args:
            alive: told what is being done, between batches.

        Raises:
            EvaluationStoppedError: somebody asked to stop.
        """
        assert self.evaluator is not None
        started = time.perf_counter()
        agreement = Agreement(self.runtime)

        def pulse() -> None:
            alive("evaluating")
            if agreement.due() and agreement.meet()[0]:
                raise EvaluationStoppedError

        report = self.evaluator.measure(
            cast(Encoder, state.ema["encoder"]),
            cast(Decoder, state.ema["decoder"]),
            self.config.objective_of(state.phase),
            thorough=False,
            pulse=pulse,
        )
        state.progress.evaluated = state.progress.images_seen
        return flat(report) | {"evaluation_seconds": time.perf_counter() - started}


def flat(report: Report) -> Record:
    """The numbers of a report that a history keeps, by name; what could not be measured is left out."""
    record: Record = {
        RENAMED.get(name, name): report[section][name]
        for section, names in RECORDED.items()
        for name in names
        if report.get(section, {}).get(name) is not None
    }
    if "features" in report:
        record |= {"features": report["features"]["network"], "features_hash": report["features"]["hash"]}
    return record
