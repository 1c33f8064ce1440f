"""The ledger survives a crash at any byte, and a sweep refuses to go on as another one."""

import errno
import resource
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from vaegan_dist.config_source import load_config
from vaegan_dist.errors import ConfigError, InputError, VaeganError
from vaegan_dist.sweeps.journal import FileJournal
from vaegan_dist.sweeps.ledger import FILE, Ledger, open_ledger
from vaegan_dist.sweeps.settings import SweepSettings

SPACE = {"objective.beta": {"uniform": [0, 1]}}


def fill(ledger: Ledger) -> None:
    for number in range(3):
        ledger.create({"objective.beta": number / 7})
        ledger.row(number, {"images_seen": 64, "fid": 3.5 + number, "odd": float("inf")})
        ledger.row(number, {"images_seen": 128, "fid": float("nan")})
    ledger.change(1, {"objective.beta": 0.9}, source=2, images_seen=64)
    ledger.row(1, {"images_seen": 96, "fid": 1.0})
    ledger.end(0, "early", seconds=1.5)
    ledger.end(2, "failed", "RuntimeError: no")
    ledger.close()


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    before = Ledger(tmp_path)
    fill(before)
    after = Ledger(tmp_path)
    assert after.trials == before.trials
    assert [row["images_seen"] for row in after.trials[1].rows] == [64, 96], "a copied trial goes back"
    assert after.trials[1].params == {"objective.beta": 0.9}
    assert after.trials[0].last("fid") is None and after.trials[0].rows[0]["odd"] is None
    assert [trial.ended for trial in after.trials.values()] == [True, False, True]


def test_a_crash_at_any_byte_loses_at_most_the_last_line(tmp_path: Path) -> None:
    fill(Ledger(tmp_path))
    whole = (tmp_path / FILE).read_bytes()
    for cut in (*range(0, len(whole), 97), *range(len(whole) - 120, len(whole))):
        (tmp_path / FILE).write_bytes(whole[:cut])
        found = Ledger(tmp_path)
        kept = whole[:cut].count(b"\n")
        assert (tmp_path / FILE).read_bytes() == whole[:cut], "who only looks changes nothing: a line may be under way"
        number = len(found.trials)
        found.create({})
        found.close()
        lines = (tmp_path / FILE).read_bytes().split(b"\n")
        assert lines[:kept] == whole.split(b"\n")[:kept] and len(lines) == kept + 2
        assert len(Ledger(tmp_path).trials) == number + 1


def test_a_line_that_is_none_is_named(tmp_path: Path) -> None:
    fill(Ledger(tmp_path))
    lines = (tmp_path / FILE).read_text().splitlines()
    (tmp_path / FILE).write_text("\n".join([*lines[:2], "{}", *lines[3:]]) + "\n")
    with pytest.raises(InputError, match=r"trials.jsonl line 3 is not of a ledger"):
        Ledger(tmp_path)


def test_a_line_that_cannot_be_written_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path)
    ledger.create({})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(VaeganError, match=r"ledger cannot be written: No space left on device; .* free"):
            ledger.end(0, "done")
    with pytest.raises(VaeganError, match="No space left"):
        ledger.end(0, "failed", "what follows from a line that may not stand")
    assert not ledger.trials[0].ended and (tmp_path / FILE).read_bytes().count(b"\n") == 2


def test_a_full_disk_is_said_once_and_closing_adds_nothing(tmp_path: Path) -> None:
    (tmp_path / FILE).symlink_to("/dev/full")
    journal = FileJournal(tmp_path / FILE)
    with pytest.raises(OSError, match="No space left") as caught, closing(journal):
        journal.append(b"{}")
    assert caught.value.__context__ is None, "closing failed as well"


def test_room_that_comes_back_does_not_bring_the_line_back(tmp_path: Path) -> None:
    """The line is cut off after ten bytes; there is room again before the ledger is closed."""
    ledger = Ledger(tmp_path)
    ledger.create({})
    before = (tmp_path / FILE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(ledger):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        try:
            with pytest.raises(VaeganError, match=r"ledger cannot be written: .*File too large"):
                ledger.end(0, "done")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len((tmp_path / FILE).read_bytes()) == len(before) + 10
    again = Ledger(tmp_path)
    assert not again.trials[0].ended
    again.end(0, "failed")
    again.close()
    assert Ledger(tmp_path).trials[0].state == "failed", "the new line does not stick to the one that was cut off"


def test_only_the_number_of_trials_may_change(tmp_path: Path) -> None:
    config = load_config("smoke")
    first = SweepSettings.model_validate({"space": SPACE, "trials": 3})
    open_ledger(tmp_path, first, config).close()
    open_ledger(tmp_path, first.model_copy(update={"trials": 9, "concurrent": 2}), config).close()
    assert yaml.safe_load((tmp_path / "sweep.yaml").read_text())["sweep"]["trials"] == 9
    with pytest.raises(ConfigError, match=r"scheduler=asha: the sweep in .* was begun with none; restore it"):
        open_ledger(tmp_path, first.model_copy(update={"scheduler": "asha"}), config)
    with pytest.raises(ConfigError, match=r"objective.gamma=9.0: the sweep in .* was begun with 0.1"):
        open_ledger(tmp_path, first, load_config("smoke", overrides=["objective.gamma=9"]))
