"""Logits that are not computed until something needs them, for the length of one call of a model's own ``forward``.

A model of transformers computes ``logits = lm_head(hidden)``, perhaps scales or caps them, reshapes them and hands them to
``cross_entropy``. To compute that loss without the logits, the model's code need not be known or rewritten: it runs as it is,
and its head hands it a :class:`DeferredLogits`. That notes the few steps whose meaning the fused loss has (a cast, a view, a
slice, a number to multiply by, tanh, a bias) and ends in ``F.cross_entropy``, which becomes one
:func:`~oslo_fusion.ops.linear_cross_entropy.linear_cross_entropy`. At anything else it becomes the logits: the head is computed
and the steps are done, in torch's own operations with torch's gradients. So an unknown model is at worst not faster.

No user ever holds one: what leaves ``forward`` is real logits, or None where the fused loss was taken (see
:class:`FusedForward`).
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from oslo_fusion.ops.kernels import is_plain
from oslo_fusion.ops.linear_cross_entropy import LabelCount, linear_cross_entropy
from oslo_fusion.surgery import Standing

FORWARD = "forward"
REPLICATE = "_replicate_for_data_parallel"
KEYWORD = "skip_logits"
"""What a caller may pass to an initialized model, as to one that Liger patched: False for logits beside the loss."""


# --- the logits --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Formula:
    """Logits as ``outer · tanh(inner · (h Wᵀ + bias))``, or ``inner · (h Wᵀ + bias)`` where nothing is capped.

    Attributes:
        hidden: ``[*lead, dim]``, with the leading dimensions of the logits.
        weight, bias: the head's.
        inner, outer, capped: see above.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    inner: float = 1.0
    outer: float = 1.0
    capped: bool = False

    def times(self, number: float) -> _Formula:
        return replace(self, outer=self.outer * number) if self.capped else replace(self, inner=self.inner * number)

    @property
    def has_a_loss(self) -> bool:
        return not self.capped or self.outer > 0


@dataclass
class Frame:
    """One call of a model's forward.

    Attributes:
        mode: what the head does: ``defer``; ``observe``: the head's own; ``exact``: the head's own in ``exact_dtype``.
        compact: leave ignored rows out of the matmuls.
        counted: how many labels count, if that will be on its way to the host once the model before the head is launched.
        losses: how many fused losses were computed.
        leaves: while a plan is being proven, the head's input and weights, cut off from what was before.
    """

    mode: str
    compact: bool
    proving: bool = False
    exact_dtype: torch.dtype = torch.float64
    counted: LabelCount | None = None
    losses: int = 0
    leaves: list[Tensor] = field(default_factory=list)

    def cut(self, x: Tensor, head: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
        """The head's input and parameters, as leaves of their own while proving."""
        weight, bias = cast(Tensor, head.weight), cast("Tensor | None", getattr(head, "bias", None))
        if not self.proving:
            return x, weight, bias
        dtype = self.exact_dtype if self.mode == "exact" else None
        leaves = [t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight, bias)]
        self.leaves = [leaf for leaf in leaves if leaf is not None]
        return cast("tuple[Tensor, Tensor, Tensor | None]", tuple(leaves))


_LOCAL = threading.local()


def current_frame() -> Frame | None:
    """The frame of the innermost armed forward of this thread."""
    frame: Frame | None = getattr(_LOCAL, "frame", None)
    return frame


@contextlib.contextmanager
def framed(frame: Frame | None) -> Iterator[None]:
    """Arm the heads that are called in the body, or disarm them."""
    outer = current_frame()
    _LOCAL.frame = frame
    try:
        yield
    finally:
        _LOCAL.frame = outer


