"""Every packing against what other software wrote, and against itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from awq_rt.errors import InvalidTensor, LayoutCannotHold, UnsupportedFormat
from awq_rt.formats import LAYOUTS, WRITABLE, TensorInfo, identify
from awq_rt.formats.padding import zeros_width
from awq_rt.testing import hurtful_weight
from awq_rt.weights import AwqWeight

GOLDEN = Path(__file__).parent / "golden"
SHARED_GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def vectors(pattern: str) -> list[Path]:
    """The copied vectors, and the rest of them where they are at hand."""
    found = {path.name: path for folder in (SHARED_GOLDEN, GOLDEN) for path in folder.glob(pattern)}
    return [found[name] for name in sorted(found)]


def info(stored: Mapping[str, Tensor], prefix: str = "layer") -> dict[str, TensorInfo]:
    return {
        suffix: TensorInfo(
            f"{prefix}.{suffix}",
            tuple(tensor.shape),
            tensor.dtype,
            tuple(tensor.tolist()) if suffix == "weight_shape" else None,
        )
        for suffix, tensor in stored.items()
    }


def read(stored: Mapping[str, Tensor], layout: str, group_size: int | None) -> AwqWeight:
    """As a checkpoint is read: identified from the tensors alone, checked, unpacked."""
    assert layout == identify("layer", info(stored)).NAME
    shape = LAYOUTS[layout].shape(info(stored), group_size)
    return LAYOUTS[layout].read(stored, shape)


def load(path: Path) -> dict[str, Tensor]:
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays if arrays[name].dtype.kind != "U"}


@pytest.mark.parametrize("path", vectors("awq_*.npz"), ids=lambda path: path.stem)
@pytest.mark.parametrize(("layout", "stem"), [("gemm", "gemm"), ("gemv", "gemv"), ("gemv_fast", "gemvfast")])
def test_what_autoawq_packed_reads_back_code_for_code(path: Path, layout: str, stem: str) -> None:
    vector = load(path)
    stored = {name: vector[f"{stem}_{name}"] for name in ("qweight", "qzeros", "scales")}
    weight = read(stored, layout, int(vector["G"]))
    assert torch.equal(weight.codes, vector["q"].T)
    assert torch.equal(weight.zeros, vector["z"].T)
    assert torch.equal(weight.scales, vector["s"].T)
    for suffix, tensor in WRITABLE[layout].write(weight).items():
        assert torch.equal(tensor, stored[suffix]), f"{suffix} differs from what AutoAWQ wrote"


@pytest.mark.parametrize("path", vectors("ct_*.npz"), ids=lambda path: path.stem)
def test_what_compressed_tensors_packed_reads_back_code_for_code(path: Path) -> None:
    vector = load(path)
    names = ("weight_packed", "weight_zero_point", "weight_shape")
    stored = {name: vector[name] for name in names if name in vector}
    stored["weight_scale"] = vector["weight_scale_f32"].to(torch.float16)
    weight = read(stored, "compressed-tensors", int(vector["G"]))
    assert torch.equal(weight.codes.to(torch.int16), vector["q"].T.to(torch.int16) + 8)
    assert torch.equal(weight.zeros.to(torch.int16), vector["z"].T.to(torch.int16) + 8)
    # The peer multiplies in the dtype of the scales; a float32 product rounded once is the same.
    assert torch.equal(weight.dequantize().half(), vector["w_f32"].T.half())
    for suffix, tensor in WRITABLE["compressed-tensors"].write(weight).items():
        if suffix in stored:
            assert torch.equal(tensor, stored[suffix]), f"{suffix} differs from what compressed-tensors wrote"


@pytest.mark.parametrize("path", vectors("marlin_*.npz"), ids=lambda path: path.stem)
def test_what_autoawq_packed_for_marlin_reads_back_code_for_code(path: Path) -> None:
    vector = load(path)
    weight = read({name: vector[name] for name in ("qweight", "scales")}, "marlin", None)
    assert torch.equal(weight.codes, vector["q"].T)
    assert torch.equal(weight.scales, vector["s"].T)
    assert weight.symmetric


SHAPES = [(576, 192, 64), (4544, 64, 64), (1408, 136, 128), (192, 40, 192), (128, 72, 32), (64, 8, 64), (128, 128, 128)]


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("kind", ["random", "extreme zeros", "symmetric", "subnormal scales"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_packing_gives_back_what_was_written(layout: str, kind: str, shape: tuple[int, int, int]) -> None:
    weight = hurtful_weight(kind, *shape, bias=True)
    stored = {**WRITABLE[layout].write(weight), "bias": weight.bias}
    assert read(stored, layout, weight.group_size).equal(weight)


@pytest.mark.parametrize("layout", ["gemm", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype_where_the_packing_allows(layout: str, dtype: torch.dtype) -> None:
    weight = hurtful_weight("wide scales", 64, 16, 16, scale_dtype=dtype)
    assert read(WRITABLE[layout].write(weight), layout, None).equal(weight)


def test_odd_sizes_survive_compressed_tensors() -> None:
    weight = hurtful_weight("extreme zeros", 36, 37, 36)
    assert read(WRITABLE["compressed-tensors"].write(weight), "compressed-tensors", None).equal(weight)


@pytest.mark.parametrize(
    ("groups", "group_size", "width"), [(32, 128, 4), (86, 128, 11), (9, 64, 2), (4, 32, 4), (1, 512, 1)]
)
def test_the_padding_of_zero_points_is_autoawqs(groups: int, group_size: int, width: int) -> None:
    assert zeros_width(groups * group_size, group_size) == width


@pytest.mark.parametrize("layout", ["gemv", "gemv_fast"])
@pytest.mark.parametrize("wrong", [96, 256])
def test_a_wrong_group_size_contradicts_the_padding(layout: str, wrong: int) -> None:
    stored = WRITABLE[layout].write(hurtful_weight("random", 768, 16, 128))
    with pytest.raises(InvalidTensor, match="6 groups where the group size makes"):
        read(stored, layout, wrong)


def test_llm_awq_differs_from_gemv_fast_only_in_the_zeros_name() -> None:
    weight = hurtful_weight("extreme zeros", 128, 16, 64)
    stored = WRITABLE["gemv_fast"].write(weight)
    stored["scaled_zeros"] = stored.pop("qzeros")
    assert read(stored, "llm-awq", 64).equal(weight)


def test_llm_awq_may_hold_bfloat16() -> None:
    weight = hurtful_weight("random", 128, 16, 64, scale_dtype=torch.bfloat16)
    half = hurtful_weight("random", 128, 16, 64)
    stored = WRITABLE["gemv_fast"].write(half)
    padded = torch.zeros(stored["scales"].shape, dtype=torch.bfloat16)
    padded[:2] = weight.scales
    products = torch.zeros_like(padded)
    products[:2] = -(weight.scales.float() * weight.zeros).to(torch.bfloat16)
    words = WRITABLE["gemv_fast"].write(AwqWeight(weight.codes, weight.zeros, half.scales))["qweight"]
    assert read({"qweight": words, "scales": padded, "scaled_zeros": products}, "llm-awq", 64).equal(weight)


def test_zeros_that_are_no_zero_points_are_refused() -> None:
    stored = WRITABLE["gemv_fast"].write(hurtful_weight("random", 128, 16, 64))
    stored["qzeros"][0, 0] = 0.5 * stored["scales"][0, 0]
    with pytest.raises(InvalidTensor, match=r"not -\(scales \* z\)"):
        read(stored, "gemv_fast", 64)


def test_gemv_fast_refuses_scales_beyond_float16() -> None:
    weight = hurtful_weight("random", 64, 16, 64, scale_dtype=torch.bfloat16)
    huge = AwqWeight(weight.codes, weight.zeros, torch.full_like(weight.scales, 1e5))
    tiny = AwqWeight(weight.codes, weight.zeros, torch.full_like(weight.scales, 1e-12))
    for unfit in (huge, tiny):
        with pytest.raises(LayoutCannotHold, match="float16"):
            WRITABLE["gemv_fast"].write(unfit)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [("gemm", (64, 12, 64)), ("gemv", (48, 8, 48)), ("gemv", (64, 8, 16)), ("gemv_fast", (96, 8, 32))],
)
def test_a_shape_that_a_packing_cannot_hold_is_refused(layout: str, shape: tuple[int, int, int]) -> None:
    with pytest.raises(LayoutCannotHold):
        WRITABLE[layout].write(hurtful_weight("random", *shape))


def test_square_layers_are_told_apart() -> None:
    weight = hurtful_weight("random", 256, 256, 32)
    for layout in WRITABLE:
        assert read(WRITABLE[layout].write(weight), layout, 32).equal(weight)


@pytest.mark.parametrize("with_g_idx", [True, False])
def test_gptq_is_refused_by_name(with_g_idx: bool) -> None:
    stored = {
        "qweight": torch.zeros(256 // 8, 64, dtype=torch.int32),
        "qzeros": torch.zeros(2, 8, dtype=torch.int32),
        "scales": torch.ones(2, 64, dtype=torch.float16),
    }
    if with_g_idx:
        stored["g_idx"] = torch.zeros(256, dtype=torch.int32)
    with pytest.raises(UnsupportedFormat, match="GPTQ"):
        identify("layer", info(stored))


@pytest.mark.parametrize("layout", WRITABLE)
def test_a_wrong_shape_names_the_tensor(layout: str) -> None:
    stored = WRITABLE[layout].write(hurtful_weight("random", 128, 64, 64))
    scales = "weight_scale" if "weight_scale" in stored else "scales"
    stored[scales] = torch.cat(
        [stored[scales], stored[scales]], dim=0 if layout in ("gemv", "compressed-tensors") else 1
    )
    with pytest.raises(InvalidTensor, match=f"layer.{scales}"):
        read(stored, layout, 64)


@pytest.mark.parametrize("layout", WRITABLE)
def test_scales_of_a_wrong_dtype_are_refused(layout: str) -> None:
    stored = WRITABLE[layout].write(hurtful_weight("random", 128, 64, 64))
    scales = "weight_scale" if "weight_scale" in stored else "scales"
    stored[scales] = stored[scales].double()
    with pytest.raises(InvalidTensor, match="float16, bfloat16 or float32"):
        read(stored, layout, 64)


def test_a_weight_shape_that_contradicts_the_words_is_refused() -> None:
    stored = WRITABLE["compressed-tensors"].write(hurtful_weight("random", 128, 64, 64))
    stored["weight_shape"] = torch.tensor([64, 1024])
    with pytest.raises(InvalidTensor, match="weight_shape"):
        read(stored, "compressed-tensors", 64)
