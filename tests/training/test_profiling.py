"""A profile is a trace that opens and a page whose parts make up the step; it changes nothing that is computed."""

import gzip
import json
import re
from pathlib import Path

from tests.training.runs import config_of, tensors_of
from vaegan_dist.training.loop import train
from vaegan_dist.training.runtime import SingleProcess


def test_a_profile_is_written_and_changes_nothing(digits: Path, tmp_path: Path) -> None:
    for name, steps in (("with", 3), ("without", 0)):
        train(config_of(digits, tmp_path / name, f"reporting.profile_steps={steps}"), SingleProcess())
    assert tensors_of(tmp_path / "with" / "smoke") == tensors_of(tmp_path / "without" / "smoke")
    assert not (tmp_path / "without" / "smoke" / "profile").exists()
    folder = tmp_path / "with" / "smoke" / "profile"
    events = json.loads(gzip.decompress((folder / "joint-trace.json.gz").read_bytes()))["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert "vaegan::forward" in names and any(name.startswith("Optimizer.step") for name in names)
    page = (folder / "joint-summary.md").read_text()
    shares = {name: float(value) for name, value in re.findall(r"^\| ([a-z ]+) \| [\d.]+ \| ([\d.]+)% \|$", page, re.M)}
    assert list(shares) == ["forward", "backward", "optimiser", "communication", "data", "rest", "whole step"]
    assert shares["whole step"] == 100 and shares["communication"] == 0
    assert all(shares[name] > 0 for name in ("forward", "backward", "optimiser"))
    # The parts come from the profiler's clock and the whole from ours.
    assert 95 <= sum(shares.values()) - shares["whole step"] <= 110
    assert "aten::" in page and page.startswith("# Profile of phase joint\n\n3 steps on cpu")
