"""A whole data set through the encoder into latent shards: shared by ranks, resumable, every sample once.

A rank owns whole shards. A shard that is done has a note beside it with its size, hash and sums; a later start takes
over what the notes vouch for. dataset.json comes last, when every shard is done.
"""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from vaegan_dist.data.dataset import ShardDataset
from vaegan_dist.data.latents import Latent, LatentManifest, LatentWriter, read_latent_manifest, write_latent_manifest
from vaegan_dist.data.manifest import MANIFEST_NAME, ShardInfo
from vaegan_dist.errors import InputError, VaeganError
from vaegan_dist.evaluation.features import weights_hash
from vaegan_dist.evaluation.ranks import Ranks
from vaegan_dist.files import file_sha256, write_whole
from vaegan_dist.seeding import standard_normal
from vaegan_dist.use.model import Model, load, open_for

NOTES: Final = ".encode"


@dataclass(frozen=True)
class Task:
    """What is encoded and where to; plain data, so that it travels to other processes."""

    model: str
    output: str
    """folder for the latent shards of the split"""
    weights: str = "ema"
    data: str | None = None
    split: str = "train"
    content: Literal["moments", "sample"] = "moments"
    dtype: Literal["float32", "float16"] = "float32"
    seed: int = 0
    batch_size: int = 64

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """A task with its model and data opened."""

    task: Task
    model: Model
    dataset: ShardDataset
    identity: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.task.output)

    def name(self, shard: int) -> str:
        """A latent shard is called as its pictures' shard is."""
        return self.dataset.manifest.shards[shard].name

    def note(self, shard: int) -> Path:
        """What says that a shard is done."""
        return self.folder / NOTES / f"{shard:06d}.json"


def open_work(task: Task, device: torch.device | str = "cpu") -> Work:
    """Open model and data.

    Raises:
        InputError: one of them is not to be had, or they do not fit each other.
    """
    model = load(task.model, weights=task.weights, device=device)
    dataset = open_for(model, task.data, task.split)
    identity = {
        "weights": weights_hash(model.networks["encoder"]),
        "content": task.content,
        "dtype": task.dtype,
        "seed": task.seed if task.content == "sample" else None,
        "split": task.split,
        "shards": [[shard.name, shard.samples, shard.sha256] for shard in dataset.manifest.shards],
    }
    return Work(task, model, dataset, identity)


