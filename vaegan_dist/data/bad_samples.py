"""The bad samples that a run has trained substitutes for: the same account on every rank, through every restart.

A rank finds a bad sample when it reads it, often some batches ahead and on its own. What counts is what was consumed:
the ranks put that together where they meet anyway (the log and the checkpoint), so that the account is a function of
the place in the order, whatever was read ahead and by how many.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vaegan_dist.data.dataset import ShardDataset
from vaegan_dist.errors import DataError

NAMED_PER_SHARD = 20
"""Causes that the listing at the end repeats for a shard; the history has every one"""

Gather = Callable[[dict[int, str]], list[dict[int, str]]]


class BadSamples:
    """One rank's copy of the account.

    Args:
        dataset: opened with `counted_elsewhere`, so that it replaces and reports but does not count.
        budget: `data.max_bad_samples`, over all ranks; with 0 the dataset fails at the first one, and every method
            here does nothing.
        state: what `to_json` gave an earlier process.
    """

    def __init__(self, dataset: ShardDataset, budget: int, state: Mapping[str, Any] | None = None) -> None:
        self.dataset, self.budget = dataset, budget
        state = state or {"found": {}, "listed": 0}
        self._found = {int(sample): str(cause) for sample, cause in state["found"].items()}
        self._listed = int(state["listed"])
        self._fresh: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._found)

    def consume(self, ids: Tensor) -> None:
        """Note what was replaced among the samples that a step is about to train on, by their ids [b]."""
        known = self.dataset.bad_samples if self.budget else {}
        if known:
            self._fresh |= {i: known[i] for i in ids.tolist() if i in known and i not in self._found}

    def agree(self, gather: Gather) -> None:
        """Put the ranks' findings together.

        Args:
            gather: a collective that gives every rank the argument of each; called on all ranks or on none.
        """
        if not self.budget:
            return
        found = {sample: cause for each in gather(self._fresh) for sample, cause in each.items()}
        self._found |= {sample: found[sample] for sample in sorted(found) if sample not in self._found}
        self._fresh = {}

    def news(self) -> list[str]:
        """One line for each bad sample that was agreed on and not listed before; equal on all ranks."""
        waiting = sorted(list(self._found)[self._listed :])
        # Listed in the order of their ids, whether or not a checkpoint came between.
        self._found |= {sample: self._found.pop(sample) for sample in waiting}
        first, self._listed = self._listed + 1, len(self._found)
        return [
            f"bad sample {number} of {self.budget} allowed, replaced by the next good one of its shard: "
            f"{self._found[sample]}"
            for number, sample in enumerate(waiting, first)
        ]

    def check(self) -> None:
        """Raises DataError, on all ranks alike, when more were replaced than the budget allows."""
        if self.budget and len(self._found) > self.budget:
            last = list(self._found.values())[-1]
            raise DataError(
                f"{last}; the run has met {len(self._found)} bad samples, more than data.max_bad_samples="
                f"{self.budget} allows; restore the shards, or set data.max_bad_samples to how many may be replaced"
            )

    def by_shard(self) -> dict[str, int]:
        """How many samples of each shard were replaced, by the shard's name."""
        return dict(Counter(cause.partition(": ")[0].removeprefix("shard ") for cause in self._found.values()))

    def summary(self) -> list[str]:
        """One line for each shard that has bad samples: how many, and what was wrong with them."""
        shards: dict[str, list[str]] = defaultdict(list)
        for sample in sorted(self._found):
            shard, _, what = self._found[sample].partition(": ")
            shards[shard].append(what)
        lines = []
        for shard, causes in shards.items():
            named = causes[:NAMED_PER_SHARD]
            if len(named) < len(causes):
                named.append(f"and {len(causes) - len(named)} more, each in the history")
            lines.append(f"{shard}: {len(causes)} of its samples were replaced: {'; '.join(named)}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps; call it after `agree`."""
        return {"found": {str(sample): cause for sample, cause in self._found.items()}, "listed": self._listed}
