"""What a padded batch needs before its tokens stand one after the other without the padding: its numbers, and its tensors.

:func:`count_tokens` makes the few numbers that a host must know, :func:`pack_tokens` everything else that is one number a
token, before any host knows how many there are: places for the whole padded batch, of which its tokens take the first. Then
come the rest, one by one what the batch's last place has, with labels that are ignored.

================  ====================  ==================================================================================
tensor            shape                 what it is
================  ====================  ==================================================================================
``mask``          ``[rows, columns]``   any dtype; not zero where there is text
``ids``, …        ``[rows, columns]``   input ids, token types and labels; positions may have one row for all
``numbers``       ``[4, rows]`` int64   of each row: tokens; whether its first column is one; at how many later columns text
                                        begins; at how many places of padding a label counts
``source``        ``[rows × columns]``  int64, the place in the flattened padded batch that each packed place comes from
``offsets``       ``[sequences + 1]``   int32, where sequences begin and end: rows, then pieces of the rest, see below
packed ``ids``, … ``[rows × columns]``  what the source of each place has
================  ====================  ==================================================================================

Labels: ``shifted`` ones belong to the token before them, within their row, and follow it in the packed batch, also where the
next text begins; so the first packed label is ignored, and that of a row's first column, which belongs to nothing, is left out.

Positions: given ones, or numbered by a rule: columns of the batch from ``pad`` + 1 on with ``TEXT`` and from 0 otherwise,
attended tokens from 0, or tokens that are not ``pad`` from ``pad`` + 1 on, as RoBERTa does. Of the rest those of the last place
where they are given or columns, otherwise 0 or ``pad``.

Offsets: the rest is cut into pieces of :data:`LONGEST_PIECE` places, as attention grows with the square of a length, up to the
packed length that :func:`bucket` says, which all further ones are.

No operator of torch's: integers have no gradient, padded calls are packed in plain eager code only, and the dispatcher would
cost the host what is saved here. On a GPU int64 tensors take two launches (``triton/pack_tokens.py``) instead of about 25.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.kernels import find_kernels

IGNORED = -100
"""The label that transformers' losses leave out."""

ATTENDED, COLUMNS, TEXT, NOWHERE = "attended", "columns", "text", ""
"""How a model numbers the tokens of a row where it is given no ``position_ids``: attended ones, columns of the batch, tokens
that are not the padding token (from one after its number on, as RoBERTa does), or not at all."""

RULES = (NOWHERE, COLUMNS, ATTENDED, TEXT)

FINE, COARSE = 64, 16
"""How many packed lengths there are for each doubling; the coarse ones where each costs the capture of CUDA graphs."""

FINEST, LONGEST_PIECE = 16, 256

NAME = "pack_tokens"

_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MASKS = frozenset((*_INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64))  # that the kernels read


class Tokens(NamedTuple):
    """What a batch has for each of its places, padded or packed; None what it was not given."""

    ids: Tensor | None = None
    types: Tensor | None = None
    labels: Tensor | None = None
    positions: Tensor | None = None


class Packed(NamedTuple):
    """A batch without its padding before a host knows how many tokens it has. Shapes: in the module's docstring."""

    source: Tensor
    offsets: Tensor
    tokens: Tokens


class Form(NamedTuple):
    """How tokens are packed.

    Attributes:
        rule: how they are numbered where no positions are given, one of :data:`RULES`.
        pad: the padding token, which only ``TEXT`` needs.
        shifted: a label belongs to the token before it.
        lengths: as for :func:`bucket`.
    """

    rule: str = NOWHERE
    pad: int = 0
    shifted: bool = False
    lengths: int = FINE


