"""Progress as a person sees it: on a screen (a small terminal that obeys what the bar sends), and in a log."""

import io
import math
import re
import sys

import pytest

from vaegan_dist.reporting.progress import Progress, Rate, duration, short
from vaegan_dist.reporting.records import Record

SGR = re.compile(r"\x1b\[[0-9;]*m")


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal and shows what is on its screen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Rows after carriage returns, erased lines and cursor moves; a sequence it does not know is a failure."""
        rows, row, column = [""], 0, 0
        for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[^\x1b]", self.getvalue()):
            if token == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            elif token == "\r":
                column = 0
            elif token == "\x1b[2K":
                rows[row] = ""
            elif token.startswith("\x1b[") and token.endswith("A"):
                row -= int(token[2:-1])
                assert row >= 0
            elif token.startswith("\x1b["):
                assert SGR.fullmatch(token) or token in ("\x1b[?25l", "\x1b[?25h"), repr(token)
            else:
                if column == self.width:
                    row, column = row + 1, 0
                    rows += [""] * (row + 1 - len(rows))
                rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in rows]


def train(images: int, seconds: float, phase: str = "vae", **terms: float) -> Record:
    return {
        "event": "train", "phase": phase, "images_seen": images, "total_images": 1000, "epoch": 1,
        "images_per_second": 10.0, "seconds": seconds, "loss_rec": 12.3456, "loss_kl": 0.5, **terms,
    }  # fmt: skip


def a_run(progress: Progress, clock: Clock, step: float = 1.0) -> None:
    """Two phases of 500 images at 10 images/s, a record every `step` seconds, a checkpoint at each phase's end."""
    images = 0
    for phase in ("vae", "adversarial"):
        progress.update({"event": "phase", "phase": phase, "images_seen": images, "phase_images": 500})
        for _ in range(int(50 / step)):
            clock.now += step
            images += int(10 * step)
            progress.update(train(images, clock.now, phase))
        progress.update(
            {"event": "checkpoint", "path": f"checkpoint-{images}", "images_seen": images, "checkpoint_seconds": 0.25}
        )
    progress.update({"event": "end", "reason": "done", "images_seen": images, "seconds": 100.0})
    progress.close()


