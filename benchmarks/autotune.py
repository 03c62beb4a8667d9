"""Makes the table of timings that is shipped for this GPU (see ``oslo_fusion/timings.py``).

    python -m benchmarks.autotune --out DIR         a table for this GPU, torch and triton: copy it into oslo_fusion/tables/
    python -m benchmarks.autotune --out DIR --without FusedAttention --models T5 Bert    all but that, and these families alone
    python -m benchmarks.autotune --out DIR --dry   no GPU: builds the models, plans, and times nothing

What ``--out`` holds already is kept where it is not measured again.

Every kernel and TorchScript site of the common families is planned with ``autotune: full``, one layer per model, at the widths
that the families are published in. A plan for such a model then needs no timing on this kind of GPU.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import oslo_fusion
from oslo_fusion import timings
from oslo_fusion.config import KERNELS

# Family: configuration class, what all of its sizes share, and width × MLP width × heads × key-value heads of each size.
DECODERS: dict[str, list[tuple[int, int, int, int]]] = {
    "Llama": [(2048, 8192, 32, 8), (3072, 8192, 24, 8), (4096, 14336, 32, 8), (8192, 28672, 64, 8)],
    "Mistral": [(4096, 14336, 32, 8)],
    "Qwen2": [(896, 4864, 14, 2), (1536, 8960, 12, 2), (3584, 18944, 28, 4)],
    "Qwen3": [(1024, 3072, 16, 8), (2048, 6144, 16, 8), (4096, 12288, 32, 8)],
    "Gemma": [(2048, 16384, 8, 1), (3072, 24576, 16, 16)],
}
T5 = [(512, 2048, 8), (768, 3072, 12), (1024, 4096, 16)]
ENCODERS = {"Bert": (768, 1024), "Roberta": (768, 1024), "GPT2": (768, 1024, 1280, 1600), "ViT": (768, 1024)}
DTYPES = (torch.bfloat16, torch.float32)


def models(tiny: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each model's name, and what builds it, with one layer."""
    for family, sizes in DECODERS.items():
        for width, inner, heads, kv_heads in sizes[: 1 if tiny else None]:
            config = getattr(transformers, f"{family}Config")(
                hidden_size=64 if tiny else width,
                intermediate_size=128 if tiny else inner,
                num_attention_heads=4 if tiny else heads,
                num_key_value_heads=2 if tiny else kv_heads,
                head_dim=16 if tiny else max(64, width // heads),
                num_hidden_layers=1,
                vocab_size=1024,
            )
            yield f"{family} {width}", functools.partial(transformers.AutoModelForCausalLM.from_config, config)
    for gated in (False, True):
        for width, inner, heads in T5[: 1 if tiny else None]:
            config = transformers.T5Config(
                d_model=64 if tiny else width,
                d_ff=128 if tiny else inner,
                d_kv=64,
                num_heads=heads,
                num_layers=1,
                feed_forward_proj="gated-gelu" if gated else "relu",
                decoder_start_token_id=0,
            )
            yield f"T5 {width}{' gated' if gated else ''}", functools.partial(transformers.T5ForConditionalGeneration, config)
    for family, widths in ENCODERS.items():
        for width in widths[: 1 if tiny else None]:
            size = {
                "hidden_size": width,
                "num_hidden_layers": 1,
                "num_attention_heads": width // 64,
                "intermediate_size": 4 * width,
            }
            size |= {"n_embd": width, "n_layer": 1, "n_head": width // 64} if family == "GPT2" else {}
            config = getattr(transformers, f"{family}Config")(**size)
            yield f"{family} {width}", functools.partial(transformers.AutoModel.from_config, config)


def main() -> int:
    """Plan every model with ``autotune: full``; the figures go to the table in the folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autotune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the table")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny, without timing")
    parser.add_argument("--seconds", type=float, default=240.0, help="start no model after this long; what is left out is said")
    parser.add_argument("--without", nargs="+", default=(), choices=KERNELS, help="kernels whose sites are not timed")
    parser.add_argument("--models", nargs="+", help="only models whose name begins so, such as 'Llama 2048' or T5")
    options = parser.parse_args()
    # The loss is timed for each vocabulary, and these models have none of their own.
    kernels = [name for name in KERNELS if name not in (*options.without, "FusedLinearCrossEntropy")]
    wanted = [(name, build) for name, build in models(options.dry) if name.startswith(tuple(options.models or ("",)))]
    if not wanted:
        names = ", ".join(name for name, _ in models(options.dry))
        parser.error(f"--models: received {' '.join(options.models)}, with which no name begins. Allowed: {names}")
    if not options.dry and not torch.cuda.is_available():
        parser.error("there is no GPU here. Remedy: --dry")
    os.environ[timings.CACHE_VARIABLE] = str(options.out)
    begin, left_out = time.perf_counter(), []
    for name, build in wanted:
        model = build()
        for dtype in DTYPES:
            if time.perf_counter() - begin > options.seconds:
                left_out.append(f"{name} {dtype}")
                continue
            autotune = "off" if options.dry else "full"
            config = {"kernel_fusion": {"enable": True, "custom_cuda_kernels": kernels, "autotune": autotune}}
            planned = oslo_fusion.plan(model.to("cpu" if options.dry else "cuda", dtype), config)
            print(f"{name} {dtype}: {planned.count('fused')} fused, {planned.count('refused')} refused", flush=True)
    for name in left_out:
        print(f"left out for lack of time: {name}")
    if not options.dry:
        path = options.out / timings.file_name(torch.cuda.get_device_name())
        print(f"{path}: {path.read_text(encoding='utf-8').count(': [')} timings")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
