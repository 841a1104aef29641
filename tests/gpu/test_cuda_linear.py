"""The CUDA backend on a GPU: right within the derived bound, repeatable, capturable.

`AWQ_RT_SWEEP_CASES=10000 python -m pytest tests/gpu` runs the long sweep.
"""

from __future__ import annotations

import os
import random
import threading
from dataclasses import dataclass, replace

import pytest
import torch

from awq_rt.backend import Backend, Packed
from awq_rt.packing import Layout
from awq_rt.packing import exllama as strips
from awq_rt.rtc import Program
from awq_rt.testing import excess, hurtful_weight
from awq_rt.testing.cases import WEIGHT_KINDS
from awq_rt.testing.conformance import checks, spec_of
from awq_rt.weights import AwqWeight

SWEEP_CASES = int(os.environ.get("AWQ_RT_SWEEP_CASES", "300"))
KERNELS = ("auto", "gemv", "gemm", "exllama")
LONG_S = 3000


def rows_of(m: int, weight: AwqWeight, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(m, weight.in_features, generator=torch.Generator().manual_seed(m)).to(dtype)


def packed_on(
    gpu: torch.device, weight: AwqWeight, dtype: torch.dtype = torch.float16, kernel: str = "auto"
) -> tuple[Backend, Packed]:
    from awq_rt_cuda import backend

    return backend, backend.pack(weight, spec_of(weight, dtype, kernel), gpu)


@pytest.mark.timeout(LONG_S)
def test_the_conformance_suite_passes() -> None:
    from awq_rt_cuda import backend

    ran = 0
    for check in checks(backend):
        check.run()
        ran += 1
    assert ran > 100


@dataclass(frozen=True)
class Drawn:
    """One case of the sweep; the weight is made when it is needed."""

    number: int
    kernel: str
    in_features: int
    out_features: int
    group_size: int
    rows: int
    kind: str
    dtype: torch.dtype
    scale_dtype: torch.dtype
    bias: bool
    mean: float

    def weight(self) -> AwqWeight:
        shape = (self.in_features, self.out_features, self.group_size)
        return hurtful_weight(self.kind, *shape, scale_dtype=self.scale_dtype, bias=self.bias, seed=self.number)


def draw(kernel: str, count: int) -> list[Drawn]:
    """Shapes of every alignment, and numbers of rows around each boundary between variants."""
    chance = random.Random(kernel)
    drawn = []
    for number in range(count):
        group_size = chance.choice([16, 32, 48, 64, 96, 128, 256] + [8, 24, 40] * (kernel == "exllama"))
        in_features = group_size * chance.randint(1, max(1, 1536 // group_size))
        if chance.random() < 0.05:
            group_size = in_features = chance.choice([16, 72, 104, 1000, 1280])
        out_features = 8 * chance.choice([1, 2, 3, chance.randint(1, 80), chance.randint(1, 300)])
        rows = chance.choice([1, 2, 3, 4, 5, 8, 9, 12, 16, 17, 24, 32, 33, 48, 64, 65, 100, 128, 129, 200, 300, 400])
        dtype = chance.choice([torch.float16, torch.bfloat16])
        scale_dtype = chance.choice([dtype, dtype, dtype, torch.float32])
        kind, bias, mean = chance.choice(WEIGHT_KINDS), chance.random() < 0.3, float(chance.random() < 0.2)
        drawn.append(
            Drawn(number, kernel, in_features, out_features, group_size, rows, kind, dtype, scale_dtype, bias, mean)
        )
    return drawn


def programs_of(case: Drawn, device_index: int) -> list[Program]:
    """What one case of the sweep compiles."""
    from awq_rt_cuda import exllama, tiled

    family, form = (exllama, strips) if case.kernel == "exllama" else (tiled, tiled)
    sizes = (case.in_features, case.out_features, case.group_size)
    layout = Layout(form.PREFIX, *sizes, case.dtype, case.scale_dtype, None, case.kernel)
    plan = family.plan(str(layout), device_index)
    if isinstance(plan, exllama.ExllamaLinear):
        return plan.programs()
    return [plan.variant(plan.step(case.rows)).program(plan.kind, plan.arch)]


def compile_for(drawn: list[Drawn], device_index: int) -> None:
    """Side by side; one by one, when each is first needed, the sweep would take an hour."""
    from awq_rt_cuda import tiled

    programs = (program for case in drawn for program in programs_of(case, device_index))
    tiled.builder().machine_codes(list(dict.fromkeys(programs)))


def error_of(case: Drawn, gpu: torch.device) -> float:
    """The largest error over the bound; the packed weight must give back the canonical one."""
    from awq_rt_cuda import backend, tiled

    weight = case.weight().to(gpu)
    pack = strips.pack if case.kernel == "exllama" else tiled.pack
    packed = pack(weight, spec_of(weight, case.dtype, case.kernel))
    assert backend.unpack(packed).equal(weight), case
    x = (rows_of(case.rows, weight) + case.mean).to(gpu, case.dtype)
    torch.cuda.synchronize()
    # What the result is likely to be given: memory full of NaN. An element that is not written is then seen.
    torch.full((case.rows, case.out_features), torch.nan, dtype=case.dtype, device=gpu)
    return excess(backend.linear(x, packed), x, weight)


@pytest.mark.timeout(LONG_S)
@pytest.mark.parametrize("kernel", KERNELS)
def test_random_shapes_are_within_the_bound(gpu: torch.device, kernel: str) -> None:
    drawn = draw(kernel, SWEEP_CASES)
    compile_for(drawn, gpu.index)
    for case in drawn:
        assert error_of(case, gpu) <= 1, case


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [True, False])
def test_one_group_a_column_is_right_where_x_has_a_mean(gpu: torch.device, kernel: str, bias: bool) -> None:
    """A column then has 16 different weights: rounded ones would all err alike, and their errors add up."""
    k = 1280
    for seed in range(8):
        weight = hurtful_weight("random", k, 296, k, scale_dtype=torch.float32, bias=bias, seed=seed)
        backend, packed = packed_on(gpu, weight, torch.bfloat16, kernel)
        x = (torch.randn(400, k, generator=torch.Generator().manual_seed(seed)) + 1).bfloat16()
        assert excess(backend.linear(x.to(gpu), packed).cpu(), x, weight) <= 1, seed


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("m", [1, 8, 16, 64])
def test_one_wrong_zero_point_leaves_the_bound(gpu: torch.device, kernel: str, m: int) -> None:
    weight = hurtful_weight("random", 256, 64, 128)
    wrong = AwqWeight(weight.codes, weight.zeros.clone(), weight.scales)
    wrong.zeros[1, 17] ^= 1
    backend, packed = packed_on(gpu, wrong, kernel=kernel)
    x = rows_of(m, weight) + 1.0
    assert excess(backend.linear(x.to(gpu), packed).cpu(), x, weight) > 1


@pytest.mark.timeout(LONG_S)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 8, 16, 32, 64, 128, 512])
def test_a_thousand_runs_agree_bit_for_bit(gpu: torch.device, m: int, dtype: torch.dtype, kernel: str) -> None:
    weight = hurtful_weight("random", 4096, 1024, 128, scale_dtype=dtype, bias=True)
    backend, packed = packed_on(gpu, weight, dtype, kernel)
    x = rows_of(m, weight, dtype).to(gpu)
    first = backend.linear(x, packed)
    different = torch.zeros((), dtype=torch.int64, device=gpu)
    for _ in range(1000):
        different += (backend.linear(x, packed) != first).sum()
    assert int(different) == 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("m", [1, 8, 64, 512])
