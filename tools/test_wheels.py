"""Build every distribution and use the wheels in an environment that holds nothing else.

    python tools/test_wheels.py

Checks that the folders of `backends/` and the root are complete as wheels (no file missing, no undeclared dependency),
and that `pip install awq-rt` alone runs a 4-bit model on the CPU.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ("awq_rt", "awq_rt_reference")
"""What `pip install awq-rt` takes from us; the other distributions need a GPU's libraries."""
TRY_OUT = """
import importlib.metadata
import sys
from pathlib import Path
import torch
import awq_rt
from awq_rt import registry

for distribution in ("awq-rt", "awq-rt-reference"):
    source = importlib.metadata.distribution(distribution).read_text("direct_url.json") or "an index"
    assert '"file://' in source, f"{distribution} came from {source}, not from the wheel that was built"
home = Path(sys.prefix).resolve()
for module in ("awq_rt", "awq_rt_reference"):
    found = Path(sys.modules.get(module, awq_rt).__file__).resolve()
    assert home in found.parents, f"{module} came from {found}, not from its wheel"
assert [p.name for p in registry.plugins() if p.backend] != [], "no backend was found"
model = awq_rt.load(sys.argv[1])
tokens = model.generate(torch.arange(1, 9)[None], max_new_tokens=4, do_sample=False)
assert tokens.shape == (1, 12), tokens.shape
"""


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], check=True, text=True, stdout=subprocess.PIPE, **options)  # type: ignore[call-overload]
    return str(done.stdout)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist, home = Path(folder, "dist"), Path(folder, "venv")
        for project in (ROOT, *sorted(path.parent for path in ROOT.glob("backends/*/pyproject.toml"))):
            if (project / "CMakeLists.txt").exists() and shutil.which("c++") is None:
                print(f"{project.name} is left out: there is no C++ compiler")
                continue
            run(sys.executable, "-m", "build", "--wheel", "--outdir", dist, project)
        print("built", ", ".join(sorted(wheel.name for wheel in dist.glob("*.whl"))))

        model = Path(folder, "model")
        run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); "
            f"import pathlib, tiny; tiny.build(pathlib.Path({str(model)!r}), tiny.config_of('llama'))")  # fmt: skip

        venv.create(home, with_pip=True)
        python = home / "bin" / "python"
        # By path: asked for by name, a higher version on the index would win, whoever put it there.
        wheels = [path for name in WHEELS for path in dist.glob(f"{name}-*.whl")]
        run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", *wheels)
        run(python, "-c", TRY_OUT, model, cwd=folder)
        report = json.loads(run(home / "bin" / "awq-rt", "inspect", model, "--json", cwd=folder))
        print(f"awq-rt from its wheel loads a {report['layout']} checkpoint and generates")


if __name__ == "__main__":
    main()
