"""By what the trials of a sweep are judged: which history key, in which records, how often."""

import difflib
from dataclasses import dataclass

from vaegan_dist.config import Config
from vaegan_dist.data.configured import open_configured
from vaegan_dist.errors import ConfigError
from vaegan_dist.evaluation.features import automatic
from vaegan_dist.sweeps.probe import last_step
from vaegan_dist.sweeps.settings import Mode, SweepSettings
from vaegan_dist.sweeps.trial import Judged
from vaegan_dist.training.evaluating import RECORDED, RENAMED
from vaegan_dist.training.pictures import image_of

# Sections of an evaluation that need a feature network, or labels.
WITH_FEATURES = {"fid", "kid", "precision", "recall", "density", "coverage", "rfid", "fid_floor", "label_divergence"}
# Looks at a trial when nothing says how often: two rungs of successive halving by three, and the end.
LOOKS = 9


@dataclass(frozen=True)
class _Offer:
    """What the records of a run hold."""

    evaluation: list[str]
    train: list[str]

    @property
    def default(self) -> tuple[str, Mode]:
        """What β does not scale: distances of features; without any, the bound at β = 1."""
        return ("fid", "min") if "fid" in self.evaluation else ("elbo", "max")


def judge(settings: SweepSettings, config: Config) -> Judged:
    """The metric that the settings name, or the default, found among those that a run of the configuration logs.

    Raises:
        ConfigError: no record of the run would hold the metric.
        InputError: the data set is not there.
    """
    offer = _offer(config)
    if not settings.metrics:
        metric, mode = offer.default
        return Judged((metric,), (mode,), "evaluation", _interval(settings, config, config.evaluation.images))
    modes = settings.modes(len(settings.metrics))
    if all(metric in offer.evaluation for metric in settings.metrics):
        return Judged(settings.metrics, modes, "evaluation", _interval(settings, config, config.evaluation.images))
    if all(metric in offer.train for metric in settings.metrics):
        interval = settings.interval_images or config.reporting.log_images
        return Judged(settings.metrics, modes, "train", min(interval, config.total_images))
    raise ConfigError(_unknown(settings.metrics, offer))


def _interval(settings: SweepSettings, config: Config, own: int) -> int:
    """Images between two evaluations: as set, as the configuration has it, or a ninth of the run."""
    return min(settings.interval_images or own or -(-config.total_images // LOOKS), config.total_images)


def _unknown(metrics: tuple[str, ...], offer: _Offer) -> str:
    known = [*offer.evaluation, *offer.train]
    missing = next((metric for metric in metrics if metric not in known), "")
    if not missing:
        return f"metric={', '.join(metrics)}: no record holds all of them; take them from evaluations: " + ", ".join(
            offer.evaluation
        )
    close = difflib.get_close_matches(missing, known, 1, 0.6)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    without = ", or set evaluation.features" if missing in WITH_FEATURES else ""
    return (
        f"metric={missing}: no record of this run would hold it{hint}; evaluations have {', '.join(offer.evaluation)}; "
        f"train records have {', '.join(offer.train)}{without}"
    )


def _offer(config: Config) -> _Offer:
    """Names that the records hold; the data set is opened, nothing is trained."""
    manifest = open_configured(config.data, read=False).manifest
    image = image_of(manifest)
    features = config.evaluation.features
    if features == "auto":
        features = automatic(len(manifest.classes or ()), max(image.height, image.width))
    names = [RENAMED.get(name, name) for group in RECORDED.values() for name in group]
    evaluation = [name for name in names if features != "none" or name not in WITH_FEATURES]
    return _Offer(evaluation, list(last_step(config, manifest).term_names))
