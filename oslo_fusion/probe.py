"""Runs before and after on small random input: do they compute the same, and which is faster here?

The law of sameness is stated once, in :func:`compare`; tests and benchmarks use it through :mod:`oslo_fusion.testing`.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oslo_fusion import rehearsal, timings
from oslo_fusion.errors import ConfigError
from oslo_fusion.plan import Timing

Function = Callable[..., Tensor]
Functions = Callable[..., "Tensor | tuple[Tensor, ...]"]
"""Of one result or several."""

_CUDA_ELEMENTS = 1 << 25  # 64 MiB in half precision: beyond the L2 of an H200, so that memory is what is timed
_CPU_ELEMENTS = 1 << 20
_CYCLES_PER_SECOND = 2e9
_LONGEST_PAUSE = 40_000_000  # 20 ms
_SETTLING_CALLS = 3  # TorchScript interprets twice, then compiles
_TIMINGS: dict[Hashable, Timing] = {}


@dataclass(frozen=True)
class Comparison:
    """Largest absolute errors against the reference, and the bound that the law sets for ours."""

    ours: float
    theirs: float
    bound: float

    @property
    def same(self) -> bool:
        """Whether our error obeys the law."""
        return self.ours <= self.bound

    def __str__(self) -> str:
        return f"error {self.ours:.3g}, allowed {self.bound:.3g} (same-dtype PyTorch: {self.theirs:.3g})"


def compare(ours: Tensor, same_dtype: Tensor, reference: Tensor, norm: str = "max") -> Comparison:
    """The law of sameness: our error may be at most twice that of the same-dtype PyTorch code, plus one ulp.

    Shapes, dtypes and the places of non-finite values must agree.

    Args:
        ours, same_dtype, reference: same shape; the reference in float32 or float64.
        norm: how errors and the ulp's magnitude are measured: ``max``, the largest absolute value, for one operation;
            ``l2``, the Euclidean norm, for gradients of whole models, whose largest error is a matter of luck.
    """
    if ours.shape != same_dtype.shape or ours.dtype != same_dtype.dtype:
        return Comparison(float("inf"), 0.0, 0.0)
    if ours.numel() == 0:
        return Comparison(0.0, 0.0, 0.0)
    truth = reference.detach().to(torch.float64)
    mine, theirs = ours.detach().to(torch.float64), same_dtype.detach().to(torch.float64)
    finite = torch.isfinite(theirs)
    if not torch.equal(finite, torch.isfinite(mine)):
        return Comparison(float("inf"), 0.0, 0.0)
    finite &= torch.isfinite(truth)
    if not bool(finite.any()):
        return Comparison(0.0, 0.0, 0.0)
    truth, mine, theirs = truth[finite], mine[finite], theirs[finite]

    def size(x: Tensor) -> float:
        return float(x.abs().max() if norm == "max" else torch.linalg.vector_norm(x))

    info, their_error = torch.finfo(same_dtype.dtype), size(theirs - truth)
    ulp = info.eps * max(size(truth), info.tiny)
    return Comparison(size(mine - truth), their_error, 2 * their_error + ulp)


def shadow(module: nn.Module) -> nn.Module:
    """A copy of the module's structure that shares its parameters and buffers and carries none of its hooks."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    twin = copy.deepcopy(module, memo={id(tensor): tensor for tensor in tensors})
    for part in twin.modules():
        for name, value in part.__dict__.items():
            if name.endswith("_hooks") and isinstance(value, dict):
                value.clear()
    return twin


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Draw random numbers in the body without moving the user's generators."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


def _tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def prove(ours: Functions, theirs: Functions, *draws: Sequence[Tensor], gradients: bool = True) -> tuple[Comparison, ...]:
    """Compare an output and its gradients under the law, on given inputs.

    Ours is run until TorchScript has settled on its fused code, and that code's results are judged. In a rehearsal it is run
    once, and found to be the same.

    Args:
        ours, theirs: functions of the inputs that return one tensor, or several of one dtype, which are judged together, and
            contain no randomness; ``theirs`` also accepts the inputs in float64, where it gives the truth.
        draws: one or more sets of floating-point inputs, judged together: of a single number the largest error of the
            same-dtype code, which sets the bound, would be a matter of luck.
        gradients: also compare the gradient of every input.

    Returns:
        A comparison of the output, then one per gradient.
    """

    def run(function: Functions, number: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(gradients):
            leaves = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_(gradients) for t in draws[number]]
            outputs = _tuple(function(*leaves))
            output = outputs[0] if len(outputs) == 1 else torch.cat([o.detach().flatten() for o in outputs])
            if not gradients:
                return (output,)
            # Each draw has a gradient of its own: the sum of one and the same would be right or wrong by the same luck.
            generator = torch.Generator().manual_seed(number)
            weights = [torch.randn(o.shape, generator=generator, dtype=torch.float32).to(o.device, o.dtype) for o in outputs]
            return output, *torch.autograd.grad(outputs, leaves, weights)

    def all_draws(function: Functions, dtype: torch.dtype | None = None) -> list[Tensor]:
        results = [run(function, number, dtype) for number in range(len(draws))]
        return [
            torch.cat([r.flatten() for r in column]) if len(column) > 1 else column[0] for column in zip(*results, strict=True)
        ]

    if rehearsal.under_way():
        return (Comparison(0.0, 0.0, 0.0),) * len(run(ours, 0))
    for _ in range(_SETTLING_CALLS):
        run(ours, 0)
    triples = zip(all_draws(ours), all_draws(theirs), all_draws(theirs, torch.float64), strict=True)
    return tuple(compare(*triple) for triple in triples)


