"""`awq-rt bench`: what is measured, that the arithmetic is right, and what is said where memory ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tiny import build, config_of
from torch import nn

import awq_rt
from awq_rt.bench import bandwidth, measure, report, session
from awq_rt.bench.limit import cached_bytes, packed_bytes, position_bytes, prefill_flops, step_bytes
from awq_rt.bench.measure import Case, Clock, Speed, generation_s, held_bytes, never_ending
from awq_rt.bench.report import LoadTime, Row, latency_table, markdown, sentences, speed_table
from awq_rt.bench.shapes import SHAPES
from awq_rt.bench.synthetic import CODE_STD, WEIGHT_STD, SyntheticCheckpoint
from awq_rt.checkpoint import open_checkpoint, write_checkpoint
from awq_rt.cli import cli
from awq_rt.errors import InvalidConfig, OutOfMemory
from awq_rt.linear import AwqLinear

CPU = torch.device("cpu")
FIGURES = {
    "model", "batch", "prefill", "decode", "fused", "prefill_tps", "decode_tps", "memory_gb", "share_of_limit",
    "gpu_idle_share", "engine_prefill_tps", "share_of_matmul", "fp16_prefill_tps", "fp16_decode_tps",
    "beside_gb", "failure",
}  # fmt: skip


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of bandwidth mean nothing here: reading 4 MB will do."""
    monkeypatch.setattr(bandwidth, "CPU_BYTES", 4 << 20)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The tiny shape, loaded and fused."""
    model = awq_rt.load(SyntheticCheckpoint("tiny", CPU), device=CPU)
    never_ending(model)
    return model


# --- made-up checkpoints ---------------------------------------------------------------------------------------------

PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "phi-3-mini": 3_821_079_552,
    "mixtral-8x7b": 46_702_792_704,
    "smollm2-135m": 134_515_008,
}
"""As their model cards and the headers of their files count them."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_as_many_parameters_as_the_model(name: str) -> None:
    checkpoint = SyntheticCheckpoint(name, CPU)
    packed = sum(
        linear.in_features * linear.out_features + linear.bias * linear.out_features
        for linear in checkpoint.linears.values()
    )
    dense = sum(torch.Size(info.shape).numel() for info in checkpoint.dense.values())
    assert packed + dense == PARAMETERS[name]


@pytest.mark.parametrize("name", SHAPES)
def test_every_matrix_of_a_layer_is_packed_and_routers_are_not(name: str) -> None:
    checkpoint = SyntheticCheckpoint(name, CPU)
    left = [n for n, info in checkpoint.dense.items() if len(info.shape) > 1 and ".layers." in n]
    assert all(n.endswith("gate.weight") for n in left)
    assert all(linear.in_features % linear.group_size == 0 for linear in checkpoint.linears.values())


def test_a_made_up_weight_is_the_same_every_time_and_of_the_spread_that_it_says() -> None:
    checkpoint = SyntheticCheckpoint("tiny", CPU)
    name = "model.layers.1.mlp.down_proj"
    weight = checkpoint[name]
    weight.check_values()
    assert weight.equal(SyntheticCheckpoint("tiny", CPU)[name])
    assert not weight.equal(checkpoint["model.layers.0.mlp.down_proj"])
    # Scales are uniform over 0.5..1.5 of their mean, which raises the spread by sqrt(13/12). A standard deviation found
    # from n values errs by 1/sqrt(2n); those of one group share their scale, hence n = groups for a generous bound.
    groups = weight.scales.numel()
    expected = WEIGHT_STD * (13 / 12) ** 0.5
    assert abs(weight.dequantize().std().item() / expected - 1) < 6 / (2 * groups) ** 0.5
    centred = weight.codes.float().reshape(-1, checkpoint.linears[name].group_size, weight.out_features)
    assert abs((centred - weight.zeros[:, None].float()).std().item() / CODE_STD - 1) < 6 / (2 * groups) ** 0.5


