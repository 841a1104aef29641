"""What of the vLLM plugin needs no vLLM: the tensors that it allots, and what it makes of them when vLLM has cut them.

`make test-vllm` serves a model with it.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from torch import Tensor

from awq_rt.conversion import stored_tensors as written
from awq_rt.errors import InvalidTensor
from awq_rt.formats import LinearShape
from awq_rt.parallel.plan import Cut
from awq_rt.parallel.sharding import part_of
from awq_rt.rounding import round_to_nearest
from awq_rt.vllm_plugin import stored
from awq_rt.vllm_plugin.stored import SCALES, SERVED, WORD, StoredTensor, canonical, check, stored_tensors
from awq_rt.weights import AwqWeight

SHAPE = LinearShape(256, 64, 32)


def weight_of(dtype: torch.dtype = torch.float16) -> AwqWeight:
    dense = torch.randn(SHAPE.out_features, SHAPE.in_features, generator=torch.Generator().manual_seed(0))
    found = round_to_nearest(dense, SHAPE.group_size)
    return AwqWeight(found.codes, found.zeros, found.scales.to(dtype))


def loaded(tensor: StoredTensor, value: Tensor) -> Tensor:
    """`value`, read from a file, in the memory that `tensor` describes: what vLLM's loader does."""
    assert tuple(value.shape) == tensor.shape
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(value)


@pytest.mark.parametrize("layout", SERVED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_linear_is_read_with_its_scales_exactly(layout: str, dtype: torch.dtype) -> None:
    weight = weight_of(dtype)
    values = written(weight, layout)
    tensors = stored_tensors(layout, SHAPE, symmetric=False)
    assert {tensor.suffix for tensor in tensors} == set(values)
    held = {tensor.suffix: loaded(tensor, values[tensor.suffix]) for tensor in tensors}
    found = canonical(layout, SHAPE, held)
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.zeros, weight.zeros)
    assert torch.equal(found.scales.float(), weight.scales.float())


def test_scales_of_float32_stay_what_they_are() -> None:
    scales = torch.tensor([[1.0, 1.0 + 2**-20]])
    assert stored.narrowed(scales).dtype == torch.float32
    assert stored.narrowed(scales[:, :1]).dtype == torch.float16
    assert stored.narrowed(torch.tensor([[2.0**100]])).dtype == torch.bfloat16  # past float16's range


def narrowed(tensor: StoredTensor, value: Tensor, dim: int | None, first: int, count: int) -> Tensor:
    """The part that vLLM's loader copies: `first` and `count` in features of one kind, in words where 8 are one."""
    if dim is None:
        return value
    if tensor.dtype == SCALES or dim != tensor.packed_dim:
        return value.narrow(dim, first, count)
    return value.narrow(dim, first // WORD, count // WORD)


@pytest.mark.parametrize("layout", SERVED)
def test_the_parts_that_vllm_cuts_are_parts_of_the_weight(layout: str) -> None:
    weight = weight_of()
    values = written(weight, layout)
    half = LinearShape(SHAPE.in_features // 2, SHAPE.out_features, SHAPE.group_size)
    rows = {}
    for tensor in stored_tensors(layout, half, symmetric=False):
        packs_inputs = tensor.packed_dim is not None and tensor.packed_dim == tensor.in_dim
        by_group = tensor.suffix not in ("qweight", "weight_packed")
        count = half.groups if by_group else half.in_features // (WORD if packs_inputs else 1)
        value = values[tensor.suffix]
        rows[tensor.suffix] = loaded(
            tensor, value if tensor.in_dim is None else value.narrow(tensor.in_dim, count, count)
        )
    expected = part_of(weight, Cut(rows=slice(half.in_features, SHAPE.in_features)), rank=1)
    if layout == "compressed-tensors":
        rows["weight_shape"] = torch.tensor([half.out_features, half.in_features])
    assert canonical(layout, half, rows).equal(expected)

    slim = LinearShape(SHAPE.in_features, SHAPE.out_features // 2, SHAPE.group_size)
    columns = {
        tensor.suffix: loaded(
            tensor, narrowed(tensor, values[tensor.suffix], tensor.out_dim, slim.out_features, slim.out_features)
        )
        for tensor in stored_tensors(layout, slim, symmetric=False)
    }
    expected = part_of(weight, Cut(columns=(slice(slim.out_features, SHAPE.out_features),)), rank=1)
    assert canonical(layout, slim, columns).equal(expected)


@pytest.mark.parametrize("shape", [LinearShape(48, 64, 32), LinearShape(64, 60, 32)])
def test_a_part_that_ends_inside_a_group_or_a_word_is_refused(shape: LinearShape) -> None:
    check("whole", SHAPE)
    with pytest.raises(InvalidTensor, match="smaller --tensor-parallel-size"):
        check("model.layers.0.mlp.down_proj", shape)


def test_vllm_finds_the_plugin_and_only_vllm_loads_it() -> None:
    (found,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "awq_rt"]
    assert found.value == "awq_rt.vllm_plugin:register"
    code = "import sys, awq_rt.vllm_plugin; assert 'vllm' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
