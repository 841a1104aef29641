"""The fused operators on every target: the shared kernels, their host half, the fake HIP runtime and the simulator.

Compiled and simulated, not run on hardware. What is allowed is derived in tests/exact_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import exact_ops
import pytest
import torch
from amdsim import TARGETS
from amdsim.toolchain import Clang
from exact_ops import Layer, heads_of, layer, placed

pytest.importorskip("awq_rt_rocm", reason="awq-rt-rocm is not installed")
pytest.importorskip("ziglang", reason="ziglang is not installed, which builds the fake HIP runtime")
import fake_hip
import simulated
from awq_rt_rocm import backend
from awq_rt_rocm.launcher import HipLauncher
from simulated import ARCHITECTURES, Machine
from torch import Tensor

from awq_rt.kernels.launcher import Defines
from awq_rt.kernels.operators import Operators
from awq_rt.ops import AttentionSpec
from awq_rt.rtc import Program

DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def machine(clang: Clang, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with simulated.machine(clang, tmp_path_factory.mktemp("rocm")) as here:
        yield here


@pytest.fixture(params=ARCHITECTURES)
def target(machine: Machine, request: pytest.FixtureRequest) -> Machine:
    machine.index = ARCHITECTURES.index(request.param)
    return machine


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def dtype_of(target: Machine, flip: int = 0) -> torch.dtype:
    """One on half of the targets, the other on the others: they differ in the wave and in the instructions."""
    return DTYPES[(target.index + flip) % 2]


def call(target: Machine, name: str, *arguments: object, ops: Operators | None = None) -> Tensor:
    """The result of an operator (of `ops`, by default the backend's own); it must have been served."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    for given in arguments:
        fields = ("cos", "sin", "q_norm", "k_norm", "slopes")
        tensors += [t for field in fields if isinstance(t := getattr(given, field, None), Tensor)]
    with fake_hip.watched(target.hip, *tensors):
        result = (backend.ops if ops is None else ops.by_name)[name](*arguments)
    assert isinstance(result, Tensor), name
    return result


@pytest.mark.parametrize(("hidden", "rows", "add"), [(64, 1, False), (1032, 2, True), (8, 3, True)])
def test_norms(target: Machine, hidden: int, rows: int, add: bool) -> None:
    dtype = dtype_of(target, add)
    x, weight = normal(rows, hidden, dtype=dtype), normal(hidden)
    if not add:
        assert exact_ops.rms_norm(x, weight, 1e-5).excess(call(target, "rms_norm", x, weight, 1e-5)) <= 1
        return
    residual = normal(rows, hidden, dtype=dtype, seed=1)
    summed = residual + x
    y = call(target, "add_rms_norm", x, residual, weight, 1e-5)
    assert torch.equal(residual, summed)
    assert exact_ops.rms_norm(summed, weight, 1e-5).excess(y) <= 1


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_activations(target: Machine, activation: str) -> None:
    gate_up = normal(3, 2 * 264, dtype=dtype_of(target, len(activation))) * 4
    gate_up[0, :8] = torch.tensor([0.0, -0.0, 1e-6, -1e-6, 11.0, -11.0, 80.0, -80.0])
    y = call(target, "gated_activation", gate_up, activation)
    assert exact_ops.gated_activation(gate_up, activation).excess(y) <= 1


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 1288, 350), (2, 1024, 75), (3, 264, 301)])
def test_the_linear_that_gives_logits(target: Machine, rows: int, depth: int, columns: int) -> None:
    dtype = dtype_of(target, rows == 2)
    x, weight = normal(rows, depth, dtype=dtype), normal(columns, depth, dtype=dtype)
    y = call(target, "dense_linear", x, weight, None)
    assert exact_ops.dense_linear(x, weight).excess(y) <= 1
    weight[-1, -1] += 0.5  # of one column; the last element of its sum
    assert exact_ops.dense_linear(x, weight).excess(y) > 1


def test_the_largest_logit(target: Machine) -> None:
    logits = normal(4, 1000, dtype=dtype_of(target))
    logits[0, 7] = logits[0, 993] = 9.0  # the first of equals
    logits[1, 400], logits[1, 3] = torch.nan, torch.inf
    logits[2] = -torch.inf
    logits[3] = -logits[3].abs() - 1
    assert torch.equal(call(target, "argmax", logits), logits.argmax(dim=-1))