class DeferredLogits(Tensor):
    """What an armed head returns: the shape, dtype and device of logits, and how to compute them."""

    _formula: _Formula
    _frame: Frame
    _replay: Callable[[], Tensor]
    _real: Tensor | None

    @staticmethod
    def __new__(
        cls, shape: torch.Size, dtype: torch.dtype, formula: _Formula, frame: Frame, replay: Callable[[], Tensor]
    ) -> DeferredLogits:
        made: DeferredLogits = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=formula.hidden.device, requires_grad=True
        )
        made._formula, made._frame, made._replay, made._real = formula, frame, replay, None
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        step = _STEPS.get(func)
        if step is not None and not torch.compiler.is_compiling():
            result = step(func, *args, **kwargs)
            if result is not None:
                return result
        return func(*materialized(args), **materialized(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{func}: was called on deferred logits past torch's Python functions. Remedy: pass {KEYWORD}=False to the model's "
            "forward, or restore the model."
        )

    def computed(self) -> Tensor:
        """The logits, computed once."""
        if self._real is None:
            self._real = self._replay()
        return self._real

    def following(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Tensor, formula: _Formula) -> Tensor:
        """These logits after one more step, whose result has the shape and dtype of ``like``."""
        return DeferredLogits(like.shape, like.dtype, formula, self._frame, lambda: func(self.computed(), *args, **kwargs))

    def outline(self) -> Tensor:
        """A tensor of the same shape and dtype without memory."""
        with torch._C.DisableTorchFunctionSubclass():
            return torch.empty(self.shape, dtype=self.dtype, device="meta")


def materialized(tree: Any) -> Any:
    """The same tuple, list or dictionary with real logits in it."""
    return pytree.tree_map_only(DeferredLogits, DeferredLogits.computed, tree)


def defer(head: nn.Module, x: Tensor, frame: Frame) -> Tensor:
    """The head's logits, deferred.

    Args:
        head: a linear module.
        x: its input.
        frame: of the call.
    """
    x, weight, bias = frame.cut(x, head)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    version = weight._version

    def compute() -> Tensor:
        if weight._version != version:
            raise RuntimeError("the head's weight changed before its logits were needed. Remedy: use them before the step")
        return F.linear(x, weight, bias)

    return DeferredLogits(x.shape[:-1] + weight.shape[:1], dtype, _Formula(x, weight, bias), frame, compute)


# --- the steps ---------------------------------------------------------------------------------------------------------------
# A step gets torch's function and its arguments, and returns its result, or None where it is none that the fused loss knows.


def _cast(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    devices = [a for a in (*args, *kwargs.values()) if isinstance(a, (str, torch.device))]
    if any(isinstance(a, Tensor) for a in (*args, *kwargs.values())) or any(torch.device(d) != logits.device for d in devices):
        return None
    here = [a for a in args if not isinstance(a, (str, torch.device))]
    options = {name: value for name, value in kwargs.items() if name != "device"}
    like = func(logits.outline(), *here, **options) if here or options or func is Tensor.float else logits
    if not like.is_floating_point():
        return None
    return cast(Tensor, logits.following(func, args, kwargs, like, logits._formula))


def _reshape(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    like = func(logits.outline(), *args, **kwargs)
    if like.dtype != logits.dtype or like.dim() < 1 or like.shape[-1] != logits.shape[-1]:
        return None
    hidden = logits._formula.hidden
    formula = replace(logits._formula, hidden=hidden.reshape(*like.shape[:-1], hidden.shape[-1]))
    return cast(Tensor, logits.following(func, args, kwargs, like, formula))


def _slice(func: Any, logits: Any, index: Any) -> Tensor | None:
    # logits[..., :-1, :]: all words of some rows, which are the same rows of the hidden states
    if not isinstance(index, tuple) or index[-1] != slice(None):
        return None
    if not all(part is Ellipsis or isinstance(part, slice) for part in index):
        return None
    if Ellipsis not in index and len(index) != logits.dim():
        return None
    like, formula = logits.outline()[index], replace(logits._formula, hidden=logits._formula.hidden[index])
    return cast(Tensor, logits.following(func, (index,), {}, like, formula))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _multiply(func: Any, first: Any, second: Any, **kwargs: Any) -> Tensor | None:
    logits, number = (first, second) if isinstance(first, DeferredLogits) else (second, first)
    if kwargs or not isinstance(logits, DeferredLogits) or not _is_number(number):
        return None
    return logits.following(torch.mul, (number,), {}, logits, logits._formula.times(float(number)))


def _divide(func: Any, logits: Any, number: Any, **kwargs: Any) -> Tensor | None:
    if kwargs or not isinstance(logits, DeferredLogits) or not _is_number(number) or number == 0:
        return None
    return logits.following(func, (number,), {}, logits, logits._formula.times(1.0 / number))


def _tanh(func: Any, logits: Any, **kwargs: Any) -> Tensor | None:
    if kwargs or logits._formula.capped:
        return None
    return cast(Tensor, logits.following(func, (), {}, logits, replace(logits._formula, capped=True)))


def _add(func: Any, logits: Any, other: Any, **kwargs: Any) -> Tensor | None:
    # BART adds a bias of its own, a buffer of [1, vocab], to the logits of a head that has none.
    if kwargs or type(logits) is not DeferredLogits or type(other) not in (Tensor, nn.Parameter, nn.Buffer):
        return None
    formula, vocab = logits._formula, logits.shape[-1]
    fits = other.dim() >= 1 and other.shape[-1] == other.numel() == vocab and other.device == logits.device
    if not fits or other.dim() > logits.dim() or formula.bias is not None or formula.capped or formula.inner != 1.0:
        return None
    if not other.is_floating_point():
        return None
    like = logits.outline().to(torch.promote_types(other.dtype, logits.dtype))
    bias = other.reshape(vocab)
    if not torch.is_autocast_enabled(logits.device.type):
        bias = bias.to(formula.weight.dtype)
    return logits.following(func, (other,), {}, like, replace(formula, bias=bias))


def _cross_entropy(
    func: Any,
    logits: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    if type(logits) is not DeferredLogits or isinstance(target, DeferredLogits) or not logits._formula.has_a_loss:
        return None
    if weight is not None or size_average is not None or reduce is not None or reduction not in ("mean", "sum"):
        return None
    if target.dtype != torch.int64 or target.shape != logits.shape[:-1] or logits.dim() > 2 or target.device != logits.device:
        return None
    formula, frame = logits._formula, logits._frame
    scale, cap = (formula.inner, None) if not formula.capped else (formula.inner * formula.outer, formula.outer)
    loss = linear_cross_entropy(
        formula.hidden,
        formula.weight,
        target,
        bias=formula.bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        logit_softcap=cap,
        logit_scale=scale,
        reduction=reduction,
        compact=frame.compact,
        counted=frame.counted,
    )
    frame.losses += 1
    # torch's loss has the dtype of its logits, but under autocast computes in float32.
    return loss if torch.is_autocast_enabled(logits.device.type) else loss.to(logits.dtype)


_STEPS: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys((Tensor.float, Tensor.to), _cast),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape, Tensor.contiguous, Tensor.flatten, torch.flatten), _reshape),
    Tensor.__getitem__: _slice,
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _multiply),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div), _divide),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
    **dict.fromkeys((Tensor.add, Tensor.__add__, torch.add), _add),
    F.cross_entropy: _cross_entropy,
}

