"""Finding plugins, trusting them or not, and choosing one."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plugins.folders import STRANGER, install, write_metadata, write_plugin

from awq_rt import devices, registry
from awq_rt.backend import LinearSpec
from awq_rt.devices import Device, Probe, Refusal
from awq_rt.errors import (
    BackendQuarantined,
    NoBackend,
    UnknownBackend,
    UnknownKernel,
    UnsupportedDevice,
)
from awq_rt.linear import AwqLinear
from awq_rt.testing import excess, hurtful_weight

CPU = Device("cpu", 0, "a processor", "cpu", "x86_64", 2**30)
SPEC = LinearSpec(256, 64, 128, torch.float32)
GPU = Device("cuda", 0, "Some GPU", "nvidia", "sm_90", 2**34, 32, "550.1")

BROKEN = {
    "raises": ("raise RuntimeError('no luck')\n", "AWQ-BACKEND-010", "RuntimeError: no luck"),
    "exits": ("import os\nos._exit(3)\n", "AWQ-BACKEND-012", "ended with exit status 3"),
    "dies": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n",
        "AWQ-BACKEND-012",
        "was killed by SIGSEGV",
    ),
    "leaves": ("raise SystemExit('bye')\n", "AWQ-BACKEND-012", "bye"),
    "lacks": ("class backend:\n    name = 'lacks'\n    contract = (1, 0)\n", "AWQ-BACKEND-014", "pack, unpack, linear"),
    "old": ("class backend(Base):\n    name = 'old'\n    contract = (0, 9)\n", "AWQ-BACKEND-015", "(0, 9)"),
    "wrong": (
        "class backend(Base):\n    name = 'wrong'\n    def linear(self, x, packed):\n"
        "        return super().linear(x, packed) * 1.01\n",
        "AWQ-BACKEND-013",
        "times the bound",
    ),
    "tired": (
        "from awq_rt.devices import Refusal\nclass backend(Base):\n    name = 'tired'\n"
        "    def supports(self, spec, device):\n        return Refusal('TIRED-001', 'it is tired', 'let it sleep')\n",
        "AWQ-BACKEND-013",
        "refuses every linear on cpu",
    ),
    "reuses": (
        "class backend(Base):\n    name = 'reuses'\n    kept = {}\n    def linear(self, x, packed):\n"
        "        y = super().linear(x, packed)\n        return self.kept.setdefault((y.shape, y.dtype), y).copy_(y)\n",
        "AWQ-BACKEND-013",
        "wrote a later result over an earlier one",
    ),
    "waits": (
        "from awq_rt.devices import Device, Probe\nclass backend(Base):\n    name = 'waits'\n"
        "    def probe(self):\n        return Probe((Device('xpu', 0, 'Some GPU', 'some', 'gen1', 0),))\n"
        "    def supports(self, spec, device):\n        return None\n",
        "AWQ-DEVICE-001",
        "does not reach a 'xpu' device",
    ),
}
"""By name: the plugin's source, and the code and words of its refusal."""


@pytest.fixture(scope="module")
def stranger_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the stranger's plugin; examined once, since its files stay the same."""
    site = tmp_path_factory.mktemp("stranger")
    install(STRANGER, site)
    return site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path, for plugins; what the registry found in it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    _forget()
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("plugin_", "awq_rt_stranger"))]:
        del sys.modules[name]
    _forget()


