"""Compiles the kernels for a GPU that need not be there; run as a program, because tests run them interpreted."""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vaegan_dist.models import group_norm_kernels

H100 = GPUTarget("cuda", 90, 32)
TENSORS = {"x", "gradient", "y", "dx"}
SUMS = {"partial", "stats", "shares"}
PARAMETERS = {"weight", "bias", "pre"}
CONSTANTS = {"KIND": 2, "SLOPE": 0.2, "EPS": 1e-5, "ROWS": 32, "WIDTH": 128, "PARTS": 8, "SIZE": 4, "HAS_PRE": True}
KERNELS = ["channel_moments", "group_moments", "normalise", "gradient_sums", "group_sums", "input_gradient"]


def compile_for(name: str, pictures: str, sums: str, wide: object) -> None:
    kernel = getattr(group_norm_kernels, name)
    constants = {key: value for key, value in {**CONSTANTS, "WIDE": wide}.items() if key in kernel.arg_names}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in TENSORS:
            signature[argument] = f"*{pictures}"
        else:
            signature[argument] = f"*{sums}" if argument in SUMS | PARAMETERS else "i32"
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=H100)
    assert compiled.asm["cubin"]


if __name__ == "__main__":
    for pictures, sums, dtype in (("bf16", "fp32", torch.float32), ("fp64", "fp64", torch.float64)):
        for name in KERNELS:
            compile_for(name, pictures, sums, group_norm_kernels.WIDE[dtype])
            sys.stdout.write(f"{name} {pictures}\n")
