"""URLs of data sets, and how the object stores' client is set up for them: credentials come from the environment."""

import os
from datetime import timedelta
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from vaegan_dist.errors import InputError

SCHEMES = ("s3", "gs", "az", "abfs", "abfss", "https", "http")
CACHE_BYTES = 64 * 2**30
"""Most bytes of fetched shards that a node keeps, unless set"""


def is_remote(path: str) -> bool:
    """Whether a data set's path is a URL whose shards have to be fetched; or of a kind that nobody knows."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> str:
    """A path on this machine, from itself or from a file:// URL."""
    return unquote(urlsplit(path).path) if path.startswith("file://") else path


def checked_url(url: str) -> SplitResult:
    """The parts of a URL that holds no secret."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise InputError(f"{parts.scheme}://…: not a known kind of URL; use one of {', '.join(SCHEMES)}")
    if "@" in parts.netloc.removesuffix(".dfs.core.windows.net") and not parts.scheme.startswith("abfs"):
        raise InputError(f"{parts.scheme}://…: the URL holds a user or password; leave credentials to the environment")
    if parts.query or parts.fragment:
        raise InputError(
            f"{parts.scheme}://{parts.netloc}{parts.path}: the URL has a query; leave keys to the environment"
        )
    return parts


def client_options(scheme: str, timeout: float) -> dict[str, Any]:
    """Client options. obstore itself does not retry: it would start a cut body over, here it is continued."""
    endpoints = (value for name, value in os.environ.items() if name.startswith("AWS_ENDPOINT"))
    plain = scheme == "http" or any(value.startswith("http://") for value in endpoints)
    limit = timedelta(seconds=timeout)
    client = {"timeout": limit, "connect_timeout": min(limit, timedelta(seconds=10)), "allow_http": plain}
    return {"client_options": client, "retry_config": {"max_retries": 0, "retry_timeout": limit}}
