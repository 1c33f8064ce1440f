"""A run whose storage is an S3 server: what is there is whole, a machine with nothing goes on, an outage is borne."""

import shutil
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store

from tests.data.s3_server import Bucket
from tests.training.runs import config_of, rows_of, tensors_in, tensors_of
from vaegan_dist.config import Config
from vaegan_dist.config_source import load_config
from vaegan_dist.data import transfer
from vaegan_dist.data.objects import Objects
from vaegan_dist.errors import ConfigError, InputError, VaeganError
from vaegan_dist.training.checkpoint import checkpoints, folder_name, open_checkpoint
from vaegan_dist.training.finished import outcome_of_finished
from vaegan_dist.training.graft import graft
from vaegan_dist.training.loop import train
from vaegan_dist.training.meter import Agreement
from vaegan_dist.training.mirror import Mirror
from vaegan_dist.training.remote import RemoteRun, fetch_checkpoint, refuse_standing, remote_run, standing
from vaegan_dist.training.resume import run_folder
from vaegan_dist.training.runtime import SingleProcess
from vaegan_dist.training.step import Step

URL = "s3://shards/runs"
SETTINGS = ("checkpoint.images=640", "checkpoint.retry_seconds=0.1", "checkpoint.keep_last=2")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine keeps its copies; removing it makes it another machine."""
    folder = tmp_path / "machine"
    monkeypatch.setenv("VAEGAN_CACHE", str(folder))
    monkeypatch.setattr(transfer, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(transfer, "ATTEMPTS", 3)
    return folder


@pytest.fixture(scope="module")
def calm(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in a folder, uninterrupted."""
    config = config_of(digits, tmp_path_factory.mktemp("calm"), *SETTINGS)
    assert train(config, SingleProcess()).reason == "done"
    return run_folder(config)


def config_at(digits: Path, *overrides: str) -> Config:
    return config_of(digits, Path("unused"), *SETTINGS, f"run.storage={URL}", *overrides)


def names_in(bucket: Bucket) -> dict[str, int]:
    return {e["path"].removeprefix("runs/smoke/"): e["size"] for c in obstore.list(bucket.store, "runs") for e in c}


class Stop(SingleProcess):
    """Asks to stop after so many images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, images: int) -> None:
        super().__init__()
        original = Step.__call__

        def call(step: Step, x: object) -> None:
            original(step, x)  # type: ignore[arg-type]
            self.stop = self.stop or step.state.progress.images_seen + 64 >= images

        monkeypatch.setattr(Step, "__call__", call)
        monkeypatch.setattr(Agreement, "INTERVAL_SECONDS", 0.0)


def test_a_machine_with_nothing_goes_on_from_the_store_as_if_nothing_had_happened(
    bucket: Bucket, machine: Path, calm: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_at(digits)
    with monkeypatch.context() as patch:
        assert train(config, Stop(patch, 1000)).reason == "stopped"
    stands = standing(config)
    assert stands is not None and stands[0].startswith(f"{URL}/smoke/checkpoint-") and stands[1] >= 1000
    # What an upload that was cut off leaves, newer than everything whole.
    obstore.put(bucket.store, f"runs/smoke/{folder_name(2240)}/model.safetensors", b"half")
    shutil.rmtree(machine)
    with pytest.raises(ConfigError, match=r"run\.name=smoke: a run of that name stands in s3://shards/runs"):
        refuse_standing(config)
    assert outcome_of_finished(config) is None
    assert train(config, SingleProcess()).reason == "done"

    assert tensors_of(run_folder(config)) == tensors_of(calm)
    shutil.rmtree(machine)
    copy = fetch_checkpoint(f"{URL}/smoke")
    assert copy.name == folder_name(2560) and tensors_in(copy) == tensors_of(calm)
    assert fetch_checkpoint(f"{URL}/smoke/{copy.name}/") == copy
    history = copy.parent / "history.jsonl"
    history.write_bytes(bytes(obstore.get(bucket.store, "runs/smoke/history.jsonl").bytes()))
    stop_rows = [r for r in rows_of(copy.parent) if r["event"] != "checkpoint"]
    assert stop_rows == [r for r in rows_of(calm) if r["event"] != "checkpoint"]
    # In the store is what a folder would hold, and nothing of the half upload.
    found = names_in(bucket)
    assert {n.partition("/")[0] for n in found if n.startswith("checkpoint-")} == {p.name for p in checkpoints(calm)}
    assert {"history.jsonl", "config.yaml", "samples.png", "curves.png"} <= set(found)
    done = outcome_of_finished(config)
    assert done is not None and done.reason == "already done" and done.images_seen == 2560
    with pytest.raises(InputError, match="no whole checkpoint there"):
        fetch_checkpoint(f"{URL}/other")


def test_a_server_that_goes_away_and_comes_back_costs_nothing(
    bucket: Bucket, machine: Path, calm: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second checkpoint meets a dead server; it is alive again before the attempts are spent."""
    monkeypatch.setattr(Agreement, "INTERVAL_SECONDS", 0.0)
    original, pushes = RemoteRun.push, list[str]()

    def push(remote: RemoteRun, path: Path) -> None:
        pushes.append(path.name)
        if len(pushes) == 2:
            remote.objects = Objects("s3://shards/runs/smoke", timeout=2)
            broken, remote.objects._store = (
                remote.objects._store,
                S3Store(
                    "shards",
                    endpoint="http://127.0.0.1:9",
                    client_options={"allow_http": True},
                    retry_config={"max_retries": 0},
                ),
            )
            try:
                original(remote, path)
            finally:
                remote.objects._store = broken
        else:
            original(remote, path)

    monkeypatch.setattr(RemoteRun, "push", push)
    runtime, config = SingleProcess(), config_at(digits)
    assert train(config, runtime).reason == "done"
    assert pushes[1] == pushes[2], "it was tried again"
    (warning,) = [str(r["message"]) for r in runtime.records if r["event"] == "warning"]
    assert "no checkpoint could be written below s3://shards/runs/smoke" in warning and "no connection" in warning
    assert tensors_of(run_folder(config)) == tensors_of(calm)


