"""Latent shards: every key once through a kill, the same bytes for any number of ranks, readable elsewhere."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vaegan_dist import load
from vaegan_dist.cli import main
from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.data.latents import read_latent_manifest, read_latents
from vaegan_dist.data.prepare import PrepareOptions, prepare
from vaegan_dist.errors import DataError

KILLED_AT = 700


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real digits in five shards."""
    folder = tmp_path_factory.mktemp("digits-5")
    prepare(PrepareOptions(source="digits", output=str(folder), limit=1280, shard_samples=256))
    return folder


@pytest.fixture(scope="module")
def whole(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its latents, by one uninterrupted process."""
    output = tmp_path_factory.mktemp("latents")
    assert main(["encode", str(run), str(output), "--data", str(data)]) == 0
    return output / "train"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def keys_of(data: Path) -> list[str]:
    dataset = open_dataset(str(data))
    return [dataset.key(sample) for sample in range(len(dataset))]


def test_every_key_once_and_the_decoder_makes_pictures_of_them(run: Path, data: Path, whole: Path) -> None:
    model, dataset = load(run), open_dataset(str(data))
    latents = list(read_latents(whole))
    assert [latent.key for latent in latents] == keys_of(data)
    batch = dataset.read(range(len(dataset)))
    assert batch.labels is not None and [latent.label for latent in latents] == batch.labels.tolist()
    mu = torch.from_numpy(np.stack([latent.arrays["mu"] for latent in latents]))
    logvar = torch.from_numpy(np.stack([latent.arrays["logvar"] for latent in latents]))
    assert torch.allclose(model.decode(mu), model.reconstruct(batch.images), atol=1e-5)
    manifest = read_latent_manifest(whole)
    assert manifest.samples == 1280 and manifest.shape == (8,) and manifest.classes == dataset.manifest.classes
    second = (mu.double().square() + logvar.double().exp()).mean()
    deviation = math.sqrt(float(second - mu.double().mean().square()))
    assert manifest.scaling_factor == pytest.approx(1 / deviation, rel=1e-6)


def test_the_stock_reader_reads_them(data: Path, whole: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    found, latents = [], {latent.key: latent for latent in read_latents(whole)}
    for shard in read_latent_manifest(whole).shards:
        for sample in webdataset.WebDataset(str(whole / shard.name), shardshuffle=False).decode():
            keys = sample["keys.json"]
            assert sample["mu.npy"].shape == sample["logvar.npy"].shape == (len(keys), 8)
            assert all(
                np.array_equal(row, latents[key].arrays["mu"]) for key, row in zip(keys, sample["mu.npy"], strict=True)
            )
            found += keys
    assert sorted(found) == sorted(keys_of(data)) and len(set(found)) == len(found)


def test_killed_in_a_shard_and_resumed_by_two_ranks_it_is_the_same(
    run: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    code = f"""
import os, signal, sys
from vaegan_dist.cli import main
from vaegan_dist.data.latents import LatentWriter
add, count = LatentWriter.add, 0
def counted(self, latent):
    global count
    count += 1
    if count == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, latent)
LatentWriter.add = counted
sys.exit(main(["encode", {str(run)!r}, {str(tmp_path)!r}, "--data", {str(data)!r}]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, timeout=200, check=False)
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "train"
    assert not (folder / "dataset.json").exists(), "it must not look complete"
    done = sorted(folder.glob("*.tar"))
    assert len(done) == 2
    before = {path: path.stat().st_mtime_ns for path in done}
    with done[1].open("r+b") as file:  # one of them is damaged meanwhile
        file.seek(5000)
        file.write(b"damage")
    command = ["encode", str(run), str(tmp_path), "--data", str(data)]
    assert main([*command, "--workers", "2"]) == 0
    assert content(folder) == content(whole), "the same bytes, whoever encoded them"
    assert done[0].stat().st_mtime_ns == before[done[0]], "a shard that was done was done again"
    assert main(command) == 0
    assert content(folder) == content(whole)


def test_samples_are_drawn_once_from_the_posterior(run: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    command = ["encode", str(run), str(tmp_path), "--data", str(data), "--content", "sample", "--dtype", "float16"]
    assert main([*command, "--seed", "4", "--batch-size", "100"]) == 0
    drawn = list(read_latents(tmp_path / "train"))
    assert drawn[0].arrays["latent"].dtype == np.float16
    moments = list(read_latents(whole))
    z = np.stack([latent.arrays["latent"] for latent in drawn]).astype(np.float64)
    mu = np.stack([latent.arrays["mu"] for latent in moments])
    sigma = np.exp(0.5 * np.stack([latent.arrays["logvar"] for latent in moments]))
    eps = (z - mu) / sigma
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05


def test_other_latents_in_the_folder_are_refused(
    run: Path, data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encode", str(run), str(whole.parent), "--data", str(data), "--weights", "raw"]) == 2
    assert "holds latents of another model, data set or setting" in capsys.readouterr().err
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "thesis.txt").write_text("mine")
    assert main(["encode", str(run), str(tmp_path), "--data", str(data)]) == 2
    assert "holds other files" in capsys.readouterr().err


def test_a_damaged_latent_shard_is_named(whole: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(whole, tmp_path / "copy")
    shard = sorted((tmp_path / "copy").glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(DataError, match=shard.name):
        list(read_latents(tmp_path / "copy"))
    assert json.loads((whole / "dataset.json").read_text())["format"] == "vaegan_dist_latents"
