"""The counter of dropout: the published generator, and masks of rows that are as random as they should be."""

from __future__ import annotations

import pytest
import torch

from oslo_fusion.ops.dropout import draw_rng, kept_in_rows, kept_scale, kept_threshold, philox

RNG = torch.tensor([7, 11])


def test_philox_gives_the_published_numbers() -> None:
    # Random123's known answers for philox2x32.
    known = [
        (0, 7, (0x257A3673, 0xCD26BE2A)),
        (0xFFFFFFFF, 7, (0xAB302C4D, 0x3DC9D239)),
        (0, 10, (0xFF1DAE59, 0x6CD10DF2)),
        (0xFFFFFFFF, 10, (0x2C3F628B, 0xAB4FD7AD)),
    ]
    for value, rounds, expected in known:
        word = torch.tensor(value)
        assert tuple(int(x) for x in philox(word, word, word, rounds)) == expected


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_rows_lose_their_share_everywhere(dropout: float) -> None:
    kept = kept_in_rows(RNG, dropout, (4, 256, 768)).double()
    deviation = (dropout * (1 - dropout)) ** 0.5
    assert kept.mean().item() == pytest.approx(1 - dropout, abs=5 * deviation / kept.numel() ** 0.5)
    for dims in ((0, 1), (2,)):  # of each column, each row
        share = kept.mean(dims)
        number = kept.numel() / share.numel()
        assert float((share - (1 - dropout)).abs().max()) < 5 * deviation / number**0.5
        assert share.std().item() == pytest.approx(deviation / number**0.5, rel=0.15)
    centred = kept.flatten(0, 1) - (1 - dropout)
    for shift in ((0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (2, 0), (1, 1)):  # neighbours, of one draw too
        together = (centred * centred.roll(shift, (0, 1))).mean().item() / deviation**2
        assert abs(together) < 5 / kept.numel() ** 0.5, shift


def test_a_mask_is_a_function_of_seed_offset_and_place() -> None:
    masks = [kept_in_rows(torch.tensor(rng), 0.5, (64, 64)) for rng in ([7, 11], [7, 12], [8, 11], [7 + (1 << 32), 11])]
    masks.append(kept_in_rows(torch.tensor([7, 11 + (1 << 32)]), 0.5, (64, 64)))
    for number, one in enumerate(masks):
        for other in masks[:number]:
            assert 0.4 < (one == other).double().mean() < 0.6
    assert torch.equal(kept_in_rows(RNG, 0.5, (64, 64)), masks[0])
    assert torch.equal(kept_in_rows(RNG, 0.5, (2, 5, 33)).flatten(0, 1), masks[0][:10, :33])
    assert kept_in_rows(RNG, 0.5, (0, 8)).shape == (0, 8)


def test_what_is_kept_makes_up_for_what_is_dropped() -> None:
    for dropout in (0.1, 0.3, 0.5, 0.999):
        assert kept_scale(dropout) * kept_threshold(dropout) / 65536 == pytest.approx(1, rel=1e-12)
        assert kept_scale(dropout) == pytest.approx(1 / (1 - dropout), rel=1e-2)
    assert kept_scale(0.0) == 1.0
    assert kept_scale(1 - 1e-9) > 0


def test_seeds_are_torchs() -> None:
    torch.manual_seed(3)
    first, second = draw_rng(torch.device("cpu")), draw_rng(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(draw_rng(torch.device("cpu")), first)
    assert not torch.equal(first, second)