@pytest.fixture
def stranger(stranger_site: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stranger's plugin is installed."""
    monkeypatch.syspath_prepend(stranger_site)


def _forget() -> None:
    importlib.invalidate_caches()
    registry.plugins.cache_clear()
    registry.device_for.cache_clear()


def _source(body: str) -> str:
    base = "from awq_rt_stranger import StrangerBackend as Base\n" if "Base" in body else ""
    return base + body + ("backend = backend()\n" if "class backend" in body else "")


# --- a stranger's plugin ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stranger")
def test_a_strangers_plugin_of_two_files_is_found_and_selected() -> None:
    assert len([path for path in STRANGER.iterdir() if path.is_file()]) == 2
    plugin = next(plugin for plugin in registry.plugins() if plugin.name == "stranger")
    assert (plugin.distribution, plugin.version, plugin.refusal) == ("awq-rt-stranger", "1.2.3", None)
    assert registry.select(SPEC, CPU).backend.name == "stranger"

    weight = hurtful_weight("random", 256, 64, 128, bias=True)
    linear = AwqLinear(256, 64, 128)
    linear.bind(weight, torch.float32, "cpu")
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    assert linear.backend_name == "stranger"
    assert excess(linear(x), x, weight) <= 1


def test_a_strangers_plugin_conforms(stranger_site: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "awq_rt.testing.conformance", "stranger"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(stranger_site)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout


# --- quarantine ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stranger")
def test_broken_plugins_are_quarantined_with_their_reasons_and_the_others_go_on(site: Path) -> None:
    for name, (body, _, _) in BROKEN.items():
        write_plugin(site, name, _source(body))
    found = {plugin.name: plugin.refusal for plugin in registry.plugins() if plugin.refusal is not None}
    for name, (_, code, words) in BROKEN.items():
        assert found[name].code == code, name
        assert words in found[name].reason, name
        assert found[name].fix, name
    assert registry.select(SPEC, CPU).backend.name == "stranger"
    assert registry.get("reference").name == "reference"
    with pytest.raises(BackendQuarantined, match=r"'raises' is quarantined: .*no luck.*AWQ-BACKEND-010"):
        registry.get("raises")


@pytest.mark.parametrize(
    ("member", "value", "code"),
    [
        ("contract", (0, 9), "AWQ-BACKEND-015"),
        ("contract", (1, 99), "AWQ-BACKEND-015"),
        ("contract", "1.0", "AWQ-BACKEND-015"),
        ("contract", 1, "AWQ-BACKEND-015"),
        ("name", "another", "AWQ-BACKEND-016"),
        ("priority", "high", "AWQ-BACKEND-014"),
    ],
)
def test_a_member_that_breaks_the_contract_is_refused_with_its_value(member: str, value: object, code: str) -> None:
    members = {name: getattr(registry.get("reference"), name) for name in registry.MEMBERS}
    assert registry.contract_refusal(SimpleNamespace(**members), "reference") is None
    refusal = registry.contract_refusal(SimpleNamespace(**{**members, member: value}), "reference")
    assert refusal is not None
    assert refusal.code == code
    assert str(value) in refusal.reason


@pytest.mark.parametrize("member", registry.MEMBERS)
def test_a_missing_member_is_refused_by_name(member: str) -> None:
    members = {name: getattr(registry.get("reference"), name) for name in registry.MEMBERS if name != member}
    refusal = registry.contract_refusal(SimpleNamespace(**members), "reference")
    assert refusal is not None
    assert (refusal.code, refusal.reason) == ("AWQ-BACKEND-014", f"it lacks {member}")


def test_two_distributions_of_one_name_are_both_refused(site: Path) -> None:
    install(STRANGER, site)
    write_metadata(
        site, "impostor", "1.0", {"stranger": "awq_rt_stranger:backend", "reference": "awq_rt_stranger:backend"}
    )
    refusals = {(p.name, p.distribution): p.refusal for p in registry.plugins() if p.refusal is not None}
    assert refusals["stranger", "impostor"].code == "AWQ-BACKEND-017"
    assert refusals["stranger", "awq-rt-stranger"].code == "AWQ-BACKEND-017"
    assert refusals["reference", "impostor"].code == "AWQ-BACKEND-017"
    assert type(registry.get("reference")).__name__ == "ReferenceBackend"  # awq_rt's own requirement keeps its name


def test_a_backend_that_raises_in_supports_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    class Moody:
        name = "moody"
        kernels = ()

        def supports(self, spec: LinearSpec, device: Device) -> Refusal | None:
            raise KeyError(spec.group_size)

    monkeypatch.setattr(registry, "backends", lambda: (Moody(), registry.get("reference")))
    choice = registry.select(SPEC, CPU)
    assert choice.backend.name == "reference"
    assert ("AWQ-BACKEND-018", "supports() raised KeyError: 128") in [(r.code, r.reason) for _, r in choice.refusals]


# --- selection -------------------------------------------------------------------------------------------------------


def test_an_unknown_backend_lists_those_that_are_installed() -> None:
    with pytest.raises(UnknownBackend, match=r"'nonesuch' is not installed; installed: .*reference.*AWQ-BACKEND-001"):
        registry.select(SPEC, CPU, "nonesuch")


def test_an_unknown_kernel_lists_those_that_exist() -> None:
    spec = LinearSpec(256, 64, 128, torch.float32, kernel="nonesuch")
    with pytest.raises(UnknownKernel, match=r"'nonesuch'.*kernels here: auto, .*torch.*AWQ-BACKEND-002"):
        registry.select(spec, CPU)
    with pytest.raises(UnknownKernel, match=r"not known to reference; kernels here: auto, torch"):
        registry.select(spec, CPU, "reference")


@pytest.mark.usefixtures("stranger")
def test_a_linear_that_nothing_serves_is_answered_with_every_refusal(site: Path) -> None:
    write_plugin(site, "raises", BROKEN["raises"][0])
    with pytest.raises(NoBackend) as caught:
        registry.select(LinearSpec(256, 64, 128, torch.float64), CPU)
    for words in (
        "raises: ",
        "[AWQ-BACKEND-010]",
        "stranger: ",
        "[STRANGER-001]",
        "reference: ",
        "[AWQ-REFERENCE-001]",
    ):
        assert words in str(caught.value)
    assert caught.value.code == "AWQ-BACKEND-004"


@pytest.mark.usefixtures("stranger")
def test_the_reasons_against_better_backends_stay_with_the_choice() -> None:
    choice = registry.select(SPEC, GPU)
    assert dict(choice.refusals)["stranger"].code == "STRANGER-002"


@pytest.mark.usefixtures("stranger")
def test_a_pinned_backend_is_chosen_over_a_better_one() -> None:
    assert registry.select(SPEC, CPU, "reference").backend.name == "reference"


# --- devices ---------------------------------------------------------------------------------------------------------


def test_an_idle_gpu_is_never_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "nvidia", lambda: Probe((GPU,)))
    monkeypatch.setattr(registry, "backends", lambda: (registry.get("reference"),))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert registry.default_device() == torch.device("cpu")
    assert len(caught) == 1
    assert str(caught[0].message).startswith("cuda:0 Some GPU (sm_90, 16 GiB) is not used: ")
    assert "[AWQ-" in str(caught[0].message)


def test_a_gpu_that_torch_reaches_and_a_backend_drives_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        name = "driver"

        def probe(self) -> Probe:
            return Probe((GPU,))

    monkeypatch.setattr(registry, "backends", lambda: (Driver(), registry.get("reference")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert registry.default_device() == torch.device("cuda", 0)


def test_a_machine_without_a_gpu_runs_on_the_cpu_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "nvidia", Probe)
    monkeypatch.setattr(devices, "amd", Probe)
    monkeypatch.setattr(registry, "backends", lambda: (registry.get("reference"),))
    assert registry.default_device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["nonsense", "cpu:x", "xpu", "meta"])
def test_a_device_that_cannot_be_used_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedDevice, match=name):
        registry.checked_device(name)