ROTATIONS = {
    "part": AttentionSpec(3, 1, 80, 0.1, 32, norm_eps=1e-6),
    "interleaved": AttentionSpec(2, 2, 256, 0.1, 64, interleaved=True),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_rope_append(target: Machine, name: str) -> None:
    spec, dtype, count = ROTATIONS[name], dtype_of(target), 5
    made = layer(spec, [4, 0], 20, dtype)
    qkv = normal(2, count, (spec.heads + 2 * spec.kv_heads) * spec.head_dim, dtype=dtype)
    q = call(target, "rope_append", qkv, made.positions, made.k_cache, made.v_cache, spec, made.tensors)
    positions = made.positions[:, None] + torch.arange(count)
    raw = heads_of(qkv, spec)
    stored = [torch.stack([c[row, :, positions[row].long()] for row in range(2)]) for c in (made.k_cache, made.v_cache)]
    for found, given, weight in ((q, raw[0], made.tensors.q_norm), (stored[0], raw[1], made.tensors.k_norm)):
        exact = placed(given, positions, spec, made.tensors, weight)
        assert bool(((found.double() - exact.value).abs() <= exact.limit).all())
    assert torch.equal(stored[1], raw[2])


CASES = {
    "one head a head": (AttentionSpec(2, 2, 128, 0.09, 128), [300, 5]),
    "two heads a head, partly rotated": (AttentionSpec(4, 2, 80, 0.1, 32), [40, 130]),
    "wide, window and softcap": (AttentionSpec(2, 1, 256, 0.06, 256, window=140, softcap=20.0), [290]),
    "interleaved, with slopes": (AttentionSpec(1, 1, 64, 0.06, 32, interleaved=True), [150]),
    "four heads a head": (AttentionSpec(4, 1, 128, 0.09, 128), [400]),
    "five heads a head, normed": (AttentionSpec(5, 1, 80, 0.1, 80, norm_eps=1e-6), [180]),
    "the first token": (AttentionSpec(4, 1, 64, 0.09, 64), [0]),
}


def attend(target: Machine, made: Layer) -> Tensor:
    return call(target, "decode_attention", *made.arguments)


@pytest.mark.parametrize("name", CASES)
def test_attention(target: Machine, name: str) -> None:
    spec, positions = CASES[name]
    made = layer(spec, positions, max(positions) + 9, dtype_of(target, len(name)), slopes="slopes" in name)
    before = len(target.hip.launched)
    assert made.excess(attend(target, made)) <= 1
    names = [launched for launched, _, _ in target.hip.launched[before:]]
    assert names[0] == "fused_attention"
    assert names[1:] in ([], ["fused_attention_sum"])


def test_a_wrong_layer_is_outside_the_limit(target: Machine) -> None:
    spec, positions = CASES["interleaved, with slopes"]
    made = layer(spec, positions, max(positions) + 9, torch.float16)
    for defect in (replace(spec, interleaved=False), replace(spec, scale=spec.scale * 1.02), replace(spec, window=149)):
        assert made.excess(attend(target, replace(made, spec=defect))) > 1


@dataclass(frozen=True, slots=True)
class Faulty(HipLauncher):
    """Compiles the kernels with one passage replaced."""

    old: str
    new: str

    def program(self, name: str, defines: Defines, device_index: int) -> Program:
        right = HipLauncher.program(self, name, defines, device_index)
        if name == "fused_attention_sum":  # what is replaced is in the kernel that it follows
            return right
        assert any(self.old in text for _, text in right.sources), f"{self.old!r} does not occur any more"
        return replace(right, sources=tuple((file, text.replace(self.old, self.new)) for file, text in right.sources))


def norm_excess(target: Machine, ops: Operators) -> float:
    x, residual, weight = (normal(2, 1032, dtype=torch.float16, seed=seed) for seed in (0, 1, 2))
    summed, weight = residual + x, weight[0].float()
    y = call(target, "add_rms_norm", x, residual, weight, 1e-5, ops=ops)
    return exact_ops.rms_norm(summed, weight, 1e-5).excess(y) if torch.equal(residual, summed) else torch.inf


def gated_excess(target: Machine, ops: Operators) -> float:
    gate_up = normal(2, 2 * 264, dtype=torch.float16) * 4
    return max(
        exact_ops.gated_activation(gate_up, name).excess(call(target, "gated_activation", gate_up, name, ops=ops))
        for name in ("silu", "gelu")
    )


def logits_excess(target: Machine, ops: Operators) -> float:
    x, weight = normal(2, 1288, dtype=torch.float16), normal(75, 1288, dtype=torch.float16)
    return exact_ops.dense_linear(x, weight).excess(call(target, "dense_linear", x, weight, None, ops=ops))


def argmax_excess(target: Machine, ops: Operators) -> float:
    logits = normal(2, 1000, dtype=torch.float16)
    logits[0, 7] = logits[0, 993] = 9.0
    logits[1] = -logits[1].abs() - 1
    return 0.0 if torch.equal(call(target, "argmax", logits, ops=ops), logits.argmax(dim=-1)) else torch.inf


def attention_excess(target: Machine, ops: Operators) -> float:
    spec, positions = AttentionSpec(2, 1, 64, 0.12, 64, window=140), [150]
    made = layer(spec, positions, 160, torch.float16)
    return made.excess(call(target, "decode_attention", *made.arguments, ops=ops))


FAULTS: dict[str, tuple[Callable[[Machine, Operators], float], str, str]] = {
    "a norm without its barrier": (norm_excess, "    __syncthreads();\n    sum = sums[0];", "    sum = sums[0];"),
    "a norm that keeps its sum": (norm_excess, "store_8(residual + row + column(i), words[i]);", ";"),
    "a norm of the wrong length": (norm_excess, "sum * (1.0f / kHidden)", "sum * (1.0f / (kHidden + 8))"),
    "a norm in waves of another size": (norm_excess, "kLanes = kWave", "kLanes = 96 - kWave"),
    "lanes that exchange with others": (norm_excess, "kXor2 = 0x4E", "kXor2 = 0xB1"),
    "gate for up": (gated_excess, "load_8(from + kVectors * 8)", "load_8(from)"),
    "a sigmoid to another base": (gated_excess, "exp2_of(-kLog2E * z)", "exp2_of(-1.4375f * z)"),
    "one coefficient of erf": (gated_excess, "0.38528362f", "0.38028362f"),
    "the end of the depth": (logits_excess, "kWhole = kDepth % kTurn == 0", "kWhole = true"),
    "a column beyond the last": (logits_excess, "r < rows && column + c < n", "r < rows"),
    "the last of equal logits": (argmax_excess, "value == best && at < index", "value == best && at > index"),
    "negative logits in reverse": (argmax_excess, "~bits & 0xFFFF : bits", "bits : bits"),
    "attention without its barrier": (attention_excess, "    __syncthreads();\n    add_up", "    add_up"),
    "a position too many": (attention_excess, "position < share.end ? score : kUnseen", "score"),
    "a window too wide": (attention_excess, "query - window + 1", "query - window"),
    "shares that are not scaled anew": (attention_excess, "sums[g][j] *= shrink;", "sums[g][j] *= 1.0f;"),
    "parts in another order": (attention_excess, "parts + part) * kPartStride", "parts + part / 2) * kPartStride"),
    "a rotation the other way": (attention_excess, "- b[j] * angles.sin[j]", "+ b[j] * angles.sin[j]"),
    "the new key is not stored": (attention_excess, "store_8(k_cache + slot + place.first, k_words[0]);", ";"),
    "a team that leaves out a lane": (attention_excess, "mask < kTeam; mask *= 2", "mask < kTeam / 2; mask *= 2"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_put_into_the_kernels_are_noticed(machine: Machine, name: str) -> None:
    excess, old, new = FAULTS[name]
    machine.index = list(FAULTS).index(name) % len(TARGETS)
    try:
        assert not excess(machine, Operators(Faulty(old, new))) <= 1
    except fake_hip.WrongCall:
        assert machine.hip.wrong


@pytest.mark.parametrize("check", [norm_excess, gated_excess, logits_excess, argmax_excess, attention_excess])
def test_the_kernels_without_a_fault_pass(machine: Machine, check: Callable[[Machine, Operators], float]) -> None:
    for machine.index in (0, 4):
        assert check(machine, Operators(HipLauncher())) <= 1


def test_what_a_decoder_needs_is_compiled_before_its_first_step(machine: Machine) -> None:
    machine.index = 0
    spec = AttentionSpec(2, 1, 64, 0.12, 64)
    device = torch.device("cpu")
    backend.prepare_ops(torch.float16, device, [64], [(64, "silu")], [(spec, False)])
    names = {
        program.name
        for program in Operators(HipLauncher()).programs(torch.float16, 0, [64], [(64, "silu")], [(spec, False)])
    }
    assert names == {
        f"fused_{name}.cu" for name in ("norm", "gated", "rope", "attention", "attention_sum", "logits", "argmax")
    }
    unserved = AttentionSpec(2, 1, 32, 0.12, 32)  # heads of 32 features go to torch
    assert len(Operators(HipLauncher()).programs(torch.float16, 0, [], [], [(unserved, False)])) == 1
