"""A model cut over two processes computes what it does in one; what cannot be cut is refused with a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import torch
from parallel_worker import GREEDY, PROMPT, SAMPLED, packed_bytes
from tiny import GROUP_SIZE, build, config_of
from torch import Tensor
from transformers import AutoModelForCausalLM

import awq_rt
from awq_rt.checkpoint import Checkpoint, open_checkpoint
from awq_rt.errors import CannotShard, InvalidConfig, NotLaunched, UnsupportedDevice
from awq_rt.fusion.verification import ROUNDINGS
from awq_rt.models.placement import Placement, place
from awq_rt.parallel.plan import Plan, plan
from awq_rt.parallel.sharding import ShardedCheckpoint, part_of

PROCESSES = 2
LIMIT_S = 240

UNEVEN = {  # three heads of k and v, five groups of the MLP: the processes' parts differ
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "intermediate_size": 5 * GROUP_SIZE,
    "vocab_size": 129,
    "attention_bias": True,
    "mlp_bias": True,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),  # biases, and a head that is the embedding
    "qwen3": ("qwen3", {}),  # norms of q and k
    "gemma2": ("gemma2", {}),  # norms behind attention and MLP
    "mixtral": ("mixtral", {}),  # experts
    "uneven": ("llama", UNEVEN),
}


def tiny_config(name: str) -> Any:
    family, changes = CASES[name]
    config = config_of(family)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left what they computed of every case."""
    folder = tmp_path_factory.mktemp("parallel")
    for name in CASES:
        build(folder / name, tiny_config(name))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*launch, parallel_worker.__file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def of_both(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def within_rounding(found: Tensor, expected: Tensor) -> bool:
    """Whether logits differ by no more than sums in another order do: `fusion.verification` derives the bound."""
    limit = ROUNDINGS * torch.finfo(torch.float32).eps / 2
    return bool((found - expected).norm() <= limit * expected.norm())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does(processes: Path, name: str) -> None:
    whole = awq_rt.load(processes / name, device="cpu", fuse=False)
    with torch.no_grad():
        logits = whole(PROMPT).logits
    tokens = whole.generate(PROMPT, **GREEDY)
    for found in of_both(processes, name):
        for way in ("plain", "fused"):
            assert within_rounding(found[f"{way} logits"], logits)
            assert found[f"{way} tokens"].tolist() == tokens.tolist()
        assert "2 layers fused" in found["fused fusion"]
        assert found["class"] == type(whole).__name__


@pytest.mark.parametrize("name", CASES)
def test_all_processes_draw_the_tokens_of_the_first(processes: Path, name: str) -> None:
    first, second = of_both(processes, name)
    torch.manual_seed(0)
    expected = awq_rt.load(processes / name, device="cpu", fuse=False).generate(PROMPT, **SAMPLED)
    for way in ("plain sampled", "fused sampled"):
        assert first[way].tolist() == second[way].tolist()
    assert first["plain sampled"].tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_each_process_packs_its_part_alone(processes: Path, name: str) -> None:
    whole = packed_bytes(awq_rt.load(processes / name, device="cpu", fuse=False))
    assert [found["bytes"] for found in of_both(processes, name)] == [whole // 2, whole // 2]


def test_a_bias_that_is_added_twice_is_outside_the_bound(processes: Path) -> None:
    with torch.no_grad():
        expected = awq_rt.load(processes / "uneven", device="cpu", fuse=False)(PROMPT).logits
    for found in of_both(processes, "defect"):
        assert not within_rounding(found, expected)


def test_what_processes_cannot_do_together_is_refused_in_each(processes: Path) -> None:
    for found in of_both(processes, "refusals"):
        assert "InvalidInput: generate was called with other arguments in process 1" in found["prompts"]
        assert "InvalidInput: generate was called with other arguments in process 1" in found["settings"]
        assert "NotImplementedError: max_time" in found["time"]
        assert "NotImplementedError: a model loaded with tp_plan holds" in found["saving"]
        assert "NotImplementedError: gradients do not pass" in found["training"]
        assert "UnsupportedDevice: device 'cpu:0' was given with tp_plan" in found["device"]
        assert "UnsupportedDevice: tp_plan and device_map 'auto' were both given" in found["both"]
        assert "InvalidConfig: tp_plan 'colwise' is unknown" in found["plan"]


def test_a_process_that_ends_is_an_error_in_the_others(processes: Path) -> None:
    said = torch.load(processes / "loss.0.pt", weights_only=True)
    assert said.startswith("PeerLost: process 0 has lost another process of the model")
    assert "[AWQ-PARALLEL-003]" in said


def test_without_torchrun_the_message_says_how_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "model", config_of("llama"))
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(NotLaunched, match="torchrun --nproc-per-node=2"):
        awq_rt.load(tmp_path / "model", device="cpu", tp_plan="auto")
    with pytest.raises(InvalidConfig, match="'auto' cuts a model"):
        awq_rt.load(tmp_path / "model", tp_plan="rowwise")
    with pytest.raises(UnsupportedDevice, match="give one"):
        awq_rt.load(tmp_path / "model", tp_plan="auto", device_map="auto")


def planned(folder: Path, config: Any, rank: int, size: int) -> tuple[Plan, Checkpoint]:
    """The plan of process `rank` of `size` for a new checkpoint of `config`, without any process."""
    if not folder.exists():
        build(folder, config)
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    placement: Placement = place(model, checkpoint)
    return plan(model, placement, checkpoint, rank, size), checkpoint


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 2])
def test_the_parts_of_all_processes_are_the_whole(tmp_path: Path, name: str, size: int) -> None:
    plans = [planned(tmp_path / name, tiny_config(name), rank, size) for rank in range(size)]
    checkpoint = plans[0][1]
    assert plans[0][0].cuts
    for linear in plans[0][0].cuts:
        weight = checkpoint[linear]
        cuts = [found.cuts[linear] for found, _ in plans]
        parts = [part_of(weight, cut, rank) for rank, cut in enumerate(cuts)]
        if cuts[0].rows is not None:
            assert torch.equal(torch.cat([part.codes for part in parts]), weight.codes)
            assert torch.equal(torch.cat([part.scales for part in parts]), weight.scales)
            assert [part.bias is None for part in parts] == [weight.bias is None, *[True] * (size - 1)]
        else:
            assert torch.equal(torch.cat([part.codes for part in parts], dim=1), weight.codes)
            assert torch.equal(torch.cat([part.zeros for part in parts], dim=1), weight.zeros)
        assert {part.group_size for part in parts} == {weight.group_size}


