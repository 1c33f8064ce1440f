"""Kernels (Triton) of a group norm and the activation after it, for pictures whose channels lie side by side.

A picture `[H, W, C]` is cut into `chunks` of rows, a row being one position's channels. Each program takes whole rows,
so that memory is read in long runs however narrow a group is, and leaves sums for each channel; a program for each
group adds them up; the last kernel writes. Pictures are read twice, and no program waits for another one.

Sums are kept in float32, or in float64 for pictures in float64, without atomic additions: the same bits every time.
Whatever the kernels leave for each other lies in three buffers, so that the host allocates and passes few:

- `partial`: two planes `[B, chunks, C]`, then two `[B, groups]` that the backward pass fills;
- `stats`: mean and 1/deviation `[B, groups]`, then the channels' means `[B, C]`;
- `shares`: what each picture adds to the gradients of weight, bias and pre, planes `[B, C]`.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"

import torch
import triton
import triton.language as tl

NONE, LEAKY_RELU, SILU = 0, 1, 2  # kinds of activation; kernels know no names from outside
WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}  # what sums are kept in


@triton.jit
def _activated(u, KIND: tl.constexpr, SLOPE: tl.constexpr):
    if KIND == 1:  # LEAKY_RELU
        u = tl.where(u > 0, u, u * SLOPE)
    elif KIND == 2:  # SILU
        u = u / (1 + tl.exp(-u))
    return u


@triton.jit
def _through_activation(gradient, u, KIND: tl.constexpr, SLOPE: tl.constexpr):
    """The gradient before the activation, of the one after it."""
    if KIND == 1:
        gradient = tl.where(u > 0, gradient, gradient * SLOPE)
    elif KIND == 2:
        share = 1 / (1 + tl.exp(-u))
        gradient = gradient * share * (1 + u * (1 - share))
    return gradient


@triton.jit
def _centre(stats, pre, at_group, channel, real, HAS_PRE: tl.constexpr, WIDE: tl.constexpr):
    """What is subtracted from each channel of a picture."""
    centre = tl.load(stats + at_group, mask=real, other=0)
    if HAS_PRE:
        centre -= tl.load(pre + channel, mask=real, other=0).to(WIDE)
    return centre


@triton.jit
def _normalised_and_gradient(
    x,
    gradient,
    at,
    inside,
    centre,
    scale,
    gain,
    offset,
    KIND: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x̂ of a tile, and d, the gradient before the activation."""
    hat = (tl.load(x + at, mask=inside, other=0).to(WIDE) - centre[None, :]) * scale[None, :]
    d = tl.load(gradient + at, mask=inside, other=0).to(WIDE)
    d = _through_activation(d, hat * gain[None, :] + offset[None, :], KIND, SLOPE)
    return hat, d


