"""A 4-bit model as one graph: torch.compile without a break, torch.export, and opcheck of every operator."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, config_of
from torch import Tensor, nn

import awq_rt
from awq_rt import registry
from awq_rt.backend import LinearSpec
from awq_rt.devices import Device
from awq_rt.linear import AwqLinear
from awq_rt.testing import hurtful_weight

ROOT = Path(__file__).resolve().parents[1]
CODE = (".py", ".cpp", ".cu", ".inc", ".h")
TOKENS = torch.arange(3, 35).view(2, 16)
FAMILIES = ("llama", "qwen3_moe")
CPU = Device("cpu", 0, "cpu", "cpu", "unknown", 0)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    build(folder, config_of(request.param))
    return awq_rt.load(folder)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


class Graphs:
    """A compiler that runs what it is given, and counts."""

    def __init__(self) -> None:
        self.products: list[int] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.products.append(sum(node.target is torch.ops.awq_rt.linear.default for node in graph.graph.nodes))
        return graph.forward


def linears(model: Any) -> int:
    return sum(isinstance(module, AwqLinear) for module in model.modules())


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens, use_cache=False).logits
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal up to the order of float32 additions: experts are summed in another one under a compiler."""
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_a_model_is_one_graph_with_every_product_in_it(model: Any) -> None:
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    assert_close(logits(compiled), logits(model))
    assert graphs.products == [linears(model)]


def test_no_more_graphs_are_made_once_two_lengths_were_seen(model: Any) -> None:
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    for length in (16, 5, 9, 13, 2):
        tokens = TOKENS[:, :length].contiguous()  # a view's strides would be another graph
        assert_close(logits(compiled, tokens), logits(model, tokens))
    assert len(graphs.products) <= 2


def test_gradients_pass_through_a_compiled_model(model: Any) -> None:
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        embeddings = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        run(inputs_embeds=embeddings, use_cache=False).logits.square().sum().backward()
        gradients.append(embeddings.grad)
    assert_close(gradients[1], gradients[0])


@pytest.mark.filterwarnings("ignore:No complete tensor found in the group:UserWarning")  # joined weights are views
def test_a_model_is_exported_saved_and_loaded(model: Any) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            found: Tensor = self.model(tokens, use_cache=False).logits
            return found

    with torch.no_grad():
        program = torch.export.export(Logits(), (TOKENS,), strict=False)
    products = [node for node in program.graph.nodes if node.target is torch.ops.awq_rt.linear.default]
    assert len(products) == linears(model)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_close(torch.export.load(file).module()(TOKENS), logits(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor compiles C++ on a CPU")
def test_inductor_compiles_what_is_around_a_product() -> None:
    linear = AwqLinear(64, 128, 32)
    linear.bind(hurtful_weight("random", 64, 128, 32, seed=1), torch.float32, "cpu")
    block = nn.Sequential(nn.LayerNorm(64), linear, nn.GELU())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-5, atol=1e-5)


def cpu_backends() -> list[str]:
    spec = LinearSpec(64, 128, 32, torch.float32)
    return [backend.name for backend in registry.backends() if backend.supports(spec, CPU) is None]


def of_linear(linear: AwqLinear, backend: str) -> tuple[Any, ...]:
    x = torch.randn(2, 3, linear.in_features, generator=torch.Generator().manual_seed(0)).to(linear.weight.dtype)
    return x.requires_grad_(), list(linear.packed.tensors), backend, linear.layout, linear.out_features


def of_gradient(linear: AwqLinear, backend: str) -> tuple[Any, ...]:
    grad = torch.randn(2, 3, linear.out_features, generator=torch.Generator().manual_seed(1)).to(linear.weight.dtype)
    return grad, list(linear.packed.tensors), backend, linear.layout, linear.in_features


ARGUMENTS: dict[str, Callable[[AwqLinear, str], tuple[Any, ...]]] = {
    "awq_rt::linear": of_linear,
    "awq_rt::linear_grad": of_gradient,
}
"""What each operator is checked with."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck_passes_for_every_operator_on_every_backend(name: str, backend: str, dtype: torch.dtype) -> None:
    linear = AwqLinear(64, 128, 32)
    linear.bind(hurtful_weight("random", 64, 128, 32, bias=True, seed=1), dtype, "cpu", backend=backend)
    namespace, operator = name.split("::")
    packet = getattr(getattr(torch.ops, namespace), operator)
    torch.library.opcheck(packet.default, ARGUMENTS[name](linear, backend))


def test_there_is_no_operator_that_opcheck_above_does_not_see() -> None:
    """Not in torch's dispatcher, nor in a source that was not imported here.

    The fused operators are functions that the decoder calls, and no operators of the dispatcher.
    """
    found = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("awq_rt")}
    sources = [path for folder in ("awq_rt", "backends") for path in (ROOT / folder).rglob("*") if path.suffix in CODE]
    for source in sources:
        text = source.read_text(encoding="utf-8")
        assert not re.search(r"TORCH_LIBRARY|library\.Library\(|library\.define\(", text), source
        found |= set(re.findall(r"(?:custom_op|triton_op)\(\s*\"([^\"]+)\"", text))
    assert found == ARGUMENTS.keys()
