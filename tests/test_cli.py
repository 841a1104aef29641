"""The command line, from the user's side: what is printed where, and how it ends."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from tiny import build
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, PreTrainedTokenizerFast

import awq_rt
from awq_rt import __version__
from awq_rt.cli import Commands, cli
from awq_rt.cli.console import size
from awq_rt.errors import AwqRtError, CheckpointNotFound

generate_module = importlib.import_module("awq_rt.cli.generate")  # `awq_rt.cli.generate` itself is the command

VOCABULARY = 256
TEMPLATE = """{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}\
{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin)


def error_of(result: Result, exit_code: int = 1) -> str:
    """The one message of a command that failed: no traceback, nothing on standard output."""
    assert result.exit_code == exit_code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token a letter: 95 of ASCII and 161 others, none of them a control character."""
    letters = [chr(code) for code in (*range(0x20, 0x7F), *range(0x4E00, 0x4E00 + VOCABULARY - 95))]
    by_letter = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    by_letter.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=by_letter, clean_up_tokenization_spaces=False)
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    options = {"initializer_range": 0.5, "bos_token_id": None, "eos_token_id": None}  # wide: answers that vary
    build(folder, AutoConfig.for_model("llama", **sizes, **heads, **options))
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of every `awq_rt.load`, which loads once and then answers with the same model."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(awq_rt, "load", lambda path, **keywords: calls.append(keywords) or _loaded(path))
    return calls


_LOADED: dict[Path, Any] = {}


def _loaded(path: str | Path) -> Any:
    path = Path(path)
    if path not in _LOADED:
        from awq_rt.models import load

        _LOADED[path] = load(path, device="cpu", backend="reference")
    return _LOADED[path]


def _continuation(model: Path, text: str, new_tokens: int) -> str:
    """The greedy continuation of `text`, without the command line."""
    loaded = _loaded(model)
    inputs = loaded.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    tokens = loaded.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    decoded: str = loaded.tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return decoded


# --- the group -------------------------------------------------------------------------------------------------------


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("convert", "doctor", "generate", "inspect"):
        assert f"\n  {command} " in result.stdout
    assert "..." not in result.stdout.partition("Commands:")[2]  # every summary fits its line


@pytest.mark.parametrize("command", ["--help", "generate --help", "inspect --help", "convert --help", "--version"])
def test_help_needs_neither_torch_nor_transformers(command: str) -> None:
    code = f"""
