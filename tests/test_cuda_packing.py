"""The CUDA backend's packed form, on a CPU: exact both ways, and in the order that the kernels are written for."""

from __future__ import annotations

import pytest
import torch

from awq_rt.backend import LinearSpec
from awq_rt.devices import Device
from awq_rt.testing import hurtful_cases, hurtful_weight
from awq_rt.testing.conformance import spec_of

packing = pytest.importorskip("awq_rt_cuda.packing", reason="awq-rt-cuda is not installed")
exllama_packing = pytest.importorskip("awq_rt.packing.exllama")
backend = pytest.importorskip("awq_rt_cuda").backend

CPU = torch.device("cpu")
H100 = Device("cuda", 0, "NVIDIA H100", "nvidia", "sm_90", 80 << 30, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "layout"), [("auto", "tiles"), ("gemm", "tiles"), ("exllama", "exllama")])
def test_every_hurtful_weight_comes_back_exactly(dtype: torch.dtype, kernel: str, layout: str) -> None:
    for case in hurtful_cases(dtype):
        packed = backend.pack(case.weight, spec_of(case.weight, dtype, kernel), CPU)
        assert packed.layout.split()[0] == layout, case.name
        assert backend.unpack(packed).equal(case.weight), case.name


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((96, 24, 96), "tiles"),  # one group, rounded up with the column
        ((192, 24, 96), "tiles"),  # cut into groups of 32
        ((144, 8, 48), "tiles"),  # groups of 16
        ((160, 16, 32), "tiles"),  # in_features is no multiple of a tile
        ((72, 8, 24), "rows"),  # no factor of 16
        ((30, 5, 30), "rows"),
    ],
)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_awkward_shapes_come_back_exactly(shape: tuple[int, int, int], layout: str, scale_dtype: torch.dtype) -> None:
    weight = hurtful_weight("random", *shape, scale_dtype=scale_dtype, bias=True)
    packed = backend.pack(weight, spec_of(weight, torch.float16), CPU)
    assert packed.layout.split()[0] == layout
    assert backend.unpack(packed).equal(weight)
    assert all(tensor.is_contiguous() for tensor in packed.tensors)


def test_nibbles_lie_where_the_kernels_look_for_them() -> None:
    """The drawing at the head of kernels/tile.cuh, read literally."""
    codes = torch.randint(0, 16, (192, 48), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    words = packing.pack_codes(codes).flatten().view(torch.int32)
    places = {0: (0, 0), 4: (8, 0), 8: (0, 8), 12: (8, 8), 16: (0, 1), 20: (8, 1), 24: (0, 9), 28: (8, 9)}
    for strip, tile, lane, step in [(0, 0, 0, 0), (2, 1, 17, 3), (1, 2, 31, 2)]:
        word = int(words[((strip * 3 + tile) * 32 + lane) * 4 + step])
        n, k = 16 * strip + lane // 4, 64 * tile + 16 * step + 2 * (lane % 4)
        for bit, (right, down) in places.items():
            assert (word >> bit) & 15 == int(codes[k + down, n + right])


@pytest.mark.parametrize("shape", [(8, 8, 8), (96, 24, 96), (72, 8, 24), (1000, 16, 1000), (160, 40, 40)])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exllama_takes_groups_of_whole_words_and_pads_nothing(
    shape: tuple[int, int, int], scale_dtype: torch.dtype
) -> None:
    weight = hurtful_weight("random", *shape, scale_dtype=scale_dtype, bias=True)
    packed = backend.pack(weight, spec_of(weight, torch.bfloat16, "exllama"), CPU)
    assert packed.layout.split()[0] == "exllama"
    assert backend.unpack(packed).equal(weight)
    assert all(tensor.is_contiguous() for tensor in packed.tensors)
    k, n, group_size = shape
    assert [packed.tensors[i].numel() for i in range(3)] == [k * n // 2, k // group_size * n // 2, k // group_size * n]


def test_exllamas_nibbles_lie_where_its_kernels_look_for_them() -> None:
    """The drawing at the head of kernels/exllama.cuh, read literally."""
    codes = torch.randint(0, 16, (192, 48), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    words = exllama_packing.pack_codes(codes).flatten().view(torch.int32)
    places = {0: 0, 4: 2, 8: 4, 12: 6, 16: 1, 20: 3, 24: 5, 28: 7}
    for strip, row, column in [(0, 0, 0), (3, 17, 5), (5, 23, 7)]:
        word = int(words[(strip * 24 + row) * 8 + column])
        for bit, down in places.items():
            assert (word >> bit) & 15 == int(codes[row * 8 + down, strip * 8 + column])
    zeros = torch.randint(0, 16, (3, 48), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    packed = exllama_packing.pack_zeros(zeros)
    assert int(packed[4, 2, 1]) == int(zeros[2, 34]) | int(zeros[2, 35]) << 4
    scales = torch.rand(3, 48, generator=torch.Generator().manual_seed(2))
    assert exllama_packing.pack_scales(scales)[4, 2].tolist() == scales[2, 32:40].tolist()


def test_zeros_and_scales_lie_in_pairs_of_columns() -> None:
    zeros = torch.randint(0, 16, (3, 48), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = packing.pack_zeros(zeros, 1, 3)
    assert int(packed[2, 1, 5]) == int(zeros[1, 37]) | int(zeros[1, 45]) << 4
    scales = torch.rand(3, 48, generator=torch.Generator().manual_seed(0))
    assert packing.pack_scales(scales, 1, 3)[2, 1, 5].tolist() == [float(scales[1, 37]), float(scales[1, 45])]


@pytest.mark.parametrize(
    ("in_features", "group_size", "expected"),
    [(4096, 128, 128), (4096, 32, 32), (4096, 4096, 4096), (72, 72, 128), (192, 96, 32), (96, 24, 8)],
)
def test_the_kernels_group_size_divides_a_tile_or_is_a_multiple(
    in_features: int, group_size: int, expected: int
) -> None:
    assert packing.kernel_group_size(in_features, group_size) == expected


@pytest.mark.parametrize(
    ("spec", "device", "code"),
    [
        (LinearSpec(64, 64, 64, torch.float32), H100, "AWQ-CUDA-012"),
        (LinearSpec(72, 64, 24, torch.float16, kernel="gemv"), H100, "AWQ-CUDA-013"),
        (LinearSpec(64, 64, 64, torch.float16), Device("cuda", 0, "V100", "nvidia", "sm_70", 0), "AWQ-CUDA-011"),
        (LinearSpec(64, 64, 64, torch.float16), Device("cuda", 0, "MI300X", "amd", "gfx942", 0), "AWQ-CUDA-010"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_code(spec: LinearSpec, device: Device, code: str) -> None:
    refusal = backend.supports(spec, device)
    assert refusal is not None
    assert (refusal.code, bool(refusal.reason), bool(refusal.fix)) == (code, True, True)


def test_probing_without_a_gpu_is_an_answer() -> None:
    probe = backend.probe()
    assert probe.devices or probe.refusals
