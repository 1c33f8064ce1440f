"""Where all randomness comes from: (seed, purpose, position), hashed. Nothing draws from a global generator."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from named parts, for example `derive_seed(seed, "noise", "z", images_seen)`.

    A hash and not a sum, so that neighbouring seeds and purposes never meet.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def standard_normal(shape: Sequence[int], *parts: int | str, device: torch.device | None = None) -> Tensor:
    """Float32 noise of N(0, 1), a pure function of shape, parts and kind of device."""
    device = device or torch.device("cpu")
    generator = torch.Generator(device).manual_seed(derive_seed(*parts))
    return torch.randn(tuple(shape), generator=generator, device=device)
