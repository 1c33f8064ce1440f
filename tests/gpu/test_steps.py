"""A GPU computes what the CPU computes; captured steps compute what plain ones do; nothing waits for the device."""

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.steps import BATCH, VARIANTS, begin, config_of, pictures, trained
from vaegan_dist.models.group_norm import GroupNorm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
STEPS = 20


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Kernels that repeat themselves bit by bit."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gpu_computes_what_the_cpu_does(variant: str) -> None:
    """In float64, on the same noise: weights, averages, memory and terms after 20 steps, captured ones included."""
    cpu, _ = trained(config_of(variant), "cpu", torch.float64, STEPS)
    gpu, step = trained(config_of(variant), "cuda", torch.float64, STEPS)
    assert step.graphs is not None and step.graphs.graphs, "nothing was captured"
    assert cpu.keys() == gpu.keys()
    for name, value in cpu.items():
        torch.testing.assert_close(
            gpu[name], value, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_captured_steps_are_the_plain_ones(variant: str, dtype: torch.dtype) -> None:
    plain, _ = trained(config_of(variant, "training.cuda_graphs=false"), "cuda", dtype, STEPS)
    captured, step = trained(config_of(variant), "cuda", dtype, STEPS)
    assert step.graphs is not None and step.graphs.graphs
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name, value in plain.items():
        torch.testing.assert_close(
            captured[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("mlp", "batch-norm", "stabilised")])
def test_fused_norms_are_torch_s(variant: str) -> None:
    """In float64, whole steps; steps with penalties too, some of whose passes go by torch."""
    plain, _ = trained(config_of(variant, "training.fused_norms=false"), "cuda", torch.float64, STEPS)
    fused, step = trained(config_of(variant, "training.fused_norms=true"), "cuda", torch.float64, STEPS)
    norms = [module for module in step.state.networks.modules() if isinstance(module, GroupNorm)]
    assert norms and all(norm.fused for norm in norms)
    for name, value in plain.items():
        torch.testing.assert_close(
            fused[name], value, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("graphs", ["true", "false"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_never_waits_for_the_device(variant: str, graphs: str) -> None:
    state, step = begin(config_of(variant, f"training.cuda_graphs={graphs}"), "cuda", torch.float32)
    images = pictures(0).pin_memory()

    def run(count: int) -> None:
        for _ in range(count):
            step(images)
            state.advance(BATCH, state.progress.position)

    run(16)  # kernels are chosen, graphs are captured
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.steps == 24


@pytest.mark.parametrize("variant", ["larsen", "paper", "introspective", "latent-diffusion"])
def test_half_precision_learns_alike(variant: str) -> None:
    """Terms of bfloat16 steps, captured, lie by those of float32."""
    whole, step = trained(config_of(variant), "cuda", torch.float32, STEPS)
    half, _ = trained(config_of(variant, "training.mixed_precision=bf16"), "cuda", torch.float32, STEPS)
    for name, a, b in zip(step.term_names, whole["sums"].tolist(), half["sums"].tolist(), strict=True):
        if name.startswith("loss_"):
            assert b == pytest.approx(a, rel=0.1, abs=0.05 * STEPS), name


def test_a_bad_step_is_skipped_in_a_graph_too() -> None:
    state, step = begin(config_of("lazy-r1"), "cuda", torch.float32)
    original = step._noise

    def poisoned() -> dict[str, torch.Tensor]:
        noise = original()
        if state.progress.images_seen == 15 * BATCH:
            noise["eps"][0, 0] = torch.inf
        return noise

    step._noise = poisoned  # type: ignore[method-assign]
    before = {}
    for number in range(17):
        if number in (15, 16):
            before[number] = torch.cat([p.detach().flatten().clone() for p in state.networks.parameters()])
        step(pictures(number))
        state.advance(BATCH, state.progress.position)
    after = torch.cat([p.detach().flatten() for p in state.networks.parameters()])
    assert step.sums[-1].item() == 1 and step.worst_in_a_row.item() == 1 and step.skipped_in_a_row.item() == 0
    assert torch.equal(before[15], before[16]), "the bad step moved weights"
    assert not torch.equal(before[16], after) and after.isfinite().all()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("variant", ["paper", "latent-diffusion", "lazy-r1", "residual"])
def test_compiled_steps_train_as_plain_ones(variant: str, mode: str) -> None:
    """Penalised steps too, some of whose passes stay as they are."""
    plain, step = trained(config_of(variant, "training.cuda_graphs=false"), "cuda", torch.float32, 12)
    compiled, _ = trained(config_of(variant, f"training.compile={mode}"), "cuda", torch.float32, 12)
    for name, a, b in zip(step.term_names, plain["sums"].tolist(), compiled["sums"].tolist(), strict=True):
        assert b == pytest.approx(a, rel=2e-2, abs=2e-2), name
