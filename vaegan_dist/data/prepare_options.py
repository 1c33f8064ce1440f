"""The options of `prepare`."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from vaegan_dist.config import Count, Positive, Section
from vaegan_dist.data.images import Crop, Encoding, parse_colour
from vaegan_dist.data.manifest import Layout
from vaegan_dist.data.sources import SourceKind

_NOT_CONTENT = {"source", "output", "format", "labels", "workers", "max_bad", "overwrite"}


class PrepareOptions(Section):
    """How to turn pictures into a data set."""

    source: str
    """what to read: a folder, zip, tar, IDX, .npy or .npz path, `digits`, or hf:NAME[:SPLIT]"""
    output: str
    """folder to write; each split gets a subfolder"""
    format: SourceKind | Literal["auto"] = "auto"
    """kind of the source, where its name does not tell"""
    labels: str | None = None
    """classes: a CSV of path,label (or .npy for arrays), or `none`; default: the source's own, or its subfolders"""
    resolution: Annotated[int, Field(gt=0, le=4096)] | None = None
    """side of the square pictures; default: as they are, which must be all the same"""
    crop: Crop = "center"
    """how a picture becomes square: center (cut the longer side), pad (with the background), none (stretch)"""
    background: str = "white"
    """colour under transparent pixels and around padded pictures: a name or #rrggbb"""
    channels: Literal[1, 3] | None = None
    """1 grey, 3 RGB; default: grey if the first 64 pictures are"""
    encoding: Encoding = "jpeg"
    """how pictures are stored in the layout `files`; a JPEG that fits already is kept byte for byte"""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """JPEG quality"""
    layout: Layout | Literal["auto"] = "auto"
    """files: a member per picture; chunks: arrays of 256 pictures, for tiny ones; auto: chunks up to 48x48 pixels"""
    validation: Annotated[float, Field(gt=0, lt=1)] | None = None
    """share of the pictures to set aside as the split `validation`"""
    validation_by: str | None = None
    """pattern removed from a key before it decides the split, so that variants of one picture stay together"""
    shard_samples: Positive = 4_096
    """most pictures in a shard"""
    shard_bytes: Annotated[int, Field(ge=2**16)] = 256 * 2**20
    """bytes after which a shard ends"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """seed of the order in which pictures are spread over the shards"""
    limit: Positive | None = None
    """most pictures per split, chosen by the seed"""
    max_bad: Count = 0
    """broken pictures that may be left out (each is named) before the preparation fails"""
    workers: Count = 0
    """threads that decode and encode; 0: one per CPU"""
    overwrite: bool = False
    """replace a data set that stands in the output folder"""

    @field_validator("background")
    @classmethod
    def _colour(cls, value: str) -> str:
        parse_colour(value)
        return value

    @field_validator("validation_by")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        return value

    def content(self) -> dict[str, Any]:
        """The options that decide the result; where it is read from and written to, and how fast, does not."""
        return self.model_dump(mode="json", exclude=_NOT_CONTENT)
