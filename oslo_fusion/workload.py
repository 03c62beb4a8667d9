"""What is timed, and how: models by name, inputs, one step, a check before any timing, and the providers side by side.

``python -m oslo_fusion bench`` and everything in ``benchmarks/`` measure through this module, so that every figure is
taken in the same way: wall clock with a synchronize per call, all providers in one run on identically seeded models,
and nothing is timed whose answers are wrong. transformers is imported when a model is built, not before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import gc
import inspect
import math
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from oslo_fusion import engine
from oslo_fusion.config import FusionConfig, MemoryEfficientFusion, parse_config
from oslo_fusion.environment import environment
from oslo_fusion.errors import ConfigError, PlanError
from oslo_fusion.models import SIZES, build_model, dtype_name, parse_device, parse_dtype, seeded, wrong_value
from oslo_fusion.testing import assert_close_to_reference

MODES = ("forward", "training")
PROVIDERS = ("eager", "compile", "compile reduce-overhead", "oslo_fusion")
"""``eager``: the model as Hugging Face gives it. ``compile``: ``torch.compile(model)``. ``compile reduce-overhead``:
the same with ``mode="reduce-overhead"``, which replays CUDA graphs. ``oslo_fusion``: ``oslo_fusion.initialize(model,
config)``."""

_ROUNDS = 5
_LONGEST_WAITS = 12
MIN_WARMUP = 5  # TorchScript's profiling executor runs, profiles, then compiles: forward and backward are settled after four


# --- the workload ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """One thing to time: a model, a batch, and what is done with it.

    Attributes:
        model: a name or local path, as for :func:`build_model`.
        batch: samples per call.
        seq: tokens per sample; of an encoder-decoder on both sides. An image model fixes its own and ignores it.
        mode: ``forward`` (evaluation mode, no gradients) or ``training`` (forward with labels, backward, fused AdamW).
        dtype: of parameters and images; text or ``torch.dtype``.
        device: text or ``torch.device``.
        size: ``full`` or ``tiny``.
        seed: of weights and inputs.
        ragged: texts are of different lengths, uniformly from an eighth of ``seq`` on, padded on the right, with a mask.

    Raises:
        ConfigError: a field is unusable. Whether ``seq`` fits the model is found when inputs are made.
    """

    model: str
    batch: int
    seq: int
    mode: str = "forward"
    dtype: torch.dtype | str = "float32"
    device: torch.device | str = "cpu"
    size: str = "full"
    seed: int = 0
    ragged: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "seq"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"{name}: received {value!r} ({type(value).__name__}). Allowed: a whole number from 1. Remedy: {name}=8."
                )
        if self.mode not in MODES:
            raise wrong_value("mode", self.mode, MODES)
        if self.size not in SIZES:
            raise wrong_value("size", self.size, SIZES)
        object.__setattr__(self, "dtype", parse_dtype(self.dtype))
        object.__setattr__(self, "device", parse_device(self.device))

    @property
    def torch_device(self) -> torch.device:
        """The device, parsed."""
        return parse_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype, parsed."""
        return parse_dtype(self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, ready for JSON."""
        return {
            **dataclasses.asdict(self),
            "dtype": dtype_name(self.torch_dtype),
            "device": str(self.torch_device),
        }

    def build(self) -> nn.Module:
        """A fresh model, the same each time, in training mode where that is timed."""
        model = build_model(self.model, dtype=self.torch_dtype, device=self.torch_device, size=self.size, seed=self.seed)
        return model.train(self.mode == "training")

    def second(self) -> Workload:
        """The same workload at another batch and length: half of each, or two where that is nothing."""
        return dataclasses.replace(self, batch=self.batch // 2 or 2, seq=self.seq // 2 or 2)

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Random inputs for ``model``, the same each time: token ids ``[batch, seq]`` or pixels ``[batch, channels,
        height, width]``, in training with labels. A masked language model's are set at 15 % of the tokens of each sample.

        Raises:
            ConfigError: ``seq`` is longer than the model's positions, or the model has no loss to train on.
        """
        config: Any = model.config
        generator = torch.Generator().manual_seed(self.seed + 1)
        made: dict[str, Tensor] = {}
        if getattr(model, "main_input_name", "input_ids") == "pixel_values":
            side = config.image_size if isinstance(config.image_size, Sequence) else (config.image_size,) * 2
            pixels = torch.randn(self.batch, config.num_channels, *side, generator=generator)
            made["pixel_values"] = pixels.to(self.torch_dtype)
            labels = torch.randint(config.num_labels, (self.batch,), generator=generator)
        else:
            self._check_length(config)

            def tokens() -> Tensor:
                # The lowest ids are padding and other special tokens, to which some models react.
                return torch.randint(min(5, config.vocab_size - 1), config.vocab_size, shape, generator=generator)

            shape = (self.batch, self.seq)
            made["input_ids"] = tokens()
            labels = tokens()
            if config.is_encoder_decoder and self.mode == "forward":
                made["decoder_input_ids"] = tokens()
        if self.mode == "training":
            if "labels" not in inspect.signature(model.forward).parameters:
                raise ConfigError(
                    f"mode: received 'training', and {type(model).__name__} has no loss. Remedy: mode='forward', or a "
                    "model with a task head."
                )
            made["labels"] = labels
            if any(cls.__name__.endswith("ForMaskedLM") for cls in type(model).__mro__):
                ranks = torch.rand(labels.shape, generator=generator).argsort(1).argsort(1)
                made["labels"] = labels.masked_fill(ranks >= max(1, round(0.15 * self.seq)), -100)
        if self.ragged and "input_ids" in made:
            lengths = torch.randint(max(1, self.seq // 8), self.seq + 1, (self.batch, 1), generator=generator)
            seen = torch.arange(self.seq)[None, :] < lengths
            made["attention_mask"] = seen.long()
            made["input_ids"] = made["input_ids"].masked_fill(~seen, config.pad_token_id or 0)
            if "labels" in made and made["labels"].dim() == 2:
                kept = made["labels"].masked_fill(~seen, -100)
                bare = (kept == -100).all(1)  # of a text of a few tokens none may be masked: a loss of nothing is no number
                kept[bare, 0] = labels[bare, 0]
                made["labels"] = kept
        return {name: tensor.to(self.torch_device) for name, tensor in made.items()}

    def _check_length(self, config: Any) -> None:
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        if isinstance(limit, int) and "roberta" in config.model_type:
            limit -= config.pad_token_id + 1  # RoBERTa counts positions from after its padding token
        if isinstance(limit, int) and self.seq > limit:
            raise ConfigError(
                f"seq: received {self.seq}, and {self.model} ({self.size}) has {limit} positions. Remedy: seq of at "
                f"most {limit}."
            )


Step = Callable[[Mapping[str, Tensor]], Any]


def make_step(model: Callable[..., Any], parameters: Sequence[nn.Parameter], mode: str) -> Step:
    """The function that is timed: it takes inputs and runs one forward, or one training step.

    Training uses fused AdamW with a learning rate of zero: the same kernels run, and the weights stay where the check
    saw them. (In pure float16 without loss scaling real steps end in NaN, and multiplying NaN draws less power and
    runs faster.)

    Args:
        model: the model or its compiled wrapper.
        parameters: what the optimizer owns.
        mode: ``forward`` or ``training``.
    """
    if mode == "forward":

        def forward(inputs: Mapping[str, Tensor]) -> Any:
            with torch.no_grad():
                return model(**inputs)

        return forward

    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)

    def train(inputs: Mapping[str, Tensor]) -> Any:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return train


# --- the clock ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """Wall-clock seconds per call, synchronized, nothing trimmed.

    Attributes:
        median_s, p90_s, mean_s: over ``repeats`` calls after the warm-up.
        first_call_s: the very first call.
        warmup_s: all calls before the timed ones together, the first included.
        second_shape_s: the first call with another batch and length, after the timed ones; None if not asked.
        peak_bytes: most memory allocated on the device during the timed calls, weights and the memory of captured CUDA graphs
            included, other models that are there at the time not; None on the CPU.
        repeats: how many calls were timed.
    """

    median_s: float
    p90_s: float
    mean_s: float
    first_call_s: float
    warmup_s: float
    second_shape_s: float | None
    peak_bytes: int | None
    repeats: int


def measure(
    step: Callable[[], object],
    device: torch.device,
    repeats: int = 50,
    warmup: int = 10,
    second_shape: Callable[[], object] | None = None,
) -> Measurement:
    """Time ``step``.

    Args:
        step: does the work once; whatever it returns is dropped.
        device: synchronized after each call.
        repeats: timed calls, at least 1.
        warmup: calls before them, at least :data:`MIN_WARMUP`.
        second_shape: the same work at another shape, called once at the end.

    Raises:
        ConfigError: too few calls.
    """
    _check_calls(repeats, warmup)
    watch = Stopwatch(step, device)
    resident = _allocated(device)
    watch.warm_up(warmup)
    watch.time(repeats)
    return watch.measurement(resident, second_shape)


class Stopwatch:
    """Times one step, in as many portions as the caller likes, so that several can be timed in turn."""

    def __init__(self, step: Callable[[], object], device: torch.device) -> None:
        self._step, self._device = step, device
        self._warming: list[float] = []
        self._times: list[float] = []
        self._rise = 0

    def _timed(self, function: Callable[[], object]) -> float:
        start = time.perf_counter()
        result = function()
        synchronize(self._device)
        stop = time.perf_counter()
        del result
        return stop - start

    def warm_up(self, calls: int) -> None:
        """Make the first calls."""
        synchronize(self._device)
        self._warming += [self._timed(self._step) for _ in range(calls)]

    def time(self, calls: int) -> None:
        """Make timed calls, and note how far the allocated memory rises above what is there at their start."""
        before = _allocated(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._times += [self._timed(self._step) for _ in range(calls)]
        if self._device.type == "cuda":
            self._rise = max(self._rise, torch.cuda.max_memory_allocated(self._device) - before)

    def measurement(self, resident: int, second_shape: Callable[[], object] | None = None) -> Measurement:
        """What was measured.

        Args:
            resident: bytes that the model and its optimizer hold between calls; the peak is counted from there.
            second_shape: called once, timed.
        """
        times, middle = sorted(self._times), len(self._times) // 2
        return Measurement(
            median_s=times[middle] if len(times) % 2 else (times[middle - 1] + times[middle]) / 2,
            p90_s=times[math.ceil(0.9 * len(times)) - 1],
            mean_s=sum(times) / len(times),
            first_call_s=self._warming[0],
            warmup_s=sum(self._warming),
            second_shape_s=self._timed(second_shape) if second_shape else None,
            peak_bytes=resident + self._rise + _kept_for_graphs(self._device) if self._device.type == "cuda" else None,
            repeats=len(times),
        )


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _kept_for_graphs(device: torch.device) -> int:
    """Bytes that captured CUDA graphs use while they are replayed: the allocator has them in pools of their own and counts
    them as free."""
    segments = (s for s in torch.cuda.memory_snapshot() if s["device"] == (device.index or 0))
    return sum(s["total_size"] - s["allocated_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def _check_calls(repeats: int, warmup: int) -> None:
    for name, value, least in (("repeats", repeats, 1), ("warmup", warmup, MIN_WARMUP)):
        if value < least:
            raise ConfigError(f"{name}: received {value}. Allowed: a whole number from {least}. Remedy: {name}={least}.")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(step: Callable[[], object], device: torch.device, calls: int = 3, top: int = 12) -> dict[str, Any]:
    """Where the time of a warmed-up step goes on a CUDA device, per call.

    Args:
        step: as for :func:`measure`.
        device: a CUDA device.
        calls: how many calls are traced and averaged.
        top: how many kernels are listed.

    Returns:
        ``wall_ms`` (synchronized, median), ``host_ms`` (until the call returns, with the device idle at its start:
        close to ``wall_ms`` means that the host is the limit), ``device_ms`` (sum of all kernels, copies and fills),
        ``launches`` (their number), ``idle_ms`` (of all calls, between two kernels), ``idle``: the longest waits with the
        kernels before and after, and ``kernels``: ``name``, ``ms``, ``calls``, ``share`` of ``device_ms``, largest first.
    """
    wall, host = [], []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        result = step()
        host.append(time.perf_counter() - start)
        synchronize(device)
        wall.append(time.perf_counter() - start)
        del result
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(calls):
            step()
        synchronize(device)
    kernels = [
        event
        for event in trace.key_averages()
        if event.device_type == torch._C._autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.key.startswith(("Optimizer.", "ProfilerStep"))  # spans around kernels, which would count twice
    ]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    idle = _idle(trace.events())
    total = sum(event.self_device_time_total for event in kernels)
    return {
        "wall_ms": sorted(wall)[2] * 1e3,
        "host_ms": sorted(host)[2] * 1e3,
        "device_ms": total / calls / 1e3,
        "launches": sum(event.count for event in kernels) / calls,
        "idle_ms": sum(ms for ms, _, _ in idle) / calls,
        "idle": [{"ms": ms, "after": after[:80], "before": before[:80]} for ms, after, before in idle[:_LONGEST_WAITS]],
        "kernels": [
            {
                "name": event.key[:160],
                "ms": event.self_device_time_total / calls / 1e3,
                "calls": event.count / calls,
                "share": event.self_device_time_total / total,
            }
            for event in kernels[:top]
        ],
    }


def _idle(events: Any) -> list[tuple[float, str, str]]:
    """Times in which a device did nothing, ms, longest first, with the names of what ran before and after."""
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in events
        if e.device_type == torch._C._autograd.DeviceType.CUDA
        and not getattr(e, "is_user_annotation", False)
        and not e.name.startswith(("Optimizer.", "ProfilerStep"))
    )
    found, until, last = [], math.inf, ""
    for start, end, name in spans:
        if start > until:
            found.append(((start - until) / 1e3, last, name))
        if end > until or math.isinf(until):
            until, last = end, name
    return sorted(found, reverse=True)


# --- the roof -------------------------------------------------------------------------------------------------------


def count_flops(workload: Workload) -> int:
    """Floating-point operations of one call: matrix products, convolutions, attention; in training with the backward.

    Counted on one sample and multiplied, with attention as plain matrix products, so that the figure is the model's
    and not that of the kernel chosen on this device. A causal mask does not reduce it.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, which importing us must not do

    single = dataclasses.replace(workload, batch=1)
    model = single.build()
    inputs = single.inputs(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if workload.mode == "training":
            model(**inputs).loss.backward()
        else:
            with torch.no_grad():
                model(**inputs)
    return int(counter.get_total_flops()) * workload.batch


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measured FLOP/s of one square matrix product on random data: 8192³ on a GPU, 1024³ on the CPU.

    The better of A·B and A·Bᵀ: on some CPUs float16 has a fast path for one of them only, 30 times apart.
    """
    size, calls = (8192, 10) if device.type == "cuda" else (1024, 3)
    with seeded(0, device):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    layouts = (right, right.t())
    pilots = [_seconds_per_call(functools.partial(torch.mm, left, b), device, 1, rounds=1) for b in layouts]
    best = layouts[pilots.index(min(pilots))]
    return 2 * size**3 / _seconds_per_call(lambda: torch.mm(left, best), device, calls)


def copy_bandwidth(device: torch.device) -> float:
    """Measured bytes per second, read and written, of a large copy: 1 GiB on a GPU, 128 MiB on the CPU."""
    size, calls = (1 << 30, 10) if device.type == "cuda" else (1 << 27, 3)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds_per_call(lambda: target.copy_(source), device, calls)


def _seconds_per_call(function: Callable[[], object], device: torch.device, calls: int, rounds: int = 3) -> float:
    """The best of some rounds of back-to-back calls: a roof is what the machine can do, not what it did on average."""
    function()
    best = math.inf
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


# --- same answers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a model said: its main output, and in training its loss and the gradient of every parameter by name.

    With a fused loss there is no output in training: logits are what it does without.
    """

    output: Tensor | None
    loss: Tensor | None = None
    gradients: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


def answers(model: nn.Module, inputs: Mapping[str, Tensor], mode: str) -> Answers:
    """Run ``model`` once and keep what it said. Gradients are removed from the model again."""
    if mode == "forward":
        with torch.no_grad():
            return Answers(_main_output(model(**inputs)))
    result = model(**inputs)
    result.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    output = None if _without_logits(result) else _main_output(result).detach()
    return Answers(output, result.loss.detach(), gradients)


def check(before: Answers, after: Answers, reference: Answers) -> dict[str, Any]:
    """The gate before any timing: our error may be at most twice that of the same-dtype PyTorch code, plus one ulp.

    The output and the loss are compared by their largest error (the loss in the output's dtype); each parameter's
    gradient by ‖g − ref‖ / ‖ref‖.

    Args:
        before: of the untouched model.
        after: of the initialized model.
        reference: of the untouched model in float32 (for half precision) or float64.

    Returns:
        The errors that were found, for the record.

    Raises:
        AssertionError: the law is broken; the message has what, and both errors.
    """
    found: dict[str, Any] = {}
    if before.output is not None and after.output is not None and reference.output is not None:
        assert_close_to_reference(after.output, before.output, reference.output, what="output")
        found["output"] = _errors(before.output, after.output, reference.output)
    if before.loss is not None and after.loss is not None and reference.loss is not None:
        dtype = before.loss.dtype if before.output is None else before.output.dtype
        assert_close_to_reference(after.loss.to(dtype), before.loss.to(dtype), reference.loss, what="loss")
        found["loss"] = _errors(before.loss, after.loss, reference.loss)
    if not before.gradients.keys() == after.gradients.keys() == reference.gradients.keys():
        raise AssertionError(
            "gradients: not the same parameters have one before and after: "
            f"{sorted(before.gradients.keys() ^ after.gradients.keys())[:5]}"
        )
    whole = math.hypot(*(float(truth.double().norm()) for truth in reference.gradients.values()))
    worst: dict[str, Any] = {}
    for name, truth in reference.gradients.items():
        error = _compare_gradients(name, before.gradients[name], after.gradients[name], truth, whole)
        if error is not None and error["after"] > worst.get("after", -1.0):
            worst = {"parameter": name, **error}
    if worst:
        found["worst_gradient"] = worst
    return found


def _compare_gradients(name: str, before: Tensor, after: Tensor, reference: Tensor, whole: float) -> dict[str, float] | None:
    """Relative errors; None for a gradient that is zero but for rounding, as that of a key projection's bias is."""
    truth = reference.double()
    size = float(truth.norm())
    theirs, ours = float((before.double() - truth).norm()), float((after.double() - truth).norm())
    vanishes = theirs >= size  # PyTorch gets no digit right: it is noise, and noise is measured on the whole gradient
    allowed = 2 * theirs + torch.finfo(before.dtype).eps * (whole if vanishes else size)
    if not ours <= allowed:  # also where ours is NaN
        raise AssertionError(
            f"gradient of {name}: error {ours:.3g} in a norm of {size:.3g}, allowed {allowed:.3g} (same-dtype PyTorch: "
            f"{theirs:.3g})"
        )
    return None if vanishes else {"before": theirs / size, "after": ours / size}


def _errors(before: Tensor, after: Tensor, reference: Tensor) -> dict[str, float]:
    def largest(tensor: Tensor) -> float:
        return float((tensor.to(reference.dtype) - reference).abs().max()) if tensor.numel() else 0.0

    return {"before": largest(before), "after": largest(after), "largest_value": float(reference.abs().max())}


def _without_logits(result: Any) -> bool:
    """Whether a fused loss took the logits' place. A model without any would have no entry for them."""
    return result.loss is not None and getattr(result, "logits", result) is None


def _main_output(result: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if isinstance(value := getattr(result, name, None), Tensor):
            return value
    values = result if isinstance(result, tuple) else (result,)
    found = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
    if found is None:
        raise ConfigError(f"model: it returned {type(result).__name__} without a floating-point tensor. Remedy: another model.")
    return found


def switch_off_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout probability in a model to zero, and return the model.

    A training step can be compared only without dropout, since a fused kernel draws other random numbers. Modules stay
    in training mode; dropout modules, and numbers on modules that are named like one (``attention_dropout``,
    ``dropout_prob``, ``layerdrop``), become zero. The configuration, which transformers reads when it builds, stays.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(module.__dict__.items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


@dataclass(frozen=True)
class Gate:
    """A green check: the errors, which sites were fused, the seconds of ``initialize`` and of our first call."""

    errors: Mapping[str, Any]
    fused: tuple[str, ...]
    initialize_s: float
    first_call_s: float


def run_check(workload: Workload, config: object) -> Gate:
    """Run the workload's model before and after :func:`oslo_fusion.initialize`, with dropout off, and compare.

    Raises:
        AssertionError: the answers differ by more than the law allows.
        OsloFusionError: from ``initialize``.
    """
    wide = torch.float64 if workload.torch_dtype == torch.float32 else torch.float32
    device = workload.torch_device
    model = switch_off_dropout(workload.build())
    inputs = workload.inputs(model)
    before = answers(model, inputs, workload.mode)
    model.to(wide)
    wide_inputs = {name: t.to(wide) if t.is_floating_point() else t for name, t in inputs.items()}
    reference = answers(model, wide_inputs, workload.mode)
    del model
    free_memory(device)
    model, initialize_s = _initialized(workload, config)
    switch_off_dropout(model)
    start = time.perf_counter()
    after = answers(model, inputs, workload.mode)
    synchronize(device)
    return Gate(check(before, after, reference), _fused_sites(model), initialize_s, time.perf_counter() - start)


# --- providers ------------------------------------------------------------------------------------------------------


def compare(
    workload: Workload,
    config: object,
    providers: Sequence[str] = PROVIDERS,
    *,
    repeats: int = 50,
    warmup: int = 10,
    with_profile: bool = False,
    on_stage: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time the same workload with each provider in one run.

    First the answers of ``oslo_fusion`` are checked (where it is among the providers), then the roof is measured,
    then each provider gets a fresh, identically seeded model, and they are timed in turn, in five rounds. All models are
    on the device at once. A provider that fails gives a row with its error, and the run goes on.

    Args:
        workload: what to time.
        config: for ``oslo_fusion``, in any form that :func:`oslo_fusion.initialize` takes.
        providers: names out of :data:`PROVIDERS`, in order. Speedups are given relative to ``eager``.
        repeats, warmup: as for :func:`measure`.
        with_profile: also say where the time of ``eager`` and ``oslo_fusion`` goes (on CUDA only).
        on_stage: called with a few words as each of the ``3 + len(providers)`` stages begins.

    Returns:
        Plain data, ready for JSON: ``workload``, ``config``, ``check``, ``fusion`` (counts by outcome and kind,
        reasons of refusals), ``roof`` (``flops`` per call, ``matmul_flops_per_s``, ``copy_bytes_per_s``) and
        ``rows``: per provider the fields of :class:`Measurement`, ``prepare_s`` (initialize or wrap), ``speedup``,
        ``percent_of_roof``, ``profile`` and ``error``. For ``oslo_fusion``, ``prepare_s`` and ``first_call_s`` are
        the slower of the check's and the timed model's, because what the first has compiled the second finds ready.

    Raises:
        AssertionError: the check is red; nothing was timed.
        ConfigError: an argument is unusable; nothing was timed.
    """
    for name in providers:
        if name not in PROVIDERS:
            raise wrong_value("providers", name, PROVIDERS)
    _check_calls(repeats, warmup)
    fusion = parse_config(config).fusion
    device = workload.torch_device
    on_stage(f"checking answers ({workload.model}, {dtype_name(workload.torch_dtype)}, {workload.mode})")
    with _exact_float32(), _no_compiler_caches(fusion):
        gate = run_check(workload, fusion) if "oslo_fusion" in providers else None
        free_memory(device)
        on_stage("measuring the roof")
        flops = count_flops(workload)
        free_memory(device)
        rate, bandwidth = matmul_rate(workload.torch_dtype, device), copy_bandwidth(device)
        free_memory(device)
        entries = []
        try:
            for name in providers:
                on_stage(f"preparing {name}")
                entries.append(_prepare(name, workload, fusion, gate, warmup))
                free_memory(device)
            on_stage("timing")
            for turn in range(_ROUNDS):  # in turn, so that a slow moment of the machine meets all of them
                calls = len(range(turn, repeats, _ROUNDS))
                for entry in entries:
                    entry.attempt(functools.partial(_Entry.time, calls=calls))
            for entry in entries:
                entry.attempt(lambda e: e.finish(flops, rate, with_profile))
        finally:
            _reset_compiler()
    rows = [entry.row for entry in entries]
    outcome = next((_outcome(entry.report) for entry in entries if entry.report is not None), None)
    entries.clear()
    free_memory(device)
    _add_speedups(rows)
    return {
        "workload": workload.to_dict(),
        "config": fusion.to_dict(),
        "check": None if gate is None else dict(gate.errors),
        "fusion": outcome,
        "roof": {"flops": flops, "matmul_flops_per_s": rate, "copy_bytes_per_s": bandwidth},
        "rows": rows,
    }


@dataclass
class _Entry:
    """A provider at work: its row, and while nothing failed its step."""

    row: dict[str, Any]
    device: torch.device
    report: Any = None
    resident: int = 0
    run: Callable[[Mapping[str, Tensor]], Any] | None = None
    inputs: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    second_inputs: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def start(self, run: Callable[[Mapping[str, Tensor]], Any]) -> None:
        """Take the function that is timed."""
        self.run = run
        self.watch = Stopwatch(lambda: run(self.inputs), self.device)

    def attempt(self, act: Callable[[_Entry], None]) -> None:
        """Do something with a provider that has not failed; a failure becomes its row: the others still count."""
        if self.row["error"] is not None:
            return
        try:
            act(self)
        except Exception as error:
            self.row["error"] = f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:600]
            self.run = None

    def time(self, calls: int) -> None:
        """Time a portion of the calls."""
        self.watch.time(calls)

    def finish(self, flops: int, rate: float, with_profile: bool) -> None:
        """The profile, another shape, and the row from what was timed."""
        run, found = self.run, None
        assert run is not None
        if with_profile and self.device.type == "cuda" and self.row["provider"] in ("eager", "oslo_fusion"):
            # Before another shape comes: from then on torch.compile has a graph for any, and calls that for the first one too.
            found = profile(lambda: run(self.inputs), self.device)
        measured = self.watch.measurement(self.resident, lambda: run(self.second_inputs))
        slower_first_call = max(measured.first_call_s, self.row.pop("gate_first_call_s", 0.0))
        self.row.update(dataclasses.asdict(measured), first_call_s=slower_first_call)
        self.row["percent_of_roof"] = 100 * flops / (measured.median_s * rate)
        if found is not None:
            self.row["profile"] = found


def _prepare(name: str, workload: Workload, config: object, gate: Gate | None, warmup: int) -> _Entry:
    """Build a provider's model and make its first calls."""
    entry = _Entry({"provider": name, "error": None}, workload.torch_device)
    entry.attempt(lambda e: _start(e, name, workload, config, gate, warmup))
    return entry


def _start(entry: _Entry, name: str, workload: Workload, config: object, gate: Gate | None, warmup: int) -> None:
    if name == "compile reduce-overhead" and entry.device.type != "cuda":
        raise ConfigError("reduce-overhead replays CUDA graphs, and this workload runs on the CPU")
    before = _allocated(entry.device)
    if name == "oslo_fusion":
        model, entry.row["prepare_s"] = _initialized(workload, config)
        entry.report = engine.report(model)
        called: Callable[..., Any] = model
        if gate is not None:
            if tuple(row.site.path for row in entry.report.rows if row.outcome == "fused") != gate.fused:
                raise PlanError(
                    f"{entry.report.count('fused')} sites were fused where the check saw {len(gate.fused)}: what was timed "
                    "is not what was checked. Remedy: autotune: off, or a quieter machine."
                )
            entry.row["prepare_s"] = max(entry.row["prepare_s"], gate.initialize_s)
            entry.row["gate_first_call_s"] = gate.first_call_s
    else:
        model = workload.build()
        start = time.perf_counter()
        called = _compiled(model, name)
        entry.row["prepare_s"] = time.perf_counter() - start
    step = make_step(called, list(model.parameters()), workload.mode)
    entry.inputs, entry.second_inputs = workload.inputs(model), workload.second().inputs(model)

    def run(given: Mapping[str, Tensor]) -> Any:
        if name == "compile reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        return step(given)

    entry.start(run)
    entry.watch.warm_up(warmup)
    entry.resident = _allocated(entry.device) - before


def _initialized(workload: Workload, config: object) -> tuple[nn.Module, float]:
    model = workload.build()
    synchronize(workload.torch_device)
    start = time.perf_counter()
    engine.initialize(model, config)
    synchronize(workload.torch_device)
    return model, time.perf_counter() - start


def _compiled(model: nn.Module, name: str) -> Callable[..., Any]:
    if name == "eager":
        return model
    torch.compiler.config.force_disable_caches = True  # else a compilation left on disk would be timed as the first call
    return torch.compile(model, mode="reduce-overhead" if name == "compile reduce-overhead" else None)


def _reset_compiler() -> None:
    torch._dynamo.reset()
    torch.compiler.config.force_disable_caches = False


def _fused_sites(model: nn.Module) -> tuple[str, ...]:
    return tuple(row.site.path for row in engine.report(model).rows if row.outcome == "fused")


def _outcome(report: Any) -> dict[str, Any]:
    refusals = Counter((row.site.kind, row.reason) for row in report.rows if row.outcome == "refused")
    return {
        **{outcome: report.count(outcome) for outcome in ("fused", "refused", "off")},
        "kinds": dict(Counter(row.site.kind for row in report.rows if row.outcome == "fused")),
        "refusals": [{"kind": kind, "reason": reason, "sites": n} for (kind, reason), n in refusals.items()],
    }


def _add_speedups(rows: list[dict[str, Any]]) -> None:
    base = next((r["median_s"] for r in rows if r["provider"] == "eager" and r["error"] is None), None)
    for row in rows:
        if base is not None and row["error"] is None:
            row["speedup"] = base / row["median_s"]


# --- the dial -------------------------------------------------------------------------------------------------------

BUDGETS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


def sweep(
    workload: Workload,
    config: object,
    budgets: Sequence[float] = BUDGETS,
    *,
    memory_gib: float | None = None,
    repeats: int = 20,
    warmup: int = MIN_WARMUP,
    on_stage: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Training speed against memory over ``activation_memory_budget``, and the fastest setting that fits.

    Each budget gets a fresh, identically seeded model; loss and gradients of another are checked before, on an eighth of the
    batch, because the float32 answers of a batch that fills the memory would not fit into it. A budget that runs out of memory,
    or fails, gives a row with its error, and the sweep goes on. Key/value caches are off, as in Trainer.

    Args:
        workload: what to time, in mode ``training``.
        config: as for :func:`compare`; ``scope`` and everything else but the budget are taken from it.
        budgets: numbers from 0 to 1.
        memory_gib: how much may be used; None for as much as there is.
        repeats, warmup: as for :func:`measure`.
        on_stage: called with a few words as each of the ``1 + len(budgets)`` stages begins.

    Returns:
        Plain data: ``workload``, ``config``, ``memory``: what is counted as memory, ``memory_gib``, ``rows``: for eager and
        per budget ``tokens_per_s``, ``memory_bytes``, ``saved_bytes`` (what autograd keeps between forward and backward), the
        fields of :class:`Measurement` and ``error``; and ``picked``: the budget of the fastest row that fits, or None.

    Raises:
        ConfigError: an argument is unusable; nothing was timed.
    """
    if workload.mode != "training":
        raise wrong_value("mode", workload.mode, ("training",))
    if memory_gib is not None and not memory_gib > 0:
        raise ConfigError(f"memory: received {memory_gib!r}. Allowed: GiB above 0. Remedy: memory=80.")
    _check_calls(repeats, warmup)
    if not budgets:
        raise ConfigError("budgets: received none. Allowed: numbers from 0 to 1. Remedy: budgets=(0, 0.5, 1).")
    fusion = parse_config(config).fusion
    block = fusion.memory_efficient_fusion
    block = block if isinstance(block, MemoryEfficientFusion) else MemoryEfficientFusion()
    blocks = [dataclasses.replace(block, activation_memory_budget=budget) for budget in dict.fromkeys(budgets)]
    settings = [dataclasses.replace(fusion, enable=True, memory_efficient_fusion=block) for block in blocks]
    rows = []
    with _exact_float32(), _no_compiler_caches(settings[0]):
        on_stage("eager")
        rows.append(_sweep_row(workload, None, repeats, warmup))
        for number, setting in enumerate(settings):
            budget = blocks[number].activation_memory_budget
            on_stage(f"activation_memory_budget {budget:g}")
            rows.append({**_sweep_row(workload, setting, repeats, warmup), "budget": budget})
    return {
        "workload": workload.to_dict(),
        "config": settings[-1].to_dict(),
        "memory": "peak allocated" if workload.torch_device.type == "cuda" else "kept for the backward",
        "memory_gib": memory_gib,
        "rows": rows,
        "picked": pick(rows, memory_gib),
    }


def pick(rows: Sequence[Mapping[str, Any]], memory_gib: float | None) -> float | None:
    """The budget of the fastest row without an error that needs at most this much memory; None if there is none."""
    limit = math.inf if memory_gib is None else memory_gib * 2**30
    fitting = [row for row in rows if row["budget"] is not None and row["error"] is None and row["memory_bytes"] <= limit]
    best = max(fitting, key=lambda row: row["tokens_per_s"], default=None)
    return None if best is None else float(best["budget"])


def _sweep_row(workload: Workload, config: Any, repeats: int, warmup: int) -> dict[str, Any]:
    row: dict[str, Any] = {"budget": None, "error": None}
    try:
        if config is not None:
            run_check(dataclasses.replace(workload, batch=max(1, workload.batch // 8)), config)
            torch._dynamo.reset()
            free_memory(workload.torch_device)
        row.update(_sweep_measurement(workload, config, repeats, warmup))
    except (torch.OutOfMemoryError, MemoryError):
        row["error"] = "OOM"
    except AssertionError as error:
        row["error"] = f"the answers differ: {error}"[:600]
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:600]
    torch._dynamo.reset()
    free_memory(workload.torch_device)  # after the handler: until then the error's frames hold the model
    return row


def _sweep_measurement(workload: Workload, config: Any, repeats: int, warmup: int) -> dict[str, Any]:
    device, before = workload.torch_device, _allocated(workload.torch_device)
    model = workload.build()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    if config is not None:
        engine.initialize(model, config)
    step = make_step(model, list(model.parameters()), workload.mode)
    inputs = workload.inputs(model)
    watch = Stopwatch(lambda: step(inputs), device)
    watch.warm_up(warmup)
    saved = saved_bytes(model, inputs)
    resident = _allocated(device) - before
    watch.time(repeats)
    measured = watch.measurement(resident)
    tokens = workload.batch * workload.seq
    return {
        **dataclasses.asdict(measured),
        "tokens_per_s": tokens / measured.median_s,
        "saved_bytes": saved,
        "memory_bytes": saved if measured.peak_bytes is None else measured.peak_bytes,
    }


def saved_bytes(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Bytes that autograd keeps from a forward for its backward, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    total = sum(kept.values())  # while all are alive, so that no address was used twice
    del loss
    return total


# --- where and when -------------------------------------------------------------------------------------------------


def facts(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """What a result is worth nothing without: device, driver, versions, commit and time.

    Args:
        device: where the workload ran.
        commit: the commit of the code, where it runs from a copy without its history; else git is asked.
    """
    here = environment()
    found: dict[str, Any] = {"type": device.type, "name": here.cpu, "threads": here.cpu_threads, "driver": None}
    if device.type == "cuda":
        card = here.devices[device.index or 0]
        found = {
            "type": "cuda",
            "name": card.name,
            "capability": list(card.capability),
            "memory_gib": round(card.memory_gib, 1),
            "driver": _ask(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]),
        }
    found["slug"] = ("cpu-" if device.type == "cpu" else "") + slug(str(found["name"]))
    return {
        "device": found,
        "versions": {name: getattr(here, name) for name in ("python", "torch", "transformers", "triton", "cuda", "hip")},
        "commit": _commit(commit),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def slug(text: str) -> str:
    """``NVIDIA H200`` → ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _commit(given: str | None) -> dict[str, Any]:
    if given is not None:
        return {"id": given, "dirty": None}
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # an installed package may lie inside somebody else's repository
        return {"id": None, "dirty": None}
    changes = _ask(["git", "-C", str(root), "status", "--porcelain"])
    return {
        "id": _ask(["git", "-C", str(root), "rev-parse", "--verify", "-q", "HEAD"]) or None,
        "dirty": None if changes is None else bool(changes),
    }


def _ask(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def free_memory(device: torch.device) -> None:
    """Return what the last model left, so that the next one's peak is its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _no_compiler_caches(config: FusionConfig) -> Iterator[None]:
    """Where ours compiles, what an earlier run left on disk must not be timed as the first call."""
    if config.aot is None:
        yield
        return
    torch.compiler.config.force_disable_caches = True
    try:
        yield
    finally:
        _reset_compiler()


@contextlib.contextmanager
def _exact_float32() -> Iterator[None]:
    """float32 means float32, in every provider and in the roof: no TF32 in matrix products."""
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(saved)
