"""The kernels of the group norm: by Triton's interpreter on the CPU (see conftest.py), or compiled for a GPU."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.gpu.steps import IMAGE, config_of, trained
from tests.needs import missing
from vaegan_dist.config_source import load_config
from vaegan_dist.errors import ConfigError
from vaegan_dist.models import group_norm
from vaegan_dist.models.group_norm import SLOPE, GroupNorm, _Launch, fuse_norms, fused_group_norm, twice_differentiable
from vaegan_dist.models.networks import as_written
from vaegan_dist.training.state import create_state

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ACTIVATIONS = {"none": lambda u: u, "leaky_relu": lambda u: F.leaky_relu(u, SLOPE), "silu": F.silu}
# Pictures, groups: channels that are no power of two, rows that chunks and tiles do not divide, one row, one group.
SHAPES = [((2, 16, 8, 8), 4), ((3, 12, 5, 7), 3), ((1, 96, 1, 1), 8), ((2, 8, 37, 41), 1), ((2, 640, 3, 3), 32)]


@pytest.fixture(autouse=True, scope="module")
def triton() -> None:
    if find_spec("triton") is None:
        missing("triton (pip install triton)")


def inputs(shape: tuple[int, ...], dtype: torch.dtype, *, pre: bool, mean: float = 0.0) -> list[Tensor]:
    """Pictures, weight, bias (and what is added before), and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    channels = [torch.randn(shape[1], generator=generator, dtype=torch.float64).to(wide) for _ in range(2 + pre)]
    given = [(x + mean).to(dtype), *channels, gradient.to(dtype)]
    return [tensor.to(DEVICE).requires_grad_(index < len(given) - 1) for index, tensor in enumerate(given)]


