"""Cross entropy of a linear layer's output without keeping that output: ``lm_head`` and loss of a language model in one.

    z = softcap(logit_scale · (h Wᵀ + bias))            softcap(x) = c · tanh(x / c), or x without one
    loss of a row = logsumexp(z) - (1 - ε) · z[label] - ε · mean(z)
    loss = Σ over rows whose label is not ignored, divided by their number, or by ``num_items``

Shapes: ``hidden`` ``[*batch, dim]``, ``weight`` ``[vocab, dim]``, ``bias`` ``[vocab]``, ``labels`` ``[*batch]`` int64. A causal
model's labels are shifted by the caller.

What plain PyTorch keeps for 16384 tokens and 128256 words is 4.2 GB of half logits and twice that for each float32 copy. Here
one chunk of rows is in memory at a time. A loss is a number, so its gradient is known up to a factor as soon as the chunk's
logits are: forward computes the gradients of ``hidden``, ``weight`` and ``bias`` and drops the chunk, backward scales them.

Dtype law: the product is rounded to the dtype of ``hidden``, as ``lm_head`` rounds it; bias, loss and what is between them are
computed in float32 (float64 for float64), and the loss is returned so, as transformers does after ``logits.float()``. The
gradient of the logits is rounded to the dtype of ``hidden``. The weight's is summed over all rows in float32 and rounded once,
at the end. A weight of another dtype than ``hidden`` is rounded to that of ``hidden`` first, as autocast does. Gradients have
the dtype of what they belong to.

A label outside the vocabulary: ConfigError on the CPU; on a GPU, where looking at it would stop the host, an assertion on the
device, as torch's own cross entropy. If every label is ignored, the mean is NaN and the gradients are zero, as torch has it.

Source: transformers' ``ForCausalLMLoss`` and ``fixed_cross_entropy``; torch's ``cross_entropy``. Gradients in the forward:
Malek, efficient_cross_entropy (github.com/mgmalek/efficient_cross_entropy), which Liger Kernel (arXiv:2410.10989) follows.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.kernels import find_kernels, is_plain, wants_gradient

NAME = "linear_cross_entropy"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("mean", "sum")


class Options(NamedTuple):
    """What the loss is, and how its gradients are kept; in the operator's order.

    Attributes:
        ignore_index: rows with this label count for nothing.
        label_smoothing: ε, from 0 to 1.
        logit_softcap: c; 0 for none.
        logit_scale: what logits are multiplied by before the cap.
        wide: sum the weight's gradient in float32; otherwise in the weight's dtype, which halves what is kept.
        compact: gather the rows whose label is not ignored first. Their number must be known to the host, which waits for it.
    """

    ignore_index: int
    label_smoothing: float
    logit_softcap: float
    logit_scale: float
    wide: bool
    compact: bool


class Wanted(NamedTuple):
    """Which gradients the forward computes."""

    hidden: bool
    weight: bool
    bias: bool


class Sums(NamedTuple):
    """What the operator returns: the loss summed over rows, their number, and the sum's gradients, empty if not wanted."""

    loss: Tensor
    rows: Tensor
    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor


