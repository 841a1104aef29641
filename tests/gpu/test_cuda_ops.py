"""The fused operators on a GPU: right within the derived limits, repeatable, capturable, declining what they cannot."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import exact_ops
import pytest
import torch
from exact_ops import Layer, layer
from torch import Tensor

from awq_rt import ops
from awq_rt.ops import AttentionSpec

DTYPES = (torch.float16, torch.bfloat16)
SWEEP_CASES = int(os.environ.get("AWQ_RT_SWEEP_CASES", "300"))
HEAD_DIMS = (64, 80, 96, 112, 128, 256)

LLAMA = AttentionSpec(8, 8, 128, 128**-0.5, 128)
SPECS = {
    "llama": LLAMA,
    "llama 3": AttentionSpec(16, 4, 128, 128**-0.5, 128),
    "phi 3": AttentionSpec(6, 6, 96, 96**-0.5, 96),
    "phi 2": AttentionSpec(4, 4, 80, 80**-0.5, 32),
    "gemma 2": AttentionSpec(4, 2, 256, 256**-0.5, 256, window=100, softcap=20.0),
    "qwen 3": AttentionSpec(8, 4, 128, 128**-0.5, 128, norm_eps=1e-6),
    "gpt-j": AttentionSpec(4, 4, 256, 256**-0.5, 64, interleaved=True),
    "mistral": AttentionSpec(6, 2, 128, 128**-0.5, 128, window=33),
    "no rotation": AttentionSpec(3, 3, 64, 64**-0.5),
    "gemma": AttentionSpec(8, 1, 256, 256**-0.5, 256),
    "falcon": AttentionSpec(71, 1, 64, 64**-0.5, 64),
    "qwen 2": AttentionSpec(14, 2, 128, 128**-0.5, 128),
}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cuda_ops() -> dict[str, object]:
    from awq_rt_cuda.fused import OPS

    return OPS


def run(name: str, *arguments: object) -> Tensor:
    """The backend's own operator, which must serve these."""
    from awq_rt_cuda.fused import OPS

    result = OPS[name](*arguments)
    assert isinstance(result, Tensor), (name, result)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [8, 64, 264, 4096, 5120, 11008, 16384])
@pytest.mark.parametrize("rows", [1, 3, 300])
def test_norms(gpu: torch.device, rows: int, hidden: int, dtype: torch.dtype) -> None:
    x, residual = normal(rows, hidden, dtype=dtype) * 3, normal(rows, hidden, dtype=dtype, seed=1)
    weight = normal(hidden, seed=2)
    y = run("rms_norm", x.to(gpu), weight.to(gpu), 1e-5)
    assert exact_ops.rms_norm(x, weight, 1e-5).excess(y) <= 1
    added = residual.to(gpu)
    y = run("add_rms_norm", x.to(gpu), added, weight.to(gpu), 1e-5)
    assert torch.equal(added, residual.to(gpu) + x.to(gpu))
    assert exact_ops.rms_norm(added.cpu(), weight, 1e-5).excess(y) <= 1


def test_a_wrong_norm_is_outside_its_limit() -> None:
    x, weight = normal(4, 4096, dtype=torch.float16), normal(4096)
    exact = exact_ops.rms_norm(x, weight, 1e-5)
    assert exact.excess(exact.value.half()) <= 1
    short = torch.cat((x[:, :-8], torch.zeros(4, 8)), dim=1)  # one load of the sum is missing
    assert exact.excess((x * torch.rsqrt(short.float().square().mean(-1, keepdim=True) + 1e-5) * weight).half()) > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (1, 11008), (7, 1032), (600, 2048)])
def test_gated_activations(gpu: torch.device, rows: int, width: int, activation: str, dtype: torch.dtype) -> None:
    gate_up = normal(rows, 2 * width, dtype=dtype) * 5
    y = run("gated_activation", gate_up.to(gpu), activation)
    assert exact_ops.gated_activation(gate_up, activation).excess(y) <= 1


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations_keep_infinities_and_nan(gpu: torch.device, activation: str) -> None:
    gate = torch.tensor([torch.inf, -1e4, torch.nan, -0.0, 0.0, 60000.0, -60000.0, 1e-7])
    gate_up = torch.cat((gate, torch.ones(8)))[None].half().to(gpu)
    expected = ops.gated_activation(gate_up, activation)
    assert torch.equal(run("gated_activation", gate_up, activation).nan_to_num(7), expected.nan_to_num(7))


