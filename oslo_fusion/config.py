"""The ``kernel_fusion`` block: one frozen dataclass and the parser that fills it.

OSLO's keys keep OSLO's meaning. Whatever is unknown, of the wrong type or out of range is a :class:`ConfigError` that
names the key's full path, what was received, what is allowed and, for a misspelt key, the nearest one. Configuration
strings are checked here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oslo_fusion.errors import ConfigError

BLOCK = "kernel_fusion"
AOT_BLOCK = "memory_efficient_fusion"
KERNELS = (
    "FusedRMSNorm",
    "FusedLayerNorm",
    "FusedSwiGLU",
    "FusedGeGLU",
    "FusedRoPE",
    "FusedAttention",
    "FusedDropoutAddNorm",
    "FusedLinearCrossEntropy",
    "FusedNoRepeatNGram",
)
"""Names that ``custom_cuda_kernels`` may hold. A plan refuses by name what this version has no room for."""

KERNEL = ("auto", "triton", "cuda")
AUTOTUNE = ("off", "cached", "full")
ON_REFUSAL = ("report", "raise")
SCOPES = ("layer", "model")
_FILE_ENDINGS = (".yaml", ".yml", ".json")
_LATER_KEYS = ("preset", "cuda_graphs", "generation")


@dataclass(frozen=True)
class MemoryEfficientFusion:
    """The ``memory_efficient_fusion`` block: AOT Autograd and Inductor, and how much of the forward is kept for the backward.

    Attributes:
        activation_memory_budget: 1 is fastest, 0 recomputes everything in the backward but what is random. In
            ``scope: layer`` that is each layer's own share: 0 keeps a layer's inputs, as gradient checkpointing does.
        scope: ``layer`` compiles a repeated layer once for all its kind; ``model`` the whole forward, or with
            ``FusedLinearCrossEntropy`` all below the head.
        replacements: ``package.module:name`` of each :class:`oslo_fusion.aot.Replacement` to use: one's own kernels in
            place of patterns.
        cuda_graphs: capture what forward and backward launch in training as a CUDA graph each, per shape, and replay them: the
            host no longer limits small layers. Needs ``scope: model``, and shapes that come again.

    Raises:
        ConfigError: a field has the wrong type or a value that is not allowed.
    """

    activation_memory_budget: float = 1.0
    scope: str = "layer"
    replacements: tuple[str, ...] = ()
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        path = f"{AOT_BLOCK}.activation_memory_budget"
        budget: object = self.activation_memory_budget
        scope: object = self.scope
        names: object = self.replacements
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget <= 1:
            remedy = "write 0.5 for half of the memory"
            if isinstance(budget, (int, float)) and 1 < budget <= 100 and not isinstance(budget, bool):
                remedy = f"it is a share, not a percentage or GiB: {budget} % is {budget / 100:g}"
            raise _wrong(path, budget, "a number from 0 to 1", remedy)
        object.__setattr__(self, "activation_memory_budget", float(budget))
        if not isinstance(scope, str) or scope not in SCOPES:
            raise _wrong(f"{AOT_BLOCK}.scope", scope, " | ".join(SCOPES), _nearest(scope, SCOPES))
        if not isinstance(self.cuda_graphs, bool):
            raise _wrong(f"{AOT_BLOCK}.cuda_graphs", self.cuda_graphs, "true or false", "write true or false, without quotes")
        if self.cuda_graphs and scope != "model":
            remedy = f"scope: model, which is {scope} now, or cuda_graphs: false"
            raise _wrong(f"{AOT_BLOCK}.cuda_graphs", True, "false, or true with scope: model", remedy)
        path = f"{AOT_BLOCK}.replacements"
        if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
            raise _wrong(path, names, "a list of 'package.module:name'", "write replacements: [my_package.kernels:gated]")
        for index, name in enumerate(names):
            module, _, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
            if not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
                raise _wrong(
                    f"{path}[{index}]", name, "'package.module:name'", "name an importable oslo_fusion.aot.Replacement"
                )
        object.__setattr__(self, "replacements", tuple(names))


_AOT_KEYS = tuple(field.name for field in dataclasses.fields(MemoryEfficientFusion))


@dataclass(frozen=True)
class FusionConfig:
    """The ``kernel_fusion`` block.

    Attributes:
        enable: fuse. ``False`` leaves the model untouched, as in OSLO.
        memory_efficient_fusion: AOT Autograd instead of TorchScript: ``True``, or a :class:`MemoryEfficientFusion`, or a
            mapping with its fields. Anything but ``False`` is kept as a :class:`MemoryEfficientFusion`.
        custom_cuda_kernels: kernels to use beside the rest: ``FusedRMSNorm`` and ``FusedLayerNorm`` for norms,
            ``FusedSwiGLU`` and ``FusedGeGLU`` for gated MLPs, ``FusedRoPE`` for the rotary embedding of attention,
            ``FusedAttention`` for attention with T5's relative-position bias and the fastest backend for any other,
            ``FusedNoRepeatNGram`` for n-gram blocking in ``generate``; ``("all",)`` for all of these. Only by name:
            ``FusedLinearCrossEntropy`` for head and loss of a language model in training, whose output then has None for
            logits. The plan refuses by name what this version does not have.
        padding_free: compute padded batches without their padding, packed into one sequence of tokens, in training and
            evaluation. Where outputs have a place for each token, those at padding are zeros.
        kernel: which implementation of a kernel is used where there are several: ``triton`` or ``cuda`` (the compiled
            extension's) and no other, so that a site without it is refused; ``auto`` the fastest on this device, on the CPU
            the extension's C++ kernel.
        autotune: ``off`` takes every fusion that is correct; ``cached`` takes those measured to be faster on this
            device, each measured once and, on a GPU, remembered from process to process; ``full`` measures again.
        verify: run the model on a sample input before and after, and put the difference into the report.
        on_refusal: ``report`` puts refusals into the report; ``raise`` raises :class:`RefusalError` instead of applying.

    Raises:
        ConfigError: a field has the wrong type or a value that is not allowed.
    """

    enable: bool = False
    memory_efficient_fusion: bool | MemoryEfficientFusion = False
    custom_cuda_kernels: tuple[str, ...] = ()
    padding_free: bool = False
    kernel: str = "auto"
    autotune: str = "cached"
    verify: bool = False
    on_refusal: str = "report"

    def __post_init__(self) -> None:
        for name in ("enable", "padding_free", "verify"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise _wrong(name, value, "true or false", "write true or false, without quotes")
        object.__setattr__(self, "memory_efficient_fusion", _memory_efficient_fusion(self.memory_efficient_fusion))
        object.__setattr__(self, "custom_cuda_kernels", _kernel_names(self.custom_cuda_kernels))
        for name, allowed in (("kernel", KERNEL), ("autotune", AUTOTUNE), ("on_refusal", ON_REFUSAL)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise _wrong(name, value, " | ".join(allowed), _nearest(value, allowed))

    @property
    def aot(self) -> MemoryEfficientFusion | None:
        """The settings of the AOT room, None where it is off."""
        block = self.memory_efficient_fusion
        return block if self.enable and isinstance(block, MemoryEfficientFusion) else None

    def to_dict(self) -> dict[str, Any]:
        """The block as plain data, ready for YAML or JSON."""
        plain = {**dataclasses.asdict(self), "custom_cuda_kernels": list(self.custom_cuda_kernels)}
        if isinstance(block := plain["memory_efficient_fusion"], dict):
            block["replacements"] = list(block["replacements"])
        return plain


_KEYS = tuple(field.name for field in dataclasses.fields(FusionConfig))


@dataclass(frozen=True)
class ParsedConfig:
    """A :class:`FusionConfig` and what should be said about the source it came from."""

    fusion: FusionConfig
    notes: tuple[str, ...] = ()


def parse_config(source: object) -> ParsedConfig:
    """Read a configuration from any of its forms.

    Args:
        source: a :class:`FusionConfig`; a mapping or OmegaConf ``DictConfig`` with a ``kernel_fusion`` block; or the
            path of a ``.yaml``, ``.yml`` or ``.json`` file with one. Other top-level blocks are left alone and noted.

    Raises:
        ConfigError: with the full key path, what was received and the remedy.
    """
    if isinstance(source, FusionConfig):
        return ParsedConfig(source)
    if isinstance(source, (str, os.PathLike)):
        return _parse_tree(_read_file(Path(source)), where=f"{os.fspath(source)}: ")
    if isinstance(source, DictConfig):
        return _parse_tree(_resolve(source), where="")
    if isinstance(source, Mapping):
        return _parse_tree(dict(source), where="")
    raise ConfigError(
        f"config: received {_show(source)}. Allowed: a dict, an OmegaConf DictConfig, a FusionConfig, or the path of a "
        f"{', '.join(_FILE_ENDINGS)} file. Remedy: config={{'{BLOCK}': {{'enable': True}}}}."
    )


def _parse_tree(tree: object, where: str) -> ParsedConfig:
    if isinstance(tree, FusionConfig):
        return ParsedConfig(tree)
    example = f"write {BLOCK}: {{enable: true}}"
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}config: received {_show(tree)} instead of a mapping. Remedy: {example}.")
    if BLOCK not in tree:
        bare = [key for key in tree if key in _KEYS]
        if bare:
            remedy = f"these keys belong inside the block: {BLOCK}: {{{', '.join(map(str, bare))}: …}}"
        else:
            remedy = _nearest_key(BLOCK, tree) or example
        raise ConfigError(f"{where}{BLOCK}: the block is missing; received the keys {_show_keys(tree)}. Remedy: {remedy}.")
    stray = [str(key) for key in tree if key in _KEYS]
    if stray:
        raise ConfigError(
            f"{where}{stray[0]}: received at the top level. Remedy: move it into the block, as {BLOCK}.{stray[0]}."
        )
    block = tree[BLOCK]
    if isinstance(block, FusionConfig):
        return ParsedConfig(block, _other_blocks(tree))
    if block is None or (isinstance(block, Mapping) and not block):
        raise ConfigError(
            f"{where}{BLOCK}: received an empty block. Remedy: {example} to fuse, or {BLOCK}: {{enable: false}} to leave "
            "the model untouched."
        )
    if not isinstance(block, Mapping):
        raise ConfigError(f"{where}{BLOCK}: received {_show(block)} instead of a mapping. Remedy: {example}.")
    for key in block:
        if key in _LATER_KEYS:
            raise ConfigError(
                f"{where}{BLOCK}.{key}: received {_show(block[key])}, but this version of oslo_fusion has no room for it. "
                f"Allowed: {', '.join(_KEYS)}. Remedy: remove the key."
            )
        if key not in _KEYS:
            raise ConfigError(
                f"{where}{BLOCK}.{key}: unknown key, received {_show(block[key])}. Allowed: {', '.join(_KEYS)}. "
                f"Remedy: {_nearest(key, _KEYS) or 'remove the key'}."
            )
    values = dict(block)
    if "custom_cuda_kernels" in values and values["custom_cuda_kernels"] is None:
        values["custom_cuda_kernels"] = ()  # OSLO's default
    try:
        return ParsedConfig(FusionConfig(**values), _other_blocks(tree))
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def _other_blocks(tree: Mapping[Any, Any]) -> tuple[str, ...]:
    others = [str(key) for key in tree if key != BLOCK]
    return (f"left alone in the configuration, outside {BLOCK}: {', '.join(others)}",) if others else ()


def _memory_efficient_fusion(value: object) -> bool | MemoryEfficientFusion:
    if isinstance(value, MemoryEfficientFusion) or value is False:
        return value
    if value is True:
        return MemoryEfficientFusion()
    if not isinstance(value, Mapping):
        remedy = f"write true, or {AOT_BLOCK}: {{activation_memory_budget: 0.5}}"
        raise _wrong(AOT_BLOCK, value, f"true, false, or a block of {', '.join(_AOT_KEYS)}", remedy)
    for key in value:
        if key not in _AOT_KEYS:
            raise ConfigError(
                f"{BLOCK}.{AOT_BLOCK}.{key}: unknown key, received {_show(value[key])}. Allowed: {', '.join(_AOT_KEYS)}. "
                f"Remedy: {_nearest(key, _AOT_KEYS) or 'remove the key'}."
            )
    return MemoryEfficientFusion(**value)


def _kernel_names(value: object) -> tuple[str, ...]:
    path, allowed = "custom_cuda_kernels", (*KERNELS, "all")
    if value == "all":
        return ("all",)
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise _wrong(path, value, "a list of kernel names", f"write {path}: [{KERNELS[0]}]")
    for index, name in enumerate(value):
        if not isinstance(name, str) or name not in allowed:
            raise _wrong(f"{path}[{index}]", name, ", ".join(allowed), _nearest(name, allowed))
    return tuple(dict.fromkeys(value))


def _read_file(path: Path) -> object:
    where = f"config: {path}"
    if path.suffix not in _FILE_ENDINGS and not path.is_dir():
        raise ConfigError(
            f"{where}: received a file name that ends in {path.suffix or 'nothing'!r}. Allowed: {', '.join(_FILE_ENDINGS)}. "
            "Remedy: rename the file, or pass a dict."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise ConfigError(f"{where}: is a directory. Remedy: give the path of the file inside it.") from None
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such file (from {Path.cwd()}). Remedy: check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot be read: {error}. Remedy: make it a readable UTF-8 text file.") from error
    try:
        if path.suffix == ".json":
            return json.loads(text)
        created = OmegaConf.create(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: malformed JSON: {error}. Remedy: correct that line.") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"{where}: malformed YAML: {error}. Remedy: correct that line.") from error
    return _resolve(created)


def _resolve(tree: DictConfig | ListConfig) -> object:
    try:
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: cannot be resolved: {error}. Remedy: give that key a value.") from error


def _wrong(key: str, value: object, allowed: str, remedy: str) -> ConfigError:
    text = f"{BLOCK}.{key}: received {_show(value)}. Allowed: {allowed}."
    return ConfigError(f"{text} Remedy: {remedy}." if remedy else text)


def _show(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 120 else text[:117] + '...'} ({type(value).__name__})"


def _show_keys(tree: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, tree)) or "none"


def _nearest(value: object, allowed: Sequence[str]) -> str:
    lowered = {name.lower(): name for name in allowed}
    close = difflib.get_close_matches(str(value).lower(), lowered, n=1)
    return f"did you mean {lowered[close[0]]}?" if close else ""


def _nearest_key(wanted: str, tree: Mapping[Any, Any]) -> str:
    close = difflib.get_close_matches(wanted, [str(key) for key in tree], n=1)
    return f"rename {close[0]} to {wanted}" if close else ""
