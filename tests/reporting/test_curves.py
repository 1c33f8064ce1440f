"""The curves: what is plotted is what the history says, and the picture is drawn without a display."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaegan_dist.errors import InputError
from vaegan_dist.reporting.curves import collect, make_figure, phase_spans, plot_curves
from vaegan_dist.reporting.records import Record
from vaegan_dist.reporting.sinks import History, read_history


def three_phases() -> list[Record]:
    rows: list[Record] = []
    for images in range(0, 3000, 100):
        phase = ("vae", "warm", "adversarial")[images // 1000]
        if images % 1000 == 0:
            rows.append({"event": "phase", "phase": phase, "images_seen": images})
        row: Record = {
            "event": "train", "phase": phase, "images_seen": images + 100, "epoch": 1, "seconds": images / 10,
            "images_per_second": 1000.0, "loss_rec": 100 + 1000 / (images + 100), "loss_kl": 20.0, "beta": 0.5,
            "lr_encoder": 1e-3, "lr_decoder": 1e-3, "psnr": None,
        }  # fmt: skip
        if phase != "vae":
            row |= {"loss_disc": 1.4, "accuracy_real": 0.7, "loss_adv": math.nan if images == 1500 else 0.7}
        rows.append(row)
    rows.append({"event": "checkpoint", "images_seen": 3000, "path": "checkpoint-3000", "seconds": 1.0})
    return rows


@pytest.fixture
def history(tmp_path: Path) -> Path:
    path = tmp_path / "history.jsonl"
    sink = History(path)
    for row in three_phases():
        sink.log(row)
    sink.close()
    return path


def test_the_curves_are_the_history(history: Path) -> None:
    rows = [row for row in three_phases() if row["event"] == "train"]
    curves = collect(read_history(history))
    assert set(curves) == {
        "images_per_second", "loss_rec", "loss_kl", "beta", "lr_encoder", "lr_decoder",
        "loss_disc", "accuracy_real", "loss_adv",
    }  # fmt: skip
    for key, (places, values) in curves.items():
        assert places == [row["images_seen"] for row in rows]
        expected = [np.nan if row.get(key) is None else row[key] for row in rows]
        np.testing.assert_array_equal(values, np.array(expected, dtype=float))


def test_phases_span_the_images_they_trained_on() -> None:
    rows = three_phases()
    expected = [("vae", 0, 1000), ("warm", 1000, 2000), ("adversarial", 2000, 3000)]
    assert phase_spans(rows) == expected
    assert phase_spans([row for row in rows if row["event"] == "train"]) == expected, "a file without phase rows"


def test_every_family_has_a_panel_with_labelled_axes(history: Path) -> None:
    figure = make_figure(read_history(history))
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
    assert titles == [
        "Reconstruction", "KL divergence", "Adversarial", "Discriminator accuracy", "Learning rates", "Throughput",
    ]  # fmt: skip
    assert all(ax.get_ylabel() for ax in figure.axes)
    assert figure.axes[5].get_xlabel() == "images seen"
    drawn = {name for ax in figure.axes for line in ax.lines for name in str(line.get_label()).split("\n")}
    assert set(collect(read_history(history))) <= drawn
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [name for name in texts if name in ("vae", "warm", "adversarial")] == ["vae", "warm", "adversarial"]


def test_the_picture_is_whole_and_pyplot_is_left_alone(history: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "curves.png"
    before = "matplotlib.pyplot" in sys.modules
    plot_curves(history, output)
    image = Image.open(output)
    assert image.size[0] == 1200
    assert len(image.convert("RGB").getcolors(maxcolors=2**24) or []) > 50
    assert ("matplotlib.pyplot" in sys.modules) == before
    assert [entry.name for entry in output.parent.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"event": "train", "images_seen": 5}],
        [{"event": "train", "phase": "vae", "images_seen": 5, "loss_rec": None}],
        [{"event": "train", "phase": "vae", "images_seen": 5, "loss_rec": 1.0, "strange": 3}],
        [{"event": "train", "images_seen": i, "lr_encoder": 0.0, "loss_adv": -1e30 * i} for i in (1, 2)],
    ],
)
def test_sparse_histories_are_drawn(rows: list[Record], tmp_path: Path) -> None:
    sink = History(tmp_path / "history.jsonl")
    for row in rows:
        sink.log(row)
    sink.close()
    plot_curves(tmp_path / "history.jsonl", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] == 1200


def test_a_missing_history_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no history there"):
        plot_curves(tmp_path / "history.jsonl", tmp_path / "curves.png")
