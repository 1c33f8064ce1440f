"""dataset.json: round trip, names that stay below it, one-line errors, atomic writing."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vaegan_dist.data.manifest import (
    Manifest,
    ShardInfo,
    find_manifest,
    read_manifest,
    write_manifest,
)
from vaegan_dist.errors import InputError

SHARD = {"name": "shard-000000.tar", "samples": 3, "bytes": 10240, "sha256": "0" * 64}


def tree(**changes: Any) -> dict[str, Any]:
    base = {"layout": "files", "height": 4, "width": 5, "channels": 3, "shards": [SHARD]}
    return {"format_version": 1, "split": "train", "classes": None, "created": {}, **base, **changes}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_round_trip_and_sum(tmp_path: Path) -> None:
    second = {**SHARD, "name": "deeper/größe 1.tar", "samples": 5}
    manifest = Manifest.model_validate(tree(shards=[SHARD, second], classes=["a", "b"], created={"seed": 3}))
    path = write_manifest(tmp_path / "new", manifest)
    assert path == tmp_path / "new" / "dataset.json"
    assert read_manifest(path) == manifest
    assert manifest.samples == 8
    assert [entry.name for entry in path.parent.iterdir()] == ["dataset.json"], "no temporary file stays behind"


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "../x.tar", "a/../../x.tar", "a//b.tar", "./a.tar", "a/.", "..", "", "x" * 2000),
        *("c:\\x.tar", "a\\b.tar", "C:x.tar", "https://host/x.tar", "pipe:cat x", "a\nb.tar", "a\x00b.tar", "a\u2028b"),
    ],
)
def test_shard_names_stay_below(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "dataset.json", tree(shards=[{**SHARD, "name": name}]))
    with pytest.raises(InputError) as caught:
        read_manifest(path)
    assert "shards.0.name" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30))
def test_accepted_shard_names_resolve_below(name: str) -> None:
    try:
        shard = ShardInfo(name=name, samples=1, bytes=1, sha256="0" * 64)
    except ValidationError:
        return
    root = Path("/root-folder/data")
    assert (root / shard.name).is_relative_to(root)
    assert ".." not in (root / shard.name).parts


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("<html>moved</html>", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "format_version"),
        (tree(format_version=2), "format_version is 2"),
        (tree(format_version=True), "format_version"),
        (tree(extra=1), "extra"),
        (tree(channels=2), "channels=2"),
        (tree(shards=[]), "shards"),
        (tree(shards=[SHARD, SHARD]), "listed twice"),
        (tree(shards=[{**SHARD, "samples": -1}]), "shards.0.samples"),
        (tree(shards=[{**SHARD, "sha256": "abc"}]), "shards.0.sha256"),
        (tree(height=10**6), "height"),
    ],
)
def test_wrong_manifests_are_named(tmp_path: Path, content: Any, named: str) -> None:
    path = write(tmp_path / "dataset.json", content)
    with pytest.raises(InputError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert named in message
    assert str(path) in message
    assert "\n" not in message


def test_find(tmp_path: Path) -> None:
    train = write(tmp_path / "set/train/dataset.json", tree())
    validation = write(tmp_path / "set/validation/dataset.json", tree(split="validation"))
    assert find_manifest(tmp_path / "set") == train
    assert find_manifest(str(tmp_path / "set"), "validation") == validation
    assert find_manifest(train.parent) == train
    assert find_manifest(train) == train
    assert find_manifest(validation, "validation") == validation
    with pytest.raises(InputError, match="holds the split 'train', not 'validation'"):
        find_manifest(train.parent, "validation")
    with pytest.raises(InputError, match=r"nowhere/train/dataset.json and .*vaegan-dist prepare"):
        find_manifest(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_manifest(tmp_path, Manifest.model_validate(tree()))
    old = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_manifest(tmp_path, Manifest.model_validate(tree(split="other")))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
