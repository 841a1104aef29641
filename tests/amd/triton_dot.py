"""Compiles `tl.dot` for every target with a matrix unit, by Triton and without a GPU, into the folder argv[1]."""

import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {"gfx90a": 64, "gfx942": 64, "gfx950": 64, "gfx1100": 32, "gfx1201": 32}
SHAPES = ((16, 16, 32), (32, 32, 32), (32, 32, 64))


@triton.jit
def dot(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # noqa: N803  # Triton's constants
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(
        b + n[None, :] * K + k[:, None]
    )  # B [N, K]: gfx950 would transpose the other order in an undocumented way
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(left, right, out_dtype=tl.float32))


if __name__ == "__main__":
    for arch, wave in TARGETS.items():
        for kind in ("fp16", "bf16"):
            for shape in SHAPES:
                sizes = dict(zip("MNK", shape, strict=True))
                signature = {"a": f"*{kind}", "b": f"*{kind}", "c": "*fp32", **dict.fromkeys(sizes, "constexpr")}
                options = {"num_warps": 1, "matrix_instr_nonkdim": 16 if shape[0] == 16 else 0}
                built = triton.compile(
                    ASTSource(dot, signature, constexprs=sizes), target=GPUTarget("hip", arch, wave), options=options
                )
                name = f"{arch}-{kind}-{'x'.join(map(str, shape))}.hsaco"
                (Path(sys.argv[1]) / name).write_bytes(built.asm["hsaco"])
