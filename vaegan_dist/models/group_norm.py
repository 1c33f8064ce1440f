"""Group norm (Wu & He 2018, arXiv 1803.08494) with the activation after it, on a GPU by kernels of our own.

torch's group norm wants channels apart, where convolutions are fastest with channels side by side, and under autocast
float32: between two convolutions in bfloat16 a picture is then converted, rearranged, normalised, activated, rearranged
and converted again. The kernels read and write what the convolutions do, and take the bias of the one before along.
"""

import functools
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaegan_dist.errors import ConfigError

Activation = Literal["none", "leaky_relu", "silu"]
SLOPE = 0.2  # of the leaky ReLU
WIDEST = 2048  # channels that a program can hold
TILE = 4096  # numbers that a program holds at a time
PROGRAMS = 2048  # to be under way at a time: some for each multiprocessor
MOST_CHUNKS, MOST_PARTS = 128, 8192  # of a picture; of a group, with its channels
LARGEST = 2**29  # numbers in a picture; a transposed convolution makes four times as many, which 32 bits still address
ALIGNED = 16  # bytes, by which Triton tells addresses apart
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

log = logging.getLogger(__name__)
_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def twice_differentiable(wanted: bool = True) -> Iterator[None]:
    """Let group norms compute by torch alone, whose gradients have gradients; the kernels' have none."""
    token = _plain.set(wanted or _plain.get())
    try:
        yield
    finally:
        _plain.reset(token)


class GroupNorm(nn.GroupNorm):
    """Group norm and an activation.

    Attributes:
        fused: use the kernels where they can be used.
    """

    def __init__(self, groups: int, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__(groups, channels, eps=eps)
        self.fused = False

    def forward(self, x: Tensor, activation: Activation = "none", pre: Tensor | None = None) -> Tensor:
        """`[B, C, ...]` -> the same.

        Args:
            pre: `[C]`, added to `x` before it is normalised; only where `fuses(x)`.
        """
        if pre is None and not self.fuses(x):
            return activated(super().forward(x), activation)
        return fused_group_norm(x, self.weight, self.bias, self.num_groups, self.eps, activation, pre)

    def fuses(self, x: Tensor) -> bool:
        """Whether the kernels are to be used for `x`, or for what a convolution makes of it."""
        return (
            self.fused
            and x.is_cuda
            and x.dim() == 4
            and x.dtype in FLOATS
            and self.num_channels <= WIDEST
            and x.shape[0] * x.shape[2] * x.shape[3] > 0
            and x.shape[2] * x.shape[3] * self.num_channels <= LARGEST
            and not _plain.get()
            and not torch.compiler.is_compiling()  # which has kernels of its own
        )


def activated(x: Tensor, activation: Activation) -> Tensor:
    """The activation alone."""
    if activation == "leaky_relu":
        return F.leaky_relu(x, SLOPE)
    return F.silu(x) if activation == "silu" else x


def normalised(norm: nn.Module, x: Tensor, activation: Activation) -> Tensor:
    """Norm (or none) and activation."""
    if isinstance(norm, GroupNorm):
        done: Tensor = norm(x, activation)
        return done
    return activated(norm(x), activation)


def convolved(conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.Module, x: Tensor, activation: Activation) -> Tensor:
    """Convolution, norm (or none) and activation."""
    plain = type(conv) in (nn.Conv2d, nn.ConvTranspose2d) and conv.bias is not None
    if plain and isinstance(norm, GroupNorm) and norm.fuses(x):
        done: Tensor = norm(_without_bias(conv, x), activation, conv.bias)
        return done
    return normalised(norm, conv(x), activation)


def _without_bias(conv: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> Tensor:
    if isinstance(conv, nn.Conv2d):
        done: Tensor = conv._conv_forward(x, conv.weight, None)
        return done
    assert not isinstance(conv.padding, str)
    shape = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
    return F.conv_transpose2d(x, conv.weight, None, *shape)


def fuse_norms(networks: nn.Module, wanted: bool | None, device: torch.device) -> None:
    """Use the kernels in all group norms, or in none; None: where they can be used.

    Raises:
        ConfigError: wanted where they cannot be used.
    """
    norms = [module for module in networks.modules() if isinstance(module, GroupNorm)]
    if wanted and device.type != "cuda":
        raise ConfigError(
            "training.fused_norms=true: this worker has no GPU; set cluster.gpus_per_worker=1, or leave it unset"
        )
    fused = bool(norms) and wanted is not False and device.type == "cuda"
    if fused and (reason := _why_not(device)):
        what = f"the kernels of the group norms cannot be used on {device}: {reason}"
        if wanted:
            raise ConfigError(f"training.fused_norms=true: {what}; leave it unset, or install what is missing")
        log.warning("%s; torch's own group norms are used, which are slower", what)
        fused = False
    for norm in norms:
        norm.fused = fused


@functools.cache
@torch.enable_grad()
def _why_not(device: torch.device) -> str:
    """Why the kernels cannot be compiled and run on this device, in one line; nothing if they can."""
    if torch.version.hip:
        return "nobody has tried them with ROCm yet"
    try:
        x = torch.arange(72.0, device=device).sin().view(2, 4, 3, 3).requires_grad_()
        weight, bias = torch.ones(4, device=device), torch.zeros(4, device=device)
        expected = F.silu(F.group_norm(x, 1))
        (gradient,) = torch.autograd.grad(expected.square().sum(), x)
        for _ in range(2):  # the second time on another way
            y = fused_group_norm(x, weight, bias, 1, 1e-5, "silu", None)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            (own,) = torch.autograd.grad(y.square().sum(), x)
            torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-4)
    except Exception as error:  # whatever a compiler fails with, torch's own norm works
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""


def fused_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    activation: Activation,
    pre: Tensor | None,
) -> Tensor:
    """activation(group norm of `x + pre`), `[B, C, H, W]`, channels last, in the precision of `x`.

    Args:
        weight, bias: `[C]`.
        pre: `[C]`, or none.

    It can be differentiated once. `pre` is taken from the mean instead of being added to each number: where the two
    cancel and are much larger than the deviation, as many digits are lost as they are larger.
    """
    done: Tensor = _Fused.apply(x, weight, bias, pre, groups, eps, activation)  # type: ignore[no-untyped-call]
    return done