def test_one_activation_is_not_another() -> None:
    gate_up = normal(4, 512, dtype=torch.float16)
    for wrong in ops.ACTIVATIONS:
        for right in ops.ACTIVATIONS:
            found = exact_ops.gated_activation(gate_up, wrong).value.half()
            assert (exact_ops.gated_activation(gate_up, right).excess(found) <= 1) == (wrong == right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [8, 896, 4096, 5120])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 32001), (2, 50000), (3, 128256), (4, 4099)])
def test_dense_linears(gpu: torch.device, rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    x, weight = normal(rows, depth, dtype=dtype), normal(columns, depth, dtype=dtype, seed=1)
    torch.full((rows, columns), torch.nan, dtype=dtype, device=gpu)  # its memory comes back for the result
    y = run("dense_linear", x.to(gpu), weight.to(gpu), None)
    assert exact_ops.dense_linear(x, weight).excess(y) <= 1
    assert torch.equal(y, run("dense_linear", x.to(gpu), weight.to(gpu), None))


def test_dense_linears_that_are_left_to_blas(gpu: torch.device) -> None:
    x, weight = normal(4, 64, dtype=torch.float16).to(gpu), normal(8, 64, dtype=torch.float16).to(gpu)
    bias, dense_linear = normal(8, dtype=torch.float16).to(gpu), cuda_ops()["dense_linear"]
    assert dense_linear(x, weight, bias) is NotImplemented
    assert dense_linear(torch.cat((x, x)), weight, None) is NotImplemented
    assert dense_linear(x, weight.bfloat16(), None) is NotImplemented
    assert dense_linear(x[:, :60].contiguous(), weight[:, :60].contiguous(), None) is NotImplemented
    assert dense_linear(x, weight[:, :60], None) is NotImplemented


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "count"), [(1, 8), (3, 32000), (1, 128256), (65, 8200)])
def test_argmax(gpu: torch.device, rows: int, count: int, dtype: torch.dtype) -> None:
    logits = (normal(rows, count) * 3).to(dtype).to(gpu)  # many equal ones
    assert run("argmax", logits).tolist() == logits.cpu().float().argmax(-1).tolist()
    logits[0] = -torch.inf
    assert run("argmax", logits)[0] == 0
    logits[0, count // 2], logits[0, count // 3] = -0.0, 0.0
    assert run("argmax", logits)[0] == count // 3
    logits[0, count - 1] = torch.nan
    assert run("argmax", logits)[0] == count - 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("count", [1, 37])
def test_rope_append(gpu: torch.device, name: str, count: int, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    first = torch.tensor([5, 0, 40], dtype=torch.int32)
    made = layer(spec, first.tolist(), 80, dtype).on(gpu)
    qkv = normal(3, count, (spec.heads + 2 * spec.kv_heads) * spec.head_dim, dtype=dtype).to(gpu)
    before = made.k_cache.clone(), made.v_cache.clone()
    q = run("rope_append", qkv, first.to(gpu), made.k_cache, made.v_cache, spec, made.tensors)
    positions = first[:, None] + torch.arange(count)
    raw_q, raw_k, raw_v = exact_ops.heads_of(qkv, spec)
    assert_placed(q, raw_q, positions, spec, made, made.tensors.q_norm)
    for row in range(3):
        new = positions[row].to(gpu)
        assert torch.equal(made.v_cache[row][:, new], raw_v[row])
        one = positions[row : row + 1]
        assert_placed(
            made.k_cache[row : row + 1][:, :, new], raw_k[row : row + 1], one, spec, made, made.tensors.k_norm
        )
        for cache, old in zip((made.k_cache, made.v_cache), before, strict=True):
            kept = torch.ones(80, dtype=torch.bool, device=gpu)
            kept[new] = False
            assert torch.equal(cache[row][:, kept].nan_to_num(9), old[row][:, kept].nan_to_num(9))


def assert_placed(
    found: Tensor, raw: Tensor, positions: Tensor, spec: AttentionSpec, made: Layer, norm: Tensor | None
) -> None:
    exact = exact_ops.placed(raw, positions, spec, made.tensors, norm)
    assert bool(((found.double().cpu() - exact.value).abs() <= exact.limit).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("positions", [[0], [1], [5, 0, 130], [511], [300] * 40])
def test_attention(gpu: torch.device, name: str, positions: list[int], dtype: torch.dtype) -> None:
    made = layer(SPECS[name], positions, 520, dtype, slopes=name == "no rotation", seed=len(positions)).on(gpu)
    assert made.excess(run("decode_attention", *made.arguments)) <= 1


def test_sharp_scores(gpu: torch.device) -> None:
    made = layer(LLAMA, [400, 77], 512, torch.float16, sharp=20.0).on(gpu)
    assert made.excess(run("decode_attention", *made.arguments)) <= 1


@pytest.mark.parametrize("case", range(SWEEP_CASES))
def test_random_attention(gpu: torch.device, case: int) -> None:
    chance = random.Random(case)
    head_dim, kv_heads = chance.choice(HEAD_DIMS), chance.choice([1, 2, 3, 8])
    spec = AttentionSpec(
        kv_heads * chance.choice([1, 1, 2, 3, 4, 5, 8, 11]),
        kv_heads,
        head_dim,
        head_dim**-0.5,
        chance.choice([0, 16, head_dim // 32 * 16, head_dim]),
        chance.random() < 0.3,
        chance.choice([None, None, 1, 2, 64, 200]),
        chance.choice([None, None, 15.0]),
        chance.choice([None, 1e-6]),
    )
    slots, rows = chance.choice([(16, 33), (100, 5), (100, 33), (513, 2), (1500, 1)])
    positions = [chance.randrange(slots) for _ in range(rows)]
    dtype = chance.choice(DTYPES)
    made = layer(spec, positions, slots, dtype, slopes=chance.random() < 0.3, seed=case).on(gpu)
    assert made.excess(run("decode_attention", *made.arguments)) <= 1, (spec, positions)


def test_wrong_attention_is_outside_its_limit() -> None:
    made = layer(replace(LLAMA, window=50, softcap=5.0), [100, 70], 128, torch.float16, slopes=True)
    y = ops.decode_attention(*made.arguments)
    assert made.excess(y) <= 1
    slopeless = replace(made.tensors, slopes=None)
    early = replace(made.tensors, cos=made.tensors.cos.roll(-1, 0), sin=made.tensors.sin.roll(-1, 0))
    defects = [
        replace(made, spec=replace(made.spec, window=51)),
        replace(made, spec=replace(made.spec, window=49)),
        replace(made, spec=replace(made.spec, softcap=None)),
        replace(made, spec=replace(made.spec, interleaved=True)),
        replace(made, spec=replace(made.spec, scale=made.spec.scale * 1.01)),
        replace(made, tensors=slopeless),
        replace(made, tensors=early),
        replace(made, v_cache=made.v_cache.roll(1, 1)),
    ]
    for defect in defects:
        wrong = exact_ops.attention(*defect.arguments).value.half()
        assert exact_ops.attention(*made.arguments).excess(wrong) > 1, defect.spec


def test_caches_may_be_the_leading_slots_of_longer_ones(gpu: torch.device) -> None:
    made = layer(LLAMA, [60, 3], 64, torch.float16).on(gpu)
    longer = [torch.full((3, 10, 200, 128), torch.nan, device=gpu).half() for _ in range(2)]
    views = []
    for cache, own in zip(longer, (made.k_cache, made.v_cache), strict=True):
        view = cache[1:, 2:, 16:80]
        view.copy_(own)
        views.append(view)
    viewed = replace(made, k_cache=views[0], v_cache=views[1])
    assert viewed.excess(run("decode_attention", *viewed.arguments)) <= 1
    assert bool(longer[0][0].isnan().all())
    assert bool(longer[0][:, :, 80:].isnan().all())


@pytest.mark.parametrize("name", ["llama", "llama 3", "gemma 2"])
def test_a_captured_step_replays_at_new_positions(gpu: torch.device, name: str) -> None:
    made = layer(SPECS[name], [3, 200], 256, torch.float16).on(gpu)
    run("decode_attention", *made.arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run("decode_attention", *made.arguments)
    for step in range(1, 50):
        made.positions.add_(1)
        made.qkv.copy_(normal(*made.qkv.shape, dtype=torch.float16, seed=step))
        graph.replay()
        if step % 7 == 0:
            assert made.excess(y) <= 1


def test_calls_in_a_row_on_one_cache_see_each_other(gpu: torch.device) -> None:
    made = layer(LLAMA, [0], 256, torch.float16).on(gpu)
    tokens = normal(200, *made.qkv.shape, dtype=torch.float16).to(gpu)
    positions = torch.arange(200, dtype=torch.int32, device=gpu)[:, None]
    results = [run("decode_attention", tokens[t], positions[t], *made.arguments[2:]) for t in range(200)]
    for t in (1, 60, 199):
        at = replace(made, qkv=tokens[t], positions=positions[t])
        assert at.excess(results[t]) <= 1


@pytest.mark.parametrize("name", ["llama", "llama 3"])
def test_results_repeat_bit_for_bit(gpu: torch.device, name: str) -> None:
    made = layer(SPECS[name], [1000, 17, 512], 1024, torch.float16).on(gpu)
    first = run("decode_attention", *made.arguments)
    different = torch.zeros((), dtype=torch.int64, device=gpu)
    for _ in range(200):
        different += (run("decode_attention", *made.arguments) != first).sum()
    assert int(different) == 0


def test_parts_added_by_a_second_kernel_give_the_same_bits(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from awq_rt_cuda import tiled
    from awq_rt_cuda.fused import attention

    positions = [700, attention.ALONE + 1]  # up to ALONE a cluster does not divide
    made = layer(SPECS["llama 3"], positions, 1024, torch.float16).on(gpu)
    expected = run("decode_attention", *made.arguments)
    older = replace(tiled.target_of(gpu.index), arch=89)
    monkeypatch.setattr(attention, "target_of", lambda index: older)
    for cached in (attention.plan, attention._shape):
        cached.cache_clear()
    try:
        assert torch.equal(run("decode_attention", *made.arguments), expected)
    finally:
        for cached in (attention.plan, attention._shape):
            cached.cache_clear()


def test_what_is_not_served_is_declined(gpu: torch.device) -> None:
    own = cuda_ops()
    x, weight = normal(2, 64, dtype=torch.float16).to(gpu), torch.ones(64, device=gpu)
    assert own["rms_norm"](x.float(), weight, 1e-5) is NotImplemented
    assert own["rms_norm"](x.cpu(), weight.cpu(), 1e-5) is NotImplemented
    assert own["rms_norm"](x[:, :36].contiguous(), weight[:36], 1e-5) is NotImplemented
    assert own["rms_norm"](x[:, 8:], weight[8:], 1e-5) is NotImplemented
    assert own["rms_norm"](x.flatten()[1:65][None], weight, 1e-5) is NotImplemented
    assert own["gated_activation"](x[:, :40].contiguous(), "silu") is NotImplemented
    assert own["gated_activation"](x, "sigmoid") is NotImplemented
    for spec in (AttentionSpec(2, 2, 32, 1.0, 32), AttentionSpec(2, 2, 96, 1.0, 24)):
        made = layer(spec, [3], 16, torch.float16).on(gpu)
        assert own["decode_attention"](*made.arguments) is NotImplemented


def test_nothing_to_do_is_done(gpu: torch.device) -> None:
    empty = torch.empty(0, 64, dtype=torch.float16, device=gpu)
    assert run("rms_norm", empty, torch.ones(64, device=gpu), 1e-5).shape == (0, 64)
    assert run("gated_activation", empty, "silu").shape == (0, 32)
