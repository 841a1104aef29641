"""Code and pickles of a checkpoint have one door each: the sources are searched for others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("awq_rt", "backends") for path in (ROOT / folder).rglob("*.py"))

REMOTE_CODE = "awq_rt/models/architecture.py"
PICKLES = "awq_rt/checkpoint/storage.py"

AUTO = ("Config", "Tokenizer", "Processor", "Model", "ModelForCausalLM", "ModelForImageTextToText")
RUNS_CODE_OF_A_CHECKPOINT = (*(f"Auto{name}.from_pretrained" for name in AUTO), "get_class_from_dynamic_module",
                             "transformers.pipeline", "pipeline")  # fmt: skip
RUNS_CODE_OF_A_FILE = ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load",
                       "joblib.load", "marshal.load", "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load",
                       "numpy.load", "np.load", "eval", "exec", "compile", "__import__", "runpy.run_path")  # fmt: skip


def calls(source: str, wanted: tuple[str, ...]) -> Iterator[ast.Call]:
    """Calls of the wanted functions, by their last two names or, where only one is written, by that."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ".".join(ast.unparse(node.func).split(".")[-2:])
            if name in wanted:
                yield node


def where(wanted: tuple[str, ...]) -> dict[str, list[ast.Call]]:
    found = {path.relative_to(ROOT).as_posix(): list(calls(path.read_text(), wanted)) for path in SOURCES}
    return {path: its for path, its in found.items() if its}


def test_the_search_finds_what_it_is_for() -> None:
    source = "import torch\ntransformers.AutoConfig.from_pretrained(x)\ntorch.load(y)\nmodel.eval()\neval(z)\n"
    assert [call.lineno for call in calls(source, RUNS_CODE_OF_A_CHECKPOINT)] == [2]
    assert [call.lineno for call in calls(source, RUNS_CODE_OF_A_FILE)] == [3, 5]


def test_a_checkpoints_own_code_runs_from_one_place_and_only_when_asked() -> None:
    found = where(RUNS_CODE_OF_A_CHECKPOINT)
    assert set(found) == {REMOTE_CODE}
    for call in found[REMOTE_CODE]:
        if ast.unparse(call.func) != "get_class_from_dynamic_module":
            said = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert said["trust_remote_code"] == "trust_remote_code", ast.unparse(call)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not (isinstance(node.value, ast.Constant) and node.value.value), f"{path}:{node.value.lineno}"


def test_nobody_trusts_remote_code_by_default() -> None:
    checked = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                positional = [*node.args.posonlyargs, *node.args.args]
                pairs = [*zip(reversed(positional), reversed(node.args.defaults), strict=False),
                         *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]  # fmt: skip
                for argument, default in pairs:
                    if argument.arg == "trust_remote_code" and default is not None:
                        assert ast.unparse(default) == "False", f"{path}:{node.lineno}"
                        checked += 1
    assert checked > 3


def test_pickles_are_read_in_one_place_with_weights_only() -> None:
    found = where(RUNS_CODE_OF_A_FILE)
    assert set(found) == {PICKLES}
    (call,) = found[PICKLES]
    assert ast.unparse(call.func) == "torch.load"
    assert {word.arg: ast.unparse(word.value) for word in call.keywords}["weights_only"] == "True"


@pytest.mark.parametrize("unsafe", ["torch.load(p)", "torch.load(p, weights_only=False)", "pickle.load(f)", "exec(s)"])
def test_an_unsafe_read_would_be_found(unsafe: str) -> None:
    (call,) = calls(unsafe, RUNS_CODE_OF_A_FILE)
    safe = {word.arg: ast.unparse(word.value) for word in call.keywords}.get("weights_only") == "True"
    assert not safe