@dataclass(frozen=True)
class _Kind:
    """What the kernels are compiled for."""

    shape: tuple[int, int, int, int]
    groups: int
    eps: float
    activation: Activation
    has_pre: bool
    pictures: torch.dtype
    parameters: torch.dtype
    device: torch.device


class _Plan:
    """How a batch of pictures is shared out to programs, and the kernels for it."""

    def __init__(self, kind: _Kind) -> None:
        images, channels, height, width = kind.shape
        groups, rows, size = kind.groups, height * width, channels // kind.groups
        line, group = _power_of_two(channels), _power_of_two(size)
        lines = max(1, min(TILE // line, _power_of_two(rows)))
        chunks = min(MOST_CHUNKS, MOST_PARTS // group, math.ceil(PROGRAMS / images))
        chunk = lines * math.ceil(math.ceil(rows / chunks) / lines)
        chunks, tiles = math.ceil(rows / chunk), math.ceil(rows / lines)
        kernels = _kernels()
        self.sums = torch.float64 if kind.pictures == torch.float64 else torch.float32
        self.planes = (3 if kind.has_pre else 2, images, channels)  # of `shares`
        self.partial = 2 * images * (chunks * channels + groups)
        self.stats = images * (2 * groups + channels)
        active = {"none": kernels.NONE, "leaky_relu": kernels.LEAKY_RELU, "silu": kernels.SILU}[kind.activation]
        tile = (lines, line, kernels.WIDE[self.sums])
        parts = (_power_of_two(chunks), group, kernels.WIDE[self.sums])
        by_chunk, by_group, by_tile = images * chunks, images * groups, images * tiles
        own = (kind.has_pre, active, SLOPE, *tile)
        # Each takes tensors first and then what is the same every time.
        self.channel_moments = _Launch(
            kernels.channel_moments, by_chunk, (rows, channels, chunk, chunks, kind.has_pre, *tile)
        )
        self.group_moments = _Launch(
            kernels.group_moments, by_group, (rows, channels, size, groups, chunk, chunks, kind.eps, *parts)
        )
        self.normalise = _Launch(kernels.normalise, by_tile, (images, rows, channels, size, groups, tiles, *own))
        self.gradient_sums = _Launch(
            kernels.gradient_sums, by_chunk, (images, rows, channels, size, groups, chunk, chunks, *own)
        )
        self.group_sums = _Launch(
            kernels.group_sums, by_group, (rows, channels, size, groups, chunks, kind.has_pre, *parts)
        )
        self.input_gradient = _Launch(
            kernels.input_gradient, by_tile, (images, rows, channels, size, groups, chunks, tiles, *own)
        )


class _Launch:
    """Starts a kernel whose numbers stay; after the first time without Triton's look at every argument."""

    def __init__(self, kernel: Any, programs: int, numbers: tuple[Any, ...]) -> None:
        self.kernel, self.grid, self.numbers = kernel, (programs, 1, 1), numbers
        self.compiled: Any = None

    def __call__(self, aligned: bool, *tensors: Tensor | None) -> None:
        """`aligned`: addresses are multiples of ALIGNED, as they were when the kernel was compiled."""
        if aligned and self.compiled is not None:
            self.compiled[self.grid](*tensors, *self.numbers)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers)
        if aligned:
            self.compiled = compiled


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        pre: Tensor | None,
        groups: int,
        eps: float,
        activation: Activation,
    ) -> Tensor:
        assert bias.dtype == weight.dtype and (pre is None or pre.dtype == weight.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        shape, has_pre = tuple(x.shape), pre is not None
        plan = _plan(_Kind(shape, groups, eps, activation, has_pre, x.dtype, weight.dtype, x.device))  # type: ignore[arg-type]
        partial = torch.empty(plan.partial, dtype=plan.sums, device=x.device)
        stats = torch.empty(plan.stats, dtype=plan.sums, device=x.device)
        y = torch.empty_like(x)
        aligned = _aligned(x, weight, bias, pre)
        with _on(x.device):
            plan.channel_moments(aligned, x, pre, partial)
            plan.group_moments(aligned, partial, stats)
            plan.normalise(aligned, x, pre, weight, bias, stats, y)
        ctx.save_for_backward(x, weight, bias, pre, stats)
        ctx.plan = plan
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # by create_graph=True
            raise RuntimeError("the gradient of a fused group norm has no gradient: use twice_differentiable()")
        x, weight, bias, pre, stats = ctx.saved_tensors
        plan: _Plan = ctx.plan
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        partial = torch.empty(plan.partial, dtype=plan.sums, device=x.device)
        shares = torch.empty(plan.planes, dtype=plan.sums, device=x.device)
        dx = torch.empty_like(x)
        aligned = _aligned(x, gradient, weight, bias, pre)
        with _on(x.device):
            plan.gradient_sums(aligned, x, gradient, pre, weight, bias, stats, partial)
            plan.group_sums(aligned, weight, stats, partial, shares)
            plan.input_gradient(aligned, x, gradient, pre, weight, bias, stats, partial, dx)
        of_weight, of_bias, *of_pre = shares.sum(1).to(weight.dtype).unbind()
        return dx, of_weight, of_bias, of_pre[0] if of_pre else None, None, None, None


def _aligned(*tensors: Tensor | None) -> bool:
    return not any(tensor.data_ptr() % ALIGNED for tensor in tensors if tensor is not None)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels start on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.lru_cache(1024)
def _plan(kind: _Kind) -> _Plan:
    return _Plan(kind)


@functools.cache
def _kernels() -> ModuleType:
    from vaegan_dist.models import group_norm_kernels  # Triton comes with torch for GPUs only

    return group_norm_kernels


def _power_of_two(number: int) -> int:
    """The first that is no smaller."""
    return 1 << max(number - 1, 0).bit_length()