def test_a_captured_chain_replays_with_new_inputs(gpu: torch.device, m: int, kernel: str) -> None:
    weight = hurtful_weight("random", 1024, 1024, 128)
    backend, packed = packed_on(gpu, weight, kernel=kernel)
    x = (rows_of(m, weight) * 0.01).to(gpu)
    backend.linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(8):
            y = backend.linear(y, packed) * 0.1
    x.copy_((rows_of(m + 1, weight)[:m] * 0.01).to(gpu))
    graph.replay()
    expected = x
    for _ in range(8):
        expected = backend.linear(expected, packed) * 0.1
    assert torch.equal(y, expected)


@pytest.mark.parametrize("kernel", ["auto", "exllama"])
def test_streams_and_threads_do_not_disturb_each_other(gpu: torch.device, kernel: str) -> None:
    weight = hurtful_weight("random", 1024, 512, 128)
    backend, packed = packed_on(gpu, weight, kernel=kernel)
    inputs = [rows_of(m, weight).to(gpu) for m in (1, 3, 8, 16, 40)]
    expected = [backend.linear(x, packed) for x in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(index: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(200):
                if not torch.equal(backend.linear(inputs[index], packed), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_view_in_the_middle_of_a_storage_is_right(gpu: torch.device, kernel: str) -> None:
    weight = hurtful_weight("random", 128, 64, 64)
    backend, packed = packed_on(gpu, weight, kernel=kernel)
    storage = torch.randn(5 * 128 + 1, generator=torch.Generator().manual_seed(0)).half()
    x = storage[1:].view(5, 128)  # 2 bytes past any alignment
    assert excess(backend.linear(storage.to(gpu)[1:].view(5, 128), packed).cpu(), x, weight) <= 1


def test_parts_that_meet_in_memory_give_the_cluster_result(gpu: torch.device) -> None:
    """The road of GPUs without clusters, taken on whatever is here."""
    from awq_rt_cuda import tiled
    from awq_rt_cuda.gemm import Variant

    weight = hurtful_weight("random", 2048, 256, 128, bias=True)
    _, packed = packed_on(gpu, weight)
    layout = Layout.parse(packed.layout)
    x = rows_of(16, weight)
    variant = Variant(16, 2, 2, 2, 2, 4, to_partials=True)
    results = []
    clusters = tiled.target_of(gpu.index).clusters
    for chosen in (variant, replace(variant, to_partials=False)) if clusters else (variant,):
        plan = tiled.TiledLinear(layout, gpu.index)
        plan._gemm[16] = tiled.load(chosen, plan.kind, gpu.index)
        results.append(plan.linear(x.to(gpu), packed))
        assert excess(results[-1].cpu(), x, weight) <= 1
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exllama_dequantises_each_weight_rounded_once(gpu: torch.device, dtype: torch.dtype) -> None:
    from awq_rt_cuda import exllama

    weight = hurtful_weight("extreme zeros", 1016, 264, 8, scale_dtype=torch.float32)
    _, packed = packed_on(gpu, weight, dtype, "exllama")
    w = exllama.plan(packed.layout, gpu.index).weight(packed)
    assert torch.equal(w.cpu(), weight.dequantize(torch.float32).to(dtype))


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_sees_one_graph(gpu: torch.device) -> None:
    from awq_rt.linear import AwqLinear

    weight = hurtful_weight("random", 256, 128, 128, bias=True)
    linear = AwqLinear(256, 128, 128)
    linear.bind(weight, torch.float16, gpu, backend="cuda")
    compiled = torch.compile(lambda x: torch.relu(linear(x)) + 1, fullgraph=True)
    x = rows_of(3, weight).to(gpu)
    assert torch.allclose(compiled(x), torch.relu(linear(x)) + 1)