def test_a_made_up_checkpoint_written_to_files_is_the_one_in_memory(tmp_path: Path) -> None:
    made_up = SyntheticCheckpoint("tiny", CPU)
    write_checkpoint(tmp_path / "model", made_up.stored(), made_up.config)
    stored = open_checkpoint(tmp_path / "model")
    assert stored.linears.keys() == made_up.linears.keys()
    assert all(stored[name].equal(made_up[name]) for name in stored)
    assert all(torch.equal(stored.view(name), made_up.view(name)) for name in made_up.dense)
    assert (stored.nbytes, stored.layout, stored.quantization) == (
        made_up.nbytes,
        made_up.layout,
        open_checkpoint(tmp_path / "model").quantization,
    )
    tokens = torch.arange(20)[None]
    assert torch.equal(awq_rt.load(tmp_path / "model")(tokens).logits, awq_rt.load(made_up)(tokens).logits)


@pytest.mark.parametrize("name", ["tiny", "qwen3-0.6b"])
def test_activations_neither_vanish_nor_overflow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of the real width: the logits' spread is that of a normalised vector times random weights."""
    shape = SHAPES[name]
    monkeypatch.setitem(
        SHAPES, "narrow", type(shape)(shape.model_type, shape.sizes | {"num_hidden_layers": 2}, shape.group_size)
    )
    model = awq_rt.load(SyntheticCheckpoint("narrow", CPU), dtype="float16")
    with torch.no_grad():
        spread = model(torch.arange(12)[None]).logits.float().std().item()
    expected = WEIGHT_STD * shape.sizes["hidden_size"] ** 0.5
    assert 0.5 < spread / expected < 2


def test_an_unknown_shape_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(InvalidConfig, match=r"'llama-9'.*llama-2-7b"):
        SyntheticCheckpoint("llama-9", CPU)


# --- the limit -------------------------------------------------------------------------------------------------------


class Shaped:
    """As much of a model as the limit needs, in the shape of Llama-2-7B: its sums are known from elsewhere."""

    dtype = torch.float16

    def __init__(self, name: str):
        self.config = SHAPES[name].config()


def test_cached_keys_and_values_are_those_of_every_position_before_a_step() -> None:
    llama = Shaped("llama-2-7b")
    assert position_bytes(llama) == 2 * 32 * 4096 * 2
    # Steps after a prompt of 2 see 3, 4 and 5 positions.
    assert cached_bytes(llama, 2, 3) == pytest.approx(4 * position_bytes(llama))
    assert position_bytes(Shaped("llama-3.1-8b")) == position_bytes(llama) / 4


def test_a_sliding_window_bounds_what_a_step_reads() -> None:
    mistral = Shaped("mistral-7b")
    assert cached_bytes(mistral, 5000, 1) == pytest.approx(5001 * position_bytes(mistral))
    mistral.config.sliding_window = 4096
    assert cached_bytes(mistral, 5000, 1) == pytest.approx(4096 * position_bytes(mistral))
    assert cached_bytes(mistral, 100, 1) == pytest.approx(101 * position_bytes(mistral))


def test_a_step_reads_packed_weights_scales_zeros_and_the_head(tiny: Any) -> None:
    linears = [module for module in tiny.modules() if isinstance(module, AwqLinear)]
    parameters = sum(linear.in_features * linear.out_features for linear in linears)
    groups = parameters // 32
    head = 256 * 64 * 2  # kept as it is stored
    cache = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, bytes
    assert step_bytes(tiny, 3, 9, 1) == parameters / 2 + groups * 2 + groups / 2 + head + 3 * 10 * cache
    assert packed_bytes(linears[0]) == 64 * 64 / 2 + 2 * 64 * 2.5


def test_a_mixture_has_no_limit_that_is_known_beforehand(tmp_path: Path) -> None:
    build(tmp_path, config_of("mixtral"))
    model = awq_rt.load(tmp_path)
    assert step_bytes(model, 1, 8, 8) is None
    assert prefill_flops(model, 1, 8) is None


def test_a_prompt_computes_with_every_weight_and_attends_to_what_is_before(tiny: Any) -> None:
    linears = [module for module in tiny.modules() if isinstance(module, AwqLinear)]
    parameters = sum(linear.in_features * linear.out_features for linear in linears)
    attention = 2 * 2 * 64 * (1 + 2 + 3) * 2  # two operations, two products, width, positions seen, layers
    assert prefill_flops(tiny, 5, 3) == 5 * (2 * 3 * parameters + 2 * 256 * 64 + attention)