@contextmanager
def begun(work: Work) -> Iterator[bool]:
    """Claim the output folder for one driver; whether there is anything to do.

    Raises:
        InputError: the folder holds something else, or another process is at work there.
    """
    notes = work.folder / NOTES
    if (work.folder / MANIFEST_NAME).exists():
        if read_latent_manifest(work.folder).source.get("identity") != _digest(work):
            raise InputError(
                f"{work.folder}: holds latents of another model, data set or setting; choose another --output"
            )
        yield False
        return
    if work.folder.is_dir() and any(work.folder.iterdir()) and not (notes / "identity.json").exists():
        raise InputError(f"{work.folder}: holds other files; choose another --output")
    notes.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(notes / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{work.folder}: another process encodes into it; wait for it") from None
        path, content = notes / "identity.json", json.dumps({"identity": _digest(work)}).encode()
        if not path.exists():
            write_whole(path, content)
        elif path.read_bytes() != content:
            raise InputError(
                f"{work.folder}: holds a part of the latents of another model, data set or setting; remove it, or "
                f"choose another --output"
            )
        yield True
    finally:
        os.close(descriptor)


def _digest(work: Work) -> str:
    return hashlib.sha256(json.dumps(work.identity, sort_keys=True).encode()).hexdigest()


def encode_share(work: Work, ranks: Ranks, pulse: Callable[[], None], done: Callable[[int], None]) -> None:
    """This rank's shards, those left to do.

    Args:
        pulse: called between batches; may raise to stop.
        done: told how many samples each shard that is done or was done before has.
    """
    for shard in range(ranks.rank, len(work.dataset.manifest.shards), ranks.world_size):
        if _finished(work, shard) is None:
            _encode_shard(work, shard, pulse)
        done(work.dataset.shard_samples[shard])


def encode_task(arguments: dict[str, Any], ranks: Ranks, tell: Callable[[int], None]) -> None:
    """`encode_share` of a task in plain data, as processes and clusters run it."""
    encode_share(open_work(Task(**arguments), ranks.device), ranks, lambda: None, tell)


def finish(work: Work) -> LatentManifest:
    """Write dataset.json once every shard is done.

    Raises:
        VaeganError: some are not.
    """
    notes = [_finished(work, shard) for shard in range(len(work.dataset.manifest.shards))]
    missing = [work.name(shard) for shard, note in enumerate(notes) if note is None]
    if missing:
        raise VaeganError(
            f"{len(missing)} of {len(notes)} shards are not encoded ({missing[0]}); run the command again"
        )
    whole = [note for note in notes if note is not None]
    # Sums in the order of the shards, whichever rank made them: the factor does not depend on the ranks.
    count, total, square = (math.fsum(note["sums"][place] for note in whole) for place in range(3))
    mean = total / count
    deviation = math.sqrt(max(square / count - mean * mean, 1e-24))
    manifest, model = work.dataset.manifest, work.model
    made = LatentManifest(
        split=work.task.split,
        layout=manifest.layout,
        content=work.task.content,
        shape=model.latent_shape,
        dtype=work.task.dtype,
        classes=manifest.classes,
        mean=mean,
        scaling_factor=1 / deviation,
        model={
            "source": str(model.source),
            "weights": model.weights,
            "images_seen": model.images_seen,
            "hash": work.identity["weights"],
        },
        source={
            "data": work.task.data or model.config.data.path,
            "pictures": manifest.samples,
            "identity": _digest(work),
            "seed": work.identity["seed"],
        },
        shards=tuple(ShardInfo(**note["shard"]) for note in whole),
    )
    write_latent_manifest(work.folder, made)
    return made


def _finished(work: Work, shard: int) -> dict[str, Any] | None:
    """The note of a shard whose bytes are those that were written; None where there is none."""
    try:
        note: dict[str, Any] = json.loads(work.note(shard).read_bytes())
        info = ShardInfo(**note["shard"])
        path = work.folder / info.name
        whole = path.stat().st_size == info.bytes and file_sha256(path) == info.sha256
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return note if whole else None


@torch.no_grad()
def _encode_shard(work: Work, shard: int, pulse: Callable[[], None]) -> None:
    first = sum(work.dataset.shard_samples[:shard])
    end = first + work.dataset.shard_samples[shard]
    sums = np.zeros(3)
    path = work.folder / work.name(shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    with LatentWriter(path, work.dataset.manifest.layout) as writer:
        for begin in range(first, end, work.task.batch_size):
            pulse()
            ids = range(begin, min(begin + work.task.batch_size, end))
            batch = work.dataset.read(ids)
            posterior = work.model.posterior(batch.images.to(next(work.model.parameters()).device))
            mu, variance = posterior.mu.double(), posterior.logvar.double().exp()
            sums += [mu.numel(), float(mu.sum()), float((mu.square() + variance).sum())]
            keys = [work.dataset.key(sample) for sample in ids]
            arrays = _arrays(work, posterior.mu, posterior.logvar, keys)
            labels = [None] * len(ids) if batch.labels is None else batch.labels.tolist()
            for row, (key, label) in enumerate(zip(keys, labels, strict=True)):
                writer.add(Latent(key, {name: values[row] for name, values in arrays.items()}, label))
        info = writer.finish(work.name(shard))
    note = {"shard": info.model_dump(), "sums": sums.tolist()}
    write_whole(work.note(shard), json.dumps(note).encode())


def _arrays(work: Work, mu: Tensor, logvar: Tensor, keys: list[str]) -> dict[str, Any]:
    kept = {"mu": mu, "logvar": logvar}
    if work.task.content == "sample":
        shape = work.model.latent_shape
        # By key and not by place, so that a picture's latent does not depend on how the data set was sharded.
        eps = torch.stack([standard_normal(shape, work.task.seed, "encode", key) for key in keys]).to(mu)
        kept = {"latent": mu + torch.exp(0.5 * logvar) * eps}
    return {name: values.cpu().numpy().astype(work.task.dtype) for name, values in kept.items()}
