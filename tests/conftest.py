"""Fixtures that every room's tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.needs import missing

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