# --- measuring -------------------------------------------------------------------------------------------------------


def test_the_clock_counts_new_tokens_and_not_the_prompt() -> None:
    clock = Clock()
    for tokens in (torch.arange(9)[None], torch.tensor([1]), torch.tensor([2])):
        clock.put(tokens)
    clock.end()
    assert len(clock.times) == 2
    assert clock.times[0] <= clock.times[1]


@pytest.mark.parametrize("fuse", ["auto", False])
def test_a_generation_has_a_first_token_and_every_step(fuse: Any) -> None:
    model = awq_rt.load(SyntheticCheckpoint("tiny", CPU), device=CPU, fuse=fuse)
    never_ending(model)
    seen = []
    generate = model.generate

    def watched(ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        seen.append((tuple(ids.shape), generate(ids, **arguments).shape[1]))

    model.generate = watched
    first_s, rest_s = generation_s(model, Case(2, 5, 7))
    assert seen == [((2, 5), 5 + 7 + 1)]
    assert first_s > 0
    assert rest_s > 0


def test_an_answer_that_may_end_early_is_noticed(tiny: Any) -> None:
    """The counter-test: an end-of-sequence token would make every figure too good."""
    kept = tiny.generation_config
    try:
        tiny.generation_config = type(kept)(do_sample=False, eos_token_id=list(range(256)), pad_token_id=0)
        with pytest.raises(AssertionError, match="early"):
            generation_s(tiny, Case(1, 4, 4))
    finally:
        tiny.generation_config = kept


def test_medians_are_taken_and_warm_ups_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(99.0, 99.0), (98.0, 98.0), (3.0, 30.0), (1.0, 20.0), (2.0, 10.0)])
    monkeypatch.setattr(measure, "generation_s", lambda model, case: next(times))
    speed = measure.measured(nn.Module(), Case(4, 8, 10), repeats=3)
    assert speed == Speed(first_s=2.0, step_s=2.0)
    assert speed.idle_share is None


def test_the_idle_share_is_what_of_a_step_the_gpu_does_not_need() -> None:
    assert Speed(1.0, step_s=0.002, gpu_step_s=0.0015).idle_share == pytest.approx(0.25)
    assert Speed(1.0, step_s=0.002, gpu_step_s=0.0021).idle_share == 0.0


# --- rows ------------------------------------------------------------------------------------------------------------


def filled(monkeypatch: pytest.MonkeyPatch, dense: Speed | None, read_tbps: float = 0.001) -> Row:
    monkeypatch.setattr(session, "step_bytes", lambda model, batch, prefill, decode: 1e6)
    memory = measure.Memory(CPU)
    monkeypatch.setattr(memory, "_taken", lambda: memory._before + 3_000_000_000)
    case = Case(4, 100, 50)
    row = Row("m", 4, 100, 50, True)
    monkeypatch.setattr(session, "prefill_flops", lambda model, batch, prefill: 3e9)
    result = report.Result("d", "c", read_tbps, 0.1)
    return session._filled(row, case, Speed(0.2, 0.005, 0.004, 0.1), dense, None, result, memory)


def test_a_row_holds_rates_memory_and_the_share_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    row = filled(monkeypatch, None)
    assert row.prefill_tps == pytest.approx(4 * 100 / 0.2)
    assert row.decode_tps == pytest.approx(4 / 0.005)
    assert row.memory_gb == pytest.approx(3.0)
    assert row.share_of_limit == pytest.approx(1e6 / 1e9 / 0.005)  # 1 ms of reading in a step of 5 ms
    assert row.gpu_idle_share == pytest.approx(0.2)
    assert row.engine_prefill_tps == pytest.approx(4 * 100 / 0.1)
    assert row.share_of_matmul == pytest.approx(3e9 / 0.2 / 1e11)
    assert (row.fp16_prefill_tps, row.speed_up) == (None, None)