import sys
from awq_rt.cli import main
sys.argv = ["awq-rt", *{command.split()!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
loaded = {{"torch", "transformers", "numpy"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout == f"awq-rt, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonesuch"], "No such command 'nonesuch'"),
        (["generate"], "Missing argument 'MODEL'"),
        (["generate", "model", "hi", "--prompt", "hi"], "given twice"),
        (["generate", "model", ""], "the prompt is empty"),
        (["generate", "model", "-"], "the prompt is empty"),
        (["generate", "model", "hi", "--raw", "--system", "be brief"], "--raw leaves out"),
        (["generate", "model", "hi", "--max-new-tokens", "0"], "x>=1"),
        (["generate", "model", "hi", "--temperature", "-1"], "x>=0"),
        (["generate", "model", "hi", "--top-p", "0"], "0<x<=1"),
        (["generate", "model", "hi", "--dtype", "int8"], "float16"),
        (["generate", "model", "hi", "--seed", "1"], "add --temperature"),
        (["generate", "model", "hi", "--seed", "1", "--temperature", "0"], "the answer is greedy"),
        (["convert", "source"], "Missing argument 'DST'"),
        (["convert", "source", "destination"], "Missing option '--to'"),
        (["convert", "source", "destination", "--to", "gptq"], "not one of gemm, gemv, gemv_fast, compressed-tensors"),
        (["inspect"], "Missing argument 'MODEL'"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str], words: str) -> None:
    assert words in error_of(run(*arguments), exit_code=2)


def test_a_terminal_without_a_prompt_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(click.UsageError, match="no prompt"):
        generate_module._prompt(None, None)


# --- how commands end ------------------------------------------------------------------------------------------------


def _ended(error: BaseException) -> Result:
    """How a command ends that raises `error`."""

    @click.group(cls=Commands)
    def group() -> None: ...

    @group.command()
    def command() -> None:
        raise error

    return CliRunner().invoke(group, ["command"])


def test_an_error_of_ours_is_one_message_with_its_code() -> None:
    assert error_of(_ended(CheckpointNotFound("model: not here"))) == "Error: model: not here [AWQ-CKPT-001]\n"
    assert error_of(_ended(AwqRtError("two\nlines"))) == "Error: two\nlines [AWQ-000]\n"


def test_a_package_that_cannot_be_imported_points_to_the_doctor() -> None:
    assert error_of(_ended(ImportError("libcudart.so.12: cannot open"))) == (
        "Error: libcudart.so.12: cannot open; `awq-rt doctor` says more\n"
    )


def test_a_device_without_memory_is_one_message() -> None:
    assert "the device has too little memory: tried 2 GiB" in error_of(_ended(torch.OutOfMemoryError("tried 2 GiB")))


def test_a_bug_keeps_its_traceback() -> None:
    for error in (RuntimeError("bug"), KeyError("bug")):
        assert _ended(error).exception is error


def test_an_interrupt_ends_with_130() -> None:
    assert error_of(_ended(KeyboardInterrupt()), exit_code=130) == "\n"


def test_a_warning_is_one_line() -> None:
    @click.group(cls=Commands)
    def group() -> None: ...

    @group.command()
    def command() -> None:
        warnings.simplefilter("always")
        warnings.warn("the GPU is idle", RuntimeWarning, stacklevel=1)

    result = CliRunner().invoke(group, ["command"])
    assert (result.exit_code, result.stderr) == (0, "Warning: the GPU is idle\n")


def test_a_reader_that_goes_away_ends_the_command_quietly(model: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "from awq_rt.cli import main; main()", "inspect", str(model), "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# --- generate --------------------------------------------------------------------------------------------------------


def test_the_answer_goes_to_standard_output_and_the_figures_to_standard_error(
    model: Path, loads: list[dict[str, Any]]
) -> None:
    result = run("generate", model, "abc", "--raw", "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    assert len(set(result.stdout)) > 4
    assert result.stdout == _continuation(model, "abc", 12) + "\n"
    assert "3 prompt tokens, 12 new; first token after " in result.stderr
    assert " tokens/s; loaded in " in result.stderr
    assert "it/s" not in result.stderr  # no progress bar where nobody looks


def test_the_prompt_goes_through_the_chat_template(model: Path, loads: list[dict[str, Any]]) -> None:
    result = run("generate", model, "abc", "--system", "be brief", "--max-new-tokens", 8)
    assert result.stdout == _continuation(model, "<system>be brief<user>abc<assistant>", 8) + "\n"
    result = run("generate", model, "abc", "--max-new-tokens", 8)
    assert result.stdout == _continuation(model, "<user>abc<assistant>", 8) + "\n"


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (["abc def"], None),
        (["--prompt", "abc def"], None),
        (["-p", "abc def"], "not read"),
        (["-"], "abc def\n"),
        (["--prompt", "-"], "abc def"),
        ([], "abc def\n"),
    ],
)
def test_the_prompt_comes_from_wherever_it_is_given(
    model: Path, loads: list[dict[str, Any]], arguments: list[str], stdin: str | None
) -> None:
    result = run("generate", model, *arguments, "--raw", "--max-new-tokens", 2, stdin=stdin)
    assert result.stdout == _continuation(model, "abc def", 2) + "\n"


def test_one_new_token_has_no_speed(model: Path, loads: list[dict[str, Any]]) -> None:
    result = run("generate", model, "abc", "--max-new-tokens", 1)
    assert "1 new; first token after" in result.stderr
    assert "tokens/s" not in result.stderr


def test_a_seed_repeats_what_was_sampled(model: Path, loads: list[dict[str, Any]]) -> None:
    def answer(seed: int) -> str:
        return run("generate", model, "abc", "--temperature", 2, "--seed", seed, "--max-new-tokens", 16).stdout

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}),
        (
            {"temperature": 0.0, "top_p": 0.5},
            {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None},
        ),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
        ({"top_p": 0.9, "top_k": 5}, {"do_sample": True, "top_p": 0.9, "top_k": 5}),
        ({"min_p": 0.1}, {"do_sample": True, "min_p": 0.1}),
    ],
)
def test_sampling_is_off_until_it_is_asked_for(chosen: dict[str, Any], expected: dict[str, Any]) -> None:
    nothing: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "top_k", "min_p"))
    assert generate_module.Sampling(**{**nothing, **chosen}).arguments() == expected


def test_a_repetition_penalty_changes_a_greedy_answer(model: Path, loads: list[dict[str, Any]]) -> None:
    plain = run("generate", model, "abc", "--max-new-tokens", 24).stdout
    assert run("generate", model, "abc", "--max-new-tokens", 24, "--repetition-penalty", 5).stdout != plain


