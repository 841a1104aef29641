"""Writes TROUBLESHOOTING.md from the codes in awq_rt/codes.py.

python tools/troubleshooting.py
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from awq_rt import codes

DESTINATION = Path(__file__).resolve().parents[1] / codes.PAGE

HEAD = """\
# Troubleshooting

Every error, refusal and finding of awq_rt ends with a code in brackets. Find it here, or ask for it:
`awq-rt doctor --explain AWQ-CUDA-003`. `awq-rt doctor` says which of them concern this machine, and
`awq-rt doctor MODEL` which concern a model on it; `--bundle report.zip --redact` makes the file to send with a report.
MODEL, DESTINATION and PLUGIN in the commands stand for your own.

NaN or nonsense in the place of text: `AWQ_RT_CHECK=1 awq-rt generate MODEL` watches every module and names the first
whose output is not finite; the model is then not fused, and each module waits for the device. It also tries a linear of
each shape beside the reference on a CPU, which on a GPU happens anyway: a kernel that is wrong there gives way to the
next backend, with a warning ([AWQ-BACKEND-020](#awq-backend-020)). What passed is remembered per device, driver, plugin
files, torch and shape, in the cache.

A code keeps its meaning for ever. Plugins that are not of awq-rt have codes of their own. This page is made from
`awq_rt/codes.py` by `tools/troubleshooting.py`.
"""


def page() -> str:
    """The whole text."""
    return "\n".join((HEAD, *_contents(), *_sections()))


def _contents() -> Iterator[str]:
    for family, its in codes.families().items():
        yield f"- **{family}**: " + ", ".join(f"[{code.code}](#{code.code.lower()})" for code in its)
    yield ""


def _sections() -> Iterator[str]:
    for family, its in codes.families().items():
        yield f"## {family}\n"
        for code in its:
            yield f"### {code.code}\n\n**{code.title}.** {code.cause}\n\n{code.remedy}\n\n    {code.command}\n"


def main() -> None:
    with tempfile.NamedTemporaryFile("w", dir=DESTINATION.parent, delete=False, encoding="utf-8") as file:
        file.write(page())
    os.chmod(file.name, 0o644)
    os.replace(file.name, DESTINATION)


if __name__ == "__main__":
    main()