def _error(name: str, received: object, allowed: str, remedy: str = "") -> ConfigError:
    return ConfigError(f"{NAME}: {name}: received {received}. Allowed: {allowed}." + (f" Remedy: {remedy}." if remedy else ""))


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: Options) -> None:
    """Raise ConfigError for what no implementation can compute. Called first by the reference and by every launcher."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise _error(name, f"dtype {tensor.dtype}", "half, bfloat16, float and double", f"{name}.float()")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise _error("hidden", f"shape {list(hidden.shape)}", "[*batch, dim] with dim of at least one")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise _error("weight", f"shape {list(weight.shape)}", f"[vocab, {hidden.shape[-1]}], as hidden is {list(hidden.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise _error("bias", f"shape {list(bias.shape)}", f"[{weight.shape[0]}], a number per word")
    if labels.dtype != torch.int64:
        raise _error("labels", f"dtype {labels.dtype}", "int64", "labels.long()")
    if labels.shape != hidden.shape[:-1]:
        raise _error("labels", f"shape {list(labels.shape)}", f"{list(hidden.shape[:-1])}, one per row of hidden")
    for name, tensor in (("weight", weight), ("labels", labels), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise _error(name, f"a tensor on {tensor.device}", f"{hidden.device}, where hidden is", f"{name}.to(hidden.device)")
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise _error("label_smoothing", options.label_smoothing, "0 to 1")
    if not 0.0 <= options.logit_softcap < float("inf"):
        raise _error("logit_softcap", options.logit_softcap, "None, or a positive number")
    if not abs(options.logit_scale) < float("inf"):
        raise _error("logit_scale", options.logit_scale, "a finite number")


def check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Refuse a label outside the vocabulary: at once on the CPU, by an assertion on the device elsewhere.

    Raises:
        ConfigError: a label on the CPU is neither a word nor ``ignore_index``.
    """
    inside = ((labels >= 0) & (labels < vocab)) | (labels == ignore_index)
    if labels.device.type != "cpu":
        torch._assert_async(inside.all(), f"{NAME}: labels: one lies outside of 0 to {vocab - 1} and is not {ignore_index}")
    elif not bool(inside.all()):
        wrong = labels[~inside].flatten()[0].item()
        raise _error("labels", wrong, f"0 to {vocab - 1}, the rows of weight, or {ignore_index} for none")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    logit_softcap: float,
    logit_scale: float,
    wide: bool,
    compact: bool,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The meaning, in plain PyTorch, with all logits at once. Arguments: :class:`Options`, then :class:`Wanted`.

    Returns:
        :class:`Sums`.
    """
    options = Options(ignore_index, label_smoothing, logit_softcap, logit_scale, wide, compact)
    _check(hidden, weight, labels, bias, options)
    vocab, dim = weight.shape
    check_labels(labels, vocab, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        dtype, high = hidden.dtype, wide_dtype(hidden.dtype)
        rows, flat, rounded = hidden.reshape(-1, dim), labels.reshape(-1), weight.to(dtype)
        z = F.linear(rows, rounded).to(high)
        z = (z if bias is None else z + bias.to(high)) * logit_scale
        slope = torch.full_like(z, logit_scale)
        if logit_softcap:
            capped = torch.tanh(z / logit_softcap)
            z, slope = capped * logit_softcap, slope * (1 - capped * capped)
        kept = flat != ignore_index
        target = torch.where(kept, flat, 0).unsqueeze(1)
        logp = torch.log_softmax(z, -1)
        losses = (label_smoothing - 1) * logp.gather(1, target).squeeze(1)
        if label_smoothing:  # 0 · -inf, of a forbidden word, would be NaN
            losses = losses - label_smoothing * logp.mean(-1)
        loss, count = torch.where(kept, losses, 0).sum(), kept.sum().to(high)
        d = (logp.exp() - label_smoothing / vocab).scatter_add(1, target, torch.full_like(z[:, :1], label_smoothing - 1))
        d = torch.where(kept.unsqueeze(1), d * slope, 0).to(dtype)
        dhidden = (d @ rounded).reshape(hidden.shape) if hidden_gradient else hidden.new_empty(0)
        dweight = (d.to(high).t() @ rows.to(high)).to(_sum_dtype(weight, wide)) if weight_gradient else hidden.new_empty(0)
        dbias = d.to(high).sum(0) if bias_gradient and bias is not None else hidden.new_empty(0)
    return loss, count, dhidden, dweight, dbias


def _sum_dtype(weight: Tensor, wide: bool) -> torch.dtype:
    return wide_dtype(weight.dtype) if wide else weight.dtype


# --- the operator ------------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("oslo_fusion", "FRAGMENT")
_LIBRARY.define(
    f"{NAME}(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, int ignore_index, float label_smoothing, "
    "float logit_softcap, float logit_scale, bool wide, bool compact, bool hidden_gradient, bool weight_gradient, "
    "bool bias_gradient) -> (Tensor loss, Tensor count, Tensor dhidden, Tensor dweight, Tensor dbias)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _default(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Importing the kernels registers them over this one, so that it sees at most one CUDA tensor where there is a triton.
    kernels = find_kernels(NAME) if hidden.is_cuda else None
    launch = linear_cross_entropy_reference if kernels is None else kernels.launch_linear_cross_entropy
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = launch(hidden, *arguments)
    return result


def register_kernels(function: Any, key: str) -> None:
    """Register a faster implementation for one dispatch key, such as ``CUDA``."""
    _LIBRARY.impl(NAME, function, key)


def _fake(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options, wanted = Options(*arguments[:6]), Wanted(*arguments[6:])
    _check(hidden, weight, labels, bias, options)
    high = wide_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=high),
        hidden.new_empty((), dtype=high),
        hidden.new_empty(hidden.shape) if wanted.hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape, dtype=_sum_dtype(weight, options.wide)) if wanted.weight else hidden.new_empty(0),
        bias.new_empty(bias.shape, dtype=high) if wanted.bias and bias is not None else hidden.new_empty(0),
    )


_LIBRARY.impl(NAME, _default, "CompositeExplicitAutograd")
torch.library.register_fake(f"oslo_fusion::{NAME}", _fake, lib=_LIBRARY)


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """The stream that labels are counted on. Before others in turn, or the count would wait for a whole forward's blocks."""
    return torch.cuda.Stream(device, priority=-1)