def test_a_server_that_stays_away_ends_in_one_line_and_nothing_half_is_chosen(
    bucket: Bucket, machine: Path, calm: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Agreement, "INTERVAL_SECONDS", 0.0)
    original = RemoteRun.check_owner

    def check(remote: RemoteRun) -> None:
        # All but the seal is there by now.
        if any(n.startswith(folder_name(1280)) for n in remote.objects.sizes()):
            monkeypatch.setattr(
                remote.objects,
                "_store",
                S3Store(
                    "gone",
                    endpoint="http://127.0.0.1:9",
                    client_options={"allow_http": True},
                    retry_config={"max_retries": 0},
                ),
            )
        original(remote)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteRun, "check_owner", check)
        with pytest.raises(VaeganError, match=r"s3://shards/runs/smoke: .* \(attempt 2 of 2\)") as caught:
            train(config_at(digits, "checkpoint.write_attempts=2"), SingleProcess())
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setenv("VAEGAN_CACHE", str(machine))
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    host, port = bucket.server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    config = config_at(digits)
    remote = remote_run(config)
    assert remote is not None
    assert f"{folder_name(1280)}/model.safetensors" in names_in(bucket)
    assert folder_name(1280) not in remote.sealed()
    assert train(config, SingleProcess()).reason == "done"
    assert tensors_of(run_folder(config)) == tensors_of(calm)


def test_a_damaged_one_is_named_and_a_stale_process_cannot_seal(
    bucket: Bucket, machine: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_at(digits)
    with monkeypatch.context() as patch:
        assert train(config, Stop(patch, 1400)).reason == "stopped"
    remote = remote_run(config)
    assert remote is not None
    newest = remote.sealed()[0]
    obstore.put(
        bucket.store, f"runs/smoke/{newest}/model.safetensors", b"x" * names_in(bucket)[f"{newest}/model.safetensors"]
    )
    shutil.rmtree(machine)
    stale = RemoteRun(f"{URL}/smoke", machine / "stale")
    stale.take_over()
    runtime = SingleProcess()
    assert train(config, runtime).reason == "done"
    (warning,) = [str(r["message"]) for r in runtime.records if r["event"] == "warning"]
    assert newest in warning and "model.safetensors has been changed" in warning
    resumed = [r["images_seen"] for r in runtime.records if r["event"] == "resume"]
    assert resumed == [1280]
    old = run_folder(config) / folder_name(2560)
    shutil.copytree(old, stale.folder / folder_name(9920))
    with pytest.raises(VaeganError, match="another process has taken this run over"):
        stale.push(stale.folder / folder_name(9920))
    history = remote.objects.small("history.jsonl", 2**20)
    (stale.folder / "history.jsonl").write_text("of the process before")
    assert "another process has taken this run over" in Mirror(stale).close()
    assert remote.objects.small("history.jsonl", 2**20) == history
    assert remote.sealed()[0] == folder_name(2560)


def test_a_checkpoint_that_was_replaced_is_fetched_anew(
    bucket: Bucket, machine: Path, calm: Path, digits: Path, tmp_path: Path
) -> None:
    """`best/` of a sweep that was continued: another winner, at the same image count."""
    (old,) = [path for path in checkpoints(calm) if path.name == folder_name(2560)]
    winner = config_of(digits, tmp_path / "runs", *SETTINGS, "objective.beta=7")
    new = graft(old, winner).path
    for source in (old, new):
        remote = RemoteRun(f"{URL}/best", source.parent)
        remote.take_over()
        remote.replace(source)
        fetched = fetch_checkpoint(f"{URL}/best")
        assert fetched.name == source.name and open_checkpoint(fetched).config == open_checkpoint(source).config
    before = (fetched / "checkpoint.json").stat().st_ino
    assert (fetch_checkpoint(f"{URL}/best") / "checkpoint.json").stat().st_ino == before, "downloaded though it is here"


@pytest.mark.parametrize("storage", ["https://server/runs", "ftp://x/y"])
def test_a_storage_that_cannot_be_written_is_named_by_its_key(storage: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.storage: \w+:// cannot be written; use a folder or one of s3, gs"):
        load_config("smoke", overrides=[f"run.storage={storage}"])


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    config = load_config("smoke", overrides=[f"run.storage=file://{tmp_path}/my%20runs"])
    assert run_folder(config) == tmp_path / "my runs" / "smoke"
