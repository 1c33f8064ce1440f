"""What keeps a run from being ruined by its own numbers: the budget of skipped steps and the watch for divergence.

A step whose gradient is not finite is skipped on the device by `step.py`; here it is only counted, where the loop
waits for the device anyway.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from vaegan_dist.reporting.records import Record, number
from vaegan_dist.training.step import Step

ACCURACY_LIMIT = 0.99
KL_FACTOR, LOSS_FACTOR = 10.0, 3.0
IN_A_ROW = 5
EMA_DECAY = 0.9
WARM_UP_RECORDS = 5


def worst_skips(step: Step) -> int:
    """The longest row of skipped steps since the last call; equal on all ranks, since the gradient is averaged."""
    worst = int(step.worst_in_a_row.item())
    step.worst_in_a_row.zero_()
    return worst


@dataclass
class Watch:
    """Warns when a phase seems to diverge; each kind once, and again only after it was well in between.

    - the discriminator wins: its accuracy stays above 0.99 for five log records;
    - the KL explodes: above ten times its own moving average, or a reconstruction loss above three times its own;
    - a term is not finite though the gradient was.
    """

    phase: str = ""
    records: int = 0
    won: int = 0
    averages: dict[str, float] = field(default_factory=dict)
    raised: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Watch":
        """Back from a checkpoint."""
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return asdict(self)

    def look(self, phase: str, record: Record) -> list[str]:
        """Warnings that a log record gives rise to."""
        if phase != self.phase:
            self.phase, self.records, self.won, self.averages, self.raised = phase, 0, 0, {}, []
        trouble = {**self._not_finite(record), **self._discriminator_wins(record), **self._grown(record)}
        self.records += 1
        news = [message for key, message in trouble.items() if key not in self.raised]
        self.raised = list(trouble)
        skipped = int(number(record, "skipped_steps") or 0)
        if skipped:
            news.insert(0, f"{skipped} steps since the last record had a gradient that is not finite and were skipped")
        return news

    def _not_finite(self, record: Record) -> dict[str, str]:
        bad = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        return {f"finite {key}": f"{key} is {record[key]} though the gradient is finite" for key in bad}

    def _discriminator_wins(self, record: Record) -> dict[str, str]:
        values = [float(value or 0.0) for key, value in record.items() if key.startswith("accuracy_")]
        self.won = self.won + 1 if values and min(values) > ACCURACY_LIMIT else 0
        if self.won < IN_A_ROW:
            return {}
        return {
            "discriminator": f"the discriminator tells real from fake in over {ACCURACY_LIMIT:.0%} of cases for "
            f"{self.won} records: the decoder may learn nothing from it; lower its learning rate or raise objective.r1"
        }

    def _grown(self, record: Record) -> dict[str, str]:
        trouble = {}
        for key, factor in (("loss_kl", KL_FACTOR), ("loss_rec", LOSS_FACTOR), ("loss_sim", LOSS_FACTOR)):
            value = number(record, key)
            if value is None:
                continue
            average = self.averages.get(key, value)
            if self.records >= WARM_UP_RECORDS and value > factor * average > 0:
                trouble[key] = f"{key} is {value:.4g}, over {factor:g} times its average of {average:.4g}"
            self.averages[key] = EMA_DECAY * average + (1.0 - EMA_DECAY) * value
        return trouble
