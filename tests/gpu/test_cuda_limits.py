"""The CUDA backend at the edge of what a GPU holds: more than 2^31 elements, no room, several GPUs."""

from __future__ import annotations

import gc

import pytest
import torch

from awq_rt.backend import LinearSpec
from awq_rt.errors import OutOfMemory
from awq_rt.testing import excess, hurtful_weight
from awq_rt.testing.conformance import spec_of
from awq_rt.weights import AwqWeight

KERNELS = ("auto", "gemv", "gemm", "exllama")
BEYOND = 2**31
MIB = 2**20


def need(gpu: torch.device, gigabytes: float) -> None:
    """Skip where the GPU has less memory free."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(gpu)[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"{gigabytes} GB of free memory are needed; {free:.1f} GB are there")


def random_on(gpu: torch.device, k: int, n: int, group_size: int) -> AwqWeight:
    """Too large to be made on the CPU."""
    generator = torch.Generator(gpu).manual_seed(0)
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8, device=gpu, generator=generator)
    zeros = torch.randint(0, 16, (k // group_size, n), dtype=torch.uint8, device=gpu, generator=generator)
    scales = torch.rand(k // group_size, n, device=gpu, generator=generator) * 0.02 + 0.001
    return AwqWeight(codes, zeros, scales.half())


def check_rows(y: torch.Tensor, x: torch.Tensor, weight: AwqWeight) -> None:
    """The first rows, the last, and those on either side of element 2^31 of x and of y."""
    m = x.shape[0]
    chosen = {0, 1, m - 2, m - 1}
    for width in (x.shape[1], y.shape[1]):
        chosen |= {row for row in (BEYOND // width - 1, BEYOND // width, BEYOND // width + 1) if row < m}
    index = torch.tensor(sorted(chosen), device=x.device)
    assert excess(y[index], x[index], weight) <= 1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("k", "n"), [(8192, 64), (64, 8192)])
def test_an_input_or_a_result_beyond_two_to_the_31(gpu: torch.device, kernel: str, k: int, n: int) -> None:
    from awq_rt_cuda import backend

    need(gpu, 12)
    weight = random_on(gpu, k, n, 64)
    packed = backend.pack(weight, spec_of(weight, torch.float16, kernel), gpu)
    m = BEYOND // max(k, n) + 100
    x = torch.randn(m, k, dtype=torch.float16, device=gpu)
    y = backend.linear(x, packed)
    assert max(x.numel(), y.numel()) > BEYOND
    check_rows(y, x, weight)


@pytest.mark.parametrize(("kernel", "m"), [("gemv", 65535 * 8 + 3), ("gemm", 65535 * 64 + 3)])
def test_more_rows_than_one_dimension_of_a_grid_holds(gpu: torch.device, kernel: str, m: int) -> None:
    from awq_rt_cuda import backend

    need(gpu, 4)
    weight = random_on(gpu, 64, 16, 64)
    packed = backend.pack(weight, spec_of(weight, torch.bfloat16, kernel), gpu)
    x = torch.randn(m, 64, dtype=torch.bfloat16, device=gpu)
    y = backend.linear(x, packed)
    for rows in (
        slice(0, 100),
        slice(m // 2 - 50, m // 2 + 50),
        slice(65535 * 8 - 50, 65535 * 8 + 3),
        slice(-100, None),
    ):
        assert excess(y[rows], x[rows], weight) <= 1, rows


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_weight_beyond_two_to_the_31(gpu: torch.device, kernel: str) -> None:
    from awq_rt_cuda import backend

    need(gpu, 24)
    k, n = 32768, 65552
    assert k * n > BEYOND
    weight = random_on(gpu, k, n, 128)
    packed = backend.pack(weight, spec_of(weight, torch.float16, kernel), gpu)
    columns = torch.tensor([0, 1, 32767, 32768, 65535, 65536, n - 2, n - 1], device=gpu)
    part = AwqWeight(weight.codes[:, columns], weight.zeros[:, columns], weight.scales[:, columns])
    del weight
    for m in (1, 8, 64, 512):
        x = torch.randn(m, k, dtype=torch.float16, device=gpu)
        assert excess(backend.linear(x, packed)[:, columns], x, part) <= 1, m
    unpacked = backend.unpack(packed)
    assert torch.equal(unpacked.codes[:, columns], part.codes)


@pytest.mark.parametrize("kernel", ["auto", "exllama"])
def test_no_room_to_pack_is_said_and_leaves_nothing(gpu: torch.device, kernel: str) -> None:
    from awq_rt_cuda import backend

    weight = hurtful_weight("random", 4096, 4096, 128)
    small = hurtful_weight("random", 256, 128, 128)
    backend.pack(small, spec_of(small, torch.float16, kernel), gpu)  # whatever stays for good is there now
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(gpu)
    reserved = torch.cuda.memory_reserved(gpu)
    total = torch.cuda.mem_get_info(gpu)[1]
    torch.cuda.set_per_process_memory_fraction((reserved + 24 * MIB) / total, gpu)  # the codes alone are 16 MiB
    try:
        with pytest.raises(
            OutOfMemory, match=rf"{gpu} has no room to pack a linear of 4096 x 4096: .*device_map"
        ) as caught:
            backend.pack(weight, spec_of(weight, torch.float16, kernel), gpu)
        assert torch.cuda.memory_allocated(gpu) == before, caught  # which still holds the traceback
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)
    packed = backend.pack(weight, spec_of(weight, torch.float16, kernel), gpu)
    assert backend.unpack(packed).to("cpu").equal(weight)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("m", [1, 16, 64, 512])
def test_each_of_several_gpus_computes_on_its_own(gpu: torch.device, kernel: str, m: int) -> None:
    from awq_rt_cuda import backend

    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("there is one GPU; two are needed")
    weight = hurtful_weight("random", 1024, 520, 128, bias=True)
    x = torch.randn(m, 1024, generator=torch.Generator().manual_seed(m)).half()
    results = []
    for index in (*range(count), 0):  # and once more on the first, which is the current device all the time
        there = torch.device("cuda", index)
        packed = backend.pack(weight, spec_of(weight, torch.float16, kernel), there)
        y = backend.linear(x.to(there), packed)
        assert y.device == there
        results.append(y.cpu())
    assert torch.cuda.current_device() == 0
    assert excess(results[0], x, weight) <= 1
    if len({torch.cuda.get_device_name(index) for index in range(count)}) == 1:
        assert all(torch.equal(result, results[0]) for result in results)


def test_a_second_gpu_is_captured_on_a_stream_of_its_own(gpu: torch.device) -> None:
    from awq_rt_cuda import backend

    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU; two are needed")
    weight = hurtful_weight("random", 1024, 512, 128)
    there = torch.device("cuda", 1)
    packed = backend.pack(weight, spec_of(weight, torch.float16), there)
    x = torch.randn(3, 1024, dtype=torch.float16, device=there)
    expected = backend.linear(x, packed)
    with torch.cuda.device(there):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = backend.linear(x, packed)
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_a_shape_that_no_family_can_cut_is_refused_by_name(gpu: torch.device) -> None:
    from awq_rt_cuda import backend

    device = backend.probe().devices[0]
    for kernel, group_size, reason in (("gemm", 24, "no factor of 16"), ("exllama", 20, "multiple of 8")):
        k = group_size * 16
        refusal = backend.supports(LinearSpec(k, 64, group_size, torch.float16, kernel=kernel), device)
        assert refusal is not None
        assert refusal.code == "AWQ-CUDA-013"
        assert reason in refusal.reason
