"""The kernels of pack_tokens: what the reference makes, bit for bit, on a GPU or interpreted; compiled for GPUs not here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops import pack_tokens as meaning
from oslo_fusion.ops.pack_tokens import ATTENDED, COLUMNS, IGNORED, NOWHERE, RULES, TEXT, Form, Tokens
from oslo_fusion.triton import pack_tokens as kernels

PAD = 1
MASKS = (torch.int64, torch.bool, torch.float64, torch.bfloat16, torch.int32, torch.uint8)


def test_this_file_interpreted(rerun_interpreted: Callable[[], None]) -> None:
    rerun_interpreted()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that a launcher allocates is full of a number that is none of the batch's."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(-7777))


def ragged(rows: int, columns: int, kind: str, device: torch.device) -> tuple[Tensor, Tokens]:
    """A batch whose rows are padded on the right or on the left, have holes, or are full; of several rows one is empty."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    places = torch.arange(columns).expand(rows, columns)
    masks = {
        "right": places < lengths,
        "left": places >= columns - lengths,
        "holes": torch.rand(rows, columns, generator=generator) < 0.6,
        "full": places >= 0,
        "nothing": places < 0,
    }
    mask = masks[kind].clone()
    if rows > 2 and kind != "full":
        mask[rows // 2] = False
    ids, types, positions = (torch.randint(0, most, mask.shape, generator=generator) for most in (5, 2, 99))
    labels = torch.where(torch.rand(mask.shape, generator=generator) < 0.5, ids, IGNORED)
    return mask.to(device), Tokens(*(x.to(device) for x in (ids, types, labels, positions)))


def judge(mask: Tensor, tokens: Tokens, form: Form, sequences: int) -> None:
    """Every number of every place, the rest's too."""
    ours = kernels.launch_count_tokens(mask, tokens.labels, form.shifted)
    theirs = meaning.count_tokens_reference(mask, tokens.labels, form.shifted)
    assert torch.equal(ours, theirs)
    packed = kernels.launch_pack_tokens(ours, mask, tokens, form, sequences)
    expected = meaning.pack_tokens_reference(theirs, mask, tokens, form, sequences)
    fields = ("source", "offsets", *Tokens._fields)
    for name, a, b in zip(fields, (*packed[:2], *packed[2]), (*expected[:2], *expected[2]), strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert (a.dtype, a.shape, a.is_contiguous()) == (b.dtype, b.shape, True), name
            assert torch.equal(a, b), f"{name}: {a.tolist()}, not {b.tolist()}"


SHAPES = [(1, 1), (1, 17), (3, 333), (2, 600)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["right", "left", "holes", "full", "nothing"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: tuple[int, int], kind: str, device: torch.device) -> None:
    mask, tokens = ragged(*shape, kind, device)
    bare = tokens._replace(positions=None)
    cases = [(tokens, NOWHERE, True), (bare._replace(labels=None), NOWHERE, False), (bare._replace(ids=None), TEXT, True)]
    cases += [(bare, rule, shifted) for rule, shifted in ((COLUMNS, True), (ATTENDED, False), (TEXT, False))]
    for (given, rule, shifted), dtype in zip(cases, MASKS, strict=True):
        judge(mask.to(dtype), given, Form(rule, PAD, shifted), shape[0] + 5)


@pytest.mark.usefixtures("poisoned")
def test_more_rows_than_a_block(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(kernels, "BLOCK", 32)  # interpreted, a program takes milliseconds
    mask, tokens = ragged(300 if device.type == "cuda" else 70, 3, "holes", device)
    judge(mask, tokens, Form(shifted=True), mask.shape[0] + 300)
    if device.type == "cuda":
        mask, tokens = ragged(1500, 40, "right", device)
        judge(mask, tokens._replace(positions=None), Form(COLUMNS), mask.shape[0] + 300)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("lengths", [1, 16, 64])
def test_offsets_end_at_the_packed_length(lengths: int, device: torch.device) -> None:
    """With a rest of several pieces, with more offsets than there are pieces, and for a power of two of tokens."""
    for second in (848, 900 // lengths):
        mask, total = torch.ones(2, 1200, dtype=torch.int64, device=device), 1200 + second
        mask[1, second:] = 0
        judge(mask, Tokens(), Form(lengths=lengths), 9)
        numbers = kernels.launch_count_tokens(mask, None, False)
        offsets = kernels.launch_pack_tokens(numbers, mask, Tokens(), Form(lengths=lengths), 9).offsets.tolist()
        assert offsets[:3] == [0, 1200, total]
        assert offsets[-1] == min(total + 7 * meaning.LONGEST_PIECE, meaning.bucket(total, lengths))


@pytest.mark.usefixtures("poisoned")
def test_strided_inputs_and_positions_of_one_row(device: torch.device) -> None:
    mask, tokens = ragged(4, 33, "left", device)
    strided = Tokens(*(None if x is None else torch.stack((x, x), -1)[..., 0] for x in tokens))
    judge(mask.t().contiguous().t(), strided, Form(shifted=True), 4)
    assert tokens.positions is not None
    for positions in (tokens.positions[:1], tokens.positions[0]):
        judge(mask, tokens._replace(positions=positions), Form(), 6)


def test_launchers_check_first(device: torch.device) -> None:
    mask, tokens = ragged(4, 33, "left", device)
    numbers = kernels.launch_count_tokens(mask, None, False)
    with pytest.raises(ConfigError, match="labels: received shape"):
        kernels.launch_count_tokens(mask, mask[:1].long(), False)
    with pytest.raises(ConfigError, match="sequences: received 3"):
        kernels.launch_pack_tokens(numbers, mask, tokens, Form(), 3)
    with pytest.raises(ConfigError, match="numbers: received"):
        kernels.launch_pack_tokens(numbers[:3], mask, tokens, Form(), 4)


POINTERS = ("ids_ptr", "types_ptr", "labels_ptr", "positions_ptr")


@pytest.mark.parametrize(("mask", "shifted"), [("*i1", False), ("*i64", True), ("*bf16", False)])
def test_counting_compiles_for_every_target(compile_for_all_targets: Callable[..., Any], mask: str, shifted: bool) -> None:
    signature = {"numbers_ptr": "*i64", "mask_ptr": mask, "labels_ptr": "*i64", "rows": "i32", "columns": "i32"}
    constants = {"HAS_LABELS": True, "SHIFTED": shifted, "IGNORED": IGNORED, "BLOCK": kernels.BLOCK}
    for target in compile_for_all_targets(kernels._count_tokens_kernel, signature, constants).values():
        assert target.shared <= 1024, f"{target.target}: sums over a program's warps need little"


@pytest.mark.parametrize(("rule", "shifted"), list(itertools.zip_longest(range(5), (False, True), fillvalue=False)))
def test_packing_compiles_for_every_target(compile_for_all_targets: Callable[..., Any], rule: int, shifted: bool) -> None:
    """Every way to number tokens; with as few tensors as there can be, and with all."""
    numbers = ("rows", "columns", "positions_row_stride", "packed_stride", "pad", "sequences", "lengths")
    signature = {"packed_ptr": "*i64", "offsets_ptr": "*i32", "numbers_ptr": "*i64", "mask_ptr": "*i64"}
    signature |= dict.fromkeys(numbers, "i32") | dict.fromkeys(POINTERS, "*i64")
    constants: dict[str, Any] = {"SHIFTED": shifted, "RULE": rule, "IGNORED": IGNORED, "BLOCK": kernels.BLOCK}
    constants |= {"FINEST": meaning.FINEST, "PIECE": meaning.LONGEST_PIECE}
    constants |= dict.fromkeys(("HAS_IDS", "HAS_TYPES", "HAS_LABELS"), rule != 0)
    if rule == 0:
        constants |= dict.fromkeys(POINTERS)
    elif rule < 4:
        constants["positions_ptr"] = None
    compile_for_all_targets(kernels._pack_tokens_kernel, signature, constants)


def test_every_rule_has_a_number() -> None:
    assert set(kernels._RULES) == set(RULES)
