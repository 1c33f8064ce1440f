"""The history file: strict JSON, and nothing doubled or lost over a restart."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vaegan_dist.errors import InputError
from vaegan_dist.reporting.records import Record, decode, encode
from vaegan_dist.reporting.sinks import History, read_history


def strict(line: str) -> Any:
    """JSON by the standard and not by Python's extension of it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def rows_of_a_run(total: int = 2_000) -> list[Record]:
    """What a loop says: rows every 100 images, phases at 0 and 1000, checkpoints every 500."""
    rows: list[Record] = []
    for images in range(0, total + 1, 100):
        if images:
            rows.append(
                {
                    "event": "train",
                    "phase": "a" if images <= 1000 else "b",
                    "images_seen": images,
                    "loss_rec": 1 / images,
                }
            )
        if images % 500 == 0 and images:
            rows.append({"event": "checkpoint", "images_seen": images, "path": f"checkpoint-{images}"})
        if images in (0, 1000):
            rows.append({"event": "phase", "phase": "ab"[images // 1000], "images_seen": images})
    return rows


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=10).filter(lambda key: not key.endswith("_nonfinite")),
        st.one_of(st.none(), st.floats(), st.integers(-(2**70), 2**70), st.text()),
        max_size=8,
    )
)
def test_a_row_is_one_line_of_strict_json_and_reads_back(record: Record) -> None:
    line = encode(record)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    strict(line.decode("ascii"))
    read = decode(line)
    for key, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            assert read[key] is None
            assert str(read[f"{key}_nonfinite"]) == str(value)
        else:
            assert read[key] == value
            assert type(read[key]) is type(value)


def test_a_value_that_is_no_row_value_is_refused_by_key() -> None:
    with pytest.raises(TypeError, match="'loss_rec' holds a list"):
        encode({"loss_rec": [1.0]})


def test_every_row_is_in_the_file_when_log_returns(tmp_path: Path) -> None:
    history = History(tmp_path / "run" / "history.jsonl")
    for count, row in enumerate(rows_of_a_run(), start=1):
        history.log(row)
        content = history.path.read_bytes()
        assert content.count(b"\n") == count
        assert history.position == len(content)
    history.close()
    assert read_history(history.path) == rows_of_a_run()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_killed_and_resumed_equals_uninterrupted(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Killed at any byte after a checkpoint, several times; the resumed loop repeats rows at the seam, or does not."""
    path = tmp_path_factory.mktemp("history") / "history.jsonl"
    rows = rows_of_a_run()
    resume_at: int | None = None
    for _ in range(data.draw(st.integers(1, 3), label="kills")):
        history = History(path, resume_at)
        start = resume_at or 0
        repeats = data.draw(st.booleans(), label="repeats the seam")
        for row in rows:
            place = row["images_seen"]
            assert isinstance(place, int)
            if resume_at is None or place > start or (place == start and (repeats or row not in read_history(path))):
                history.log(row)
        history.close()
        whole = path.read_bytes()
        resume_at = data.draw(st.sampled_from([500, 1000, 1500]), label="checkpoint")
        # A checkpoint stands only after the train row at its image was written.
        marker = encode({"event": "checkpoint", "images_seen": resume_at, "path": f"checkpoint-{resume_at}"})
        path.write_bytes(whole[: data.draw(st.integers(whole.index(marker), len(whole)), label="torn at byte")])
    history = History(path, resume_at)
    for row in rows:
        if row["images_seen"] >= resume_at:  # type: ignore[operator]
            history.log(row)
    history.close()
    assert read_history(path) == rows


def test_news_at_the_seam_are_not_taken_for_repetitions(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for resume_at, restarts in ((None, 0), (0, 1), (0, 2)):
        history = History(path, resume_at)
        history.log({"event": "phase", "phase": "a", "images_seen": 0})
        history.log({"event": "resume", "images_seen": 0, "restarts": restarts})
        history.log({"event": "warning", "message": "again"})
        history.close()
    events = [row["event"] for row in read_history(path)]
    assert events == ["phase", *["resume", "warning"] * 3]


def test_a_row_without_a_place_belongs_to_the_row_before_it(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    for images in (100, 200):
        history.log({"event": "train", "images_seen": images})
        history.log({"event": "warning", "message": f"after {images}"})
    history.close()
    History(path, 100).close()
    assert [row.get("message") for row in read_history(path)] == [None, "after 100"]


@pytest.mark.parametrize("tail", [b'{"event": "tra', b'{"event": "train"}', b"\0" * 512, b"17\n", b'{"a": 1\n\xff\xff'])
def test_a_torn_tail_is_cut(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "history.jsonl"
    good = encode({"event": "train", "images_seen": 10})
    path.write_bytes(good + tail)
    assert read_history(path) == [decode(good)]
    history = History(path, 10)
    history.log({"event": "train", "images_seen": 20})
    history.close()
    assert [row["images_seen"] for row in read_history(path)] == [10, 20]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    good = encode({"images_seen": 1})
    path.write_bytes(good + b'{"images_\n' + good)
    for read in (read_history, lambda p: History(p, 1)):
        with pytest.raises(InputError, match=r"history\.jsonl: line 2 .*remove that line"):
            read(path)
    assert path.read_bytes() == good + b'{"images_\n' + good


def test_a_new_run_sets_an_old_history_aside(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for images in (1, 2):
        history = History(path)
        history.log({"images_seen": images})
        history.close()
    assert read_history(path) == [{"images_seen": 2}]
    assert read_history(tmp_path / "history.jsonl.old") == [{"images_seen": 1}]


def test_a_full_disk_leaves_no_torn_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(tmp_path / "history.jsonl")
    history.log({"images_seen": 1})
    real = history._file

    class Full:
        """Takes half of a row, then has no room."""

        def __init__(self) -> None:
            self.calls = 0

        def write(self, data: memoryview) -> int:
            self.calls += 1
            if self.calls == 2:
                raise OSError(28, "No space left on device")
            return real.write(data[: len(data) // 2]) or 0

    monkeypatch.setattr(history, "_file", Full())
    with pytest.raises(OSError, match="No space"):
        history.log({"images_seen": 2})
    monkeypatch.setattr(history, "_file", real)
    history.log({"images_seen": 3})
    assert history.position == history.path.stat().st_size
    history.close()
    assert [row["images_seen"] for row in read_history(history.path)] == [1, 3]


def test_a_missing_history_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no history there"):
        read_history(tmp_path / "history.jsonl")