_PROPERTIES = ("shape", "dtype", "device", "ndim", "is_cuda", "is_cpu", "is_meta", "layout", "requires_grad")
_METADATA: frozenset[Any] = frozenset(
    [getattr(Tensor, name).__get__ for name in _PROPERTIES]
    + [Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.is_floating_point, Tensor.__len__]
)


# --- what stands on the instances --------------------------------------------------------------------------------------------


class DeferringHead(Standing):
    """Stands on the head as ``forward``: defers inside an armed forward of its model, and is the head's own everywhere else."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        head, frame = self.module, None if torch.compiler.is_compiling() else current_frame()
        if frame is None or len(args) != 1 or kwargs:
            return type(head).forward(head, *args, **kwargs)
        x = args[0]
        if frame.mode == "defer" and self._may_defer(head, x):
            if frame.counted is not None:  # the host is ahead of the device by a forward now, and the device need not wait
                frame.counted.start()
            return defer(head, x, frame)
        if frame.proving:
            with torch.autocast(x.device.type, enabled=False) if frame.mode == "exact" else contextlib.nullcontext():
                return F.linear(*frame.cut(x, head))
        return type(head).forward(head, x)

    def _may_defer(self, head: Any, x: Any) -> bool:
        """Whether hidden states and weight are as planned, and nothing watches or wraps the head."""
        weight, bias = head.weight, getattr(head, "bias", None)
        if not is_plain(x, weight, bias) or x.device.type != self.settings["device"] or weight.device != x.device:
            return False
        if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
            return False
        if head.__dict__.get(FORWARD) is not self:  # accelerate's hooks put the weight away after the head's forward
            return False
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type) in self.settings["dtypes"]
        return x.dtype in self.settings["dtypes"] and weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)


class FusedForward(Standing):
    """Stands on a language model as ``forward``: trained with labels, it has the fused loss, and None for logits.

    Everything else is the model's own forward: without labels, in evaluation, without gradients, for a tuple
    (``return_dict=False``), under ``torch.compile``, and for a caller who passes ``skip_logits=False`` because the logits are
    wanted beside the loss. ``skip_logits=True`` asks for the loss alone in evaluation too, as it does of Liger.
    """

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's own method: Trainer and ``generate`` read it."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, skip = self.module, kwargs.pop(KEYWORD, None)
        own = type(model).forward
        if torch.compiler.is_compiling():
            return own(model, *args, **kwargs)
        proving = current_frame()
        if proving is not None and proving.proving:
            return own(model, *args, **kwargs)
        labels = self._labels(model, args, kwargs, skip)
        if labels is None:
            with framed(None):
                return own(model, *args, **kwargs)
        frame = Frame("defer", self.settings["compact"])
        frame.counted = _count(labels) if frame.compact else None
        with framed(frame):
            output = own(model, *args, **kwargs)
        return finished(output, frame)

    def _labels(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], skip: bool | None) -> Any:
        """The labels of a call that is served; None for any other."""
        if skip is False or not (skip or (model.training and torch.is_grad_enabled())):
            return None
        labels = kwargs.get("labels")
        if labels is None and args:
            given = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs)
            labels = given.arguments.get("labels")
        as_dict = kwargs.get("return_dict")
        as_dict = getattr(model.config, "return_dict", True) if as_dict is None else as_dict
        return labels if as_dict else None


def _count(labels: Any) -> LabelCount | None:
    """The count of labels for whose number the host would wait."""
    return LabelCount(labels) if type(labels) is Tensor and labels.is_cuda else None


def finished(output: Any, frame: Frame) -> Any:
    """What a forward returned, with no deferred logits in it: None where the fused loss was taken, else real ones."""
    if not isinstance(output, dict):
        return materialized(output)
    if not any(isinstance(value, DeferredLogits) for value in output.values()):
        return output
    values = {
        name: None if frame.losses and isinstance(value, DeferredLogits) and value._real is None else materialized(value)
        for name, value in output.items()
    }
    return type(output)(**values)


class PlainReplica(Standing):
    """Stands on a module as ``_replicate_for_data_parallel``: a replica of ``nn.DataParallel`` is an unfused module.

    A replica is a shallow copy, and what stands on it would go on calling the original.
    """

    def __call__(self) -> nn.Module:
        replica: nn.Module = type(self.module)._replicate_for_data_parallel(self.module)
        for name in (FORWARD, REPLICATE):
            replica.__dict__.pop(name, None)
        return replica
