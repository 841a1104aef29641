"""What backends share: the layout's words, and the form that takes any shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from awq_rt.backend import LinearSpec
from awq_rt.packing import SCALE_KINDS, Kind, Layout, rows
from awq_rt.testing import excess, hurtful_weight


@pytest.mark.parametrize("bias_dtype", [None, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layout_is_read_as_it_was_written(dtype: torch.dtype, bias_dtype: torch.dtype | None) -> None:
    layout = Layout("tiles", 4096, 11008, 128, dtype, torch.float32, bias_dtype, "auto")
    assert Layout.parse(str(layout)) == layout


def test_a_layout_says_what_was_packed() -> None:
    weight = hurtful_weight("random", 256, 24, 64, scale_dtype=torch.bfloat16, bias=True)
    spec = LinearSpec.of(weight, torch.float16, "gemm")
    layout = Layout.of("tiles", weight, spec)
    assert str(layout) == "tiles 256 24 64 float16 bfloat16 bfloat16 gemm"
    assert Layout.expected("tiles", spec) == replace(layout, bias_dtype=None)


def test_a_kind_is_what_device_code_is_told() -> None:
    layout = Layout("tiles", 256, 24, 96, torch.bfloat16, torch.float32, None, "auto")
    defines = {"ACTIVATION_HALF": 0, "SCALE_KIND": SCALE_KINDS[torch.float32], "GROUP_SIZE": 32}
    assert Kind.of(layout, 32).defines() == defines


@pytest.mark.parametrize(("k", "n", "group_size"), [(30, 5, 30), (44, 7, 11), (256, 24, 64), (7, 1, 1)])
@pytest.mark.parametrize("kind", ["random", "extreme zeros"])
def test_rows_take_any_shape_and_give_it_back(kind: str, k: int, n: int, group_size: int) -> None:
    for bias in (False, True):
        weight = hurtful_weight(kind, k, n, group_size, bias=bias)
        packed = rows.pack(weight)
        assert packed.layout == rows.PREFIX
        assert rows.unpack(packed).equal(weight)
        x = torch.randn(3, k, generator=torch.Generator().manual_seed(0)).half()
        assert excess(rows.linear(x, packed), x, weight) <= 1


def test_a_wrong_zero_point_in_rows_is_seen() -> None:
    weight = hurtful_weight("random", 44, 7, 11)
    zeros = weight.zeros.clone()
    zeros[2, 3] ^= 1
    x = torch.ones(1, 44).half()
    assert excess(rows.linear(x, rows.pack(replace(weight, zeros=zeros))), x, weight) > 1
