"""Headers of `.npy` files from anywhere: plain arrays pass, everything else is an error; nothing is ever unpickled."""

import io
import math

import numpy as np

MAX_DIMENSIONS = 4


def npy_header(head: bytes, size: int, dtype: np.dtype[np.generic], ndim: int | None) -> tuple[tuple[int, ...], int]:
    """Shape of a `.npy` file from its first bytes, and where its data begins.

    Raises:
        ValueError: not `.npy`, another type or order, or another length than shape and `size` say. Never unpickles.
    """
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, found = read(stream)
    except Exception as error:  # NumPy raises anything on a damaged header, tokenize.TokenError among it
        raise ValueError(f"not a .npy array ({' '.join(str(error).split())[:100]})") from None
    if found != dtype or fortran:
        raise ValueError(f"a .npy array of type {found}{', Fortran order' if fortran else ''}; {dtype} is read")
    if ndim is not None and len(shape) != ndim:
        raise ValueError(f"a .npy array of shape {shape}; {ndim} dimensions are read")
    if len(shape) > MAX_DIMENSIONS or any(n < 1 for n in shape):
        raise ValueError(f"a .npy array of shape {shape[:8]}; up to {MAX_DIMENSIONS} dimensions of 1 or more are read")
    expected = stream.tell() + math.prod(shape) * dtype.itemsize
    if expected != size:
        raise ValueError(f"a .npy array of shape {shape} takes {expected} bytes, the member has {size}")
    return tuple(int(n) for n in shape), stream.tell()
