"""Fixtures of the data tests."""

from collections.abc import Iterator

import pytest
from s3_server import Bucket, running_bucket


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    """An empty bucket on a local S3 server."""
    with running_bucket() as made:
        yield made
