"""A small run of every kernel for compute-sanitizer:

for tool in memcheck racecheck synccheck initcheck; do
    compute-sanitizer --tool $tool python tests/gpu/sanitized.py
done
"""

from __future__ import annotations

import torch

from awq_rt.testing import excess, hurtful_weight
from awq_rt.testing.conformance import spec_of
from awq_rt_cuda import backend, exllama, tiled

SHAPES = ((1024, 520, 128), (1280, 72, 32), (576, 192, 64), (1000, 40, 1000), (512, 264, 16))
ROWS = {"auto": (1, 2, 3, 8, 13, 32, 40, 64, 100, 130, 300), "exllama": (1, 2, 3, 8, 13)}
"""Fewer than take the road through cuBLAS, whose kernels initcheck and racecheck report themselves."""


def main() -> None:
    """Every number of rows at every shape, checked as well."""
    gpu = torch.device("cuda", 0)
    count = 0
    for number, shape in enumerate(SHAPES):
        dtype = torch.bfloat16 if number % 2 else torch.float16
        weight = hurtful_weight("random", *shape, scale_dtype=dtype, bias=True)
        dense = weight.dequantize(torch.float32).to(dtype)
        for kernel, row_counts in ROWS.items():
            packed = backend.pack(weight, spec_of(weight, dtype, kernel), gpu)
            for rows in row_counts:
                x = torch.randn(rows, shape[0], generator=torch.Generator().manual_seed(rows)).to(dtype)
                error = excess(backend.linear(x.to(gpu), packed).cpu(), x, weight)
                assert error <= 1, (kernel, shape, rows, error)
                count += 1
            if kernel == "exllama":
                w = exllama.plan(packed.layout, gpu.index).weight(packed)
            else:
                w = tiled.plan(packed.layout, gpu.index).weight(packed, dtype).T
            assert torch.equal(w.cpu(), dense), (kernel, shape)
    print(f"{count} results are right")


if __name__ == "__main__":
    main()
