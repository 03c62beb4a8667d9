"""no_repeat_ngram: scores of tokens that would repeat an n-gram of the text become -inf.

With ``n`` the size, ``L`` the length and ``t`` a row of ids, every window ``t[w : w + n]`` inside ``t[:L]`` whose first
``n - 1`` tokens equal the last ``n - 1`` tokens ``t[L - n + 1 : L]`` bans its last token ``t[w + n - 1]`` in that row. The
encoder's form takes the windows from a source text and the ending from the text that is being written.

=================  ==============================  ============================================================
tensor             shape                           dtype
=================  ==============================  ============================================================
``scores``         ``[rows, vocab]``, any strides  float16, bfloat16, float32 or float64; kept bit for bit but for -inf
``ids``            ``[rows, capacity]``            int32 or int64; tokens at and after the length are not read
``source``         ``[sources, source_length]``    int32 or int64; rows ``k·rows/sources …`` belong to source ``k``
``sizes``          ``[rows]``                      int32 or int64; a row whose size is below 1 is left alone
``device_length``  ``[]``                          int32 or int64; clamped to ``0 … capacity``
=================  ==============================  ============================================================

The reference implementation is transformers' ``NoRepeatNGramLogitsProcessor`` and ``EncoderNoRepeatNGramLogitsProcessor``:
a text shorter than ``n`` bans nothing, ``n = 1`` bans every token of the text, padding counts as text. Ids outside the
vocabulary match like any other and ban nothing (transformers raises for most of them).
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from oslo_fusion import extension
from oslo_fusion.errors import ConfigError
from oslo_fusion.ops import kernels
from oslo_fusion.ops.kernels import find_kernels, is_plain, wants_gradient

NAME = "no_repeat_ngram"
SCORES_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IDS_DTYPES = (torch.int32, torch.int64)

_ARGUMENTS = "Tensor ids, Tensor? source, int size, Tensor? sizes, SymInt length, Tensor? device_length"
_IN_PLACE = f"(Tensor(a!) scores, {_ARGUMENTS}) -> ()"
_FUNCTIONAL = f"(Tensor scores, {_ARGUMENTS}) -> Tensor"


def _check(
    scores: Tensor,
    ids: Tensor,
    source: Tensor | None,
    size: int,
    sizes: Tensor | None,
    length: int,
    device_length: Tensor | None,
    *,
    in_place: bool,
) -> None:
    """Raise ConfigError for what no implementation can compute, without reading device memory.

    Called first by the reference and by every launcher. Those in C++ have the same conditions in ``csrc/no_repeat_ngram.h``.
    """
    if scores.dim() != 2:
        raise _error("scores", _shape(scores), "[rows, vocab]", "scores.view(-1, vocab)")
    if scores.dtype not in SCORES_DTYPES:
        raise _error("scores", scores.dtype, "float16, bfloat16, float32 or float64", "scores.float()")
    rows, vocab = scores.shape
    if in_place:
        row_stride, col_stride = scores.stride()
        if (row_stride == 0 and rows > 1) or (col_stride == 0 and vocab > 1):
            raise _error("scores", "an expanded tensor", "memory of its own for every score", "scores.contiguous()")
    if ids.dim() != 2 or ids.shape[0] != rows:
        raise _error("ids", _shape(ids), f"[{rows}, capacity], as scores is {_shape(scores)}", "a row per row of scores")
    if source is not None and (source.dim() != 2 or (rows % source.shape[0] != 0 if source.shape[0] else rows != 0)):
        raise _error("source", _shape(source), f"[sources, length] where sources divides {rows}", "a row per group of beams")
    if sizes is not None and (sizes.dim() != 1 or sizes.shape[0] != rows):
        raise _error("sizes", _shape(sizes), f"[{rows}]", "a size per row, or one int")
    if sizes is None and size < 1:
        raise _error("size", size, "1 or more", "leave the call out to ban nothing")
    if not 0 <= length <= ids.shape[1]:
        raise _error("length", length, f"0 to {ids.shape[1]}, the capacity of ids", "at most ids.shape[1]")
    if device_length is not None and device_length.dim() != 0:
        raise _error("length", _shape(device_length), "a tensor of shape []", "length.reshape(())")
    device = scores.device  # asked once, and no loop over the four: these checks are run at every token, and took 1 µs more
    _check_integers("ids", ids, device)
    if source is not None:
        _check_integers("source", source, device)
    if sizes is not None:
        _check_integers("sizes", sizes, device)
    if device_length is not None:
        _check_integers("length", device_length, device)


def _check_integers(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype not in IDS_DTYPES:
        raise _error(name, tensor.dtype, "int32 or int64", f"{name}.long()")
    if tensor.device != device:
        raise _error(name, f"a tensor on {tensor.device}", f"{device}, where scores is", f"{name}.to(scores.device)")


def _error(name: str, received: object, allowed: str, remedy: str) -> ConfigError:
    return ConfigError(f"{NAME}: {name}: received {received}. Allowed: {allowed}. Remedy: {remedy}.")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


# --- what it means --------------------------------------------------------------------------------------------------


def _banned(
    scores: Tensor,
    ids: Tensor,
    source: Tensor | None,
    size: int,
    sizes: Tensor | None,
    length: int,
    device_length: Tensor | None,
) -> Tensor:
    """The mask ``[rows, vocab]`` of banned tokens."""
    rows, vocab = scores.shape
    mask = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=scores.device)
    if rows == 0:
        return mask[:, :vocab]
    if device_length is not None:
        length = min(max(int(device_length), 0), ids.shape[1])
    text = ids[:, :length]
    searched = text if source is None else source.repeat_interleave(rows // source.shape[0], dim=0)
    distinct = [size] if sizes is None else cast("list[int]", sizes.unique().tolist())
    for n in distinct:
        if n < 1 or length < n - 1 or searched.shape[1] < n:
            continue
        ending = text[:, length - n + 1 :]
        windows = searched.unfold(1, n, 1)
        matches = (windows[..., :-1] == ending.unsqueeze(1)).all(-1)
        if sizes is not None:
            matches &= (sizes == n).unsqueeze(1)
        last = windows[..., -1].long()
        # What must not be banned goes to a spare column, where it can't undo another window's ban.
        mask.scatter_(1, torch.where(matches & (last >= 0) & (last < vocab), last, vocab), True)
    return mask[:, :vocab]


def no_repeat_ngram_reference_(
    scores: Tensor,
    ids: Tensor,
    source: Tensor | None,
    size: int,
    sizes: Tensor | None,
    length: int,
    device_length: Tensor | None,
) -> None:
    """The meaning in plain PyTorch, in place. Waits for the device where a size or the length lies there."""
    _check(scores, ids, source, size, sizes, length, device_length, in_place=True)
    scores.masked_fill_(_banned(scores, ids, source, size, sizes, length, device_length), -float("inf"))


def no_repeat_ngram_reference(
    scores: Tensor,
    ids: Tensor,
    source: Tensor | None,
    size: int,
    sizes: Tensor | None,
    length: int,
    device_length: Tensor | None,
) -> Tensor:
    """The meaning in plain PyTorch, into a new contiguous tensor."""
    _check(scores, ids, source, size, sizes, length, device_length, in_place=False)
    result = scores.clone(memory_format=torch.contiguous_format)
    return result.masked_fill_(_banned(scores, ids, source, size, sizes, length, device_length), -float("inf"))


def _first_call_(scores: Tensor, *arguments: Any) -> None:
    """Answers until a kernel is registered over it: looks for one, which registers itself if it is there."""
    launchers = _find_launchers(scores)
    (no_repeat_ngram_reference_ if launchers is None else launchers.launch_no_repeat_ngram_)(scores, *arguments)


def _first_call(scores: Tensor, *arguments: Any) -> Tensor:
    """As :func:`_first_call_`, for the functional operator."""
    launchers = _find_launchers(scores)
    launch = no_repeat_ngram_reference if launchers is None else launchers.launch_no_repeat_ngram
    return cast(Tensor, launch(scores, *arguments))


def _find_launchers(scores: Tensor) -> ModuleType | None:
    if scores.device.type == "cpu":
        extension.failure()
    return find_kernels(NAME) if scores.is_cuda else None


def _fake_(scores: Tensor, *arguments: Any) -> None:
    _check(scores, *arguments, in_place=True)


def _fake(scores: Tensor, *arguments: Any) -> Tensor:
    _check(scores, *arguments, in_place=False)
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, source, size, sizes, length, device_length = inputs
    ctx.save_for_backward(ids, source, sizes, device_length)
    ctx.size, ctx.length = size, length


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The bans are found again rather than kept: a mask would hold rows × vocab bytes, and a score may have been -inf before.
    ids, source, sizes, device_length = ctx.saved_tensors
    operator = torch.ops.oslo_fusion.no_repeat_ngram.default
    bans = operator(torch.zeros_like(grad), ids, source, ctx.size, sizes, ctx.length, device_length)
    return grad.masked_fill(bans < 0, 0), None, None, None, None, None, None


# One dispatch key holds one kernel, so the extension's CUDA kernel, which stands beside Triton's, has names of its own:
# no_repeat_ngram_cuda_ and no_repeat_ngram_cuda. Whichever kernel is missing, the reference answers.
_LIBRARY = torch.library.Library("oslo_fusion", "FRAGMENT")
for _name, _answer_, _answer in (
    (NAME, _first_call_, _first_call),
    (f"{NAME}_cuda", no_repeat_ngram_reference_, no_repeat_ngram_reference),
):
    _LIBRARY.define(f"{_name}_{_IN_PLACE}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.define(f"{_name}{_FUNCTIONAL}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(f"{_name}_", _answer_, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _answer, "CompositeExplicitAutograd")
    torch.library.register_fake(f"oslo_fusion::{_name}_", _fake_, lib=_LIBRARY)
    torch.library.register_fake(f"oslo_fusion::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"oslo_fusion::{_name}", _backward, setup_context=_setup_context, lib=_LIBRARY)


# --- which kernel answers -------------------------------------------------------------------------------------------


def implementation(device_type: str, kernel: str = "auto") -> str:
    """Which implementation answers on a device, see :func:`oslo_fusion.ops.kernels.implementation`. Loads it.

    ``auto`` takes the extension's CUDA kernel where it was built, because its launch costs the host less.
    """
    return kernels.implementation(NAME, device_type, kernel)


@functools.cache
def _functions(device: torch.device, kernel: str) -> tuple[Any, Any, Any, Any]:
    """In place and functional: the operators, then what may be called past the dispatcher.

    Asked with the device, because ``device.type`` makes a string: 0.4 µs a call.
    """
    answers = implementation(device.type, kernel)
    in_place, functional = _operators(answers)
    launchers = find_kernels(NAME) if answers == "triton" else None
    if launchers is not None:
        return in_place, functional, launchers.launch_no_repeat_ngram_, launchers.launch_no_repeat_ngram
    if answers in ("c++", "cuda"):
        # Below the key of autograd, whose gradient is 9 to 12 of a call's 16 µs. In place there is none to pass by.
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU if answers == "c++" else torch._C.DispatchKey.CUDA)
        return in_place, functional, in_place, functools.partial(functional.redispatch, keys)
    return in_place, functional, in_place, functional


def _operators(answers: str) -> tuple[Any, Any]:
    namespace = torch.ops.oslo_fusion
    if answers == "cuda":
        return namespace.no_repeat_ngram_cuda_.default, namespace.no_repeat_ngram_cuda.default
    return namespace.no_repeat_ngram_.default, namespace.no_repeat_ngram.default


def _split(ids: Tensor, sizes: int | Tensor, length: int | Tensor | None) -> tuple[int, Tensor | None, int, Tensor | None]:
    """One number or a tensor, as the operator's schema takes them."""
    if type(sizes) is not int:
        _check_kind("sizes", sizes)
    if length is not None and type(length) is not int:
        _check_kind("length", length)
    size, row_sizes = (0, sizes) if isinstance(sizes, Tensor) else (sizes, None)
    if isinstance(length, Tensor):
        return size, row_sizes, 0, length
    capacity = ids.shape[1] if ids.dim() == 2 else 0
    return size, row_sizes, capacity if length is None else length, None