def test_a_log_gets_few_plain_timed_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    a_run(Progress(stream, total_images=1000, run="digits", clock=clock), clock)
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d digits: ", line) for line in lines)
    places = [int(match[1].replace(",", "")) for line in lines if (match := re.search(r"([\d,]+)/1,000 images", line))]
    # 100 records: one line for the first, then one in ten seconds, and the last numbers of each phase.
    assert places == [10, 110, 210, 310, 410, 500, 600, 700, 800, 900, 1000]
    assert sum("checkpoint checkpoint-" in line for line in lines) == 2
    assert sum("begins" in line for line in lines) == 2
    at_210 = next(line for line in lines if "210/1,000" in line)
    for part in ("vae", "21%", "10 images/s", "1:19 left", "loss_rec 12.35", "loss_kl 0.5"):
        assert part in at_210
    assert lines[-1].endswith("done at 1,000 images of 1,000 in 1:40 of training")


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_terminal_shows_one_bar_at_any_width_and_none_afterwards(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    terminal, clock = Terminal(width), Clock()
    progress = Progress(terminal, total_images=1000, run="digits", clock=clock)
    seen: list[list[str]] = []
    update = progress.update

    def watched(record: Record) -> None:
        update(record)
        if record.get("event") == "train" and record["images_seen"] in (250, 800):
            seen.append(terminal.screen())

    monkeypatch.setattr(progress, "update", watched)
    a_run(progress, clock)
    for screen, phase, images in zip(seen, ("vae", "adversarial"), ("250", "800"), strict=True):
        drawn = [line for line in screen if f"{images}/1,000" in line]
        assert len(drawn) == 1
        if width >= 80:
            bars = [line for line in screen if "━" in line]
            assert len(bars) == 1 and bars[0].startswith(f"digits {phase}") and f"{int(images) // 10}%" in bars[0]
            assert screen[screen.index(bars[0]) + 2].startswith("loss_rec 12.35  loss_kl 0.5")
        assert max(map(len, screen)) <= width
    final = terminal.screen()
    assert not any("━" in line for line in final)
    # Unwrapped, the lines that stay are the phases, their last numbers, checkpoints and the end.
    text = "".join(final).replace(" ", "")
    for kept in ("phasevaebegins", "checkpointcheckpoint-500at500", "phaseadversarialbegins", "doneat1,000images"):
        assert text.count(kept) == 1
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h"), "the cursor is back"


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    colour = re.compile(r"\x1b\[[0-9;]*?(3[0-7]|38|9[0-7])[0-9;]*m")
    shown = {}
    for name in ("colour", "none"):
        if name == "none":
            monkeypatch.setenv("NO_COLOR", "1")
        terminal, clock = Terminal(80), Clock()
        a_run(Progress(terminal, total_images=1000, run="digits", clock=clock), clock)
        shown[name] = bool(colour.search(terminal.getvalue()))
    assert shown == {"colour": True, "none": False}


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal, clock = Terminal(80), Clock()
    a_run(Progress(terminal, total_images=1000, run="digits", clock=clock), clock)
    assert "\x1b" not in terminal.getvalue()


def test_output_for_a_file_is_not_drawn_into_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train > out.txt` with the bar on stderr: what is printed still goes to the file."""
    monkeypatch.setenv("TERM", "xterm")
    terminal, piped = Terminal(80), io.StringIO()
    monkeypatch.setattr(sys, "stdout", piped)
    progress = Progress(terminal, total_images=1000, run="digits", clock=Clock())
    progress.update(train(10, 1.0))
    print("for the file")
    progress.close()
    assert piped.getvalue() == "for the file\n"
    assert "for the file" not in terminal.getvalue()


def test_after_close_no_bar_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal(80)
    progress = Progress(terminal, total_images=1000, run="digits", clock=Clock())
    progress.update(train(10, 1.0))
    progress.close()
    progress.close()
    progress.update(train(20, 2.0))
    progress.line("last words")
    assert [line for line in terminal.screen() if line][-1] == "last words"
    assert not any("━" in line for line in terminal.screen())


def test_a_reader_that_goes_away_does_not_end_the_run() -> None:
    class Head(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    clock = Clock()
    a_run(Progress(Head(), total_images=1000, run="digits", clock=clock), clock)


def test_warnings_and_restarts_are_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, total_images=1000, run="digits", clock=clock)
    progress.update({"event": "resume", "images_seen": 500, "restarts": 2})
    progress.update({"event": "phase", "phase": "gan", "images_seen": 500, "phase_images_seen": 100, "trains": "a,b"})
    progress.update({"event": "warning", "images_seen": 510, "message": "loss_disc is not finite; step skipped"})
    progress.update({"event": "pictures", "images_seen": 510, "name": "samples", "path": "s.png"})
    progress.update(train(510, 51.0, loss_disc=math.nan))
    progress.close()
    lines = [line.split("digits: ")[1] for line in stream.getvalue().splitlines()]
    assert lines[:3] == [
        "resumed at 500 images of 1,000, restart 2",
        "phase gan goes on (training a, b)",
        "warning: loss_disc is not finite; step skipped",
    ]
    assert len(lines) == 4 and "loss_disc nan" in lines[3]


def test_the_rate_is_smooth_follows_phases_and_survives_restarts() -> None:
    rate = Rate(horizon=30.0)
    rate.observe(0, 0.0, None)
    assert rate.value is None
    seconds = 0.0
    for index in range(100):
        # 100 images per interval that lasts 0.5 s or 1.5 s: 100 images/s, though single intervals say 67 or 200.
        seconds += 0.5 if index % 2 else 1.5
        rate.observe(100 * (index + 1), seconds, None)
        if index > 20:
            assert rate.value == pytest.approx(100, rel=0.05)
    rate.restart()
    assert rate.value == pytest.approx(100, rel=0.05)
    rate.observe(10_010, seconds + 1.0, None)
    assert rate.value == pytest.approx(10)
    # Back to a checkpoint: no negative rate, and the wait is not counted.
    rate.observe(5_000, seconds - 50, None)
    assert rate.value == pytest.approx(10)
    rate.observe(5_010, seconds - 49, None)
    assert rate.value == pytest.approx(10)


def test_numbers_and_durations_are_short() -> None:
    assert [short(v) for v in (0.0, 0.5, 12.3456, 243.46, 12345.6, 0.0000123, 8e-3, math.inf)] == [
        "0", "0.5", "12.35", "243.5", "12346", "1.23e-05", "0.008", "inf",
    ]  # fmt: skip
    assert [duration(v) for v in (0, 7, 754, 3723, 276_000)] == ["0:00", "0:07", "12:34", "1:02:03", "3d 4h"]
