"""Models by name, built from their configuration classes with random weights, or loaded from a local directory.

transformers is imported when a model is built, not before.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oslo_fusion.environment import environment
from oslo_fusion.errors import ConfigError

SIZES = ("full", "tiny")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Recipe:
    """How a named model is made: its classes in transformers, the published sizes, and a 2-layer version for tests."""

    config: str
    model: str
    full: Mapping[str, Any]
    tiny: Mapping[str, Any]


_BERT_TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
_T5_TINY = {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
_T5_BASE = {"d_model": 768, "d_kv": 64, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12}
_START = {"decoder_start_token_id": 0}  # T5 starts decoding with its padding token
# In transformers 5 this no longer unties the embeddings; it stops the scaling of the decoder's output, as v1.1 wants.
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_ROBERTA = {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
_BART_TINY = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
_BART_BASE = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
}
_LLAMA_3_2_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": True,
}
_LLAMA_TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 256,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}

MODELS: dict[str, Recipe] = {
    "gpt2": Recipe(
        "GPT2Config",
        "GPT2LMHeadModel",
        {},
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 512,
            "n_positions": 128,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "bert": Recipe("BertConfig", "BertForMaskedLM", {}, _BERT_TINY),
    "roberta": Recipe(
        "RobertaConfig",
        "RobertaForMaskedLM",
        {**_ROBERTA, "vocab_size": 50265, "max_position_embeddings": 514},
        {**_BERT_TINY, **_ROBERTA},
    ),
    "t5": Recipe(
        "T5Config",
        "T5ForConditionalGeneration",
        {**_T5_BASE, **_START, "d_ff": 3072},
        {**_T5_TINY, **_START, "vocab_size": 512},
    ),
    "t5-v1_1": Recipe(
        "T5Config",
        "T5ForConditionalGeneration",
        {**_T5_BASE, **_START, **_GATED, "d_ff": 2048},
        {**_T5_TINY, **_START, **_GATED, "vocab_size": 512},
    ),
    "bart": Recipe("BartConfig", "BartForConditionalGeneration", _BART_BASE, _BART_TINY),
    "vit": Recipe(
        "ViTConfig",
        "ViTForImageClassification",
        {"num_labels": 1000},
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "image_size": 32,
            "patch_size": 8,
            "num_labels": 10,
        },
    ),
    "opt": Recipe(
        "OPTConfig",
        "OPTForCausalLM",
        {},
        {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 256,
            "vocab_size": 512,
            "max_position_embeddings": 128,
        },
    ),
    "llama": Recipe("LlamaConfig", "LlamaForCausalLM", _LLAMA_3_2_1B, _LLAMA_TINY),
}
"""The names that :func:`build_model` knows; ``full`` is the published base model, of Llama the 1.24B one."""


def build_model(
    name_or_path: str, *, dtype: torch.dtype | str, device: torch.device | str, size: str = "full", seed: int = 0
) -> nn.Module:
    """Build a Hugging Face model in evaluation mode, without a download.

    Args:
        name_or_path: a key of :data:`MODELS`, which gives random weights; or a local directory as ``save_pretrained``
            writes it, whose weights are loaded. A directory called like a model is reached as ``./gpt2``.
        dtype: of the parameters.
        device: where it is built.
        size: ``full`` for the published sizes, ``tiny`` for two narrow layers. A directory has the size it has.
        seed: of the random weights: same seed, dtype and device, same weights. The caller's random state stays.

    Raises:
        ConfigError: an argument is unusable, or the directory holds no model with weights.
    """
    dtype, device = parse_dtype(dtype), parse_device(device)
    if size not in SIZES:
        raise wrong_value("size", size, SIZES)
    if name_or_path in MODELS:
        return _build(MODELS[name_or_path], dtype, device, size, seed)
    path = Path(name_or_path)
    if not path.is_dir():
        raise wrong_value("model", name_or_path, [*MODELS, "a local directory with config.json and weights"])
    if size != "full":
        raise ConfigError(
            f"size: received {size!r} with the directory {path}, whose model has the size it has. Remedy: size='full'."
        )
    return _load(path, dtype, device)


def _build(recipe: Recipe, dtype: torch.dtype, device: torch.device, size: str, seed: int) -> nn.Module:
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, recipe.config)(**(recipe.full if size == "full" else recipe.tiny))
    with seeded(seed, device), device:
        # The Auto classes' from_config ends here too. A later .to(dtype) would also narrow what is meant to stay
        # float32, Llama's rotary frequencies for one.
        model: nn.Module = getattr(transformers, recipe.model)._from_config(config, dtype=dtype)
    return model.to(device).eval()


def _load(path: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    transformers = importlib.import_module("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        architectures = getattr(config, "architectures", None) or []
        cls = getattr(transformers, architectures[0], None) if architectures else None
        if cls is None:
            raise ConfigError(
                f"model: {path}: config.json has {architectures[0] if architectures else 'nothing'!r} in architectures "
                f"and transformers {environment().transformers} has no such class. Remedy: use save_pretrained."
            )
        model: nn.Module = cls.from_pretrained(path, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"model: {path}: cannot be loaded: {error}. Remedy: give a directory as save_pretrained writes it, with "
            "config.json and weights."
        ) from error
    return model.to(device).eval()


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """``fp16``, ``float16`` or ``torch.float16`` → ``torch.float16``, and so on.

    Raises:
        ConfigError: any other value.
    """
    if isinstance(dtype, torch.dtype):
        if dtype in DTYPES.values():
            return dtype
    elif DTYPE_ALIASES.get(dtype, dtype) in DTYPES:
        return DTYPES[DTYPE_ALIASES.get(dtype, dtype)]
    raise wrong_value("dtype", dtype, [*DTYPES, *DTYPE_ALIASES])


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float16`` → ``float16``."""
    return str(dtype).removeprefix("torch.")


def parse_device(device: torch.device | str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1`` as a device that exists on this machine.

    Raises:
        ConfigError: the text names no device, or one that is not here.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise wrong_value("device", device, ("cpu", "cuda", "cuda:0")) from None
    if parsed.type not in ("cpu", "cuda"):
        raise wrong_value("device", device, ("cpu", "cuda", "cuda:0"))
    if parsed.type == "cuda":
        count = len(environment().devices)
        if (parsed.index or 0) >= count:
            seen = "none" if count == 0 else f"cuda:0 to cuda:{count - 1}"
            raise ConfigError(
                f"device: received {str(parsed)!r}; CUDA devices that torch sees here: {seen}. Remedy: device='cpu'; "
                "python -m oslo_fusion info says more."
            )
    return parsed


def default_device() -> torch.device:
    """The first CUDA device, or the CPU where there is none."""
    return torch.device("cuda" if environment().devices else "cpu")


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def wrong_value(name: str, value: object, allowed: Sequence[str]) -> ConfigError:
    close = difflib.get_close_matches(str(value), allowed, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"{name}={allowed[0]!r}."
    return ConfigError(f"{name}: received {value!r} ({type(value).__name__}). Allowed: {', '.join(allowed)}. Remedy: {remedy}")