def _check_kind(name: str, value: object) -> None:
    if not isinstance(value, (int, Tensor, torch.SymInt)) or isinstance(value, bool):
        raise _error(name, f"{value!r} ({type(value).__name__})", "an int or an integer tensor", f"int({name})")


def _run(
    in_place: bool,
    scores: Tensor,
    ids: Tensor,
    source: Tensor | None,
    sizes: int | Tensor,
    length: int | Tensor | None,
    kernel: str,
) -> Tensor:
    if in_place and scores.requires_grad and torch.is_grad_enabled():
        raise _error("scores", "a tensor that requires grad, in place", "no gradient", f"{NAME}(scores, …), which has one")
    size, row_sizes, length, device_length = _split(ids, sizes, length)
    if torch.compiler.is_compiling():
        operator_, operator = _operators(kernel)  # what is loaded cannot be asked while tracing: the operator asks when it runs
    else:
        operator_, operator, plain_, plain = _functions(scores.device, kernel)
        if plain is not operator and not wants_gradient(scores) and is_plain(scores, ids, source, row_sizes, device_length):
            operator_, operator = plain_, plain
    if in_place:
        operator_(scores, ids, source, size, row_sizes, length, device_length)
        return scores
    return cast(Tensor, operator(scores, ids, source, size, row_sizes, length, device_length))


