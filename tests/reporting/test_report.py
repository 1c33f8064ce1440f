"""The report of a real run in real Chromium: no error, nothing fetched, nothing wider than a phone; text stays text."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.needs import missing
from vaegan_dist.cli import main
from vaegan_dist.errors import InputError
from vaegan_dist.reporting.charts import LineChart, Series, Shares, nice_ticks, thinned
from vaegan_dist.reporting.report import run_report, sheets

EVIL = "<script>alert('x')</script>"
# Says on the page itself what went wrong on it, so that the document that Chromium dumps tells.
PROBE = """
<script>
const wrong = [];
window.addEventListener("error", (event) => wrong.push(event.message));
document.addEventListener("securitypolicyviolation", (event) => wrong.push(event.blockedURI));
</script>
"""
VERDICT = """
<script>
window.addEventListener("load", () => {
  const slider = document.querySelector(".sheets input");
  const shown = () => document.querySelector(".sheets img.shown").alt;
  const last = shown();
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  const chart = document.querySelector("svg.chart");
  const box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 9}));
  const tip = chart.parentElement.querySelector(".tip");
  document.body.dataset.verdict = JSON.stringify({
    wrong, first: shown(), last, tip: tip.hidden ? "" : tip.textContent,
    wide: document.documentElement.scrollWidth - window.innerWidth,
    requests: performance.getEntriesByType("resource").filter((e) => !e.name.startsWith("data:")).map((e) => e.name),
  });
});
</script>
"""


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything that a report shows, and a few hostile words."""
    folder = tmp_path_factory.mktemp("runs")
    settings = ["reporting.log_images=128", "reporting.sample_images=512", "reporting.metrics_port=0"]
    command = ["train", "--preset", "smoke", "--data", str(digits), "--storage", str(folder), "--runtime", "local"]
    assert main([*command, *settings, "--workers", "1", "reporting.tensorboard=false"]) == 0
    rows = [
        {"event": "evaluation", "phase": "joint", "images_seen": 2560, "fid": 12.25, "features": EVIL},
        {"event": "warning", "message": EVIL, "images_seen": 2560},
        {"event": "resume", "restarts": 1, "images_seen": 2560},
        {"event": "rollback", "name": "1", "message": "back", "images_seen": 2560},
        {"event": "train", "phase": "joint", "images_seen": 2561, "loss_rec": None, "loss_rec_nonfinite": "nan"},
    ]
    with (folder / "smoke" / "history.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder / "smoke"


def test_the_command_writes_one_page(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert EVIL not in text and "&lt;script&gt;alert" in text
    assert "12.25" in text and "28 × 28 × 1" in text and "training.batch_size" in text
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)[^"']+""", text), "something would be fetched"
    assert "url(" not in text and "@import" not in text
    assert text.count("<img") == 2 * len(list((run / "pictures").glob("samples-*.png"))) >= 6
    with pytest.raises(InputError, match="no run there"):
        run_report(tmp_path / "nothing")
    assert main(["report", str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_chromium_opens_it(run: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    chromium = shutil.which("chromium") or missing("chromium")
    page = run_report(run, {"shards": [], "classes": ["a"], "created": {"source": EVIL}})
    # The page's own policy lets inline scripts run.
    page = page.replace("<main>", PROBE + "<main>").replace("</body>", VERDICT + "</body>")
    (tmp_path / "page.html").write_text(page)
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--dump-dom",
            "--enable-logging=stderr",
            "--virtual-time-budget=4000",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={size[0]},{size[1]}",
            f"file://{tmp_path / 'page.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    found = re.search(r'data-verdict="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    verdict = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert verdict["wrong"] == [] and verdict["requests"] == []
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert verdict["wide"] <= 0, "the page is wider than the window"
    assert verdict["first"] != verdict["last"] and "images" in verdict["first"]
    assert re.search(r"[a-z_]+ {2}([\d.]+|–)", verdict["tip"]), verdict["tip"]


def test_many_and_large_sheets_stay_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1500, 1500, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "samples-000000000000-vae.png")
    for number in range(1, 200):
        Image.new("RGB", (8, 8)).save(tmp_path / f"samples-{number:012d}-vae.png")
    (tmp_path / "other.png").write_bytes(b"not a sheet")
    frames = sheets(tmp_path)["samples"]
    assert len(frames) == 40 and (frames[0].images_seen, frames[-1].images_seen) == (0, 199)
    assert frames[0].source.startswith("data:image/jpeg") and len(frames[0].source) < 1_500_000


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    high = low + width
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), width)
    assert 1 <= len(ticks) <= 12 and all(low - slack <= tick <= high + slack for tick in ticks)


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=300))
def test_thinning_keeps_the_extremes(ys: list[float]) -> None:
    line = thinned(Series("a", list(range(len(ys))), ys), points=20)
    finite = [y for y in ys if math.isfinite(y)]
    kept = [y for y in line.ys if math.isfinite(y)]
    assert len(line.xs) <= 22 and list(line.xs) == sorted(set(line.xs))
    if finite:
        assert (min(kept), max(kept)) == (min(finite), max(finite))


def test_charts_stand_odd_values() -> None:
    for ys in ([], [math.nan], [1.0], [0.0, 0.0], [1e-9, 1e9], [-1.0, math.inf, 2.0]):
        xs = list(range(len(ys)))
        for log in (False, True):
            text = LineChart("t", "u", [Series(EVIL, xs, ys)], log=log).svg()
            assert "nan" not in re.sub(r'data-chart="[^"]*"', "", text).lower() and EVIL not in text
    assert [round(percent) for _, _, percent in Shares([("a", 3.0), ("b", 1.0), ("c", 0.0)]).rows()] == [75, 25]