def test_what_the_checkpoint_sets_for_beams_does_not_stop_the_stream(
    model: Path, loads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _loaded(model).generation_config
    expected = _continuation(model, "abc", 4) + "\n"
    monkeypatch.setattr(settings, "num_beams", 4)
    monkeypatch.setattr(settings, "num_return_sequences", 2)
    result = run("generate", model, "abc", "--raw", "--max-new-tokens", 4)
    assert (result.exit_code, result.stdout) == (0, expected), result.output


@pytest.mark.parametrize(
    ("message", "shown"),
    [("experts of nonesuch", "experts of nonesuch"), ("", "not implemented for this checkpoint")],
)
def test_what_is_not_implemented_is_one_message(
    model: Path, monkeypatch: pytest.MonkeyPatch, message: str, shown: str
) -> None:
    def load(path: str, **keywords: Any) -> Any:
        raise NotImplementedError(message)

    monkeypatch.setattr(awq_rt, "load", load)
    printed = error_of(run("generate", model, "abc"))
    assert printed.startswith("Error: ")
    assert shown in printed


def test_what_a_model_cannot_do_while_it_generates_is_one_message(
    model: Path, loads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(**keywords: Any) -> Any:
        raise NotImplementedError("no kernel for this")

    monkeypatch.setattr(_loaded(model), "generate", generate)
    assert error_of(run("generate", model, "abc")) == "Error: no kernel for this\n"


def test_help_says_what_model_may_be() -> None:
    assert "MODEL is a folder, a file or a hub id." in run("generate", "--help").stdout


def test_every_loading_option_reaches_load(
    model: Path, loads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    options = ["--device", "cpu", "--dtype", "bfloat16", "--backend", "reference", "--kernel", "torch"]
    options += ["--attn-implementation", "eager", "--revision", "main", "--group-size", "32", "--trust-remote-code"]
    run("generate", model, "abc", "--max-new-tokens", 1, *options)
    run("generate", model, "abc", "--max-new-tokens", 1)
    given, default = loads
    assert given == {
        "device": "cpu",
        "dtype": "bfloat16",
        "backend": "reference",
        "kernel": "torch",
        "attn_implementation": "eager",
        "revision": "main",
        "token": "secret",
        "group_size": 32,
        "trust_remote_code": True,
    }
    assert default == {**dict.fromkeys(given), "token": "secret", "kernel": "auto", "trust_remote_code": False}


def test_a_template_that_refuses_a_system_message_is_a_usage_error(
    model: Path, loads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_loaded(model).tokenizer, "chat_template", NO_SYSTEM)
    result = run("generate", model, "abc", "--system", "be brief")
    assert "no system role; --raw leaves it out" in error_of(result, exit_code=2)


def test_a_tokenizer_without_a_template_takes_the_prompt_as_it_is(
    model: Path, loads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_loaded(model).tokenizer, "chat_template", None)
    assert run("generate", model, "abc", "--max-new-tokens", 2).stdout == _continuation(model, "abc", 2) + "\n"
    assert "needs a chat template" in error_of(run("generate", model, "abc", "--system", "be brief"), exit_code=2)


def test_a_checkpoint_without_a_tokenizer_is_an_error(
    model: Path, loads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_loaded(model), "tokenizer", None)
    assert "has no tokenizer" in error_of(run("generate", model, "abc"))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--backend", "nonesuch"], "AWQ-BACKEND-001"),
        (["--kernel", "nonesuch"], "AWQ-BACKEND-002"),
        (["--device", "nonesuch"], "AWQ-DEVICE-001"),
    ],
)
def test_what_cannot_be_loaded_is_one_message(model: Path, options: list[str], code: str) -> None:
    assert f"[{code}]" in error_of(run("generate", model, "abc", *options))


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_shows_what_is_quantised_and_what_is_not(model: Path) -> None:
    result = run("inspect", model)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == str(model)
    assert lines[1].startswith("LlamaForCausalLM; layout gemm; 4 bits, group size 32; ")
    assert "14 quantised linears, " in result.stdout
    (down,) = [line.split() for line in lines if "down_proj" in line]
    assert down[:6] == ["model.layers.*.mlp.down_proj", "2", "128", "64", "32", "gemm"]
    assert down[-1] == "4.62"  # 4 bits, and 16 + 4 for every 32 weights
    assert any(line.split()[:5] == ["lm_head.weight", "1", "256", "x", "64"] for line in lines)
    assert "5 vectors (norms and biases), " in result.stdout


def test_inspect_lists_every_layer_when_asked(model: Path) -> None:
    result = run("inspect", model, "--all")
    assert "model.layers.0.mlp.down_proj" in result.stdout
    assert "model.layers.1.mlp.down_proj" in result.stdout
    assert "*" not in result.stdout


def test_inspect_answers_in_json_of_a_stated_schema(model: Path) -> None:
    found = json.loads(run("inspect", model, "--json").stdout)
    assert found["schema"] == "awq-rt.inspect/1"
    assert (found["layout"], found["group_sizes"], found["warnings"]) == ("gemm", [32], [])
    assert len(found["linears"]) == 14
    assert found["linears"][0] == {
        "name": "model.layers.0.mlp.down_proj",
        "layout": "gemm",
        "in_features": 128,
        "out_features": 64,
        "group_size": 32,
        "bias": False,
        "symmetric": False,
        "nbytes": 128 * 64 // 2 + 128 // 32 * (64 // 2 + 2 * 64),
    }
    assert {"name": "lm_head.weight", "shape": [256, 64], "dtype": "float16", "nbytes": 32768} in found["dense"]
    stored = sum(part["nbytes"] for part in [*found["linears"], *found["dense"]])
    assert stored == found["nbytes"]


def test_inspect_repeats_the_checkpoints_warnings(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    assert "\nwarning: config.json has use_cache false" in run("inspect", tmp_path).stdout


def test_inspect_of_nothing_is_one_message(tmp_path: Path) -> None:
    assert "[AWQ-CKPT-001]" in error_of(run("inspect", tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{")
    assert "[AWQ-CKPT-" in error_of(run("inspect", tmp_path))


@pytest.mark.checkpoint
def test_inspect_reads_a_checkpoint_of_other_software(shared: Path) -> None:
    result = run("inspect", shared / "checkpoints" / "tiny-llama-awq")
    assert "layout gemm; 4 bits, group size 64" in result.stdout
    assert "14 quantised linears" in result.stdout


def test_sizes_are_for_people() -> None:
    sizes = [size(count) for count in (0, 999, 1000, 113_999_952, 7 * 10**9)]
    assert sizes == ["0 B", "999 B", "1.0 kB", "114.0 MB", "7.00 GB"]


# --- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["gemv", "compressed-tensors"])
def test_convert_there_and_back_is_lossless(model: Path, tmp_path: Path, layout: str) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    result = run("convert", model, there, "--to", layout)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"14 linears written to {there} as {layout}\nlossless\n"
    assert run("convert", there, back, "--to", "gemm").stdout.endswith("lossless\n")
    before, after = awq_rt.open_checkpoint(model), awq_rt.open_checkpoint(back)
    assert all(after[name].equal(weight) for name, weight in before.items())


def test_convert_leaves_what_is_there_unless_forced(model: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "precious").touch()
    assert "[AWQ-WRITE-001]" in error_of(run("convert", model, there, "--to", "gemv"))
    assert "no checkpoint" in error_of(run("convert", model, there, "--to", "gemv", "--force"))
    assert (there / "precious").exists()
    (there / "config.json").touch()
    assert run("convert", model, there, "--to", "gemv", "--force").exit_code == 0
    assert awq_rt.open_checkpoint(there).layout == "gemv"


def test_convert_says_what_was_lost(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from awq_rt import conversion

    lossy = conversion.Report(tmp_path, "gemv", 14, ("scales were rounded (14 of 14 linears)", "names changed"))
    monkeypatch.setattr(conversion, "convert", lambda *arguments, **keywords: lossy)
    result = run("convert", model, tmp_path, "--to", "gemv")
    assert result.stdout.splitlines()[1:] == ["lost: scales were rounded (14 of 14 linears)", "lost: names changed"]


def test_convert_reports_its_progress(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from awq_rt import conversion

    steps: list[tuple[int, int, str]] = []
    whole = conversion.convert

    def watched(*arguments: Any, progress: Any, **keywords: Any) -> Any:
        def both(done: int, total: int, name: str) -> None:
            steps.append((done, total, name))
            progress(done, total, name)

        return whole(*arguments, progress=both, **keywords)

    monkeypatch.setattr(conversion, "convert", watched)
    assert run("convert", model, tmp_path / "there", "--to", "gemv").exit_code == 0
    assert steps[0][:2] == (0, 14)
    assert steps[-1][:2] == (14, 14)