def test_a_device_number_that_torch_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert registry.checked_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UnsupportedDevice, match="torch sees 2"):
        registry.checked_device("cuda:2")


# --- the core and its plugins ----------------------------------------------------------------------------------------

CORE = Path(registry.__file__).parent
GPU_MODULES = ("cuda", "hip", "cupy", "pynvml", "pycuda", "triton", "numba", "amdsmi", "rocm")
BACKEND_NAMES = ("reference", "rocm", "awq_rt_reference", "awq_rt_cuda", "awq_rt_rocm")
"""Not `cuda`, which is torch's word for a device too: what it is passed to tells whether it names a backend."""
TORCH_DISTRIBUTED = ("gloo", "nccl")  # what torch.distributed calls its backends
KNOWS_PLUGINS = (CORE / "doctor" / "rules" / "gpus.py",)  # its hints say which distribution to install


def _trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(CORE.rglob("*.py")):
        yield path, ast.parse(path.read_text(), str(path))


def test_the_core_imports_no_gpu_api_and_no_plugin() -> None:
    for path, tree in _trees():
        for node in ast.walk(tree):
            imported: list[str] = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported = [node.module or ""]
            for name in imported:
                top = name.split(".")[0]
                assert top not in GPU_MODULES, f"{path} imports {name}"
                assert not top.startswith("awq_rt_"), f"{path} imports {name}"


def test_the_core_never_names_a_backend() -> None:
    for path, tree in _trees():
        if path in KNOWS_PLUGINS:
            continue
        exported = {
            id(constant)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
            for constant in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in exported:
                assert node.value not in BACKEND_NAMES, f"{path}:{node.lineno} names {node.value!r}"
            if isinstance(node, ast.keyword) and node.arg == "backend":
                named = isinstance(node.value, ast.Constant) and node.value.value not in (None, *TORCH_DISTRIBUTED)
                assert not named, f"{path}:{node.value.lineno} pins a backend"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                asked = ast.unparse(node.func.value) == "registry" and isinstance(node.args[0], ast.Constant)
                assert not asked, f"{path}:{node.lineno} asks for a backend by name"
