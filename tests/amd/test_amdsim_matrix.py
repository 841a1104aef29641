"""The matrix layouts, against what the Triton compiler makes of `tl.dot`; and that a wrong one is noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from amdsim import CodeObject, In, Out, Program, SimulationError, disassembly, matrix
from amdsim.toolchain import Clang
from device_code import kernel

TARGETS = {"gfx90a": 64, "gfx942": 64, "gfx950": 64, "gfx1100": 32, "gfx1201": 32}
SHAPES = ((16, 16, 32), (32, 32, 32), (32, 32, 64))


def operands(m: int, n: int, k: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A and B as `kind` stores them, their exact product, and how far a float32 sum of `k` products may be from it."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((m, k)).astype(np.float32), generator.standard_normal((k, n)).astype(np.float32)
    if kind == "fp16":
        stored_a, stored_b = a.astype(np.float16), b.astype(np.float16)
        exact_a, exact_b = stored_a.astype(np.float64), stored_b.astype(np.float64)
    else:
        stored_a, stored_b = ((v.view(np.uint32) >> 16).astype(np.uint16) for v in (a, b))
        exact_a, exact_b = (
            (v.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for v in (stored_a, stored_b)
        )
    return stored_a, stored_b, exact_a @ exact_b, 2.0**-24 * k * (np.abs(exact_a) @ np.abs(exact_b))


@pytest.fixture(scope="session")
def dots(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, tuple[int, int, int]], Path]:
    """Triton's code objects of one dot product, by target, type and shape."""
    triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    if missing := disassembly.available():
        pytest.skip(missing)
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("triton")
    script = Path(__file__).with_name("triton_dot.py")
    # In a process of its own: what Triton warns of is not ours, and it looks for a GPU's driver when imported.
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True, timeout=240)
    assert triton.__version__
    return {
        (arch, kind, shape): folder / f"{arch}-{kind}-{'x'.join(map(str, shape))}.hsaco"
        for arch in TARGETS
        for kind in ("fp16", "bf16")
        for shape in SHAPES
    }


def run_dot(file: Path, kind: str, shape: tuple[int, int, int]) -> tuple[float, set[str]]:
    """The largest error over its bound, and the matrix instructions that were executed."""
    a, b, exact, bound = operands(*shape, kind)
    code = CodeObject.read(file)
    program = Program(code, "dot")
    extra = sum(not argument.kind.startswith("hidden") for argument in program.kernel.arguments) - 3
    found = np.zeros((shape[0], shape[1]), np.float32)
    counts = program.launch(
        [In(a), In(np.ascontiguousarray(b.T)), Out(found), *[0] * extra],
        (1, 1, 1),
        TARGETS[code.target],
        dynamic_lds_bytes=16384,
    )
    names = {name for name in counts.instructions if name.startswith(("v_mfma", "v_wmma"))}
    return float((np.abs(found - exact) / bound).max()), names


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_agrees_on_where_elements_lie(dots: dict, arch: str, kind: str, shape: tuple[int, int, int]) -> None:
    ratio, names = run_dot(dots[arch, kind, shape], kind, shape)
    assert ratio <= 1
    assert len(names) == 1


def test_both_sizes_of_mfma_are_checked(dots: dict) -> None:
    small, large = (
        {
            name
            for arch in ("gfx90a", "gfx942", "gfx950")
            for name in run_dot(dots[arch, "fp16", shape], "fp16", shape)[1]
        }
        for shape in SHAPES[:2]
    )
    assert {name.split("_")[3][:5] for name in small} == {"16x16"}
    assert {name.split("_")[3][:5] for name in large} == {"32x32"}


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("part", ["row", "depth", "result_row"])
def test_a_wrong_layout_does_not_agree(dots: dict, monkeypatch: pytest.MonkeyPatch, arch: str, part: str) -> None:
    """One lane's place, one element's and one register's: each is enough to be noticed."""
    name = "mfma" if arch.startswith("gfx9") else "wmma12" if arch == "gfx1201" else "wmma"
    right = getattr(matrix, name)

    def wrong(*size: int) -> matrix.Shape:
        shape = right(*size)
        places = getattr(shape, part).copy()
        if part == "row":
            places[[0, 1]] = places[[1, 0]]
        elif part == "depth":  # of one column alone: an order that all share is no error
            places[3::16] = places[3::16, ::-1]
        else:
            places[[0, 1]] = places[[1, 0]]
        return replace(shape, **{part: places})

    monkeypatch.setattr(matrix, name, wrong)
    try:
        ratio, _ = run_dot(dots[arch, "fp16", SHAPES[0]], "fp16", SHAPES[0])
    except SimulationError:
        return
    assert ratio > 1000


PRODUCT = """
using halves4 = f16 __attribute__((ext_vector_type(4)));
using halves8 = f16 __attribute__((ext_vector_type(8)));
using halves16 = f16 __attribute__((ext_vector_type(16)));
// y = a b, [16, 16] each; GIVEN is the layout that the kernel believes in.
extern "C" __global__ void __launch_bounds__(64) product(const f16* a, const f16* b, float* y) {
    const u32 lane = lane_index(), row = lane % 16, part = lane / 16;
#if MATRIX == MATRIX_MFMA_16 || MATRIX == MATRIX_MFMA_32
    halves4 left, right;
    for (u32 i = 0; i < 4; i++) { left[i] = a[row * 16 + 4 * part + i]; right[i] = b[(4 * part + i) * 16 + row]; }
    const floats4 d = __builtin_amdgcn_mfma_f32_16x16x16f16(left, right, floats4{0, 0, 0, 0}, 0, 0, 0);
    for (u32 i = 0; i < 4; i++) y[(WRONG ? 4 * i + part : 4 * part + i) * 16 + row] = d[i];
#elif MATRIX == MATRIX_WMMA_REPEATED
    halves16 left, right;
    for (u32 i = 0; i < 16; i++) { left[i] = a[row * 16 + i]; right[i] = b[i * 16 + row]; }
    const floats8 d = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(left, right, floats8{});
    for (u32 i = 0; i < 8; i++) y[(WRONG ? 8 * part + i : 2 * i + part) * 16 + row] = d[i];
#else
    halves8 left, right;
    for (u32 i = 0; i < 8; i++) { left[i] = a[row * 16 + 8 * part + i]; right[i] = b[(8 * part + i) * 16 + row]; }
    const floats8 d = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(left, right, floats8{});
    for (u32 i = 0; i < 8; i++) y[(WRONG ? 2 * i + part : 8 * part + i) * 16 + row] = d[i];
#endif
}
"""


@pytest.mark.parametrize("arch", TARGETS)
def test_another_architectures_layout_gives_a_wrong_product(clang: Clang, arch: str) -> None:
    a, b, exact, bound = operands(16, 16, 16, "fp16")
    ratios = []
    for wrong in (0, 1):
        found = np.zeros((16, 16), np.float32)
        program = kernel(clang, PRODUCT, arch, WRONG=wrong)
        program.launch([In(a), In(b), Out(found)], (1, 1, 1), TARGETS[arch])
        ratios.append(float((np.abs(found - exact) / bound).max()))
    assert ratios[0] <= 1
    assert ratios[1] > 1000