def elements_to_time(device: torch.device) -> int:
    """How many elements a timing tensor should have on this device; fewer where memory is scarce."""
    if device.type != "cuda":
        return _CPU_ELEMENTS
    free, _ = torch.cuda.mem_get_info(device)
    return max(1 << 16, min(_CUDA_ELEMENTS, free // 4 // 24))


def time_calls(functions: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Median microseconds of each function, called in turn on warm caches.

    On a GPU it is the time of the device, from CUDA events: a call is queued behind a pause in which the host gets ahead, as in
    a model whose kernels are the limit. Where the host is the limit no choice of kernels helps; a captured graph does.

    In a rehearsal each function is called once and takes no time.
    """
    if rehearsal.under_way():
        for function in functions:
            function()
        return [0.0] * len(functions)
    cuda = device.type == "cuda"
    rounds, warm_up = (15, 5) if cuda else (21, 3)  # a CPU has other work: medians of 5 strayed by 4 to 10%, of 21 by 1%
    pauses = []
    for function in functions:
        for _ in range(warm_up):
            function()
        if cuda:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize(device)
        pauses.append(min(_LONGEST_PAUSE, int(_CYCLES_PER_SECOND * 3 * (time.perf_counter() - begin))))
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, pause, times in zip(functions, pauses, samples, strict=True):
            if cuda:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                with torch.cuda.device(device):
                    torch.cuda._sleep(pause)
                    start.record()
                    function()
                    end.record()
                    end.synchronize()
                times.append(start.elapsed_time(end) * 1e3)
            else:
                begin = time.perf_counter()
                function()
                times.append((time.perf_counter() - begin) * 1e6)
    return [statistics.median(times) for times in samples]


@preserved_random_state()
def time_pair(
    key: Hashable,
    before: Functions,
    after: Functions,
    inputs: Callable[[], Sequence[Tensor]],
    *,
    autotune: str,
    training: bool = True,
) -> Timing:
    """Measure before and after, without and with backward. The user's generators do not move.

    Args:
        key: what identifies the measurement apart from device and dtype, and prints as the same in every process. With
            ``autotune: cached`` it is measured once: on a GPU once for all processes (see :mod:`oslo_fusion.timings`).
        before, after: functions of the inputs that return one tensor or several.
        inputs: makes the inputs at the size that is timed; the first one's shape, dtype and device are recorded.
        autotune: ``cached`` or ``full``.
        training: also time forward and backward together.
    """
    tensors = list(inputs())
    first = tensors[0]
    full_key = (key, first.device, first.dtype, tuple(first.shape))
    written = repr((key, first.dtype, tuple(first.shape)))
    if autotune == "cached":
        known = _TIMINGS.get(full_key)
        if known is None and first.is_cuda:
            known = timings.recall(torch.cuda.get_device_name(first.device), written)
        if known is not None:
            _TIMINGS[full_key] = known
            return known
    with torch.no_grad():
        forward = time_calls([lambda: before(*tensors), lambda: after(*tensors)], first.device)
    backward: list[float | None] = [None, None]
    if training:
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            grads = [torch.randn_like(output) for output in _tuple(before(*leaves))]

            def step(function: Functions) -> Callable[[], object]:
                return lambda: torch.autograd.grad(_tuple(function(*leaves)), leaves, grads)

            backward = [*time_calls([step(before), step(after)], first.device)]
    size = "×".join(map(str, first.shape))
    timing = Timing(str(first.dtype).removeprefix("torch."), size, forward[0], forward[1], backward[0], backward[1])
    if rehearsal.under_way():
        return timing
    _TIMINGS[full_key] = timing
    if first.is_cuda:
        timings.remember(torch.cuda.get_device_name(first.device), written, timing)
    return timing


@dataclass(frozen=True)
class Sample:
    """The outputs of a model on one sample input."""

    outputs: tuple[Tensor, ...]
    description: str


def run_sample(model: nn.Module) -> Sample:
    """Run a model in eval mode on its own dummy input, without touching modes, gradients or random state.

    Raises:
        ConfigError: the model has no dummy input.
    """
    inputs = getattr(model, "dummy_inputs", None)
    if not isinstance(inputs, dict) or not inputs:
        raise ConfigError(
            f"kernel_fusion.verify: received true, but {type(model).__name__} has no dummy_inputs to run. Remedy: "
            "verify: false, and compare on an input of your own."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), preserved_random_state():
            result = model(**inputs)
    finally:
        for module, mode in modes:
            module.training = mode
    values = result.to_tuple() if hasattr(result, "to_tuple") else result
    tensors = [v for v in (values if isinstance(values, tuple) else (values,)) if isinstance(v, Tensor)]
    shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in inputs.items() if isinstance(v, Tensor))
    return Sample(tuple(t.detach().float().cpu() for t in tensors if t.is_floating_point()), shapes)


def difference(before: Sample, after: Sample) -> tuple[float, float]:
    """Largest absolute difference of the first output, and its largest magnitude before."""
    a, b = before.outputs[0], after.outputs[0]
    return float((a - b).abs().max()), float(a.abs().max())
