"""Fixtures that every room's tests share."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.needs import missing

if TYPE_CHECKING:  # the server takes a second to import; most tests need none
    from tests.data.s3_server import Bucket

# Triton decides when it is imported, by whatever test comes first: without a GPU its interpreter runs our kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the repository; skips without it, fails without it under CI."""
    if not SHARED.is_dir():
        missing(f"shared data folder {SHARED}")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indices and decoded pictures of the tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAEGAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared data set of real digits: 1,280 for training, in one shard of arrays."""
    from vaegan_dist.data.prepare import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("digits")
    prepare(PrepareOptions(source="digits", output=str(folder), limit=1280))
    return folder


@pytest.fixture
def bucket() -> "Iterator[Bucket]":
    """An empty bucket on a local S3 server."""
    from tests.data.s3_server import running_bucket

    with running_bucket() as made:
        yield made
