"""The half of the compiler that may abort: hipRTC, in a process of its own. Imports neither torch nor awq_rt.

    python hiprtc_compile.py REQUEST.json ANSWER.json

A request is `{"sources": [[name, text], ...], "options": [...]}`, or `{}` to ask for the version alone. The answer is
`{"version": "9.0 of HIP 70151831"}` with, for a compile, `"code"` (base64) or `"refused"` (the status), and `"log"`.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from typing import Any


def main(request_file: str, answer_file: str) -> None:
    """Answer the request. Whatever raises ends the process; the parent reads stderr."""
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    answer = _answer(request)
    with open(answer_file + ".part", "w", encoding="utf-8") as file:
        json.dump(answer, file)
    os.replace(answer_file + ".part", answer_file)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from hip import hip, hiprtc

    def checked(answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        if status.value != 0:
            raise RuntimeError(f"hipRTC failed with {status.name}")
        return values[0] if len(values) == 1 else tuple(values)

    major, minor = checked(hiprtc.hiprtcVersion())
    # hipRTC has called itself 9.0 for years: the runtime it came with says which compiler it really is.
    runtime = checked(hip.hipRuntimeGetVersion())
    answer: dict[str, Any] = {"version": f"{major}.{minor} of HIP {runtime}"}
    if not request:
        return answer
    (name, text), *headers = request["sources"]
    program = checked(
        hiprtc.hiprtcCreateProgram(
            text.encode(),
            name.encode(),
            len(headers),
            [header.encode() for _, header in headers],
            [header.encode() for header, _ in headers],
        )
    )
    options = [option.encode() for option in request["options"]]
    (status,) = hiprtc.hiprtcCompileProgram(program, len(options), options)
    log = bytearray(max(1, checked(hiprtc.hiprtcGetProgramLogSize(program))))
    checked(hiprtc.hiprtcGetProgramLog(program, log))
    answer["log"] = bytes(log).rstrip(b"\0 \n").decode(errors="replace")
    if status.value != 0:
        return {**answer, "refused": status.name}
    code = bytearray(checked(hiprtc.hiprtcGetCodeSize(program)))
    checked(hiprtc.hiprtcGetCode(program, code))
    return {**answer, "code": base64.b64encode(bytes(code)).decode()}


if __name__ == "__main__":
    main(*sys.argv[1:])
