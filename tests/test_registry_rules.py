"""The rules by which plugins are loaded and chosen, with plugins that exist in this process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from awq_rt import devices, registry
from awq_rt.backend import CONTRACT, LinearSpec
from awq_rt.devices import Device, Probe, Refusal
from awq_rt.errors import BackendQuarantined, NoBackend, UnknownBackend, UnknownKernel, UnsupportedDevice

HOST = Device("cpu", 0, "a processor", "cpu", "x86_64", 2**30)
GPU = Device("cuda", 0, "Some GPU", "nvidia", "sm_90", 2**34, 32, "550.1")
SECOND = replace(GPU, index=1)
SPEC = LinearSpec(256, 64, 128, torch.float16)
NO = Refusal("X-001", "it does not want to", "ask another")


def backend(name: str, priority: int = 0, *driven: Device, refuses: Any = None, **members: Any) -> Any:
    """A backend that serves what `refuses` is not; `refuses` may be an error to raise."""

    def supports(spec: LinearSpec, device: Device) -> Refusal | None:
        if isinstance(refuses, Exception):
            raise refuses
        return refuses  # type: ignore[no-any-return]

    common = {"version": "1", "contract": CONTRACT, "kernels": ("slow", "quick"), "ops": {}, "pack": None}
    found = {**common, "name": name, "priority": priority, "probe": lambda: Probe(driven), "supports": supports}
    return SimpleNamespace(**{**found, "unpack": None, "linear": None, **members})


class Entry:
    """An entry point of a distribution that is not installed."""

    def __init__(self, name: str, distribution: str, loaded: Any):
        self.name, self.loaded = name, loaded
        self.dist = SimpleNamespace(name=distribution, version="1.2")

    def load(self) -> Any:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of other tests is remembered, nor is anything of these."""
    monkeypatch.setattr(registry, "_distrusted", {})
    caches = (registry.plugins, registry.device_for, registry._shipped_distributions)
    for function in caches:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in caches:
        function.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[registry.Plugin, ...]]:
    """Makes these entry points all that there are; `shipped` are distributions that awq-rt requires."""

    def install(*entries: Entry, shipped: tuple[str, ...] = (), verdict: Any = None) -> tuple[registry.Plugin, ...]:
        asked: list[tuple[str, str]] = []
        monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: list(entries))
        requires = [*(f"{name}==1.2" for name in shipped), "click>=8", "awq-rt-extra==1 ; extra == 'more'"]
        monkeypatch.setattr(registry.importlib.metadata, "requires", lambda name: requires)

        def examine(name: str, version: str) -> Refusal | None:
            asked.append((name, version))
            return verdict  # type: ignore[no-any-return]

        monkeypatch.setattr(registry, "examine", examine)
        registry.plugins.cache_clear()
        registry._shipped_distributions.cache_clear()
        found = registry.plugins()
        strangers = [entry for entry in entries if registry._canonical(entry.dist.name) not in shipped]
        names = [entry.name for entry in entries]
        assert asked == [(e.name, "1.2") for e in sorted(strangers, key=lambda e: e.name) if names.count(e.name) == 1]
        return found

    return install


# --- loading ---------------------------------------------------------------------------------------------------------


def test_the_highest_priority_comes_first_and_the_quarantined_last(installed: Any) -> None:
    entries = [
        Entry("broken", "d1", ImportError("no library")),
        Entry("low", "d2", backend("low", 1)),
        Entry("high", "d3", backend("high", 7)),
        Entry("also", "d4", backend("also", 7)),
        Entry("awry", "d5", ImportError("no library")),
    ]
    found = installed(*entries)
    assert [plugin.name for plugin in found] == ["also", "high", "low", "awry", "broken"]
    assert [made.name for made in registry.backends()] == ["also", "high", "low"]
    assert found[0] == registry.Plugin("also", "d4", "1.2", entries[3].loaded, None)
    assert found[4].refusal is not None
    assert found[4].refusal == Refusal("AWQ-BACKEND-010", "loading it raised ImportError: no library", "reinstall d1")
    assert registry.plugins() is found


def test_what_awq_rt_requires_is_not_examined(installed: Any) -> None:
    installed(Entry("ours", "Awq_RT.Ours", backend("ours")), shipped=("awq-rt-ours",), verdict=NO)
    assert registry.get("ours").name == "ours"
    found = installed(Entry("ours", "awq-rt-extra", backend("ours")), verdict=NO)  # extras are strangers
    assert found[0].refusal is NO
    with pytest.raises(BackendQuarantined, match=r"'ours' is quarantined: it does not want to"):
        registry.get("ours")


