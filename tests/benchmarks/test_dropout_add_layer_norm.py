"""The benchmark of post-norm sublayers' ends without a GPU: its checks run, and a wrong kernel is not timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import dropout_add_layer_norm as bench
from oslo_fusion.triton.rows import RowBlocks


def test_every_provider_is_checked_on_the_cpu(capsys):
    bench.main(["--dry"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(bench.DTYPES) * len(bench.DRY_SHAPES)
    assert all(line.endswith("checked module, ours") for line in lines)


def test_a_wrong_kernel_is_red():
    with pytest.raises(AssertionError, match=r"dropout_add_layer_norm 32 .*, output"):
        bench.check(lambda *inputs, **rng: bench.ours(*inputs, **rng) * 1.01, 32, torch.float32, torch.device("cpu"))


def test_the_peers_bias_gets_the_gradient_of_a_linears():
    x, residual = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    vectors = [torch.randn(8, requires_grad=True) for _ in range(3)]
    theirs = torch.autograd.grad(bench.module(x, residual, *vectors, 0.0).square().sum(), [x, *vectors])
    vectors[0].data.zero_()  # which the matmul has added already
    mine = torch.autograd.grad(bench.ours(x, residual, *vectors, 0.0).square().sum(), [x, *vectors])
    for a, b in zip(theirs, mine, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_sweep_holds_what_was_chosen_and_what_fits():
    for mode, programs in (("training forward", 0), ("backward", 396)):
        chosen = RowBlocks(2, 1024, 4, programs, 3 if programs else 1)
        tiles = bench.candidates(chosen, mode, 132)
        assert chosen in tiles
        assert 8 < len(tiles) < 200
        assert len({bench._short(tile) for tile in tiles}) == len(tiles)


def test_rows_read_as_people_read_them():
    head = bench.row("forward", 4, 8, torch.bfloat16)
    measured = {
        "device_us": {"module": 2.0, "ours": 1.0},
        "host_us": {},
        "percent_of_copy": {"ours": 90.0},
        "against_best_peer": 2.0,
    }
    assert "ours  90.0% of copy, ×2.00 of the best peer" in bench.line({**head, **measured})
    swept = {"chosen": "a", "chosen_us": 2.0, "chosen_percent_of_copy": 80.0, "all": {"b": 1.5}}
    assert "2.0 µs  80.0% (a)  best 1.5 (b)" in bench.line({**head, **swept})
