"""Where a half precision is not enough, or nothing is to be rounded or widened."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """At least float32: losses and statistics do not sum in a half precision."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Operations keep the precision of `x`."""
    # The meta device, on which costs are counted, has no autocast.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