# --- the public functions -------------------------------------------------------------------------------------------


def no_repeat_ngram_(
    scores: Tensor, ids: Tensor, sizes: int | Tensor, length: int | Tensor | None = None, *, kernel: str = "auto"
) -> Tensor:
    """Ban, in place, every token that would repeat an n-gram of the row's own text. One launch, linear in the text.

    Args:
        scores: ``[rows, vocab]``, any strides but not expanded; changed and returned.
        ids: ``[rows, capacity]``, the text so far in the first ``length`` columns.
        sizes: n, one for all rows or a tensor ``[rows]``, in which a size below 1 leaves its row alone.
        length: tokens of text, by default all columns of ``ids``. A tensor of shape ``[]`` on the device of ``scores`` is read
            by the kernel itself, so that a CUDA graph captured once serves every length up to the capacity.
        kernel: ``triton``, ``cuda`` or ``auto``, see :func:`implementation`.

    Raises:
        ConfigError: a shape, a dtype, a device, a size or a length is wrong, or ``scores`` requires grad (C++ and CUDA raise
            its base ValueError).
    """
    return _run(True, scores, ids, None, sizes, length, kernel)


def no_repeat_ngram(
    scores: Tensor, ids: Tensor, sizes: int | Tensor, length: int | Tensor | None = None, *, kernel: str = "auto"
) -> Tensor:
    """:func:`no_repeat_ngram_` into a new contiguous tensor; ``scores`` is not changed. Copy and ban are one launch for
    texts of up to 2,048 tokens, two beyond. The gradient of a banned score is 0, of any other 1."""
    return _run(False, scores, ids, None, sizes, length, kernel)


def encoder_no_repeat_ngram_(
    scores: Tensor,
    ids: Tensor,
    source: Tensor,
    sizes: int | Tensor,
    length: int | Tensor | None = None,
    *,
    kernel: str = "auto",
) -> Tensor:
    """Ban, in place, every token that would complete an n-gram of the encoder's input.

    Args:
        scores, ids, sizes, length, kernel: as for :func:`no_repeat_ngram_`; ``ids`` is the text that is being written.
        source: ``[sources, source_length]``, the encoder's input. ``rows`` must be a multiple of ``sources``: the beams of a
            source are neighbours.

    Raises:
        ConfigError: as :func:`no_repeat_ngram_`.
    """
    return _run(True, scores, ids, source, sizes, length, kernel)


def encoder_no_repeat_ngram(
    scores: Tensor,
    ids: Tensor,
    source: Tensor,
    sizes: int | Tensor,
    length: int | Tensor | None = None,
    *,
    kernel: str = "auto",
) -> Tensor:
    """:func:`encoder_no_repeat_ngram_` into a new contiguous tensor; ``scores`` is not changed."""
    return _run(False, scores, ids, source, sizes, length, kernel)
