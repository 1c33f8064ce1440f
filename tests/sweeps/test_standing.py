"""Where a sweep stands, as table and metrics tell it: counters never fall, series are few, news are noticed."""

import io
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sweeps.test_schedulers import plan_of
from vaegan_dist.reporting.sweep_metrics import SweepIdentity, samples_of
from vaegan_dist.sweeps.ledger import Ledger, State, Trial
from vaegan_dist.sweeps.standing import Standing, identity_of
from vaegan_dist.sweeps.table import View

EVENTS = ("train", "train", "train", "copy", "crash", "done", "failed", "start again")


def served(standing: Standing, about: SweepIdentity | None = None) -> dict[tuple[str, ...], float]:
    """Values of the metrics by name and label values."""
    found = samples_of(about or identity_of(standing.plan), standing.snapshot(), "running", 0.0)
    return {(metric.name, *labels): value for metric, labels, value in found if isinstance(value, float)}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 2), st.integers(1, 4)), max_size=30))
def test_counters_are_what_trials_did_over_every_restart(events: list[tuple[str, int, int]]) -> None:
    """Trials train, copy each other (pbt), crash, end; the driver dies at any moment."""
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_of(Path(folder), trials=3)
        standing, place, spent, failed = Standing(plan), [0, 0, 0], 0, 0
        for number in range(3):
            plan.ledger.create({"objective.beta": number / 4})
        before = (0.0, 0.0)
        for what, number, size in events:
            if what == "start again":
                plan.ledger.close()
                plan = plan_of(Path(folder), trials=3)
                standing = Standing(plan)
            elif not plan.ledger.trials[number].ended:
                if what == "train":
                    place[number], spent = place[number] + 64 * size, spent + 64 * size
                    plan.ledger.row(number, {"images_seen": place[number], "m": 1.0})
                    # Its log is ahead of its metric: what the driver may forget when it dies.
                    standing.update({number: (place[number] + 32, 10.0)})
                elif what == "copy":
                    place[number] = 64 * (size - 1)
                    plan.ledger.change(number, {"objective.beta": 0.5}, source=0, images_seen=place[number])
                elif what in ("done", "failed"):
                    state: State = "done" if what == "done" else "failed"
                    plan.ledger.end(number, state)
                    failed += what == "failed"
                else:
                    standing.update({})
            found = served(standing)
            now = found["vaegan_sweep_images_total",], found["vaegan_sweep_trial_failures_total",]
            assert now == (spent, failed)
            assert now >= before
            assert sum(value for key, value in found.items() if key[0] == "vaegan_sweep_trials") == 3
            before = now
        plan.ledger.close()
        assert Ledger(Path(folder)).trials == plan.ledger.trials


def test_a_thousand_trials_have_series_for_those_under_way_only(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, trials=1000, scheduler="hyperband")
    for number in range(1000):
        row: dict[str, float | None] = {"images_seen": 64.0, "m": 1000.0 - number}
        state: State = "done" if number < 300 else "running"
        plan.ledger.trials[number] = Trial(number, {"objective.beta": 0.5}, state, [row] if number < 400 else [])
    standing = Standing(plan)
    # 398 ended meanwhile; 700 has not said anything yet; others of the ledger's are paused or have yet to begin.
    plan.ledger.trials[398].state = "failed"
    standing.update({398: (100, 1.0), 399: (128, 2.5), 700: (0, 0.0)})
    found = served(standing)
    assert {key[1] for key in found if key[0].startswith("vaegan_sweep_trial_") and len(key) > 1} == {"0399", "0700"}
    assert len(found) < 40
    assert found["vaegan_sweep_trial_images_seen", "0399"] == 128 and found["vaegan_sweep_images_per_second",] == 2.5
    assert found["vaegan_sweep_trial_value", "0399", "m"] == 601
    states = {key[1]: value for key, value in found.items() if key[0] == "vaegan_sweep_trials"}
    assert states == {"waiting": 697, "running": 2, "done": 300, "early": 0, "failed": 1}
    assert found["vaegan_sweep_best_trial",] == 299 and found["vaegan_sweep_best_value", "m", "min"] == 701
    assert found["vaegan_sweep_images_seen",] == 400 * 64 + 64, "the failed one's news do not count any more"
    shown = io.StringIO()
    View(standing, shown).close()
    assert "1000 trials: 300 done, 1 failed, 699 waiting" in shown.getvalue()


def test_news_are_noticed_wherever_they_come_from(tmp_path: Path) -> None:
    plan, now = plan_of(tmp_path), [100.0]
    standing = Standing(plan, clock=lambda: now[0])

    def silence() -> float:
        now[0] += 10
        return served(standing)["vaegan_sweep_progress_age_seconds",]

    assert silence() == 10 and silence() == 20
    plan.ledger.create({"objective.beta": 0.5})
    assert silence() == 0 and silence() == 10
    standing.update({0: (64, 5.0)})
    assert silence() == 10
    standing.update({0: (64, 5.0)})
    assert silence() == 20, "the same again is no news"
    plan.ledger.row(0, {"images_seen": 64, "m": 1.0})
    assert silence() == 0
    plan.ledger.end(0, "done")
    assert silence() == 0 and silence() == 10
    plan.ledger.close()
