"""The doctor, the load-time self-test and the tripwire on a real GPU, with right kernels and with wrong ones.

Wrong are a copy's: of the plugin with a few characters of its device code changed, in the place of the installed one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, config_of

import awq_rt
from awq_rt.errors import NonFiniteOutput

TESTS = Path(__file__).resolve().parents[1]
ZERO_POINT = "(byte & 15u)"
"""In tile.cuh, how the zero point of a lane's lower column is read."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its groups are of 32, which no plugin's examination tries."""
    folder = tmp_path_factory.mktemp("llama")
    build(folder, config_of("llama"))
    return folder


def site_with_fault(folder: Path, zero_point: str) -> Path:
    """A folder with a copy of the plugin that reads a zero point as `zero_point` says."""
    import awq_rt_cuda

    shutil.copytree(Path(awq_rt_cuda.__file__).parent, folder / "awq_rt_cuda", ignore=shutil.ignore_patterns("*.pyc"))
    source = folder / "awq_rt_cuda" / "kernels" / "tile.cuh"
    text = source.read_text()
    assert text.count(ZERO_POINT) == 2  # for float16 and for bfloat16
    source.write_text(text.replace(ZERO_POINT, zero_point))
    return folder


def python(*arguments: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python process that looks for modules in `site` first, then where this one does."""
    path = os.pathsep.join(str(part) for part in (site, TESTS, *sys.path) if part)
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def doctor(*arguments: str, site: Path | None = None) -> dict[str, Any]:
    run = python("-c", "from awq_rt.cli import main; main()", "doctor", "--json", *arguments, site=site)
    answer: dict[str, Any] = json.loads(run.stdout)
    assert run.returncode == answer["exit_code"], run.stderr
    return answer


def test_the_doctor_finds_this_gpu_ready(llama: Path) -> None:
    answer = doctor("--strict", str(llama))
    assert answer["findings"] == []
    assert (answer["verdict"], answer["exit_code"]) == ("ready", 0)
    major, minor = torch.cuda.get_device_capability(0)
    said = f"{torch.cuda.get_device_name(0)}, sm_{major}{minor}, gemv/gemm/exllama, fp16/bf16, backend cuda"
    assert re.fullmatch(rf"(\d+ x )?{re.escape(said)}", answer["summary"])
    ran = [run for run in answer["kernels"] if run["backend"] == "cuda"]
    per_gpu = {(kernel, dtype) for kernel in ("auto", "gemv", "gemm", "exllama") for dtype in ("float16", "bfloat16")}
    assert {(run["kernel"], run["dtype"]) for run in ran} == per_gpu
    for run in ran:
        assert run["status"] == "right", run
        assert 0 < run["excess"] <= 1
        assert run["bandwidth_share"] > 0
        assert run["latency_us"] > 0
    assert answer["model"]["served"] == [["cuda", answer["model"]["linears"]]]
    assert answer["model"]["memory"]["device"] == "cuda:0"


def test_a_plugin_with_a_wrong_kernel_is_quarantined_before_it_serves(tmp_path: Path) -> None:
    site = site_with_fault(tmp_path, "(byte & 7u)")
    answer = doctor("--no-run", site=site)
    assert answer["verdict"] == "degraded"
    (plugin,) = [plugin for plugin in answer["plugins"] if plugin["name"] == "cuda"]
    assert plugin["refusal"]["code"] == "AWQ-BACKEND-013"
    assert "times the bound" in plugin["refusal"]["reason"]
    assert "AWQ-BACKEND-013" in {finding["code"] for finding in answer["findings"]}


LOAD = """
import json, sys, warnings
import torch, awq_rt
from awq_rt.linear import AwqLinear
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = awq_rt.load(sys.argv[1], device="cuda:0", dtype="float16", backend=sys.argv[2] or None)
tokens = torch.arange(3, 19, device="cuda:0")[None]
print(json.dumps({
    "served": sorted({m.backend_name for m in model.modules() if isinstance(m, AwqLinear)}),
    "warnings": [text for w in caught if "another backend serves it" in (text := str(w.message))],
    "logits": model(tokens).logits.float().tolist(),
}))
"""


def loaded(llama: Path, backend: str = "", site: Path | None = None) -> dict[str, Any]:
    run = python("-c", LOAD, str(llama), backend, site=site)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_a_kernel_that_is_wrong_for_one_group_size_gives_way_when_a_model_loads(llama: Path, tmp_path: Path) -> None:
    """The examination passes it: the fault is in groups of 32 alone. The linears of the model do not."""
    wrong = loaded(llama, site=site_with_fault(tmp_path, "(byte & (GROUP_SIZE == 32 ? 7u : 15u))"))
    assert wrong["served"] == ["reference"]
    (warning,) = wrong["warnings"]
    assert "AWQ-BACKEND-020" in warning
    assert "backend 'cuda' computes a linear of " in warning
    assert "times the bound; another backend serves it" in warning
    assert wrong["logits"] == loaded(llama, "reference")["logits"]


def test_right_kernels_serve_without_a_word(llama: Path) -> None:
    right = loaded(llama)
    assert (right["served"], right["warnings"]) == (["cuda"], [])


def test_a_wrong_kernel_that_is_pinned_is_an_error_and_not_an_answer(llama: Path, tmp_path: Path) -> None:
    site = site_with_fault(tmp_path, "(byte & (GROUP_SIZE == 32 ? 7u : 15u))")
    code = "import sys, awq_rt; awq_rt.load(sys.argv[1], device='cuda:0', dtype='float16', backend='cuda')"
    run = python("-W", "ignore", "-c", code, str(llama), site=site)
    assert run.returncode == 1
    assert "NoBackend" in run.stderr
    assert "[AWQ-BACKEND-020]" in run.stderr


@pytest.mark.parametrize(
    ("scale", "named"),
    [
        (30000.0, "model.layers.1.post_attention_layernorm (LlamaRMSNorm)"),
        (5000.0, "model.layers.1.mlp (LlamaMLP)"),  # what its linears give is finite; their product is not
    ],
)
def test_the_tripwire_names_the_module_that_overflows(
    llama: Path, monkeypatch: pytest.MonkeyPatch, scale: float, named: str
) -> None:
    monkeypatch.setenv("AWQ_RT_CHECK", "1")
    model = awq_rt.load(llama, device="cuda:0", dtype="float16")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(scale)
    with pytest.raises(NonFiniteOutput, match=re.escape(named)):
        model.generate(torch.tensor([[3, 5, 7, 11]], device="cuda:0"), max_new_tokens=2, do_sample=False)