@pytest.mark.parametrize("layout", ["gemm", "compressed-tensors", "gemv"])
@pytest.mark.parametrize("name", ["mixtral", "uneven"])
def test_a_part_that_is_read_alone_is_a_part_of_the_whole(tmp_path: Path, name: str, layout: str) -> None:
    build(tmp_path / "model", tiny_config(name), layout=layout)
    for rank in range(PROCESSES):
        found, checkpoint = planned(tmp_path / "model", tiny_config(name), rank, PROCESSES)
        local = ShardedCheckpoint(checkpoint, found, rank)
        for linear, cut in found.cuts.items():
            part = local.read(linear)
            assert part.equal(part_of(checkpoint[linear], cut, rank))
            stored = local.linears[linear]
            assert (stored.in_features, stored.out_features) == (part.in_features, part.out_features)
            assert stored.bias == (part.bias is not None)


def test_more_processes_than_heads_or_groups_are_refused_with_the_number_that_fits(tmp_path: Path) -> None:
    with pytest.raises(CannotShard, match=r"can be cut into 2 parts at most.*there are 3 processes; start 1 to 2"):
        planned(tmp_path / "model", config_of("llama"), 0, 3)


def test_groups_that_end_inside_a_head_limit_the_parts(tmp_path: Path) -> None:
    config = config_of("llama")
    config.head_dim = 24  # two heads of q share one of k and v, which is 48 features; groups have 32
    with pytest.raises(CannotShard, match="into 1 parts at most"):
        planned(tmp_path / "model", config, 0, 2)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("phi3", "cuts model.layers.0.self_attn.o_proj by 'rowwise_split_input'"),
        ("opt", "transformers has no tensor-parallel plan for OPTForCausalLM; use device_map='auto'"),
    ],
)
def test_architectures_that_are_cut_otherwise_are_refused(tmp_path: Path, family: str, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        planned(tmp_path / "model", config_of(family), 0, 2)


def test_a_block_with_a_dense_linear_is_whole_in_every_process(tmp_path: Path) -> None:
    from tiny import packable

    config = config_of("llama")
    build(tmp_path / "model", config, choose=lambda name, t: packable(name, t) and "v_proj" not in name)
    found, _ = planned(tmp_path / "model", config, 1, 2)
    assert not any("self_attn" in name for name in found.cuts)
    assert {name.rpartition(".")[2] for name in found.cuts} == {"gate_proj", "up_proj", "down_proj"}
