"""The whole evaluation of a trained model: report, table and pictures, on one rank or many."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from vaegan_dist.config import EvaluationSection, ObjectiveSection
from vaegan_dist.data.loader import evaluation_batches
from vaegan_dist.data.urls import is_remote
from vaegan_dist.errors import InputError
from vaegan_dist.evaluation.evaluate import Report
from vaegan_dist.evaluation.pictures import comparison, grid, save_png, to_uint8
from vaegan_dist.evaluation.quality import open_lpips
from vaegan_dist.evaluation.ranks import Ranks
from vaegan_dist.evaluation.table import text
from vaegan_dist.evaluation.walks import interpolations, nearest, neighbour_sheet, rate_distortion, traversals
from vaegan_dist.files import write_whole
from vaegan_dist.training.measure import Evaluator
from vaegan_dist.use.model import Model, load

REPORT: Final = "evaluation.json"
TABLE: Final = "evaluation.txt"
SHOWN: Final = 16
NEIGHBOURS: Final = 5
STEPS: Final = 9
TURNED: Final = 10


@dataclass(frozen=True)
class Task:
    """What is evaluated and how; plain data, so that it travels to other processes."""

    model: str
    """a run, a checkpoint or an exported folder"""
    output: str = ""
    """folder for report, table and pictures (default: below the run's `evaluations`)"""
    weights: str = "ema"
    data: str | None = None
    split: str = "auto"
    features: str = "auto"
    samples: int = 10_000
    batch_size: int = 256
    seed: int = 0
    lpips: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def complete(task: Task) -> Task:
    """The task with its output folder, and with what a wrong path would only tell on a worker told here.

    Raises:
        InputError: there is no such model.
    """
    model = load(task.model, weights=task.weights)
    # What came from a URL lies in a cache, where nobody would look for the report.
    home = Path.cwd() if is_remote(task.model) else _home(model)
    output = task.output or str(home / "evaluations" / f"{model.images_seen:012d}-{task.weights}")
    return replace(task, output=output)


def _home(model: Model) -> Path:
    """The run of a checkpoint, or the exported folder itself."""
    return model.source.parent if model.source.name.startswith("checkpoint-") else model.source


def assess(task: Task, ranks: Ranks, pulse: Callable[[], None]) -> Report:
    """Evaluate on this rank; every rank calls it. Rank 0 writes the files. The same report on every rank.

    Raises:
        InputError: model, data or feature network are not to be had, or do not fit each other.
    """
    model = load(task.model, weights=task.weights, device=ranks.device)
    settings = EvaluationSection(samples=task.samples, features=task.features, split=task.split)
    path = task.data or model.config.data.path
    evaluator = Evaluator(
        model.config.data,
        path,
        settings,
        model.image,
        batch_size=task.batch_size,
        seed=task.seed,
        ranks=ranks,
        lpips=open_lpips(task.lpips, model.image.height, model.image.width, ranks.device),
    )
    report = evaluator.measure(model.encoder, model.decoder, objective_of(model), thorough=True, pulse=pulse)
    report["model"] = {
        "source": str(model.source),
        "weights": model.weights,
        "images_seen": model.images_seen,
        "preset": model.config.preset,
    }
    report["data"]["path"] = path
    report["seed"] = task.seed
    if ranks.rank == 0:
        output = Path(task.output)
        write_whole(output / REPORT, (json.dumps(report, indent=1) + "\n").encode())
        write_whole(output / TABLE, text({model.weights: report}).encode())
        for name, draw in _sheets(model, evaluator, report, task, output).items():
            save_png(draw(), output / f"{name}.png")
    return report


def assess_task(arguments: dict[str, Any], ranks: Ranks, tell: Callable[[int], None]) -> Report:
    """`assess` of a task in plain data, as processes and clusters run it; tells how many pictures are done."""
    task = Task(**arguments)
    part = task.batch_size // ranks.world_size
    return assess(task, ranks, lambda: tell(part))


def pictures_of(task: Task) -> int:
    """About how many pictures an evaluation passes: references, floor, reconstructions, samples, neighbours."""
    return 6 * task.samples


def objective_of(model: Model) -> ObjectiveSection:
    """The objective of the phase that the weights come from."""
    left = model.images_seen
    for phase in model.config.phases:
        left -= model.config.phase_images(phase)
        if left <= 0:
            break
    return model.config.objective_of(phase)


def _sheets(
    model: Model, evaluator: Evaluator, report: Report, task: Task, output: Path
) -> dict[str, Callable[[], Any]]:
    """The pictures by name, each drawn when called."""
    real = evaluator.splits.real
    originals = real.read(range(min(SHOWN, len(real)))).images.to(next(model.parameters()).device)
    samples = to_uint8(model.sample(64, seed=task.seed)).cpu()
    train = evaluator.splits.other or real
    return {
        "samples": partial(grid, samples),
        "reconstructions": lambda: comparison(originals.cpu(), to_uint8(model.reconstruct(originals)).cpu()),
        "interpolations": lambda: between_pictures(model, originals[:SHOWN], STEPS),
        "traversals": lambda: turn_units(model, originals[0], report["latent"]["kl_per_unit"], TURNED, STEPS),
        "neighbours": lambda: neighbour_sheet(
            samples[:8],
            nearest(samples[:8], lambda: evaluation_batches(train, task.batch_size), NEIGHBOURS)[0],
        ),
        "rate_distortion": lambda: rate_distortion(_points(report, output)),
    }


def between_pictures(model: Model, originals: Tensor, steps: int) -> Any:
    """Ways between the latents of one picture and the next, pair by pair."""
    z = model.encode(originals[: len(originals) // 2 * 2])
    return interpolations(model.decode, z[::2], z[1::2], steps)


def between_samples(model: Model, rows: int, steps: int, seed: int) -> Any:
    """Ways between latents of the prior."""
    z = model.prior(2 * rows, seed=seed)
    return interpolations(model.decode, z[::2], z[1::2], steps)


def turn_units(model: Model, original: Tensor, kl: list[float] | None, units: int, steps: int) -> Any:
    """A picture with single units of its latent turned, those with the largest KL first.

    Args:
        kl: of each unit over a data set; None: of this picture.
    """
    posterior = model.posterior(original.unsqueeze(0))
    own = posterior.kl_per_dim().view(model.latent_shape[0], -1).sum(1)
    weight = own.cpu() if kl is None else torch.tensor(kl)
    chosen = weight.topk(min(units, len(weight))).indices.tolist()
    return traversals(model.decode, posterior.mu[0], chosen, steps)


def _points(report: Report, output: Path) -> list[tuple[str, float, float]]:
    """This evaluation, and those that lie beside it with the same likelihood."""
    points = {}
    for path in sorted(output.parent.glob(f"*/{REPORT}")):
        try:
            other = json.loads(path.read_text())
            if other["likelihood"]["kind"] == report["likelihood"]["kind"]:
                points[path.parent.name.lstrip("0")] = (other["likelihood"]["rate"], other["likelihood"]["distortion"])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: is no report of an evaluation ({error}); move it away") from None
    points[output.name.lstrip("0")] = (report["likelihood"]["rate"], report["likelihood"]["distortion"])
    return [(name, *point) for name, point in points.items()]
