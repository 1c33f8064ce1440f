"""A sweep is checked on a driver that may have no GPU, whatever its trials have."""

from pathlib import Path

import pytest

from tests.training.runs import config_of
from vaegan_dist.sweeps.cost import measure_rate
from vaegan_dist.sweeps.plan import make_plan
from vaegan_dist.sweeps.settings import SweepSettings

SETTINGS = SweepSettings.model_validate({"metric": "loss_rec", "space": {"objective.beta": {"uniform": [0, 1]}}})


@pytest.mark.parametrize(
    "setting",
    [
        "training.cuda_graphs=true",
        "training.fused_norms=true",
        "training.compile=reduce-overhead",
        "training.compile=max-autotune",
    ],
)
def test_what_only_a_gpu_can_do_is_left_to_the_trials(digits: Path, tmp_path: Path, setting: str) -> None:
    config = config_of(digits, tmp_path, "cluster.gpus_per_worker=1", setting)
    plan = make_plan(SETTINGS, config)
    assert plan.judged.metrics == ("loss_rec",) and plan.config.training == config.training, "it is still the trials'"
    assert measure_rate(plan.config, 0.0) > 0