class LabelCount:
    """How many labels count, on its way to the host while a model runs, so that ``compact`` need not wait for the device there.

    It is made where the labels are, and begun where the host has launched the model: it runs beside that, on a stream which
    waits for what made the labels alone. Begun at once on the model's stream, its launches would be what the device waits for
    before the model: 0.4 ms of a step of BERT-base on one NVIDIA H200.

    Args:
        labels: int64 of any shape, as they will be given to the loss.
        ignore_index: the label that does not count.
    """

    def __init__(self, labels: Tensor, ignore_index: int = -100) -> None:
        self._labels, self._ignored, self._version = labels, ignore_index, _version(labels)
        self._number: Tensor | None = None
        self._made: torch.cuda.Event | None = None
        self._ready: torch.cuda.Event | None = None
        if labels.is_cuda:
            with torch.cuda.device(labels.device):  # whose stream made them, whatever device is current
                self._made = torch.cuda.Event()
                self._made.record()

    def start(self) -> None:
        """Count; a second time does nothing."""
        if self._number is not None:
            return
        if self._made is None:
            self._number = (self._labels != self._ignored).sum()
            return
        stream = _beside(self._labels.device)
        with torch.cuda.stream(stream):
            stream.wait_event(self._made)
            # Written as the numbers that are added up: a sum of truth values is a launch more, which converts them.
            counts = torch.empty_like(self._labels)
            torch.ne(self._labels, self._ignored, out=counts)
            number = torch.empty((), dtype=torch.int64, pin_memory=True)
            self._number = number.copy_(counts.sum(), non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def is_of(self, labels: Tensor, ignore_index: int) -> bool:
        """Whether it is these labels that are counted, and that they were not written to since."""
        same = labels.data_ptr() == self._labels.data_ptr() and labels.numel() == self._labels.numel()
        same = same and _version(labels) == self._version and ignore_index == self._ignored
        return same and labels.is_contiguous() and self._labels.is_contiguous()

    @property
    def number(self) -> int:
        """The number; begins if need be, and waits until it is counted, not for what was launched since.

        Who has it may write to the labels or let go of them: the other stream has read them.
        """
        self.start()
        if self._ready is not None:
            self._ready.synchronize()
        assert self._number is not None
        return int(self._number)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


# --- the gradient ------------------------------------------------------------------------------------------------------------


def _factor(dloss: Tensor, count: Tensor) -> Tensor:
    # Without a row the mean's gradient arrives as infinite; torch gives zero then, and so do we, where 0 · inf would be NaN.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{NAME}: has no second derivative: its gradients were computed in the forward. Remedy: create_graph=False, or "
            "F.cross_entropy(F.linear(hidden, weight, bias), labels)."
        )
    return torch.where(count > 0, dloss, 0)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, _, bias, *_ = inputs
    rest = output[1:]
    ctx.save_for_backward(*rest)
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    count, dhidden, dweight, dbias = ctx.saved_tensors
    results: list[Tensor | None] = [None] * 13
    if dloss is not None:
        factor = _factor(dloss, count)
        for position, d, dtype in ((0, dhidden, dhidden.dtype), (1, dweight, ctx.dtypes[0]), (3, dbias, ctx.dtypes[1])):
            if ctx.needs_input_grad[position]:
                results[position] = (d * factor).to(dtype)
    return tuple(results)


torch.library.register_autograd(f"oslo_fusion::{NAME}", _backward, setup_context=_context, lib=_LIBRARY)
LINEAR_CROSS_ENTROPY = torch.ops.oslo_fusion.linear_cross_entropy.default


