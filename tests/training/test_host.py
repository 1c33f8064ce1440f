"""The body of a step neither asks the device for a number nor sends it one: what a captured step relies on.

On torch's `meta` device, which computes nothing, so that it is seen without a GPU; tests/gpu sees it on one.
"""

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.gpu.steps import BATCH, IMAGE, VARIANTS, begin, config_of, pictures
from vaegan_dist.training.state import create_state
from vaegan_dist.training.step import Step


class HostTalk(TorchDispatchMode):
    """Names operations on tensors that came from the host; numbers in tensors without dimensions pass.

    A tensor came from there if it lies there, or if it is neither known nor the result of an operation (an index that
    was a list of Python's).
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.found: list[str] = []
        self.known = [tensor.untyped_storage() for tensor in known]
        self.keys = {storage._cdata for storage in self.known}

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), result)
        )
        sent = [t for t in given if t.dim() and (not t.is_meta or t.untyped_storage()._cdata not in self.keys)]
        if sent and any(t.is_meta for t in [*given, *made]):
            self.found.append(str(func))
        for tensor in made:
            self.known.append(tensor.untyped_storage())  # kept, so that no other takes its key
            self.keys.add(self.known[-1]._cdata)
        return result


def body_of(variant: str) -> tuple[Step, Tensor, dict[str, Tensor]]:
    """A step on the meta device and what its body takes."""
    device = torch.device("meta")
    state = create_state(config_of(variant), IMAGE, device, torch.float32)
    step = Step(state, next(state.remaining_phases()), 0, 1)
    step._autocast = nullcontext  # type: ignore[method-assign]  # which this device does not have
    images = torch.empty(BATCH, IMAGE.channels, IMAGE.height, IMAGE.width, dtype=torch.uint8, device=device)
    noise = {name: torch.empty(shape, device=device) for name, shape in step.objective.noise_shapes(BATCH).items()}
    return step, images, noise


@pytest.fixture
def optimisers_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused Adam has no meta kernel; its flags and rates are tensors, of which tests/gpu has the proof."""
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_stays_on_the_device(variant: str, optimisers_at_rest: None) -> None:
    """Asking for a number (`.item()`, a branch on a tensor) is an error on this device; sending one is found here."""
    step, images, noise = body_of(variant)
    state = step.state
    kept = [*state.networks.state_dict().values(), *state.ema.state_dict().values(), *state.memory.values()]
    with HostTalk(images, *noise.values(), *kept, step.sums) as talk:
        step._train_on(images, noise)
    assert not talk.found


def test_talk_is_seen(optimisers_at_rest: None) -> None:
    with HostTalk() as talk:
        on_device = torch.empty(5, device="meta") + 1
        assert not talk.found
        on_device[[0, 2]]
        torch.tensor([1.0, 2.0]).to("meta")
    assert talk.found == ["aten.index.Tensor", "aten._to_copy.default"]
    with pytest.raises((NotImplementedError, RuntimeError)):
        float(torch.empty((), device="meta"))


def test_a_step_that_is_left_is_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graphs hold memory of the device, which the next phase, or a run that was rolled back, needs."""
    made: list[weakref.ref[Any]] = []

    class Graphs:
        def __init__(self, device: torch.device) -> None:
            made.append(weakref.ref(self))

        def __call__(self, body: Any, key: object, images: Tensor, noise: dict[str, Tensor]) -> None:
            body(images, noise)

    monkeypatch.setattr("vaegan_dist.training.step.captures", lambda *_: True)
    monkeypatch.setattr("vaegan_dist.training.step.StepGraphs", Graphs)
    _, step = begin(config_of("lazy-r1"), "cpu", torch.float32)
    step(pictures(0))
    del step
    (graphs,) = made
    assert graphs() is None