@triton.jit
def channel_moments(
    x,
    pre,
    partial,
    rows,
    channels,
    chunk,
    chunks,
    HAS_PRE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mean, and sum of squared distances from it, of each channel over one chunk of one picture."""
    program = tl.program_id(0).to(tl.int64)
    image, part = program // chunks, (program % chunks).to(tl.int32)
    first = part * chunk
    last = tl.minimum(first + chunk, rows)
    channel = tl.arange(0, WIDTH)
    real = channel < channels
    x += image * rows * channels
    # Distances are taken from the first tile's mean: sums of plain squares lose their digits where the mean is large.
    row = first + tl.arange(0, ROWS)
    inside = (row < last)[:, None] & real[None, :]
    tile = tl.load(x + row[:, None] * channels + channel[None, :], mask=inside, other=0).to(WIDE)
    shift = tl.sum(tile, 0) / tl.minimum(last - first, ROWS)
    sums = tl.zeros([ROWS, WIDTH], WIDE)
    squares = tl.zeros([ROWS, WIDTH], WIDE)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & real[None, :]
        tile = tl.load(x + row[:, None] * channels + channel[None, :], mask=inside, other=0).to(WIDE)
        gap = tl.where(inside, tile - shift[None, :], 0)
        sums += gap
        squares += gap * gap
    total = tl.sum(sums, 0)
    off = total / (last - first)
    mean = shift + off
    if HAS_PRE:
        mean += tl.load(pre + channel, mask=real, other=0).to(WIDE)
    partial += program * channels + channel
    tl.store(partial, mean, mask=real)
    plane = tl.num_programs(0).to(tl.int64) * channels
    tl.store(partial + plane, tl.maximum(tl.sum(squares, 0) - total * off, 0), mask=real)


@triton.jit
def group_moments(
    partial,
    stats,
    rows,
    channels,
    size,
    groups,
    chunk,
    chunks,
    EPS: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mean and 1/deviation of one group of one picture, and its channels' means, of what its chunks have left."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    image, group = program // groups, program % groups
    part, member = tl.arange(0, PARTS), tl.arange(0, SIZE)
    inside = (part < chunks)[:, None] & (member < size)[None, :]
    at = (image * chunks + part)[:, None] * channels + group * size + member[None, :]
    each = tl.load(partial + at, mask=inside, other=0)
    spread = tl.load(partial + programs // groups * chunks * channels + at, mask=inside, other=0)
    count = tl.maximum(tl.minimum(rows - part * chunk, chunk), 0).to(WIDE)
    of_channel = tl.sum(each * count[:, None], 0) / rows
    centre = tl.sum(of_channel, 0) / size
    gap = tl.where(inside, each - centre, 0)
    variance = tl.sum(tl.sum(spread + gap * gap * count[:, None], 1), 0) / (rows * size)
    tl.store(stats + program, centre)
    tl.store(stats + programs + program, 1 / tl.sqrt(variance + EPS))
    tl.store(stats + 2 * programs + image * channels + group * size + member, of_channel, mask=member < size)


@triton.jit
def normalise(
    x,
    pre,
    weight,
    bias,
    stats,
    y,
    images,
    rows,
    channels,
    size,
    groups,
    tiles,
    HAS_PRE: tl.constexpr,
    KIND: tl.constexpr,
    SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y = activation((x + pre - mean) * rstd * weight + bias) of one tile."""
    program = tl.program_id(0).to(tl.int64)
    image, tile = program // tiles, (program % tiles).to(tl.int32)
    channel = tl.arange(0, WIDTH)
    real = channel < channels
    at_group = image * groups + channel // size
    centre = _centre(stats, pre, at_group, channel, real, HAS_PRE, WIDE)
    scale = tl.load(stats + images * groups + at_group, mask=real, other=0)
    scale *= tl.load(weight + channel, mask=real, other=0).to(WIDE)
    offset = tl.load(bias + channel, mask=real, other=0).to(WIDE)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & real[None, :]
    at = image * rows * channels + row[:, None] * channels + channel[None, :]
    value = tl.load(x + at, mask=inside, other=0).to(WIDE)
    value = _activated((value - centre[None, :]) * scale[None, :] + offset[None, :], KIND, SLOPE)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gradient_sums(
    x,
    gradient,
    pre,
    weight,
    bias,
    stats,
    partial,
    images,
    rows,
    channels,
    size,
    groups,
    chunk,
    chunks,
    HAS_PRE: tl.constexpr,
    KIND: tl.constexpr,
    SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums over one chunk of one picture, for each channel: of d, the gradient before the activation, and of d * x̂."""
    program = tl.program_id(0).to(tl.int64)
    image, part = program // chunks, (program % chunks).to(tl.int32)
    first = part * chunk
    last = tl.minimum(first + chunk, rows)
    channel = tl.arange(0, WIDTH)
    real = channel < channels
    at_group = image * groups + channel // size
    centre = _centre(stats, pre, at_group, channel, real, HAS_PRE, WIDE)
    scale = tl.load(stats + images * groups + at_group, mask=real, other=0)
    gain = tl.load(weight + channel, mask=real, other=0).to(WIDE)
    offset = tl.load(bias + channel, mask=real, other=0).to(WIDE)
    base = image * rows * channels
    plain = tl.zeros([ROWS, WIDTH], WIDE)
    product = tl.zeros([ROWS, WIDTH], WIDE)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & real[None, :]
        at = base + row[:, None] * channels + channel[None, :]
        hat, d = _normalised_and_gradient(x, gradient, at, inside, centre, scale, gain, offset, KIND, SLOPE, WIDE)
        plain += d
        product += d * hat
    partial += program * channels + channel
    tl.store(partial, tl.sum(plain, 0), mask=real)
    tl.store(partial + tl.num_programs(0).to(tl.int64) * channels, tl.sum(product, 0), mask=real)


@triton.jit
def group_sums(
    weight,
    stats,
    partial,
    shares,
    rows,
    channels,
    size,
    groups,
    chunks,
    HAS_PRE: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What the gradient of one group of one picture has in common, and its channels' shares of the parameters'."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    image, group = program // groups, program % groups
    part, member = tl.arange(0, PARTS), tl.arange(0, SIZE)
    real = member < size
    inside = (part < chunks)[:, None] & real[None, :]
    at = (image * chunks + part)[:, None] * channels + group * size + member[None, :]
    plane = programs // groups * channels
    d = tl.sum(tl.load(partial + at, mask=inside, other=0), 0)
    d_hat = tl.sum(tl.load(partial + plane * chunks + at, mask=inside, other=0), 0)
    gain = tl.load(weight + group * size + member, mask=real, other=0).to(WIDE)
    along = tl.sum(gain * d_hat, 0) / (rows * size)
    across = tl.sum(gain * d, 0) / (rows * size)
    tl.store(partial + 2 * plane * chunks + program, along)
    tl.store(partial + 2 * plane * chunks + programs + program, across)
    shares += image * channels + group * size + member
    tl.store(shares, d_hat, mask=real)
    tl.store(shares + plane, d, mask=real)
    if HAS_PRE:  # the sum of the gradient that `input_gradient` writes
        scale = tl.load(stats + programs + program)
        mean = tl.load(stats + 2 * programs + image * channels + group * size + member, mask=real, other=0)
        hats = rows * (mean - tl.load(stats + program)) * scale
        tl.store(shares + 2 * plane, scale * (gain * d - rows * across - along * hats), mask=real)


@triton.jit
def input_gradient(
    x,
    gradient,
    pre,
    weight,
    bias,
    stats,
    partial,
    dx,
    images,
    rows,
    channels,
    size,
    groups,
    chunks,
    tiles,
    HAS_PRE: tl.constexpr,
    KIND: tl.constexpr,
    SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dx = rstd * (weight * d - across - x̂ * along) of one tile."""
    program = tl.program_id(0).to(tl.int64)
    image, tile = program // tiles, (program % tiles).to(tl.int32)
    channel = tl.arange(0, WIDTH)
    real = channel < channels
    at_group = image * groups + channel // size
    centre = _centre(stats, pre, at_group, channel, real, HAS_PRE, WIDE)
    scale = tl.load(stats + images * groups + at_group, mask=real, other=0)
    partial += tl.num_programs(0).to(tl.int64) // tiles * 2 * chunks * channels
    along = tl.load(partial + at_group, mask=real, other=0)
    across = tl.load(partial + images * groups + at_group, mask=real, other=0)
    gain = tl.load(weight + channel, mask=real, other=0).to(WIDE)
    offset = tl.load(bias + channel, mask=real, other=0).to(WIDE)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & real[None, :]
    at = image * rows * channels + row[:, None] * channels + channel[None, :]
    hat, d = _normalised_and_gradient(x, gradient, at, inside, centre, scale, gain, offset, KIND, SLOPE, WIDE)
    value = scale[None, :] * (gain[None, :] * d - across[None, :] - hat * along[None, :])
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)
