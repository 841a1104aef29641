"""`awq-rt warmup` and what it stands on: a backend that compiles at run time is asked to do it ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from builders import LAYOUTS, some_weights, write_layout
from click.testing import CliRunner, Result
from tiny import FAMILIES, build
from transformers import AutoConfig

from awq_rt import load, open_checkpoint, registry
from awq_rt.backend import CONTRACT, LinearSpec, Packed, Prepared
from awq_rt.checkpoint import Checkpoint
from awq_rt.cli import cli
from awq_rt.cli.warmup import COMMON_SHAPES
from awq_rt.devices import Device, Probe, Refusal
from awq_rt.registry import Plugin
from awq_rt.rtc import Builder, KernelStore, Program
from awq_rt.testing import hurtful_weight
from awq_rt.warmup import specs_of
from awq_rt.weights import AwqWeight

CPU = torch.device("cpu")


class FakeCompiler:
    version = "fake 1.0"

    def compile(self, program: Program) -> bytes:
        return str(program).encode()


class Compiling:
    """A backend whose kernels are a file a shape."""

    name, version, contract, priority = "compiling", "1.0", CONTRACT, 100
    kernels: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[LinearSpec, ...]] = []

    def probe(self) -> Probe:
        return Probe((Device("cpu", 0, "a processor", "cpu", "x", 0),))

    def supports(self, spec: LinearSpec, device: Device) -> Refusal | None:
        return Refusal("FAKE-001", "too wide", "narrow it") if spec.out_features > 60000 else None

    def warmup(self, specs: Sequence[LinearSpec], device: torch.device) -> Iterator[Prepared]:
        self.asked.append(tuple(specs))
        programs = [
            Program(((f"{s.in_features}x{s.out_features}x{s.group_size}.cu", ""),), (), str(s.dtype)) for s in specs
        ]
        builder = Builder(FakeCompiler(), KernelStore(self.folder))
        for done, built in enumerate(builder.build(programs), start=1):
            yield Prepared(str(built.program), built.compiled, done, len(programs))


@pytest.fixture
def compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiling]:
    """The only backend there is."""
    backend = Compiling(tmp_path / "kernels")
    plugin = Plugin("compiling", "nowhere", "1.0", backend, None)  # type: ignore[arg-type]
    monkeypatch.setattr(registry, "plugins", lambda: (plugin,))
    monkeypatch.setenv("AWQ_RT_CACHE", str(tmp_path))
    registry.device_for.cache_clear()
    yield backend
    registry.device_for.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shapes = {
        "model.layers.0.self_attn.q_proj": (256, 256, 64),
        "model.layers.0.self_attn.k_proj": (256, 64, 64),
        "model.layers.0.self_attn.v_proj": (256, 64, 64),
        "model.layers.0.mlp.gate_proj": (256, 512, 64),
        "model.layers.0.mlp.up_proj": (256, 512, 32),
        "model.layers.1.self_attn.q_proj": (256, 256, 64),
    }
    return write_layout(tmp_path / "model", some_weights(shapes), "gemm", quantization=None)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["warmup", *map(str, arguments)])


def sizes(specs: Sequence[LinearSpec]) -> set[tuple[int, int, int]]:
    return {(spec.in_features, spec.out_features, spec.group_size) for spec in specs}


def test_what_was_compiled_and_what_was_there_is_said(compiling: Compiling, folder: Path, tmp_path: Path) -> None:
    first, second = run(folder), run(folder)
    assert first.exit_code == second.exit_code == 0, first.output
    where = "kernels are ready for cpu a processor (x, 0 GiB)"
    count = len(compiling.asked[0])
    assert first.stdout.startswith(f"{count} {where}: {count} compiled, 0 from the cache in {tmp_path}, ")
    assert second.stdout.startswith(f"{count} {where}: 0 compiled, {count} from the cache in {tmp_path}, ")
    assert first.stderr == ""  # nobody looks


def test_linears_are_asked_for_alone_and_joined(compiling: Compiling, folder: Path) -> None:
    run(folder)
    (asked,) = compiling.asked
    assert sizes(asked) == {
        (256, 256, 64), (256, 64, 64), (256, 512, 64), (256, 512, 32),
        (256, 384, 64),  # q, k and v; gate and up have different groups
    }  # fmt: skip
    assert len(set(asked)) == len(asked)
    assert {spec.dtype for spec in asked} == {torch.float16}


def test_only_headers_are_read(compiling: Compiling, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    assert run(folder).exit_code == 0


@pytest.mark.parametrize(
    ("layout", "scale_dtype"),
    [*((layout, torch.float16) for layout in LAYOUTS), ("compressed-tensors", torch.bfloat16)],
)
def test_the_specs_are_those_that_loading_asks_for(tmp_path: Path, layout: str, scale_dtype: torch.dtype) -> None:
    """A kernel is compiled for scales and dtypes too: one that differs would be compiled while the model loads."""
    weights = some_weights(kind="symmetric" if layout == "marlin" else "random", scale_dtype=scale_dtype)
    checkpoint = open_checkpoint(write_layout(tmp_path, weights, layout))
    ahead = set(specs_of(checkpoint, torch.bfloat16, "auto"))
    assert {LinearSpec.of(checkpoint[name], torch.bfloat16) for name in checkpoint} <= ahead


def test_without_a_model_it_is_what_common_models_need(compiling: Compiling) -> None:
    assert run("--dtype", "bfloat16", "--kernel", "auto").exit_code == 0
    (asked,) = compiling.asked
    assert sizes(asked) == {(k, n, 128) for k, n in COMMON_SHAPES}
    assert {(spec.dtype, spec.scale_dtype) for spec in asked} == {(torch.bfloat16, torch.bfloat16)}


def test_a_forbidden_compile_names_what_is_missing(
    compiling: Compiling, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWQ_RT_NO_COMPILE", "1")
    result = run(folder)
    assert result.exit_code == 1
    for size in ("256x256", "256x384", "AWQ_RT_NO_COMPILE", "AWQ-RTC-002"):
        assert size in result.stderr


def test_a_refused_linear_ends_it_with_the_reason(compiling: Compiling, tmp_path: Path) -> None:
    weight = hurtful_weight("random", 8, 60008, 8)
    result = run(write_layout(tmp_path / "wide", {"wide": weight}, "compressed-tensors"))
    assert result.exit_code == 1
    assert "too wide; narrow it [FAKE-001]" in result.stderr


def test_a_backend_without_kernels_to_compile_has_nothing_to_do() -> None:
    result = run("--device", "cpu", "--backend", "reference")
    assert result.exit_code == 0
    assert result.stdout.startswith("nothing to compile: no backend for cpu")


@pytest.mark.parametrize("kernel", ["auto", "gemv", "gemm", "exllama"])
def test_the_cuda_backend_compiles_ahead_all_that_a_linear_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    awq_rt_cuda = pytest.importorskip("awq_rt_cuda", reason="awq-rt-cuda is not installed")
    from awq_rt_cuda import exllama, selection, tiled

    builder = Builder(FakeCompiler(), KernelStore(tmp_path))
    h100 = selection.Target(90, 132, 227 << 10, 228 << 10, 2048)
    for module in (tiled, exllama):
        monkeypatch.setattr(module, "target_of", lambda index: h100)
        monkeypatch.setattr(module, "builder", lambda: builder)
        module.plan.cache_clear()
    weight = hurtful_weight("random", 4096, 1024, 128, bias=True)
    spec = LinearSpec.of(weight, torch.float16, kernel)
    unfit = LinearSpec(30, 5, 30, torch.float16)
    prepared = list(awq_rt_cuda.backend.warmup([spec, spec, unfit], torch.device("cuda", 0)))
    assert [(each.done, each.compiled) for each in prepared] == [(i + 1, True) for i in range(len(prepared))]
    assert {each.total for each in prepared} == {len(prepared)}

    monkeypatch.setenv("AWQ_RT_NO_COMPILE", "1")
    layout = awq_rt_cuda.backend.pack(weight, spec, CPU).layout
    plan = (exllama if kernel == "exllama" else tiled).plan(layout, 0)
    Builder(FakeCompiler(), KernelStore(tmp_path)).machine_codes(plan.programs())  # in another process
    for module in (tiled, exllama):
        module.plan.cache_clear()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_loading_compiles_ahead_of_the_first_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Experts too, whose gate and up are one linear: what is compiled is what is packed."""
    from awq_rt_reference import ReferenceBackend

    asked: list[LinearSpec] = []
    packed: list[LinearSpec] = []

    class Ordered(ReferenceBackend):
        def warmup(self, specs: Sequence[LinearSpec], device: torch.device) -> Iterator[Prepared]:
            assert not packed
            asked.extend(specs)
            yield Prepared("the only kernel", compiled=True, done=1, total=1)

        def pack(self, weight: AwqWeight, spec: LinearSpec, device: torch.device) -> Packed:
            packed.append(spec)
            return super().pack(weight, spec, device)

    monkeypatch.setattr(registry, "plugins", lambda: (Plugin("reference", "nowhere", "1.0", Ordered(), None),))
    build(tmp_path, AutoConfig.for_model(family, **FAMILIES[family]))
    load(tmp_path, device="cpu", dtype="float16")
    assert packed
    assert set(packed) == set(asked)