def textbook(given: list[Tensor], groups: int, activation: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The same by the formula: the result, and its gradients."""
    x, weight, bias, *pre = leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in given[:-1]]
    moved = x + pre[0].view(1, -1, 1, 1) if pre else x
    grouped = moved.reshape(x.shape[0], groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    hat = ((grouped - mean) * (variance + 1e-5).rsqrt()).view_as(x)
    y = ACTIVATIONS[activation](hat * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1))
    return [y, *torch.autograd.grad(y, leaves, given[-1].to(dtype))]


def own(given: list[Tensor], groups: int, activation: str) -> list[Tensor]:
    x, weight, bias, *pre = given[:-1]
    y = fused_group_norm(x, weight, bias, groups, 1e-5, activation, pre[0] if pre else None)  # type: ignore[arg-type]
    return [y, *torch.autograd.grad(y, given[:-1], given[-1])]


def distance(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_the_formula_and_its_gradients(shape: tuple[int, ...], groups: int, pre: bool, activation: str) -> None:
    given = inputs(shape, torch.float64, pre=pre)
    for a, b in zip(own(given, groups, activation), textbook(given, groups, activation), strict=True):
        assert distance(a, b) < 1e-13


def test_half_precision_is_rounded_once() -> None:
    given = inputs((2, 16, 9, 8), torch.bfloat16, pre=True)
    y, dx, *parameters = own(given, 4, "silu")
    expected, gradient, *others = textbook(given, 4, "silu")
    assert y.dtype == dx.dtype == torch.bfloat16
    unit = 2**-8 if DEVICE.type == "cuda" else 2**-7  # the interpreter cuts off where a GPU rounds
    for a, b in ((y, expected), (dx, gradient)):
        torch.testing.assert_close(a.double(), b, rtol=unit, atol=1e-6)
    for a, b in zip(parameters, others, strict=True):
        assert a.dtype == torch.float32 and distance(a, b) < 1e-5


@pytest.mark.parametrize("mean", [0.0, 30.0, 3000.0])
def test_as_exact_as_torch_where_the_mean_is_large(mean: float) -> None:
    given = inputs((2, 8, 40, 40), torch.float32, pre=False, mean=mean)
    expected = textbook(given, 2, "none")[0]
    theirs = F.group_norm(given[0], 2, given[1], given[2], 1e-5)
    assert distance(own(given, 2, "none")[0], expected) < 4 * distance(theirs, expected) + 1e-7


def test_other_layouts_and_frozen_parts() -> None:
    """Pictures and gradients that are not channels last, addresses off the grid, parameters that do not learn."""
    given = inputs((2, 12, 6, 5), torch.float64, pre=True)
    x, weight, bias, pre, gradient = given
    expected = textbook(given, 3, "leaky_relu")
    for pictures in (x.detach().contiguous(), x.detach().to(memory_format=torch.channels_last), off_grid(x)):
        pictures.requires_grad_()
        for added in (pre.detach(), off_grid(pre)):
            y = fused_group_norm(pictures, weight.detach(), bias.detach(), 3, 1e-5, "leaky_relu", added)
            for towards in (gradient, gradient.to(memory_format=torch.channels_last), off_grid(gradient)):
                (dx,) = torch.autograd.grad(y, pictures, towards, retain_graph=True)
                assert distance(y, expected[0]) < 1e-13 and distance(dx, expected[1]) < 1e-13
    broadcast = torch.ones((), dtype=x.dtype, device=DEVICE).expand(y.shape)
    dx, plain = (torch.autograd.grad(result, leaf, broadcast)[0] for result, leaf in _both(x, weight, bias))
    assert distance(dx, plain) < 1e-13


def off_grid(tensor: Tensor) -> Tensor:
    """The same one number further on in memory, pictures with channels last."""
    last = tensor.detach().movedim(1, -1) if tensor.dim() == 4 else tensor.detach()
    moved = torch.empty(last.numel() + 1, dtype=last.dtype, device=last.device)[1:].view(last.shape).copy_(last)
    return moved.movedim(-1, 1) if tensor.dim() == 4 else moved


def _both(x: Tensor, weight: Tensor, bias: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield fused_group_norm(x, weight, bias, 3, 1e-5, "silu", None), x
    yield F.silu(F.group_norm(x, 3, weight, bias)), x


def test_a_second_derivative_is_refused_or_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupNorm, "fuses", _fuses_anywhere)
    norm = GroupNorm(2, 8).double().to(DEVICE)
    norm.fused = True
    x = inputs((2, 8, 4, 4), torch.float64, pre=False)[0]

    def twice() -> Tensor:
        (first,) = torch.autograd.grad(norm(x, "silu").pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    with pytest.raises(RuntimeError, match="twice_differentiable"):
        twice()
    with as_written(nn.Module()):
        found = twice()
    norm.fused = False
    assert torch.equal(found, twice())


def _fuses_anywhere(norm: GroupNorm, x: Tensor) -> bool:
    """As on a GPU."""
    return norm.fused and x.dim() == 4 and not x.is_meta and not group_norm._plain.get()


@pytest.mark.parametrize("variant", ["larsen", "lazy-r1", "wasserstein", "residual", "latent-diffusion"])
def test_steps_train_alike(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps in float64: graphs that are walked twice, frozen networks, penalties, an adaptive weight."""
    called = []

    def counted(*arguments: object) -> Tensor:
        called.append(arguments)
        return fused_group_norm(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(GroupNorm, "fuses", _fuses_anywhere)
    monkeypatch.setattr(group_norm, "fused_group_norm", counted)
    monkeypatch.setattr(group_norm, "_why_not", lambda device: "")
    monkeypatch.setattr("vaegan_dist.training.state.fuse_norms", _fuse_anywhere)
    plain, _ = trained(config_of(variant, "training.fused_norms=false"), str(DEVICE), torch.float64, 2)
    assert not called
    fused, _ = trained(config_of(variant), str(DEVICE), torch.float64, 2)
    assert called
    for name, value in plain.items():
        torch.testing.assert_close(
            fused[name], value, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def _fuse_anywhere(networks: nn.Module, wanted: bool | None, device: torch.device) -> None:
    fuse_norms(networks, wanted, torch.device("cuda"))


def test_settings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Asked for where it cannot be is an error; left alone it is a warning, and torch's norms."""
    norms = nn.ModuleList([GroupNorm(1, 4)])
    with pytest.raises(ConfigError, match=r"fused_norms=true.*no GPU.*gpus_per_worker=1"):
        fuse_norms(norms, True, torch.device("cpu"))
    fuse_norms(norms, None, torch.device("cpu"))
    assert not norms[0].fused
    monkeypatch.setattr(group_norm, "_why_not", lambda device: "no C compiler")
    with caplog.at_level(logging.WARNING):
        fuse_norms(norms, None, torch.device("cuda"))
    assert not norms[0].fused and "no C compiler" in caplog.text
    with pytest.raises(ConfigError, match=r"fused_norms=true.*no C compiler"):
        fuse_norms(norms, True, torch.device("cuda"))
    monkeypatch.setattr(group_norm, "_why_not", lambda device: "")
    fuse_norms(norms, None, torch.device("cuda"))
    assert norms[0].fused
    fuse_norms(norms, False, torch.device("cuda"))
    assert not norms[0].fused
    wanted = []
    monkeypatch.setattr("vaegan_dist.training.state.fuse_norms", lambda networks, wish, device: wanted.append(wish))
    for other in ("training.channels_last=false", "training.compile=default"):
        with pytest.raises(ConfigError, match="fused_norms"):
            load_config("larsen-64", overrides=["training.fused_norms=true", other])
        create_state(config_of("larsen", other), IMAGE, DEVICE, torch.float32)
    create_state(config_of("larsen"), IMAGE, DEVICE, torch.float32)
    assert wanted == [False, False, None]


def test_what_is_fused() -> None:
    norm = GroupNorm(2, 8)
    norm.fused = True

    def asked(*shape: int, norm: GroupNorm = norm, **other: object) -> bool:
        given = {"is_cuda": True, "dtype": torch.bfloat16, "shape": shape, "dim": lambda: len(shape)}
        return norm.fuses(SimpleNamespace(**given | other))  # type: ignore[arg-type]

    assert asked(1, 8, 4, 4) and asked(1, 3, 4, 4)
    assert not asked(1, 8, 4, 4, is_cuda=False) and not asked(1, 8, 4, 4, dtype=torch.int64)
    assert not asked(1, 8) and not asked(0, 8, 4, 4) and not asked(1, 8, 2**14, 2**14)
    wide = GroupNorm(1, 4096)
    wide.fused = True
    assert not asked(1, 8, 4, 4, norm=wide)
    with twice_differentiable():
        assert not asked(1, 8, 4, 4)
    norm.fused = False
    assert not asked(1, 8, 4, 4)


def test_why_kernels_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    check = group_norm._why_not.__wrapped__
    with torch.no_grad():
        assert check(DEVICE) == ""

    def broken(*arguments: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(group_norm, "fused_group_norm", broken)
    assert check(DEVICE) == "Failed to find C compiler."
    monkeypatch.setattr(group_norm, "fused_group_norm", lambda x, *others: x)
    assert "not close" in check(DEVICE)


def test_only_aligned_tensors_take_the_short_way() -> None:
    """A kernel that was compiled for aligned addresses reads others wrongly."""
    started = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, int, int]) -> object:
            return lambda *arguments: started.append("looked at") or {grid: lambda *again: started.append("at once")}

    launch = _Launch(Kernel(), 3, (1, 2))
    for aligned in (False, True, True, False):
        launch(aligned)
    assert started == ["looked at", "looked at", "at once", "looked at"]


def test_a_compiler_takes_the_kernels(tmp_path: Path) -> None:
    """The interpreter runs what no GPU could; Triton's compiler needs none."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.compile_kernels"],
        env=kept | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 12


def test_nested_requests_stay() -> None:
    with twice_differentiable(), twice_differentiable(False):
        assert group_norm._plain.get()
    assert not group_norm._plain.get()
