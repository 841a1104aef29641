"""What each packing takes and refuses, header by header: a wrong size of any tensor, too small and too large."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import stored as stored_tensors
from torch import Tensor

from awq_rt.errors import AwqRtError, InvalidTensor, LayoutCannotHold, MissingTensor, UnsupportedFormat
from awq_rt.formats import LAYOUTS, WRITABLE, LinearShape, TensorInfo, identify, nibbles
from awq_rt.formats.layout import expect, expect_floating, group_size_of, is_matrix
from awq_rt.formats.padding import padded_groups, shape_from_groups, unpadded, unpadded_scales, used_groups, zeros_width
from awq_rt.testing import hurtful_weight
from awq_rt.weights import AwqWeight

K, N, G = 256, 192, 64
GROUP_SIZE_FOLLOWS = ("gemm", "marlin", "compressed-tensors")


def weight_for(layout: str, bias: bool = False) -> AwqWeight:
    return hurtful_weight("symmetric" if layout == "marlin" else "random", K, N, G, bias=bias)


def headers(layout: str) -> dict[str, TensorInfo]:
    """Of a linear that the packing holds."""
    tensors = stored_tensors(weight_for(layout), layout)
    shape = {"weight_shape": (N, K)}
    return {name: TensorInfo(f"layer.{name}", tuple(t.shape), t.dtype, shape.get(name)) for name, t in tensors.items()}


def resized(info: TensorInfo, dimension: int, by: int) -> TensorInfo:
    sizes = list(info.shape)
    sizes[dimension] += by
    return replace(info, shape=tuple(sizes))


def understood(stored: dict[str, TensorInfo], group_size: int | None = G) -> tuple[str, LinearShape]:
    """As a checkpoint's headers are read."""
    layout = identify("layer", stored)
    return layout.NAME, layout.shape(stored, group_size)