def test_what_is_held_is_counted_once_whoever_shows_it(tiny: Any) -> None:
    generation_s(tiny, Case(1, 4, 2))
    linears = [module for module in tiny.modules() if isinstance(module, AwqLinear)]
    packed = sum(buffer.nbytes for linear in linears for buffer in linear.buffers())
    cache = 2 * 2 * 256 * 2 * 16 * 4  # layers, keys and values, the positions that are allotted, heads, head_dim, bytes
    rest = held_bytes(tiny) - packed - cache
    assert 0 < rest < 2 * 256 * 64 * 4 + 4096  # embedding and head, norms


def test_float16_stands_beside_4_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    row = filled(monkeypatch, Speed(0.4, 0.02))
    assert row.fp16_prefill_tps == pytest.approx(4 * 100 / 0.4)
    assert row.fp16_decode_tps == pytest.approx(4 / 0.02)
    assert row.speed_up == pytest.approx(4.0)
    result = report.Result("d", "c", 1.0, rows=[row])
    assert latency_table(result).rows == [("m", "4", "100", "fused", "20.00", "5.00", "4.00x")]


PLAN = session.Plan((Case(1, 4, 2), Case(2, 4, 2)), (True,), False, 1, {})


@pytest.mark.parametrize("error", [OutOfMemory("batch 1 x 4 positions would fit"), torch.OutOfMemoryError("no")])
def test_a_case_that_does_not_fit_is_a_row_that_says_so(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_case = session.measured

    def short_of_memory(model: Any, case: Case, repeats: int) -> Speed:
        if case.batch == 1:
            raise error
        return measure_case(model, case, repeats)

    monkeypatch.setattr(session, "measured", short_of_memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**9))
    result = report.Result("d", "c", 1.0)
    session.run("tiny", PLAN, SyntheticCheckpoint("tiny", CPU), CPU, result, lambda step: None)
    first, second = result.rows
    assert first.decode_tps is None
    if isinstance(error, OutOfMemory):
        assert "would fit" in str(first.failure)
    else:  # 512 bytes a position
        assert f"fewer than {10**6 // 512} positions" in str(first.failure)
    assert second.failure is None
    assert second.decode_tps is not None
    assert any("tiny, batch 1, prefill 4: " in sentence for sentence in sentences(result))


def test_a_float16_model_that_does_not_fit_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(session, "dense_model", too_large)
    plan = session.Plan((Case(1, 4, 2),), (False,), True, 1, {})
    result = report.Result("d", "c", 1.0)
    session.run("tiny", plan, SyntheticCheckpoint("tiny", CPU), CPU, result, lambda step: None)
    assert result.notes == ["tiny in float16 does not fit into the memory of cpu"]
    assert result.rows[0].fp16_decode_tps is None


def test_progress_is_told_as_many_steps_as_were_announced() -> None:
    plan = session.Plan((Case(1, 4, 2),), (True, False), True, 1, {})
    told: list[str] = []
    session.run("tiny", plan, SyntheticCheckpoint("tiny", CPU), CPU, report.Result("d", "c", 1.0), told.append)
    assert len(told) == plan.steps


def test_what_cannot_be_fused_is_said_and_its_rows_are_unfused(tmp_path: Path) -> None:
    build(tmp_path, config_of("gpt_neox"))  # attention and MLP side by side, one projection for q, k and v
    checkpoint = open_checkpoint(tmp_path)
    result = report.Result("d", "c", 1.0)
    plan = session.Plan((Case(1, 4, 2),), (True,), False, 1, {})
    session.run("neox", plan, checkpoint, CPU, result, lambda step: None)
    assert [row.fused for row in result.rows] == [False]
    assert "neox is not fused" in result.notes[0]


# --- tables and files ------------------------------------------------------------------------------------------------


def test_columns_without_a_figure_are_left_out() -> None:
    rows = [Row("m", 1, 8, 4, True, 1234.4, 56.78, 1.234, 0.5), Row("m", 2, 8, 4, True, failure="too large")]
    table = speed_table(report.Result("d", "c", 1.0, rows=rows))
    assert list(table.names) == [
        "model", "batch", "prefill", "decode", "decoder", "prefill tokens/s", "decode tokens/s", "of the limit",
        "memory",
    ]  # fmt: skip
    assert [list(row) for row in table.rows] == [
        ["m", "1", "8", "4", "fused", "1234", "56.8", "50.0%", "1.23 GB"],
        ["m", "2", "8", "4", "fused", "-", "-", "-", "-"],
    ]


