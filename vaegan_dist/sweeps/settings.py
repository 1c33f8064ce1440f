"""What a sweep's YAML file says: settings and a search space, checked before anything starts."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from vaegan_dist.config import Count, Fraction, Positive, Section
from vaegan_dist.config_source import parse_override, parse_yaml
from vaegan_dist.errors import ConfigError

Mode = Literal["min", "max"]
# The ledger carries these; a sweep that has begun may change them and nothing else.
MAY_CHANGE = ("trials", "concurrent", "autoscaling")
PREFIX = "sweep."


class SweepSettings(Section):
    """One sweep. Progress is counted in images, as everywhere."""

    metric: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """history key by which trials are judged, or a list of them (searchers tpe and random); it must not be scaled by
    what is searched (default: the best that the configuration measures, see docs/sweeps.md)"""
    mode: Mode | Annotated[tuple[Mode, ...], Field(min_length=1)] = "min"
    """whether the smallest or the largest value is the best; one for all metrics, or a list"""
    trials: Positive = 16
    """configurations that are tried; with `grid` values beside others, for each point of the grid"""
    searcher: Literal["random", "grid", "tpe"] = "random"
    """where configurations come from; tpe: Optuna's tree-structured Parzen estimator (Bergstra et al. 2011)"""
    startup_trials: Count = 8
    """tpe: trials that are drawn at random before the estimator proposes"""
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = "none"
    """which trials are stopped early: asha (Li et al. 2018, arXiv 1810.05934), hyperband (Li et al. 2016,
    arXiv 1603.06560), median (Golovin et al. 2017); pbt copies weights instead (Jaderberg et al. 2017,
    arXiv 1711.09846)"""
    interval_images: Positive | None = None
    """images between two values of the metric, and between two checkpoints (default: evaluation.images for a metric
    of the evaluations, else reporting.log_images)"""
    grace_images: Positive | None = None
    """asha, median: images that every trial may spend (default: a sixth of the run; median: one interval)"""
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0
    """asha, hyperband: of so many trials one goes on at each rung"""
    perturb_images: Positive | None = None
    """pbt: images between two exchanges (default: one interval)"""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """pbt: share of the trials that is replaced, and share that is copied"""
    resample: Fraction = 0.25
    """pbt: probability that a value is drawn anew instead of multiplied by 0.8 or 1.25"""
    workers_per_trial: Positive | None = None
    """training workers of a trial; 1 runs it in a process that the next trial uses again, more start a group of
    workers for each trial (default: cluster.workers)"""
    concurrent: Positive | None = None
    """most trials at a time (default: as many as the cluster holds)"""
    autoscaling: bool = False
    """the cluster adds nodes when trials wait for them: `concurrent` counts, and not what the cluster holds now"""
    initial: tuple[dict[str, Any], ...] = ()
    """configurations to try first, as keys of the space and their values; what they leave out is drawn"""
    space: Annotated[dict[str, Any], Field(min_length=1)]
    """configuration keys and what they may be: {uniform: [low, high]}, {loguniform: [low, high]},
    {randint: [low, high]} (both ends included), {choice: [...]}, {grid: [...]}; with `when: {key: value}` only there"""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics; empty when the default applies."""
        if self.metric is None:
            return ()
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    def modes(self, count: int) -> tuple[Mode, ...]:
        """One mode for each of `count` metrics."""
        return (self.mode,) * count if isinstance(self.mode, str) else self.mode

    @model_validator(mode="after")
    def _fits(self) -> "SweepSettings":
        several = len(self.metrics) > 1
        if not isinstance(self.mode, str) and len(self.mode) != max(len(self.metrics), 1):
            raise ValueError(
                f"mode lists {len(self.mode)} directions for {len(self.metrics)} metrics; give one for each"
            )
        if several and self.scheduler != "none":
            raise ValueError(
                f"scheduler={self.scheduler} compares trials by one metric, `metric` lists {len(self.metrics)}; "
                f"set scheduler: none, or one metric"
            )
        if self.autoscaling and self.concurrent is None:
            raise ValueError("autoscaling=true: how many trials at a time is then a choice; set concurrent")
        if self.scheduler == "pbt" and self.searcher == "tpe":
            raise ValueError("scheduler=pbt changes values itself; set searcher: random (or grid) for where it starts")
        return self


def read_settings(path: Path, overrides: Sequence[str] = ()) -> SweepSettings:
    """A sweep's file, with `key=value` items laid over it.

    Raises:
        ConfigError: one line that names the file, the key and the remedy.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"sweep file '{path}' cannot be read: {error.strerror}") from None
    tree = parse_yaml(text, str(path))
    for key, value in map(parse_override, overrides):
        tree[key.removeprefix(PREFIX)] = value
    try:
        return SweepSettings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(_line(item) for item in error.errors()[:3])}") from None


def _line(error: Any) -> str:
    """One validation error as key, value, cause and remedy."""
    key, known = ".".join(str(part) for part in error["loc"]), list(SweepSettings.model_fields)
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, known, 1, 0.5)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        return f"{key}: unknown key{hint}; keys here: {', '.join(known)}; configuration keys go below `space`"
    if error["type"] == "missing":
        return (
            f"{key}: is required; list there what is searched, for example objective.beta: {{loguniform: [0.01, 10]}}"
        )
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{key}={error.get('input')}: {error['msg'][0].lower()}{error['msg'][1:]}"