ONE_TENSOR = [
    (layout, name, dimension)
    for layout in LAYOUTS
    for name, info in headers(layout).items()
    if name != "weight_shape"
    for dimension in range(len(info.shape))
    if (layout, name, dimension) != ("marlin", "qweight", 0)  # as many groups of another size: another weight
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_follow_from_the_headers(layout: str) -> None:
    assert understood(headers(layout)) == (layout, LinearShape(K, N, G))
    if layout in GROUP_SIZE_FOLLOWS:
        assert understood(headers(layout), None) == (layout, LinearShape(K, N, G))
    else:
        with pytest.raises(InvalidTensor, match="pass group_size="):
            understood(headers(layout), None)


@pytest.mark.parametrize(("k", "n", "g"), [(256, 32, 64), (32, 256, 32), (64, 512, 32), (128, 1024, 32)])
def test_sizes_that_coincide_are_no_other_packing(k: int, n: int, g: int) -> None:
    """As many groups as words a row; as many rows as words a row."""
    weight = hurtful_weight("random", k, n, g)
    tensors = stored_tensors(weight, "gemm")
    stored = {name: TensorInfo(f"layer.{name}", tuple(t.shape), t.dtype) for name, t in tensors.items()}
    assert understood(stored, g) == ("gemm", LinearShape(k, n, g))


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize(("layout", "name", "dimension"), ONE_TENSOR)
def test_a_tensor_of_another_size_is_another_weight_or_refused(layout: str, name: str, dimension: int, by: int) -> None:
    """One header alone never says something that the others do not contradict."""
    stored = headers(layout)
    changed = {**stored, name: resized(stored[name], dimension, by)}
    with pytest.raises(AwqRtError) as caught:
        understood(changed)
    assert isinstance(caught.value, (InvalidTensor, UnsupportedFormat))


@pytest.mark.parametrize("layout", ["gemv_fast", "llm-awq"])
def test_rows_that_are_no_whole_blocks_are_refused(layout: str) -> None:
    stored = headers(layout)
    stored["qweight"] = replace(stored["qweight"], shape=(N // 4, 96))
    with pytest.raises(InvalidTensor, match="in_features 96 is not a multiple of 64"):
        understood(stored, 32)


def test_columns_that_are_no_whole_tiles_of_marlin_are_refused() -> None:
    stored = headers("marlin")
    stored["qweight"] = replace(stored["qweight"], shape=(K // 16, 2 * 96))
    stored["scales"] = replace(stored["scales"], shape=(K // G, 96))
    with pytest.raises(InvalidTensor, match="out_features 96 is not a multiple of 64"):
        understood(stored)


def test_scales_of_another_width_are_no_scales_of_marlins_words() -> None:
    stored = headers("marlin")
    stored["scales"] = resized(stored["scales"], 1, 64)
    with pytest.raises(InvalidTensor, match="scales has shape"):
        LAYOUTS["marlin"].shape(stored, G)


@pytest.mark.parametrize("absent", ["qzeros", "no tensor"])
def test_words_of_no_known_packing_are_not_called_gptq(absent: str) -> None:
    sizes = {"qweight": (7, 5), "qzeros": (3, 9), "scales": (3, 11)}
    stored = {name: TensorInfo(f"layer.{name}", size, torch.int32) for name, size in sizes.items() if name != absent}
    with pytest.raises(UnsupportedFormat, match="packed in no layout that awq_rt knows"):
        identify("layer", stored)


def test_more_groups_than_there_is_room_for_are_refused() -> None:
    sizes = {"qweight": (N, 9 * 128 // 8), "qzeros": (N, 1), "scales": (N, 8)}
    stored = {name: replace(info, shape=sizes[name]) for name, info in headers("gemv").items()}
    with pytest.raises(InvalidTensor, match="has room for 8 groups"):
        understood(stored, 128)
    stored["qweight"] = replace(stored["qweight"], shape=(N, 8 * 128 // 8))
    assert understood(stored, 128) == ("gemv", LinearShape(8 * 128, N, 128))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_scales_of_another_dtype_are_refused(layout: str, dtype: torch.dtype) -> None:
    stored = headers(layout)
    scales = "weight_scale" if layout == "compressed-tensors" else "scales"
    with pytest.raises(InvalidTensor, match="float16, bfloat16 or float32 is expected"):
        understood({**stored, scales: replace(stored[scales], dtype=dtype)})


@pytest.mark.parametrize(("layout", "name", "dimension"), [case for case in ONE_TENSOR if case[2] == 0])
def test_words_of_another_dtype_are_no_such_packing(layout: str, name: str, dimension: int) -> None:
    if name in ("scales", "weight_scale"):
        return  # above
    stored = headers(layout)
    for dtype in (torch.int64, torch.uint8):
        with pytest.raises((UnsupportedFormat, InvalidTensor)):
            understood({**stored, name: replace(stored[name], dtype=dtype)})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_are_no_packing(layout: str) -> None:
    stored = headers(layout)
    words = "weight_packed" if layout == "compressed-tensors" else "qweight"
    with pytest.raises(UnsupportedFormat):
        identify("layer", {**stored, words: replace(stored[words], shape=stored[words].shape[:1])})


def test_words_without_scales_are_missing_them() -> None:
    for layout in LAYOUTS:
        stored = {name: info for name, info in headers(layout).items() if "scale" not in name or name == "scaled_zeros"}
        with pytest.raises(MissingTensor, match="no scales"):
            identify("layer", stored)


@pytest.mark.parametrize("layout", ["gemm", "gemv", "compressed-tensors"])
def test_an_order_of_activations_is_no_awq(layout: str) -> None:
    name = "weight_g_idx" if layout == "compressed-tensors" else "g_idx"
    with pytest.raises(UnsupportedFormat, match="GPTQ"):
        identify("layer", {**headers(layout), name: TensorInfo(f"layer.{name}", (K,), torch.int32)})


def test_the_g_idx_of_marlin_is_refused_too() -> None:
    with pytest.raises(UnsupportedFormat):
        identify("layer", {**headers("marlin"), "g_idx": TensorInfo("layer.g_idx", (K,), torch.int32)})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bias_comes_along(layout: str) -> None:
    weight = weight_for(layout, bias=True)
    read = LAYOUTS[layout].read(stored_tensors(weight, layout), LinearShape.of(weight))
    assert read.bias is not None
    assert weight.bias is not None
    assert torch.equal(read.bias, weight.bias)


HOLDS = {
    "gemm": lambda k, n, g: n % 8 == 0,
    "gemv": lambda k, n, g: k % 32 == 0 and (g >= 128 or g in (32, 64)),
    "gemv_fast": lambda k, n, g: k % 64 == 0 and n % 8 == 0 and (g >= 128 or g in (32, 64)),
    "compressed-tensors": lambda k, n, g: True,
}
SIZES = [(k, n, g) for k in (32, 48, 64, 96, 128, 256) for n in (4, 8, 12, 16) for g in (16, 32, 64, 127, 128, 256)]


@pytest.mark.parametrize("layout", WRITABLE)
def test_a_packing_holds_just_what_its_words_hold(layout: str) -> None:
    for k, n, g in SIZES:
        shape = LinearShape(k, n, g)
        if HOLDS[layout](k, n, g):
            WRITABLE[layout].check(shape)
        else:
            with pytest.raises(LayoutCannotHold):
                WRITABLE[layout].check(shape)


@pytest.mark.parametrize(
    ("layout", "shape"), [("gemm", (64, 12, 32)), ("gemv", (144, 8, 144)), ("gemv_fast", (96, 8, 32))]
)
def test_what_cannot_be_held_is_not_written(layout: str, shape: tuple[int, int, int]) -> None:
    with pytest.raises(LayoutCannotHold):
        WRITABLE[layout].write(hurtful_weight("random", *shape))


@pytest.mark.parametrize("layout", ["gemv", "gemv_fast"])
def test_a_group_without_scales_would_be_taken_for_padding(layout: str) -> None:
    weight = hurtful_weight("random", 256, 64, 64)
    scales = weight.scales.clone()
    scales[3] = 0
    with pytest.raises(LayoutCannotHold):
        WRITABLE[layout].write(replace(weight, scales=scales))


@pytest.mark.parametrize("value", [5000.0, 65504.0])
def test_gemv_fast_holds_products_up_to_float16s_largest(value: float) -> None:
    weight = hurtful_weight("random", 128, 64, 64)
    large = replace(weight, scales=torch.full_like(weight.scales, value), zeros=torch.full_like(weight.zeros, 15))
    with pytest.raises(LayoutCannotHold, match="exceed its range"):
        WRITABLE["gemv_fast"].write(large)
    small = replace(large, scales=torch.full_like(weight.scales, 4096.0))
    assert LAYOUTS["gemv_fast"].read(WRITABLE["gemv_fast"].write(small), LinearShape.of(small)).equal(small)


@pytest.mark.parametrize("off", [0.2, -0.2, 1.0])
def test_zeros_between_two_zero_points_are_refused(off: float) -> None:
    weight = hurtful_weight("random", 128, 64, 64)
    weight = replace(weight, zeros=torch.full_like(weight.zeros, 15 if off > 0 else 0), scales=weight.scales * 0 + 0.5)
    tensors = WRITABLE["gemv_fast"].write(weight)
    assert LAYOUTS["gemv_fast"].read(tensors, LinearShape.of(weight)).equal(weight)
    zeros = tensors["qzeros"].clone()
    zeros[0, 0] -= 0.5 * off
    with pytest.raises(InvalidTensor, match=r"zero points z of 0\.\.15"):
        LAYOUTS["gemv_fast"].read({**tensors, "qzeros": zeros}, LinearShape.of(weight))


def test_a_tenth_is_no_zero_point() -> None:
    """The bound itself: 1 / 10 in float32 is the nearest there is to 0.1."""
    weight = hurtful_weight("random", 128, 64, 64)
    weight = replace(weight, zeros=torch.zeros_like(weight.zeros), scales=torch.full_like(weight.scales, 10))
    tensors = WRITABLE["gemv_fast"].write(weight)
    zeros = tensors["qzeros"].clone()
    zeros[0, 0] = -1
    with pytest.raises(InvalidTensor, match=r"zero points z of 0\.\.15"):
        LAYOUTS["gemv_fast"].read({**tensors, "qzeros": zeros}, LinearShape.of(weight))


@pytest.mark.parametrize("shape", [(256, 64, 64), (256, 64, 256), (128, 128, 128), (64, 320, 32)])
def test_marlin_of_one_and_of_several_groups_reads_back(shape: tuple[int, int, int]) -> None:
    weight = hurtful_weight("symmetric", *shape)
    assert LAYOUTS["marlin"].read(stored_tensors(weight, "marlin"), LinearShape.of(weight)).equal(weight)


@pytest.mark.parametrize("values", [None, (N,), (N, K, 1), (N + 8, K), (N, K + 8), (N, K - 8)])
def test_a_stored_shape_must_be_that_of_the_words(values: tuple[int, ...] | None) -> None:
    stored = headers("compressed-tensors")
    with pytest.raises(InvalidTensor, match="contradicts"):
        understood({**stored, "weight_shape": replace(stored["weight_shape"], values=values)})


def test_a_stored_shape_may_be_absent() -> None:
    stored = {name: info for name, info in headers("compressed-tensors").items() if name != "weight_shape"}
    assert understood(stored) == ("compressed-tensors", LinearShape(K, N, G))


# --- the parts -------------------------------------------------------------------------------------------------------


def test_a_nibble_is_where_it_should_be() -> None:
    words = torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32)  # 0x76543210 and 0xFEDCBA98
    assert nibbles.split(words).tolist() == [[list(range(8)), list(range(8, 16))]]
    assert torch.equal(nibbles.join(nibbles.split(words), torch.int32), words)
    assert torch.equal(nibbles.pack_rows(nibbles.unpack_rows(words)), words)
    assert nibbles.split(torch.tensor([0x3210], dtype=torch.int16)).tolist() == [[0, 1, 2, 3]]


def test_expected_shapes_and_dtypes() -> None:
    info = TensorInfo("x", (2, 3), torch.float16)
    expect(info, 2, 3)
    expect_floating(info)
    assert info.nbytes == 12
    assert is_matrix({"x": info}, "x")
    assert is_matrix({"x": info}, "x", torch.float16)
    assert not is_matrix({"x": info}, "x", torch.int32)
    assert not is_matrix({"x": info}, "y")
    assert not is_matrix({"x": replace(info, shape=(2,))}, "x")
    for wrong in ((2,), (3, 2), (2, 3, 1)):
        with pytest.raises(InvalidTensor, match="the tensors beside it need"):
            expect(info, *wrong)


@pytest.mark.parametrize(("in_features", "groups", "size"), [(256, 4, 64), (256, 1, 256), (256, 256, 1), (1, 1, 1)])
def test_groups_that_divide(in_features: int, groups: int, size: int) -> None:
    assert group_size_of(TensorInfo("scales", (groups, 8), torch.float16), in_features, groups) == size


@pytest.mark.parametrize(("in_features", "groups"), [(256, 0), (0, 1), (256, 3), (256, 512), (0, 0), (-64, 1)])
def test_groups_that_do_not_divide(in_features: int, groups: int) -> None:
    with pytest.raises(InvalidTensor, match="do not divide"):
        group_size_of(TensorInfo("scales", (groups, 8), torch.float16), in_features, groups)


@pytest.mark.parametrize(
    ("groups", "group_size", "width"),
    [(1, 128, 1), (8, 128, 1), (9, 128, 2), (16, 128, 2), (1, 64, 2), (16, 64, 2), (17, 64, 4), (1, 32, 4), (32, 32, 4),
     (33, 32, 8), (3, 256, 1), (1, 4096, 1)],
)  # fmt: skip
def test_widths_of_zero_points(groups: int, group_size: int, width: int) -> None:
    assert zeros_width(groups * group_size, group_size) == width


@pytest.mark.parametrize("group_size", [1, 16, 63, 65, 96, 127])
def test_group_sizes_without_a_width(group_size: int) -> None:
    with pytest.raises(LayoutCannotHold, match="32, 64 and from 128 on"):
        zeros_width(group_size * 8, group_size)


SCALES = TensorInfo("scales", (8, 64), torch.float16)


@pytest.mark.parametrize(("group_size", "expected"), [(32, 32), (64, 64), (256, 256), (-1, 256)])
def test_a_group_size_that_fits_the_padding(group_size: int, expected: int) -> None:
    assert shape_from_groups(SCALES, 256, 64, 8, group_size) == LinearShape(256, 64, expected)


def test_groups_of_one_fit_where_there_is_room() -> None:
    assert shape_from_groups(SCALES, 8, 64, 8, 1) == LinearShape(8, 64, 1)
    assert shape_from_groups(SCALES, 1, 64, 8, -1) == LinearShape(1, 64, 1)


@pytest.mark.parametrize(
    ("in_features", "group_size"), [(256, 16), (256, 0), (256, -2), (256, 96), (0, -1), (0, 32), (256, 512)]
)
def test_a_group_size_that_does_not(in_features: int, group_size: int) -> None:
    with pytest.raises(InvalidTensor, match="look at the group size"):
        shape_from_groups(SCALES, in_features, 64, 8, group_size)


def rows(*firsts: float) -> Tensor:
    """One row each, of which the first value may be 0 beside another that is not."""
    return torch.tensor([[first, 2 * first] for first in firsts])


def test_padding_is_taken_off_and_put_on() -> None:
    padded = padded_groups(rows(1, 2, 3), 5)
    assert padded.tolist() == rows(1, 2, 3, 0, 0).tolist()
    assert unpadded(padded, 3, "scales").tolist() == rows(1, 2, 3).tolist()
    assert unpadded_scales(padded, 3).tolist() == rows(1, 2, 3).tolist()
    assert used_groups(padded) == 3
    with pytest.raises(InvalidTensor, match="zeros holds 3 groups where the group size makes 2"):
        unpadded(padded, 2, "zeros")
    with pytest.raises(InvalidTensor, match="scales holds 3 groups where the group size makes 4"):
        unpadded_scales(padded, 4)
    with pytest.raises(InvalidTensor, match="scales holds 4 groups where the group size makes 5"):
        unpadded_scales(torch.tensor([[1.0, 1], [1, 0], [0, 1], [0, 0], [1, 1]]), 5)
