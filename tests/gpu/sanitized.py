"""A small run of every kernel for compute-sanitizer:

for tool in memcheck racecheck synccheck initcheck; do
    PYTHONPATH=$PYTHONPATH:tests compute-sanitizer --tool $tool python tests/gpu/sanitized.py
done
"""

from __future__ import annotations

import exact_ops
import torch

from awq_rt import ops
from awq_rt.ops import AttentionSpec
from awq_rt.testing import excess, hurtful_weight
from awq_rt.testing.conformance import spec_of
from awq_rt_cuda import backend, exllama, tiled

SHAPES = ((1024, 520, 128), (1280, 72, 32), (576, 192, 64), (1000, 40, 1000), (512, 264, 16))
ROWS = {
    "auto": (1, 2, 3, 8, 13, 32, 40, 64, 100, 130, 300, 520, 1030, 2048),
    "gemv": (1, 40),
    "gemm": (1, 300),
    "exllama": (1, 2, 3, 8, 13),
}
"""What would go through cuBLAS is left out: initcheck and racecheck report its own kernels."""

SPECS = (
    AttentionSpec(8, 8, 128, 128**-0.5, 128),
    AttentionSpec(16, 4, 128, 128**-0.5, 128, norm_eps=1e-6),
    AttentionSpec(4, 2, 256, 256**-0.5, 256, window=100, softcap=20.0),
    AttentionSpec(8, 1, 64, 64**-0.5, 32, interleaved=True),
    AttentionSpec(6, 6, 96, 96**-0.5),
)


def products(gpu: torch.device) -> int:
    """Every number of rows at every shape, checked as well; how many that were."""
    count = 0
    for number, shape in enumerate(SHAPES):
        dtype = torch.bfloat16 if number % 2 else torch.float16
        weight = hurtful_weight("random", *shape, scale_dtype=dtype, bias=True)
        dense = weight.dequantize(torch.float32).to(dtype)
        for kernel, row_counts in ROWS.items():
            packed = backend.pack(weight, spec_of(weight, dtype, kernel), gpu)
            plan = (exllama if kernel == "exllama" else tiled).plan(packed.layout, gpu.index)
            for rows in row_counts:
                if isinstance(plan, tiled.TiledLinear) and plan.by_blas(rows):
                    continue
                x = torch.randn(rows, shape[0], generator=torch.Generator().manual_seed(rows)).to(dtype)
                error = excess(backend.linear(x.to(gpu), packed).cpu(), x, weight)
                assert error <= 1, (kernel, shape, rows, error)
                count += 1
            w = plan.weight(packed, dtype).T if isinstance(plan, tiled.TiledLinear) else plan.weight(packed)
            assert torch.equal(w.cpu(), dense), (kernel, shape)
    return count


def fused_operators(gpu: torch.device) -> int:
    """Every fused operator at several sizes, checked as well; how many calls that were."""
    count = 0
    for dtype in (torch.float16, torch.bfloat16):
        for rows, width in ((1, 64), (3, 4096), (40, 272)):
            count += check_norms_and_gates(rows, width, dtype, gpu)
        for spec in SPECS:
            for positions in ([0], [5, 0, 130], [511], [300] * 12):
                made = exact_ops.layer(spec, positions, 520, dtype, slopes=not spec.rotary_dim).on(gpu)
                count += check_attention(made)
    return count


def check_norms_and_gates(rows: int, width: int, dtype: torch.dtype, gpu: torch.device) -> int:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    weight = torch.randn(width, generator=torch.Generator().manual_seed(rows))
    exact = exact_ops.rms_norm(x, weight, 1e-5)
    there = x.to(gpu), weight.to(gpu)
    results = [backend.ops["rms_norm"](*there, 1e-5)]
    results.append(backend.ops["add_rms_norm"](there[0], torch.zeros_like(there[0]), there[1], 1e-5))
    assert all(exact.excess(y) <= 1 for y in results), (rows, width)
    for activation in ops.ACTIVATIONS:
        y = backend.ops["gated_activation"](there[0], activation)
        assert exact_ops.gated_activation(x, activation).excess(y) <= 1, (rows, width, activation)
    return len(results) + len(ops.ACTIVATIONS)


def check_attention(made: exact_ops.Layer) -> int:
    assert made.excess(backend.ops["decode_attention"](*made.arguments)) <= 1, (made.spec, made.positions)
    qkv, at = made.qkv[:, None], made.positions
    q = backend.ops["rope_append"](qkv, at, made.k_cache, made.v_cache, made.spec, made.tensors)
    raw, _, _ = exact_ops.heads_of(qkv, made.spec)
    exact = exact_ops.placed(raw, at[:, None], made.spec, made.tensors, made.tensors.q_norm)
    assert bool(((q.double().cpu() - exact.value).abs() <= exact.limit).all()), (made.spec, at)
    return 2


def main() -> None:
    """Both, on the first GPU."""
    gpu = torch.device("cuda", 0)
    print(f"{products(gpu)} products and {fused_operators(gpu)} fused operators are right")


if __name__ == "__main__":
    main()
