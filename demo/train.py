"""Training before and after ``memory_efficient_fusion``: a small GPT that learns to write like Python's own documentation.

    python -m demo.train [--device cpu|cuda]

Both models train on the same text, a step each in turn. On a CPU the compiled code is Inductor's C++. It claims no gain that it
did not measure. The exit status is 1 if an answer differs by more than the law allows, 2 if the demo cannot run.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from torch import Tensor, nn

import oslo_fusion
from demo.embed import LAW, DemoError, describe, measure, pick_device, quiet, say, widened
from oslo_fusion.probe import compare
from oslo_fusion.workload import saved_bytes
from tutorials.small_gpt import SIZES, Size, Text, Training, build, write

CONFIG = {"kernel_fusion": {"enable": True, "memory_efficient_fusion": True}}
START = "The "


def loss_and_gradient(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """In evaluation mode, so that nothing is dropped; all gradients as one vector. The model's mode stays what it was."""
    training = model.training
    model.eval()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    model.train(training)
    return loss.detach(), gradient


def answers_hold(model: nn.Module, untouched: nn.Module, ids: Tensor) -> bool:
    """Compare the gradient under the law, and say the outcome."""
    (ours, mine), (theirs, plain), (_, truth) = (loss_and_gradient(m, ids) for m in (model, untouched, widened(untouched)))
    say(f"loss of one batch, nothing dropped: untouched {float(theirs):.6f}, fused {float(ours):.6f}")
    comparison = compare(mine, plain, truth, "l2")
    say(f"its gradient under the law ({LAW}): {comparison}: {'holds' if comparison.same else 'BROKEN'}")
    return comparison.same


def training_demo(device: torch.device, size: Size, seconds: float = 20.0) -> bool:
    """Train the small GPT before and after. Returns whether the answers are the same."""
    text = Text()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    untouched = build(text, size, device=device, dtype=dtype)
    say(
        f"3. Training a GPT of {size.layers} layers, {size.width} wide, on Python's documentation, "
        f"{size.rows}×{size.characters} characters a step, dropout on ({describe(device, dtype)})\n"
    )
    model = oslo_fusion.initialize(copy.deepcopy(untouched), CONFIG)
    ids = text.batches(size, 1)().to(device)

    before, after = Training(untouched, text, size), Training(model, text, size)
    before.step()
    begin = time.perf_counter()
    with Console(stderr=True).status("compiling: forward and backward of one layer serve all layers"):
        after.step()
    first = time.perf_counter() - begin
    kept = [saved_bytes(m, {"input_ids": ids, "labels": ids}) / 2**20 for m in (untouched, model)]
    latency = measure(before.step, after.step, device=device, fused=1, what="training", seconds=seconds, rounds=(5, 300))
    say(f"{oslo_fusion.report(model)}\n")
    say(f"one step (forward, backward, AdamW): {latency}")
    say(f"kept from forward to backward: before {kept[0]:.1f} MiB, after {kept[1]:.1f} MiB")
    gain = (latency.medians[0] - latency.medians[1]) / 1e3
    spent = f"first step, with compilation: {first:.1f} s"
    say(f"{spent}, made up for after {first / gain:.0f} steps" if latency.measurable and gain > 0 else spent)
    count = len(before.losses)
    a, b = (sum(side.losses[-10:]) / len(side.losses[-10:]) for side in (before, after))
    say(
        f"loss, first step and mean of the last 10 of {count}: untouched {before.losses[0]:.2f} → {a:.2f}, fused "
        f"{after.losses[0]:.2f} → {b:.2f}"
    )
    say(f"what it writes by now: {write(model, text, START, size.characters - len(START))!r}")

    same = answers_hold(model, oslo_fusion.restore(copy.deepcopy(model)), ids)
    oslo_fusion.restore(model)
    restored = [type(m) for m in model.modules()] == [type(m) for m in untouched.modules()]
    say(f"restore(): classes {'are as before' if restored else 'are NOT as before'}")
    return same and restored


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Training before and after memory_efficient_fusion.")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default the GPU if there is one")
    wanted = parser.parse_args(arguments).device
    try:
        device, _ = pick_device(wanted)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    quiet()
    size = SIZES["full"] if device.type == "cuda" else replace(SIZES["small"], rows=32)
    same = training_demo(device, size)
    say("\nsame answers before and after" if same else "\nTHE ANSWERS DIFFER: see above")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
