"""The meaning of pack_tokens: beside loops over rows and columns, and clear errors. That the kernels agree: tests/triton."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.pack_tokens import (
    ATTENDED,
    COARSE,
    COLUMNS,
    IGNORED,
    LONGEST_PIECE,
    NOWHERE,
    TEXT,
    Form,
    Tokens,
    bucket,
    count_tokens,
    pack_tokens,
)

PAD = 1
MASKS = {
    "right": [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]],
    "left": [[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "an empty row, holes": [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]],
    "the last column": [[0, 0, 0, 0], [0, 0, 0, 1]],
    "full": [[1, 1], [1, 1]],
    "one": [[1]],
    "nothing": [[0, 0]],
}


@pytest.fixture(params=list(MASKS))
def batch(request: pytest.FixtureRequest) -> tuple[Tensor, Tokens]:
    mask = torch.tensor(MASKS[request.param])
    generator = torch.Generator().manual_seed(3)
    ids, types, positions = (torch.randint(0, most, mask.shape, generator=generator) for most in (4, 2, 99))
    labels = torch.where(torch.rand(mask.shape, generator=generator) < 0.6, ids, IGNORED)
    return mask, Tokens(ids, types, labels, positions)


@pytest.mark.parametrize("shifted", [False, True])
def test_numbers_of_rows(batch: tuple[Tensor, Tokens], shifted: bool) -> None:
    mask, tokens = batch
    assert tokens.labels is not None
    expected = []
    for row, labels in zip(mask.tolist(), tokens.labels.tolist(), strict=True):
        rises = sum(now > before for before, now in itertools.pairwise(row))
        pairs = zip(row, labels[1:], strict=False) if shifted else zip(row, labels, strict=True)
        expected.append([sum(row), row[0], rises, sum(not text and label != IGNORED for text, label in pairs)])
    found = count_tokens(mask, tokens.labels, shifted)
    assert found.dtype == torch.int64
    assert found.t().tolist() == expected
    assert count_tokens(mask.bool(), None, shifted).t().tolist() == [[*row[:3], 0] for row in expected]
    assert torch.equal(count_tokens(mask * -0.5, tokens.labels, shifted), found)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("rule", [NOWHERE, COLUMNS, ATTENDED, TEXT, "given"])
def test_what_is_packed(batch: tuple[Tensor, Tokens], rule: str, shifted: bool) -> None:
    mask, tokens = batch
    rows, columns = mask.shape
    ids, types, labels, positions = (x.tolist() for x in tokens if x is not None)
    places = [(r, c) for r in range(rows) for c in range(columns) if mask[r, c]]
    rest = [(rows - 1, columns - 1)] * (mask.numel() - len(places))

    def number(r: int, c: int) -> int:
        texts = [token != PAD for token in ids[r]]
        rules = {COLUMNS: c, ATTENDED: int(mask[r, :c].sum()), TEXT: PAD + (sum(texts[: c + 1]) if texts[c] else 0)}
        return rules.get(rule, positions[r][c])

    expected_labels, expected_positions = [], []
    for r, c in places:
        expected_positions.append(number(r, c))
        at = c + 1 if shifted else c
        expected_labels.append(labels[r][at] if at < columns else IGNORED)
    expected_labels += [IGNORED] * len(rest)
    if shifted:  # where the model's own shift finds each beside its token
        expected_labels = [IGNORED, *expected_labels[:-1]]
    of_rest = {COLUMNS: columns - 1, ATTENDED: 0, TEXT: PAD}.get(rule, positions[-1][-1])

    given = tokens if rule == "given" else tokens._replace(positions=None)
    form = Form(NOWHERE if rule == "given" else rule, PAD, shifted)
    packed = pack_tokens(count_tokens(mask, tokens.labels, shifted), mask, given, form, rows)
    sources = [r * columns + c for r, c in [*places, *rest]]
    assert packed.source.tolist() == sources
    found = packed.tokens
    assert found.ids is not None
    assert found.types is not None
    assert found.labels is not None
    assert found.ids.tolist() == [ids[r][c] for r, c in [*places, *rest]]
    assert found.types.tolist() == [types[r][c] for r, c in [*places, *rest]]
    assert found.labels.tolist() == expected_labels
    if rule == NOWHERE:
        assert found.positions is None
    else:
        assert found.positions is not None
        assert found.positions.tolist() == expected_positions + [of_rest] * len(rest)


def test_what_was_not_given_is_not_packed(batch: tuple[Tensor, Tokens]) -> None:
    """Without ids RoBERTa's positions are its columns, and those of one row are every row's."""
    mask, tokens = batch
    numbers = count_tokens(mask, None, False)
    source, _, found = pack_tokens(numbers, mask, Tokens(), Form(TEXT, PAD), mask.shape[0])
    assert found[:3] == (None, None, None)
    assert found.positions is not None
    assert torch.equal(found.positions, source % mask.shape[1] + PAD + 1)
    assert tokens.positions is not None
    for row in (tokens.positions[:1], tokens.positions[0]):
        found = pack_tokens(numbers, mask, Tokens(positions=row), Form(), mask.shape[0]).tokens
        assert found.positions is not None
        assert torch.equal(found.positions, tokens.positions[0][source % mask.shape[1]])


@pytest.mark.parametrize("lengths", [1, COARSE, 64])
@pytest.mark.parametrize("tokens", [1, 15, 16, 1000, 1023, 1024, 1700])
def test_offsets(tokens: int, lengths: int) -> None:
    """Of the rows, then of pieces up to the packed length that the host computes."""
    mask = torch.zeros(2, 1024, dtype=torch.bool)
    mask.view(-1)[:tokens] = True
    packed = pack_tokens(count_tokens(mask, None, False), mask, Tokens(), Form(lengths=lengths), 11)
    pieces = [min(tokens + k * LONGEST_PIECE, bucket(tokens, lengths)) for k in range(1, 10)]
    assert packed.offsets.dtype == torch.int32
    assert packed.offsets.tolist() == [0, min(tokens, 1024), tokens, *pieces]


def test_errors() -> None:
    mask = torch.ones(2, 3)
    numbers = count_tokens(mask, None, False)
    with pytest.raises(ConfigError, match=r"mask: received shape \[0, 3\]"):
        count_tokens(mask[:0], None, False)
    with pytest.raises(ConfigError, match="labels: received shape"):
        count_tokens(mask, torch.ones(3, 3), False)
    with pytest.raises(ConfigError, match=r"ids: is on meta.*ids\.to\(mask\.device\)"):
        pack_tokens(numbers, mask, Tokens(torch.ones(2, 3, device="meta")), Form(), 2)
    with pytest.raises(ConfigError, match="positions: received shape"):
        pack_tokens(numbers, mask, Tokens(positions=torch.ones(2)), Form(), 2)
    with pytest.raises(ConfigError, match="rule: received 'rows'"):
        pack_tokens(numbers, mask, Tokens(), Form("rows"), 2)
    with pytest.raises(ConfigError, match="lengths: received 0"):
        pack_tokens(numbers, mask, Tokens(), Form(lengths=0), 2)
    with pytest.raises(ConfigError, match="sequences: received 1"):
        pack_tokens(numbers, mask, Tokens(), Form(), 1)
    with pytest.raises(ConfigError, match="numbers: received"):
        pack_tokens(numbers.float(), mask, Tokens(), Form(), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_on_a_gpu_nothing_waits(batch: tuple[Tensor, Tokens], dtype: torch.dtype) -> None:
    """Kernels for int64, the reference for other tokens: both as on the CPU, and the host goes on."""
    mask, tokens = batch
    tokens = tokens._replace(ids=None if tokens.ids is None else tokens.ids.to(dtype))
    form, sequences = Form(TEXT, PAD, True), mask.shape[0] + 3
    expected = pack_tokens(count_tokens(mask, tokens.labels, True), mask, tokens._replace(positions=None), form, sequences)
    there = Tokens(*(None if x is None else x.cuda() for x in tokens._replace(positions=None)))
    device_mask = mask.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = pack_tokens(count_tokens(device_mask, there.labels, True), device_mask, there, form, sequences)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a.cpu(), b))
