"""The kernels of the fused operators are right when their source runs on the CPU: changing them needs no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import exact_ops
import pytest
import torch
from exact_ops import Layer, heads_of, layer, placed

pytest.importorskip("awq_rt_cuda", reason="awq-rt-cuda is not installed")
import emulation
from emulation import EmulatedKernel, addresses

from awq_rt.ops import AttentionSpec
from awq_rt_cuda.fused import attention, gated, greedy, logits, norm, rope
from awq_rt_cuda.fused.launch import bits

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="there is no g++ to compile the kernels with")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize(("dtype", "add"), [(torch.float16, 1), (torch.bfloat16, 0)])
def test_norms(folder: Path, dtype: torch.dtype, add: int) -> None:
    hidden, rows = 1032, 2
    kernel = EmulatedKernel("fused_norm", norm.defines(hidden, int(dtype == torch.float16), add), folder)
    x, residual, weight = (
        normal(rows, hidden, dtype=dtype),
        normal(hidden, rows, dtype=dtype).T.contiguous(),
        normal(hidden),
    )
    summed = residual + x if add else x
    y = torch.zeros_like(x)
    kernel.launch((rows, 1, 1), norm.threads_of(hidden), *addresses((x, residual, weight, y)), bits(1e-5))
    assert exact_ops.rms_norm(summed, weight, 1e-5).excess(y) <= 1
    assert not add or torch.equal(residual, summed)


@pytest.mark.parametrize(("dtype", "rows", "depth"), [(torch.float16, 1, 1288), (torch.bfloat16, 3, 512)])
def test_a_dense_linear(folder: Path, dtype: torch.dtype, rows: int, depth: int) -> None:
    """Two blocks, of which waves take a second and a third turn; depths that are and are no whole steps."""
    columns, step = 350, next(step for step in logits.ROW_STEPS if step >= rows)
    kernel = EmulatedKernel("fused_logits", logits.defines(depth, int(dtype == torch.float16), step), folder)
    x, weight = normal(rows, depth, dtype=dtype), normal(columns, depth, dtype=dtype)
    y = torch.full((rows, columns), torch.nan, dtype=dtype)
    kernel.launch((2, 1, 1), logits.THREADS, *addresses((x, weight, y)), rows, columns)
    exact = exact_ops.dense_linear(x, weight)
    assert exact.excess(y) <= 1
    weight[-1, -1] += 0.5  # of one column; the last element of its sum
    assert exact_ops.dense_linear(x, weight).excess(y) > 1


@pytest.mark.parametrize(("dtype", "parts"), [(torch.float16, 1), (torch.bfloat16, 2)])
def test_argmax(folder: Path, dtype: torch.dtype, parts: int) -> None:
    kernel = EmulatedKernel("fused_argmax", greedy.defines(int(dtype == torch.float16), parts), folder)
    logits = (normal(6, 41000) * 3).to(dtype)  # many equal ones
    logits[0], logits[1] = -torch.inf, -logits[1].abs() - 1
    logits[2], logits[2, 100] = -1.0, -0.0
    logits[2, 40999] = 0.0
    logits[3, 40003] = torch.nan
    logits[4, 7], logits[4, 8195] = torch.inf, torch.inf
    logits[5, 777] = -torch.nan
    y = torch.zeros(6, dtype=torch.int64)
    kernel.launch((6 * parts, 1, 1), greedy.THREADS, *addresses((logits, y)), 41000, cluster=parts)
    assert y.tolist() == logits.float().argmax(-1).tolist()
    assert y[2] == 100


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_activations(folder: Path, activation: str) -> None:
    rows, width = 3, 264
    kernel = EmulatedKernel("fused_gated", gated.defines(width, 1, activation), folder)
    gate_up, y = normal(rows, 2 * width, dtype=torch.float16) * 4, torch.zeros(rows, width, dtype=torch.float16)
    kernel.launch((1, 1, 1), gated.THREADS, *addresses((gate_up, y)), rows * width // 8)
    assert exact_ops.gated_activation(gate_up, activation).excess(y) <= 1


ROTATIONS = {
    "part": AttentionSpec(3, 1, 80, 0.1, 32, norm_eps=1e-6),
    "interleaved": AttentionSpec(2, 2, 256, 0.1, 64, interleaved=True),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_rope_append(folder: Path, name: str) -> None:
    spec, dtype, count = ROTATIONS[name], torch.float16, 5
    kernel = EmulatedKernel("fused_rope", rope.defines(spec, 1), folder)
    made = layer(spec, [4, 0], 20, dtype)
    caches = made.k_cache, made.v_cache
    qkv = normal(2, count, (spec.heads + 2 * spec.kv_heads) * spec.head_dim, dtype=dtype)
    q = torch.zeros(2, count, spec.heads, spec.head_dim, dtype=dtype)
    t = made.tensors
    kernel.launch(
        (count, 2, 1),
        rope.THREADS,
        *addresses((qkv, made.positions, q, *caches, t.cos, t.sin, t.q_norm, t.k_norm)),
        *(stride for cache in caches for stride in cache.stride()[:2]),
        count,
        bits(spec.norm_eps or 0.0),
    )
    positions = made.positions[:, None] + torch.arange(count)
    raw = heads_of(qkv, spec)
    stored = [torch.stack([cache[row, :, positions[row].long()] for row in range(2)]) for cache in caches]
    for found, given, weight in ((q.transpose(1, 2), raw[0], t.q_norm), (stored[0], raw[1], t.k_norm)):
        exact = placed(given, positions, spec, t, weight)
        assert bool(((found.double() - exact.value).abs() <= exact.limit).all())
    assert torch.equal(stored[1], raw[2])


def attend(folder: Path, made: Layer, parts: int, clusters: bool = True, stale: int = 0) -> torch.Tensor:
    """`decode_attention` of `made` in `parts`, which meet in a cluster or in a second kernel."""
    spec, t, rows = made.spec, made.tensors, made.qkv.shape[0]
    given = attention.defines(spec, int(made.qkv.dtype == torch.float16), t.slopes is not None, not clusters)
    cut = attention.cut_of(spec)
    y = torch.full((rows, spec.heads * spec.head_dim), torch.nan, dtype=made.qkv.dtype)
    partial = torch.full((rows * spec.heads, parts, spec.head_dim + 4), torch.nan)
    caches = made.k_cache, made.v_cache
    softcap = spec.softcap or 0.0
    EmulatedKernel(cut.entry, given, folder).launch(
        (parts, attention.blocks_of(spec), rows),
        cut.threads,
        *addresses((made.qkv, made.positions, *caches, t.cos, t.sin, t.q_norm, t.k_norm, t.slopes)),
        (y if clusters or parts == 1 else partial).data_ptr(),
        *(stride for cache in caches for stride in cache.stride()[:2]),
        made.k_cache.shape[2],
        spec.window or attention.NO_WINDOW,
        bits(spec.scale / softcap if softcap else spec.scale * attention.LOG2_E),
        bits(softcap),
        bits(spec.norm_eps or 0.0),
        cluster=parts if clusters else 1,
        stale=stale,
    )
    if not clusters and parts > 1:
        adder = EmulatedKernel("fused_attention_sum", given, folder)
        adder.launch((rows * spec.heads, 1, 1), spec.head_dim // 4, *addresses((partial, y)), parts)
    return y


CASES = {
    "one head a head": (AttentionSpec(2, 2, 128, 0.09, 128), [300, 5], 4),
    "two heads a head, partly rotated": (AttentionSpec(4, 2, 80, 0.1, 32), [40, 130], 2),
    "wide, window and softcap": (AttentionSpec(2, 1, 256, 0.06, 256, window=140, softcap=20.0), [290], 4),
    "interleaved": (AttentionSpec(1, 1, 64, 0.06, 32, interleaved=True), [150], 2),
    "grouped": (AttentionSpec(4, 1, 128, 0.09, 128), [400], 4),
    "a group in unequal chunks, normed": (AttentionSpec(5, 1, 80, 0.1, 80, norm_eps=1e-6), [180], 2),
    "the first token": (AttentionSpec(4, 1, 128, 0.09, 128), [0], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_attention(folder: Path, name: str) -> None:
    spec, positions, parts = CASES[name]
    dtype = torch.bfloat16 if name.startswith("a group") else torch.float16
    made = layer(spec, positions, max(positions) + 9, dtype, slopes=name == "interleaved")
    assert made.excess(attend(folder, made, parts)) <= 1


@pytest.mark.parametrize("name", ["one head a head", "grouped"])
def test_a_second_kernel_adds_parts_as_a_cluster_does(folder: Path, name: str) -> None:
    spec, positions, parts = CASES[name]
    made = layer(spec, [max(positions)], max(positions) + 9, torch.float16)
    again = replace(made, k_cache=made.k_cache.clone(), v_cache=made.v_cache.clone())
    assert torch.equal(attend(folder, made, parts), attend(folder, again, parts, clusters=False))


def test_a_wrong_kernel_is_outside_the_limit(folder: Path) -> None:
    spec, positions, parts = CASES["interleaved"]
    made = layer(spec, positions, max(positions) + 9, torch.float16)
    for defect in (replace(spec, interleaved=False), replace(spec, scale=spec.scale * 1.02), replace(spec, window=149)):
        assert made.excess(attend(folder, replace(made, spec=defect), parts)) > 1


@pytest.mark.parametrize("stale", [3, -200, 100000])
@pytest.mark.parametrize("name", ["one head a head", "grouped"])
def test_a_position_that_is_written_late_is_noticed(folder: Path, name: str, stale: int) -> None:
    spec, positions, parts = CASES[name]
    made = layer(spec, positions, max(positions) + 9, torch.float16)
    assert made.excess(attend(folder, made, parts, stale=stale)) <= 1