def test_a_table_is_markdown() -> None:
    assert markdown(report.Table(("a", "long"), [("10", "x")])) == "|  a | long |\n| -: | ---: |\n| 10 |    x |"


def test_loading_is_told_as_a_ratio() -> None:
    result = report.Result("d", "c", 2.0, 700.4, loads=[LoadTime("m", 3.0, 1.5, 4_000_000_000)])
    assert list(sentences(result)) == [
        "d; reads 2.000 TB/s, multiplies 700 TFLOP/s",
        "m loads in 3.00 s; its 4.00 GB are read to the device in 1.50 s: 2.00x",
    ]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("before")
    result = report.Result("d", "c", 1.0, notes=[object()])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        result.write_json(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_measures_a_made_up_model_in_every_way(tmp_path: Path) -> None:
    png = tmp_path / "figures.png"
    pytest.importorskip("matplotlib")
    result = bench(
        "--synthetic", "tiny", "--batch", "1,2", "--prefill", "4,8", "--decode", 3, "--repeats", 1,
        "--compare", "--fp16", "--load", "--json", tmp_path / "figures.json", "--png", png,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "batch | prefill | decode |" in result.stdout
    assert "FP16 latency (ms)" in result.stdout
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found.keys() >= {"device", "date", "commit", "command", "read_tbps", "rows", "loads"}
    assert [(row["batch"], row["prefill"], row["fused"]) for row in found["rows"]] == [
        (batch, prefill, fused) for fused in (True, False) for batch in (1, 2) for prefill in (4, 8)
    ]
    for row in found["rows"]:
        assert row.keys() == FIGURES
        assert row["failure"] is None
        assert min(row["prefill_tps"], row["decode_tps"], row["fp16_prefill_tps"], row["share_of_limit"]) > 0
    assert found["loads"][0]["nbytes"] > SyntheticCheckpoint("tiny", CPU).nbytes  # and the headers
    assert png.read_bytes().startswith(b"\x89PNG")


def test_chosen_cases_are_measured_and_kept_when_the_run_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    measure_case = session.measured

    def watched(model: Any, case: Case, repeats: int) -> Speed:
        kept.append(json.loads((tmp_path / "f.json").read_text())["rows"] if kept else [])
        return measure_case(model, case, repeats)

    monkeypatch.setattr(session, "measured", watched)
    result = bench(
        "--synthetic", "tiny", "--case", "2x4", "--case", "1x8", "--decode", "3,2", "--repeats", 1,
        "--json", tmp_path / "f.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [len(rows) for rows in kept] == [0, 1, 2, 3]
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [(row["batch"], row["prefill"], row["decode"]) for row in rows] == [
        (2, 4, 3),
        (2, 4, 2),
        (1, 8, 3),
        (1, 8, 2),
    ]
    assert all(row["engine_prefill_tps"] > 0 for row in rows)


def test_the_command_measures_a_checkpoint(tmp_path: Path) -> None:
    """Of a model whose configuration would end an answer at nearly any token."""
    build(tmp_path / "model", config_of("qwen2"))
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(120))}))
    result = bench(tmp_path / "model", "--prefill", 4, "--decode", 4, "--repeats", 1, "--no-fuse", "--load")
    assert result.exit_code == 0, result.output
    assert "unfused" in result.stdout
    assert "read to the device" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a MODEL, or --synthetic"),
        (("m", "--synthetic", "tiny"), "give a MODEL, or --synthetic"),
        (("--synthetic", "tiny", "--compare", "--no-fuse"), "leave out --no-fuse"),
        (("--synthetic", "tiny", "--batch", "1,x"), "not a list of positive numbers"),
        (("--synthetic", "tiny", "--batch", "0"), "not a list of positive numbers"),
        (("--synthetic", "tiny", "--case", "4"), "not BATCHxPREFILL"),
        (("--synthetic", "tiny", "--json", "/nonesuch/a.json"), "there is no folder /nonesuch"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(arguments: tuple[str, ...], message: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_an_unknown_shape_ends_the_command_with_a_sentence() -> None:
    result = bench("--synthetic", "llama-9")
    assert result.exit_code == 1
    assert "there is no shape 'llama-9'" in result.output