def step(tokens: int, lengths: int = FINE) -> int:
    """By how many tokens neighbouring packed lengths differ: a share of the power of two below.

    Not less than 16, to which tensor cores want a matrix aligned.

    Args:
        tokens: in all.
        lengths: different ones for each doubling.
    """
    return max(FINEST, (1 << (tokens.bit_length() - 1)) // lengths)


def bucket(tokens: int, lengths: int = FINE) -> int:
    """The packed length for this many tokens: the next multiple of :func:`step`, at least one token more.

    Of 64 lengths for each doubling at most 1.6 % of the work is for nothing, of 16 of them 6.3 %, and half of that on average.
    """
    size = step(tokens, lengths)
    return (tokens // size + 1) * size


def _check(mask: Tensor, tokens: Tokens, form: Form) -> None:
    """Raise ConfigError for what no implementation can compute. Called first by the references and by every launcher."""
    if mask.dim() != 2 or not mask.numel():
        raise ConfigError(f"{NAME}: mask: received shape {list(mask.shape)}, must be [rows, columns], at least one of each")
    for name, x in zip(Tokens._fields, tokens, strict=True):
        if x is None:
            continue
        if x.shape != mask.shape and not (name == "positions" and x.shape in ((1, mask.shape[1]), mask.shape[1:])):
            raise ConfigError(f"{NAME}: {name}: received shape {list(x.shape)}, must be that of the mask, {list(mask.shape)}")
        if x.device != mask.device:
            raise ConfigError(f"{NAME}: {name}: is on {x.device}, the mask on {mask.device}. Remedy: {name}.to(mask.device)")
    if form.rule not in RULES:
        raise ConfigError(f"{NAME}: rule: received {form.rule!r}. Allowed: {', '.join(map(repr, RULES))}.")
    if form.lengths < 1:
        raise ConfigError(f"{NAME}: lengths: received {form.lengths}, must be 1 or more")


def _check_sequences(mask: Tensor, numbers: Tensor, sequences: int) -> None:
    """As :func:`_check`, for what packing takes besides."""
    if numbers.shape != (4, mask.shape[0]) or numbers.dtype != torch.int64:
        received = f"{list(numbers.shape)} in {numbers.dtype}"
        raise ConfigError(f"{NAME}: numbers: received {received}, must be what count_tokens made of the mask")
    if sequences < mask.shape[0]:
        raise ConfigError(f"{NAME}: sequences: received {sequences}, must be at least the rows, {mask.shape[0]}")


# --- what it means -----------------------------------------------------------------------------------------------------------


def count_tokens_reference(mask: Tensor, labels: Tensor | None, shifted: bool) -> Tensor:
    """The meaning of :func:`count_tokens`, in plain PyTorch."""
    _check(mask, Tokens(labels=labels), Form(shifted=shifted))
    valid = mask != 0
    numbers = [valid.sum(1), valid[:, 0].long(), (valid[:, 1:] > valid[:, :-1]).sum(1)]
    if labels is None:
        return torch.stack([*numbers, torch.zeros_like(numbers[0])])
    where, what = (valid[:, :-1], labels[:, 1:]) if shifted else (valid, labels)
    return torch.stack([*numbers, ((what != IGNORED) > where).sum(1)])


def pack_tokens_reference(numbers: Tensor, mask: Tensor, tokens: Tokens, form: Form, sequences: int) -> Packed:
    """The meaning of :func:`pack_tokens`, in plain PyTorch. Does not wait for a device."""
    _check(mask, tokens, form)
    _check_sequences(mask, numbers, sequences)
    ends, valid = numbers[0].cumsum(0), mask != 0
    places = torch.arange(mask.numel(), device=mask.device)
    rest = places >= ends[-1]
    # The first place up to which there are as many tokens.
    source = torch.searchsorted(valid.flatten().cumsum(0), places + 1).clamp_(max=mask.numel() - 1)

    def packed(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.flatten().index_select(0, source)

    labels = tokens.labels
    if labels is not None:
        if form.shifted:
            labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        labels = labels.flatten().index_select(0, source).masked_fill_(rest, IGNORED)
        labels = F.pad(labels[:-1], (1, 0), value=IGNORED) if form.shifted else labels
    positions = _positions(mask, valid, tokens, form, source, rest)
    return Packed(source, _offsets(ends, form, sequences), Tokens(packed(tokens.ids), packed(tokens.types), labels, positions))


def _positions(mask: Tensor, valid: Tensor, tokens: Tokens, form: Form, source: Tensor, rest: Tensor) -> Tensor | None:
    if tokens.positions is not None:
        return tokens.positions.expand(mask.shape).flatten().index_select(0, source)
    if form.rule == NOWHERE:
        return None
    if form.rule == ATTENDED:
        return (valid.cumsum(1) - 1).flatten().index_select(0, source).masked_fill_(rest, 0)
    if form.rule == TEXT and tokens.ids is not None:
        text = tokens.ids != form.pad
        return (text.cumsum(1) * text + form.pad).flatten().index_select(0, source).masked_fill_(rest, form.pad)
    columns = source % mask.shape[1]
    return columns + (form.pad + 1) if form.rule == TEXT else columns


def _offsets(ends: Tensor, form: Form, sequences: int) -> Tensor:
    total, rows = ends[-1], ends.shape[0]
    power = torch.bitwise_left_shift(1, (total >> torch.arange(1, 63, device=ends.device)).ne(0).sum())
    size = torch.div(power, form.lengths, rounding_mode="floor").clamp_(min=FINEST)
    length = (torch.div(total, size, rounding_mode="floor") + 1) * size
    pieces = total + torch.arange(1, sequences - rows + 1, device=ends.device) * LONGEST_PIECE
    return F.pad(torch.cat([ends, torch.minimum(pieces, length)]), (1, 0)).int()


# --- what is called ----------------------------------------------------------------------------------------------------------


def _fits(mask: Tensor, *tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors. Ids and labels of other dtypes are rare, and theirs to keep."""
    return mask.is_cuda and mask.dtype in _MASKS and all(x is None or x.dtype == torch.int64 for x in tensors)


def count_tokens(mask: Tensor, labels: Tensor | None, shifted: bool) -> Tensor:
    """The numbers of each row that a host must know to pack a batch, see the module's docstring.

    Args:
        mask: ``[rows, columns]``.
        labels: ``[rows, columns]``, or None: then none is stray.
        shifted: a label belongs to the token before it.

    Returns:
        ``[4, rows]``, int64.

    Raises:
        ConfigError: a shape or device that has no meaning here.
    """
    kernels = find_kernels(NAME) if _fits(mask, labels) else None
    numbers: Tensor = (count_tokens_reference if kernels is None else kernels.launch_count_tokens)(mask, labels, shifted)
    return numbers


def pack_tokens(numbers: Tensor, mask: Tensor, tokens: Tokens, form: Form, sequences: int) -> Packed:
    """Everything that a packed batch has for each place, and where its sequences begin, see the module's docstring.

    Args:
        numbers: what :func:`count_tokens` made of this mask.
        mask: ``[rows, columns]``.
        tokens: of the padded batch, on the device of the mask.
        form: how they are packed.
        sequences: how many offsets there are after the first; at least as many as rows.

    Returns:
        Places for all of the padded batch, the tokens' first.

    Raises:
        ConfigError: a shape, rule or device that has no meaning here.
    """
    kernels = find_kernels(NAME) if _fits(mask, *tokens) else None
    pack = pack_tokens_reference if kernels is None else kernels.launch_pack_tokens
    packed: Packed = pack(numbers, mask, tokens, form, sequences)
    return packed
