"""dataset.json: what a data set consists of. Written last and atomically, so that its presence means "complete"."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vaegan_dist.errors import InputError
from vaegan_dist.files import write_whole

MANIFEST_NAME = "dataset.json"
FORMAT_VERSION: Final = 1
MAX_MANIFEST_BYTES = 256 * 2**20
MAX_SIDE = 16_384
MAX_SHARDS = 1_000_000
MAX_SHARD_BYTES = 2**42
MAX_SHARD_SAMPLES = 2**24
MEMBER_BYTES = 512

Layout = Literal["files", "chunks"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ShardInfo(_Frozen):
    """One tar file of the data set."""

    name: Annotated[str, Field(min_length=1, max_length=1024)]
    """path relative to dataset.json, with '/' between its parts; always below it"""
    samples: Annotated[int, Field(ge=0, le=MAX_SHARD_SAMPLES)]
    """pictures in the shard (in the layout `chunks` more than members)"""
    bytes: Annotated[int, Field(ge=0, le=MAX_SHARD_BYTES)]
    """size of the file"""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """hash of the file"""

    @field_validator("name")
    @classmethod
    def _stays_below(cls, name: str) -> str:
        if _CONTROL.search(name) or "\\" in name or ":" in name:
            raise ValueError("a shard name may hold no control character, backslash or colon (drive or URL)")
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError("a shard name must be a relative path that stays below dataset.json")
        return name


class Manifest(_Frozen):
    """The content of a dataset.json: one split of a data set."""

    format_version: Literal[1] = FORMAT_VERSION
    """version of this file's format"""
    split: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")] = "train"
    """which part of the data this is: train, validation"""
    layout: Layout
    """files: one picture per sample; chunks: samples of up to 256 pictures as one uint8 array"""
    height: Annotated[int, Field(gt=0, le=MAX_SIDE)]
    """rows of every picture"""
    width: Annotated[int, Field(gt=0, le=MAX_SIDE)]
    """columns of every picture"""
    channels: Literal[1, 3]
    """1 grey, 3 RGB"""
    classes: tuple[str, ...] | None = None
    """names of the classes, by label; None when the pictures have no labels"""
    shards: Annotated[tuple[ShardInfo, ...], Field(min_length=1, max_length=MAX_SHARDS)]
    """the shards, in the order of the sample list"""
    created: dict[str, Any] = {}
    """how it was made: options, source, tool version, broken pictures; informative only"""

    @field_validator("shards")
    @classmethod
    def _unique_names(cls, shards: tuple[ShardInfo, ...]) -> tuple[ShardInfo, ...]:
        seen: set[str] = set()
        for shard in shards:
            if shard.name in seen:
                raise ValueError(f"shard {shard.name!r} is listed twice")
            seen.add(shard.name)
        return shards

    @model_validator(mode="after")
    def _shards_hold_their_samples(self) -> Self:
        """A shard is no smaller than its members' headers, or its pixels: an absurd count is refused here already."""
        least = MEMBER_BYTES if self.layout == "files" else self.height * self.width * self.channels
        for shard in self.shards:
            if shard.samples * least > shard.bytes:
                raise ValueError(f"shard {shard.name}: {shard.samples} samples cannot lie in {shard.bytes} bytes")
        return self

    @property
    def samples(self) -> int:
        """Pictures in all shards together."""
        return sum(shard.samples for shard in self.shards)


def find_manifest(path: str | Path, split: str = "train") -> Path:
    """The dataset.json of a split: PATH/<split>/dataset.json, PATH/dataset.json, or PATH itself when it is a .json.

    A file that is named directly must be of the wanted split when that is not `train`, so that nobody validates on
    what was trained on.

    Raises:
        InputError: there is none; names what was looked for.
    """
    path = Path(path)
    beside = [path] if path.suffix == ".json" else [path / MANIFEST_NAME]
    candidates = beside if path.suffix == ".json" else [path / split / MANIFEST_NAME, *beside]
    for candidate in candidates:
        if not candidate.is_file():
            continue
        if candidate in beside and split != "train" and (found := read_manifest(candidate).split) != split:
            raise InputError(
                f"{candidate}: holds the split '{found}', not '{split}'; name the folder above it, or prepare with "
                "`vaegan-dist prepare --validation 0.1`"
            )
        return candidate
    looked = " and ".join(map(str, candidates))
    raise InputError(f"{path}: no prepared data set (looked for {looked}); make one with `vaegan-dist prepare`")


def read_manifest(path: str | Path) -> Manifest:
    """Read and check a dataset.json; `InputError` of one line on anything wrong."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise InputError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes, so not a dataset.json; check the path")
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make one with `vaegan-dist prepare`") from None
    return parse_manifest(text, str(path))


def parse_manifest(text: bytes, name: str) -> Manifest:
    """A manifest from the bytes of a dataset.json; `name` is what error lines call it."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON ({error}); restore it or run `vaegan-dist prepare` again") from None
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise InputError(
            f"{name}: format_version is {version!r}, this vaegan-dist reads {FORMAT_VERSION}; prepare the data again "
            "or use the version that wrote it"
        )
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        value = repr(first["input"])
        value = value if len(value) <= 80 else value[:77] + "..."
        where = f"{key}={value}: " if key else ""
        raise InputError(f"{name}: {where}{first['msg']}; run `vaegan-dist prepare` again") from None


def write_manifest(folder: str | Path, manifest: Manifest) -> Path:
    """Write FOLDER/dataset.json whole or not at all; call it last."""
    path = Path(folder) / MANIFEST_NAME
    write_whole(path, manifest_bytes(manifest))
    return path


def manifest_bytes(manifest: Manifest) -> bytes:
    """What a dataset.json holds."""
    return (json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n").encode()
