"""The benchmark of gated products without a GPU: its checks run, and a wrong product is not timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import glu


def test_every_provider_is_checked_on_the_cpu(capsys):
    glu.main(["--dry"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(glu.OPS) * len(glu.DTYPES) * len(glu.DRY_SHAPES)
    assert all("checked module, ours" in line for line in lines)


@pytest.mark.parametrize("op", list(glu.OPS))
def test_a_wrong_product_is_red(op):
    calls = glu.providers(op, compiled=False)
    right = calls["ours"]
    calls["ours"] = lambda *tensors: right(*tensors) * 1.01
    with pytest.raises(AssertionError, match=f"{op} 32 .*, output"):
        glu.check(op, calls, 32, torch.float32, torch.device("cpu"))


def test_all_widths_of_the_issue_are_in_the_table():
    assert {768, 1024, 2048, 4096, 8192, 16384, 14336, 4097} <= {width for _, _, width in glu.SHAPES}


def test_rows_read_as_people_read_them():
    head = glu.row("swiglu", "forward", 4, 8, torch.bfloat16)
    measured = {
        "device_us": {"module": 2.0, "ours": 1.0},
        "host_us": {},
        "percent_of_copy": {"ours": 90.0},
        "against_best_peer": 2.0,
    }
    assert "ours  90.0% of copy, ×2.00 of the best peer" in glu.line({**head, **measured})
    swept = {"chosen": "GluBlocks(a)", "chosen_us": 2.0, "chosen_percent_of_copy": 80.0, "all": {"GluBlocks(b)": 1.5}}
    assert "2.0 µs  80.0% (a)  best 1.5 (b)" in glu.line({**head, **swept})
