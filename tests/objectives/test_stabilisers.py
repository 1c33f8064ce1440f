"""The parts of the stabilisers that have rules of their own: the gate, LeCam's memory, what is altered how."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from textbook import altered

from vaegan_dist.objectives import lecam
from vaegan_dist.objectives.augment import NUMBERS, view_of
from vaegan_dist.objectives.equilibrium import held_back

POLICIES = ["color", "translation", "cutout"]


@pytest.mark.parametrize(
    ("real", "fake", "held"),
    [
        (0.69, 0.69, ()),
        (0.2, 0.6, ("discriminator",)),
        (0.6, 0.2, ("discriminator",)),
        (1.2, 0.7, ("decoder",)),
        (0.7, 1.2, ("decoder",)),
        (0.2, 1.2, ()),
        (float("nan"), 0.2, ()),
    ],
)
def test_gate(real, fake, held):
    flags = held_back(torch.tensor(real), torch.tensor(fake), 0.68, 0.35)
    assert tuple(name for name, flag in zip(("decoder", "discriminator"), flags, strict=True) if flag) == held


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=8), st.floats(0, 0.99))
@settings(max_examples=30, deadline=None)
def test_lecam_averages_have_weights_that_fall_with_age(means, decay):
    state = torch.zeros(lecam.SHAPE, dtype=torch.float64)
    for pair in means:
        state = lecam.moved(state, torch.tensor(pair, dtype=torch.float64), decay)
    weights = torch.tensor([decay**age for age in reversed(range(len(means)))], dtype=torch.float64)
    expected = (torch.tensor(means, dtype=torch.float64) * weights[:, None]).sum(0) / weights.sum()
    *found, begun = lecam.averages(state)
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-9, atol=1e-9)
    assert begun == 1


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14)])
@pytest.mark.parametrize("policy", [p for n in (1, 2, 3) for p in itertools.combinations(POLICIES, n)])
def test_alterations_are_those_of_the_paper(policy, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(32, *shape, generator=generator, dtype=torch.float64) * 2 - 1
    normal = torch.randn(32, NUMBERS, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(view_of(policy, normal)(x), altered(policy, normal, x), rtol=1e-10, atol=1e-12)


def test_extreme_numbers_stay_in_range():
    """A uniform number may round to 1: the shift is then the largest, and the square begins at the last place."""
    x = torch.ones(2, 1, 8, 8)
    for value in (-9.0, 9.0):
        made = view_of(POLICIES, torch.full((2, NUMBERS), value))(x)
        assert made.shape == x.shape and bool(made.isfinite().all())


def test_no_policy_changes_nothing():
    x = torch.rand(2, 1, 4, 4)
    assert view_of((), None)(x) is x
