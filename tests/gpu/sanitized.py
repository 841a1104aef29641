"""A small run of every kernel for compute-sanitizer:

for tool in memcheck racecheck synccheck initcheck; do
    compute-sanitizer --tool $tool python tests/gpu/sanitized.py
done
"""

from __future__ import annotations

import torch

from awq_rt.testing import excess, hurtful_weight
from awq_rt.testing.conformance import spec_of
from awq_rt_cuda import backend
from awq_rt_cuda.tiled import plan

SHAPES = ((1024, 520, 128), (1280, 72, 32), (576, 192, 64), (1000, 40, 1000), (512, 264, 16))
ROWS = (1, 2, 3, 8, 13, 32, 40, 64, 100, 130)
"""Fewer than take the road through cuBLAS, whose kernels initcheck and racecheck report themselves."""


def main() -> None:
    """Every number of rows at every shape, checked as well."""
    gpu = torch.device("cuda", 0)
    count = 0
    for number, shape in enumerate(SHAPES):
        dtype = torch.bfloat16 if number % 2 else torch.float16
        weight = hurtful_weight("random", *shape, scale_dtype=dtype, bias=True)
        packed = backend.pack(weight, spec_of(weight, dtype), gpu)
        for rows in ROWS:
            x = torch.randn(rows, shape[0], generator=torch.Generator().manual_seed(rows)).to(dtype)
            error = excess(backend.linear(x.to(gpu), packed).cpu(), x, weight)
            assert error <= 1, (shape, rows, error)
            count += 1
        w = plan(packed.layout, gpu.index).weight(packed, dtype).T.cpu()
        assert torch.equal(w, weight.dequantize(torch.float32).to(dtype)), shape
    print(f"{count} results are right")


if __name__ == "__main__":
    main()
