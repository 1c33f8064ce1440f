"""Latent shards: a data set encoded by a model, as WebDataset tars that a latent-diffusion trainer reads.

A sample holds `mu.npy` and `logvar.npy`, or `latent.npy` where latents were sampled, and `cls` as in the pictures'
shards. In the layout `chunks` a sample holds up to 256 latents stacked, `keys.json` and `labels.npy`. There is one
latent shard for each shard of pictures, with its name and its keys in its order.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vaegan_dist.data.manifest import MANIFEST_NAME, Layout, ShardInfo
from vaegan_dist.data.shard_writer import TarShard, npy_bytes
from vaegan_dist.errors import DataError, InputError
from vaegan_dist.files import write_whole

LATENT_FORMAT: Final = "vaegan_dist_latents"
Array = npt.NDArray[np.floating[Any]]


class LatentManifest(BaseModel):
    """The dataset.json of latent shards."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal["vaegan_dist_latents"] = LATENT_FORMAT
    format_version: Literal[1] = 1
    split: str
    layout: Layout
    content: Literal["moments", "sample"]
    """moments: mu and logvar of q(z|x); sample: one z drawn from it"""
    shape: tuple[int, ...]
    """of one latent"""
    dtype: Literal["float32", "float16"]
    classes: tuple[str, ...] | None
    mean: float
    """of all numbers in z ~ q(z|x), over the data set"""
    scaling_factor: Annotated[float, Field(gt=0)]
    """1 / standard deviation of these numbers: what a diffusion model multiplies z with (Rombach et al. 2022, D.1)"""
    model: dict[str, Any]
    """where the model came from, and the hash of its weights"""
    source: dict[str, Any]
    """the pictures"""
    shards: tuple[ShardInfo, ...]

    @property
    def samples(self) -> int:
        """Latents in all shards together."""
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class Latent:
    """One latent of a data set."""

    key: str
    arrays: dict[str, Array]
    """`mu` and `logvar`, or `latent`, each of the manifest's shape"""
    label: int | None


class LatentWriter(TarShard[Latent]):
    """A shard of latents."""

    def one(self, item: Latent) -> dict[str, Any]:
        return {f"{name}.npy": npy_bytes(array) for name, array in item.arrays.items()}

    def many(self, items: Sequence[Latent]) -> dict[str, Any]:
        """Arrays `[n, *shape]`."""
        names = items[0].arrays
        return {f"{name}.npy": npy_bytes(np.stack([each.arrays[name] for each in items])) for name in names}


def read_latent_manifest(folder: str | Path) -> LatentManifest:
    """The dataset.json of latent shards.

    Raises:
        InputError: there is none, or it is of something else.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        return LatentManifest.model_validate(json.loads(path.read_bytes()))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make latents with `vaegan-dist encode`") from None
    except (ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: does not describe latent shards: {reason}; run `vaegan-dist encode` again") from None


def write_latent_manifest(folder: Path, manifest: LatentManifest) -> Path:
    """Write dataset.json whole or not at all; call it last."""
    path = folder / MANIFEST_NAME
    write_whole(path, (json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n").encode())
    return path


def read_latents(folder: str | Path) -> Iterator[Latent]:
    """Every latent of a folder that `vaegan-dist encode` wrote, in order.

    Raises:
        InputError: no latents there.
        DataError: a shard is damaged.
    """
    manifest = read_latent_manifest(folder)
    for shard in manifest.shards:
        count = 0
        for members in _samples(Path(folder) / shard.name):
            for latent in _latents(members):
                count += 1
                yield latent
        if count != shard.samples:
            raise DataError(f"shard {shard.name}: {count} latents, dataset.json says {shard.samples}; encode again")


def _samples(path: Path) -> Iterator[dict[str, bytes]]:
    """Members of each sample by extension, and its key as `__key__`."""
    sample: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                file = archive.extractfile(member)
                if file is None:
                    continue
                if sample.get("__key__") != key.encode():
                    if sample:
                        yield sample
                    sample = {"__key__": key.encode()}
                sample[extension] = file.read()
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"shard {path.name}: cannot be read ({error}); encode again") from None
    if sample:
        yield sample


def _latents(members: Mapping[str, bytes]) -> Iterator[Latent]:
    names = [name for name in ("mu", "logvar", "latent") if f"{name}.npy" in members]
    arrays = {name: _array(members[f"{name}.npy"]) for name in names}
    if "keys.json" not in members:
        label = int(members["cls"]) if "cls" in members else None
        yield Latent(members["__key__"].decode(), arrays, label)
        return
    labels = _array(members["labels.npy"]) if "labels.npy" in members else None
    for row, key in enumerate(json.loads(members["keys.json"])):
        own = {name: array[row] for name, array in arrays.items()}
        yield Latent(str(key), own, None if labels is None else int(labels[row]))


def _array(content: bytes) -> Any:
    return np.load(io.BytesIO(content), allow_pickle=False)
