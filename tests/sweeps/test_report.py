"""The files that a sweep leaves are whole, self-contained, and say what the ledger says."""

import csv
import json
from pathlib import Path

from tests.sweeps.test_schedulers import plan_of
from vaegan_dist.sweeps.report import render, write_report
from vaegan_dist.sweeps.result import write_result


def test_report_table_and_json_tell_the_same(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, trials=6, scheduler="asha")
    for number in range(6):
        trial = plan.proposals.next()
        assert trial is not None
        for rung in (1, 2) if number % 3 else (1,):
            values = {
                "images_seen": 1280 * rung,
                "m": 10.0 + number - rung,
                "rate": 5.0 - number,
                "distortion": 9 + number,
            }
            plan.ledger.row(number, values)
        plan.ledger.end(number, "done" if number % 3 else "early")
    plan.ledger.create({"objective.beta": 0.5})
    plan.ledger.end(6, "failed", "RuntimeError: <script>alert(1)</script>")
    best = write_result(plan)
    assert best is not None and best.number == 1
    said = json.loads((tmp_path / "sweep.json").read_text())
    assert said["best"] == 1 and [trial["m"] for trial in said["trials"]] == [9, 9, 10, 12, 12, 13, None]
    assert said["images_spent"] == 2 * 1280 + 4 * 2560 and said["trials"][6]["state"] == "failed"
    with (tmp_path / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["m"] for row in table] == ["9.0", "9.0", "10.0", "12.0", "12.0", "13.0", ""]
    assert [float(row["objective.beta"]) for row in table] == [
        t.params["objective.beta"] for t in plan.ledger.trials.values()
    ]
    page = write_report(plan).read_text()
    assert page.count("data:image/png") == 4, "over images, against the key, rate and distortion, importance"
    assert "<script>alert" not in page and "http://" not in page.replace("http://www.w3.org", "")
    assert page.index("0001</td>") < page.index("0000</td>") < page.index("0006</td>")


def test_a_report_of_nothing_is_a_report(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert write_result(plan) is None
    assert "0 of 30" in render(plan)
