"""One of the processes of tests/test_parallel.py: python parallel_worker.py FOLDER, started by torchrun.

Loads its part of every checkpoint in FOLDER and saves what came of it to FOLDER/NAME.RANK.pt.
"""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path
from typing import Any

import torch

import awq_rt
from awq_rt.linear import AwqLinear
from awq_rt.parallel import group, quantizer

PROMPT = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
SAMPLED = {**GREEDY, "do_sample": True, "top_k": 20}


def packed_bytes(model: Any) -> int:
    linears = [module for module in model.modules() if isinstance(module, AwqLinear)]
    return sum(tensor.nbytes for linear in linears for tensor in linear.packed.tensors)


def refusal(function: Any) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def of_model(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for fuse in (False, "auto"):
        model = awq_rt.load(folder, device="cpu", tp_plan="auto", fuse=fuse)
        key = "fused" if fuse else "plain"
        with torch.no_grad():
            found[f"{key} logits"] = model(PROMPT).logits
        found[f"{key} tokens"] = model.generate(PROMPT, **GREEDY)
        torch.manual_seed(rank)  # every process its own, as without a seed
        found[f"{key} sampled"] = model.generate(PROMPT, **SAMPLED)
        found[f"{key} fusion"] = str(model.fusion)
        found["class"] = type(model).__name__
        found["bytes"] = packed_bytes(model)
    return found


def refusals(folder: Path, rank: int) -> dict[str, str]:
    model = awq_rt.load(folder, device="cpu", tp_plan="auto")
    x = model.get_input_embeddings()(PROMPT).requires_grad_()
    return {
        "prompts": refusal(lambda: model.generate(PROMPT + rank, **GREEDY)),
        "settings": refusal(lambda: model.generate(PROMPT, **{**GREEDY, "min_new_tokens": 5 + rank})),
        "time": refusal(lambda: model.generate(PROMPT, max_time=1.0)),
        "saving": refusal(lambda: model.save_pretrained(folder.parent / "saved")),
        "training": refusal(lambda: model(inputs_embeds=x)),
        "device": refusal(lambda: awq_rt.load(folder, device="cpu:0", tp_plan="auto")),
        "both": refusal(lambda: awq_rt.load(folder, device_map="auto", tp_plan="auto")),
        "plan": refusal(lambda: awq_rt.load(folder, device="cpu", tp_plan="colwise")),
    }


def with_a_defect(folder: Path) -> torch.Tensor:
    """Logits when every process adds the bias of a linear whose rows are cut."""
    right = quantizer.ShardedCheckpoint
    quantizer.ShardedCheckpoint = lambda whole, plan, rank: right(whole, plan, 0)
    try:
        model = awq_rt.load(folder, device="cpu", tp_plan="auto", fuse=False)
    finally:
        quantizer.ShardedCheckpoint = right
    with torch.no_grad():
        return model(PROMPT).logits


def after_a_loss(folder: Path, rank: int) -> str:
    """What process 0 is told when process 1 has ended; does not return in that one."""
    model = awq_rt.load(folder, device="cpu", tp_plan="auto")
    model.generate(PROMPT, **GREEDY)
    if rank:
        os._exit(0)
    return refusal(lambda: model.generate(PROMPT, **GREEDY))


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for checkpoint in sorted(path for path in folder.iterdir() if path.is_dir()):
        torch.save(of_model(checkpoint, rank), folder / f"{checkpoint.name}.{rank}.pt")
    torch.save(with_a_defect(folder / "uneven"), folder / f"defect.{rank}.pt")
    torch.save(refusals(folder / "llama", rank), folder / f"refusals.{rank}.pt")
    torch.save(after_a_loss(folder / "llama", rank), folder / f"loss.{rank}.pt")
    atexit.unregister(group._leave)  # nobody is left to leave together with


if __name__ == "__main__":
    main()
