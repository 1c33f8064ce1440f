"""A local S3 server with one bucket, reached as every cloud SDK would: by variables."""

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import obstore
import pytest
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

SECRET = "sEcReT-kEy-9"


@dataclass
class Bucket:
    """A bucket called `shards`, and the server that holds it."""

    store: S3Store
    server: ThreadedMotoServer

    def upload(self, folder: Path, prefix: str) -> str:
        """Put a folder's files below a prefix; returns the URL."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                obstore.put(self.store, f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://shards/{prefix}"

    def kill(self) -> None:
        """End the server: connections are refused from now on."""
        listener = self.server._server
        if listener is not None:
            self.server.stop()
            listener.server_close()
            self.server._server = None


@contextmanager
def running_bucket() -> Iterator[Bucket]:
    """A bucket that is there while the context lasts, with the variables that lead to it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            patch.setenv(name, value)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        # Its buckets outlive a server of moto's, so those of an earlier test go first.
        for method, path in (("POST", "moto-api/reset"), ("PUT", "shards")):
            urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/{path}", method=method)).close()
        made = Bucket(S3Store("shards", client_options={"allow_http": True}), server)
        yield made
        made.kill()