def test_an_uninstalled_source_tree_trusts_nobody(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise registry.importlib.metadata.PackageNotFoundError(name)

    installed()
    monkeypatch.setattr(registry.importlib.metadata, "requires", absent)
    registry._shipped_distributions.cache_clear()
    assert registry._shipped_distributions() == frozenset()
    monkeypatch.setattr(registry.importlib.metadata, "requires", lambda name: None)
    registry._shipped_distributions.cache_clear()
    assert registry._shipped_distributions() == frozenset()


def test_of_two_with_one_name_neither_is_loaded_unless_awq_rt_requires_one(installed: Any) -> None:
    first, second = Entry("one", "a", backend("one")), Entry("one", "b", backend("one"))
    found = installed(first, second)
    assert [(p.distribution, p.refusal.code, p.refusal.reason) for p in found if p.refusal] == [
        ("a", "AWQ-BACKEND-017", "b registers the name 'one' too"),
        ("b", "AWQ-BACKEND-017", "a registers the name 'one' too"),
    ]
    found = installed(first, second, shipped=("b",))
    assert [(plugin.distribution, plugin.refusal is None) for plugin in found] == [("b", True), ("a", False)]
    assert registry.get("one") is second.loaded


def test_the_contract_is_checked_when_a_plugin_is_loaded(installed: Any) -> None:
    older, newer = (CONTRACT[0], CONTRACT[1] - 1), (CONTRACT[0], CONTRACT[1] + 1)
    found = installed(
        Entry("a", "d", backend("a", contract=older)),
        Entry("b", "d2", backend("b", contract=newer)),
        Entry("c", "d3", backend("c", contract=(CONTRACT[0] + 1, 0))),
        Entry("e", "d4", backend("another")),
        Entry("f", "d5", backend("f", priority="first")),
        Entry("g", "d6", SimpleNamespace(name="g")),
    )
    codes = {plugin.name: plugin.refusal.code[-3:] if plugin.refusal else "" for plugin in found}
    assert codes == {"a": "", "b": "015", "c": "015", "e": "016", "f": "014", "g": "014"}
    assert all(plugin.refusal.fix for plugin in found if plugin.refusal)


@pytest.mark.parametrize("contract", [(2, 5), (2, 4), (2, 0), (2, 6), (1, 5), (3, 5), (5, 5)])
def test_a_plugin_of_our_major_and_no_newer_minor_is_accepted(
    contract: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "CONTRACT", (2, 5))
    refusal = registry.contract_refusal(backend("a", contract=contract), "a")
    assert (refusal is None) is (contract in ((2, 5), (2, 4), (2, 0)))
    assert refusal is None or refusal.code == "AWQ-BACKEND-015"


def test_an_unknown_name_is_answered_with_those_that_are_installed(installed: Any) -> None:
    installed(Entry("a", "d", backend("a")), Entry("b", "d2", ValueError("no")))
    with pytest.raises(UnknownBackend, match="'c' is not installed; installed: a, b"):
        registry.get("c")
    installed()
    with pytest.raises(UnknownBackend, match="installed: none"):
        registry.get("c")


# --- choosing --------------------------------------------------------------------------------------------------------


def test_the_first_that_serves_is_chosen_with_the_refusals_of_those_above(installed: Any) -> None:
    installed(
        Entry("best", "d", backend("best", 9, refuses=NO)),
        Entry("odd", "d2", backend("odd", 8, refuses=ZeroDivisionError("oh"))),
        Entry("good", "d3", backend("good", 7)),
        Entry("last", "d4", backend("last", 1)),
        Entry("broken", "d5", ValueError("no")),
    )
    choice = registry.select(SPEC, GPU)
    assert choice.backend.name == "good"
    assert [(name, refusal.code) for name, refusal in choice.refusals] == [
        ("broken", "AWQ-BACKEND-010"),
        ("best", "X-001"),
        ("odd", "AWQ-BACKEND-018"),
    ]
    assert registry.refusal_of(registry.get("odd"), SPEC, GPU) == Refusal(
        "AWQ-BACKEND-018", "supports() raised ZeroDivisionError: oh", "update odd"
    )
    pinned = registry.select(SPEC, GPU, "last")
    assert (pinned.backend.name, pinned.refusals) == ("last", ())
    with pytest.raises(NoBackend, match="best: it does not want to; ask another"):
        registry.select(SPEC, GPU, "best")


def test_a_kernel_is_looked_for_among_those_asked(installed: Any) -> None:
    installed(
        Entry("a", "d", backend("a", 5, kernels=("x", "y"))), Entry("b", "d2", backend("b", 4, kernels=("y", "z")))
    )
    chosen = {kernel: registry.select(replace(SPEC, kernel=kernel), GPU).backend.name for kernel in ("auto", *"xyz")}
    assert chosen == {"auto": "a", "x": "a", "y": "a", "z": "b"}
    choice = registry.select(replace(SPEC, kernel="z"), GPU)
    assert choice.refusals == (("a", Refusal("AWQ-BACKEND-002", "it has no kernel 'z'", "choose one of: auto, x, y")),)
    with pytest.raises(UnknownKernel, match="'w' is not known to a, b; kernels here: auto, x, y, z"):
        registry.select(replace(SPEC, kernel="w"), GPU)
    with pytest.raises(UnknownKernel, match="'z' is not known to a; kernels here: auto, x, y"):
        registry.select(replace(SPEC, kernel="z"), GPU, "a")


def test_where_nothing_is_installed_nothing_serves(installed: Any) -> None:
    installed()
    with pytest.raises(NoBackend, match="none is installed"):
        registry.select(SPEC, GPU)


def test_what_was_seen_to_be_wrong_is_not_chosen_again(installed: Any) -> None:
    installed(Entry("a", "d", backend("a", 5)), Entry("b", "d2", backend("b", 4)))
    assert registry.distrust("a", SPEC, GPU, NO) is True
    assert registry.distrust("a", replace(SPEC, out_features=72), GPU, NO) is False
    assert registry.distrust("a", SPEC, SECOND, NO) is True
    assert registry.distrust("b", SPEC, HOST, NO) is True
    choice = registry.select(SPEC, GPU)
    assert (choice.backend.name, choice.refusals) == ("b", (("a", NO),))
    assert registry.select(replace(SPEC, bias=True), GPU).backend.name == "a"
    assert registry.select(SPEC, HOST).backend.name == "a"


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with these GPUs, and a torch that sees so many of them."""

    def make(nvidia: tuple[Device, ...] = (), amd: tuple[Device, ...] = (), seen: int = 0) -> None:
        monkeypatch.setattr(devices, "cpu", lambda: Probe((HOST,)))
        monkeypatch.setattr(devices, "nvidia", lambda: Probe(nvidia))
        monkeypatch.setattr(devices, "amd", lambda: Probe(amd))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        registry.device_for.cache_clear()

    return make


def test_a_device_is_described_by_a_probe_before_the_machine(installed: Any, machine: Any) -> None:
    described = replace(SECOND, name="as the backend says")
    installed(Entry("a", "d", backend("a", 5, described)))
    machine(nvidia=(GPU, SECOND), seen=2)
    assert registry.device_for(torch.device("cuda:1")) is described
    assert registry.device_for(torch.device("cuda:0")) == GPU
    assert registry.device_for(torch.device("cuda")) == GPU
    assert registry.device_for(torch.device("cpu")) == HOST
    unknown = registry.device_for(torch.device("xpu:3"))
    assert (unknown.type, unknown.index, unknown.arch, unknown.memory_bytes) == ("xpu", 3, "unknown", 0)
    machine(amd=(GPU,))
    assert registry.device_for(torch.device("cuda:0")) == GPU


def test_the_default_is_the_first_device_of_the_best_backend_that_torch_reaches(installed: Any, machine: Any) -> None:
    installed(Entry("a", "d", backend("a", 5, HOST, SECOND, GPU)), Entry("b", "d2", backend("b", 9, HOST)))
    machine(nvidia=(GPU, SECOND), seen=2)
    assert registry.default_device() == torch.device("cuda", 1)
    machine(nvidia=(GPU,), seen=0)
    with pytest.warns(
        RuntimeWarning, match=r"^cuda:0 Some GPU .* is not used: torch .* does not reach a 'cuda' device"
    ):
        assert registry.default_device() == torch.device("cpu")


@pytest.mark.parametrize("kind", ["nvidia", "amd"])
def test_a_gpu_that_nothing_drives_is_named_with_the_reason(installed: Any, machine: Any, kind: str) -> None:
    machine(**{kind: (GPU,)}, seen=1)
    installed(Entry("a", "d", backend("a", 5, HOST)))
    with pytest.warns(RuntimeWarning, match=r"no installed backend drives it; .*\[AWQ-BACKEND-004\]"):
        registry.default_device()
    installed(Entry("a", "d", ValueError("no")), Entry("b", "d2", KeyError("x")))
    with pytest.warns(RuntimeWarning, match=r"is not used: a is quarantined \(.*\); b is quarantined \(.*010\]\)$"):
        registry.default_device()


def test_the_warning_points_at_who_called_who_asked_for_the_device(installed: Any, machine: Any) -> None:
    def load() -> torch.device:
        return registry.default_device()

    machine(nvidia=(GPU,), seen=1)
    installed(Entry("a", "d", backend("a", 5, HOST)))
    with pytest.warns(RuntimeWarning) as caught:
        load()
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, load.__code__.co_firstlineno + 6)


def test_devices_that_can_be_used_and_cannot(installed: Any, machine: Any) -> None:
    machine(nvidia=(GPU,), seen=1)
    assert registry.checked_device("cuda") == torch.device("cuda")
    machine(nvidia=(GPU, SECOND), seen=2)
    assert registry.checked_device("cuda:1") == torch.device("cuda:1")
    assert registry.checked_device("cuda") == torch.device("cuda")
    assert registry.checked_device(torch.device("cpu")) == torch.device("cpu")
    for wrong, words in (("cuda:2", "torch sees 2 of type 'cuda'"), ("meta", "no device type 'meta'"),
                         ("no such", "is not a torch device")):  # fmt: skip
        with pytest.raises(UnsupportedDevice, match=words):
            registry.checked_device(wrong)
    assert registry.torch_refusal("cuda") is None
    assert registry.torch_refusal("cpu") is None
    machine()
    refusal = registry.torch_refusal("cuda")
    assert refusal is not None
    assert refusal.code == "AWQ-DEVICE-001"
    with pytest.raises(UnsupportedDevice, match="does not reach a 'cuda' device"):
        registry.checked_device("cuda")