class _Loss(torch.autograd.Function):
    """The operator and its gradient for plain eager code on a GPU: launches, and nothing between.

    Backward hands the gradients that forward computed over: it scales them where they lie and keeps no second copy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        options: Options,
        counted: LabelCount | None,
    ) -> tuple[Tensor, Tensor]:
        kernels = find_kernels(NAME)
        assert kernels is not None
        wanted = Wanted(*(ctx.needs_input_grad[i] for i in (0, 1, 3)))
        sums = Sums(*kernels.launch_linear_cross_entropy(hidden, weight, labels, bias, *options, *wanted, counted=counted))
        ctx.sums, ctx.dtypes = sums, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(sums.rows)
        ctx.set_materialize_grads(False)
        return sums.loss.detach(), sums.rows

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, _: Any) -> Any:
        if dloss is None:
            return (None,) * 6
        sums, ctx.sums = ctx.sums, None
        if sums is None:
            raise RuntimeError(
                f"{NAME}: backward ran already, and its gradients were handed over to it. Remedy: compute the loss again, or "
                "add up losses and run backward once."
            )
        factor = _factor(dloss, sums.rows)
        kernels = find_kernels(NAME)
        assert kernels is not None
        gradients: list[Tensor | None] = []
        for wanted, d, dtype in zip(
            (ctx.needs_input_grad[i] for i in (0, 1, 3)), (sums.dhidden, sums.dweight, sums.dbias), ctx.dtypes, strict=True
        ):
            gradients.append(kernels.launch_scale(d, factor, dtype) if wanted else None)
        return gradients[0], gradients[1], None, gradients[2], None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    accumulate: torch.dtype = torch.float32,
    compact: bool = False,
    counted: LabelCount | None = None,
) -> Tensor:
    """Cross entropy of ``hidden @ weight.T + bias`` against ``labels``, without the logits of all rows in memory.

    As ``F.cross_entropy(logits.float(), labels)``, or its sum over ``num_items`` where that is given. Under autocast
    ``hidden`` and ``weight`` are rounded to its dtype, as ``F.linear`` rounds them.

    Args:
        hidden: ``[*batch, dim]``, half, bfloat16, float or double; any strides, zero rows allowed.
        weight: ``[vocab, dim]``, of the dtype of ``hidden`` unless under autocast.
        labels: ``[*batch]`` int64, shifted already.
        bias: ``[vocab]`` or None.
        ignore_index: the label of rows that count for nothing.
        label_smoothing: ε, 0 to 1, as in ``F.cross_entropy``.
        logit_softcap: c of ``c · tanh(logits / c)``, 30 for Gemma 2, or None.
        logit_scale: what logits are multiplied by, before the cap.
        reduction: ``mean`` over the rows that count, or ``sum``.
        num_items: what the sum is divided by instead of their number: transformers' ``num_items_in_batch``.
        accumulate: dtype in which the weight's gradient is summed: float32, rounded once at the end; or the weight's own,
            which is rounded once a chunk and needs half the memory.
        compact: leave ignored rows out of the matmuls, worth it where many are. The host waits once for their number, unless
            ``counted`` has it.
        counted: of these labels, made earlier; that of others is not looked at.

    Returns:
        The loss, a float32 scalar (float64 for float64). Mean with every label ignored: NaN. Backward runs once per loss on a
        GPU: the gradients are handed over.

    Raises:
        ConfigError: a shape, dtype, device or option that has no meaning here; on the CPU a label outside the vocabulary.
    """
    if reduction not in REDUCTIONS:
        raise _error("reduction", repr(reduction), " | ".join(REDUCTIONS))
    if num_items is not None and reduction != "mean":
        raise _error("num_items", "a number with reduction='sum'", "None, or reduction='mean'", "divide the sum yourself")
    if accumulate not in (torch.float32, weight.dtype):
        raise _error("accumulate", accumulate, f"torch.float32 or {weight.dtype}, that of weight")
    if logit_softcap is not None and not logit_softcap > 0:
        raise _error("logit_softcap", logit_softcap, "None, or a positive number")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    elif weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        other = weight.dtype if weight.dtype != hidden.dtype or bias is None else bias.dtype
        raise _error("hidden", f"{hidden.dtype} with {other}", "one dtype outside of autocast", "hidden.to(weight.dtype)")
    options = Options(
        ignore_index,
        float(label_smoothing),
        float(logit_softcap or 0.0),
        float(logit_scale),
        accumulate == torch.float32 or accumulate == torch.float64,
        compact,
    )
    wanted = Wanted(*(t is not None and wants_gradient(t) for t in (hidden, weight, bias)))
    if counted is not None and not (compact and counted.is_of(labels, ignore_index)):
        counted = None
    kernels = None
    if hidden.is_cuda and not torch.compiler.is_compiling() and is_plain(hidden, weight, labels, bias):
        kernels = find_kernels(NAME)
    loss: Tensor
    if kernels is None:
        loss, count, *_ = LINEAR_CROSS_ENTROPY(hidden, weight, labels, bias, *options, *wanted)
    elif any(wanted):
        loss, count = _Loss.apply(hidden, weight, labels, bias, options, counted)
    else:
        loss, count, *_ = kernels.launch_linear_cross_entropy(hidden, weight, labels, bias, *options, *wanted)
    if reduction == "mean":
        loss = loss / (count if num_items is None else num_items)
    return loss
