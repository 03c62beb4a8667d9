"""The kernels of linear_cross_entropy: against the reference on a GPU or interpreted; and compiled for absent GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops import linear_cross_entropy as op
from oslo_fusion.ops.linear_cross_entropy import Options, Sums, Wanted
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.testing import assert_close_to_reference
from oslo_fusion.triton import linear_cross_entropy as kernels
from oslo_fusion.triton.linear_cross_entropy import LossBlocks, chunk_rows, loss_blocks, padded_width, rest_columns

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = LossBlocks(columns=32, warps=4)
"""Several blocks to a row."""

OPTIONS = {
    "plain": Options(-100, 0.0, 0.0, 1.0, True, False),
    "smoothed": Options(-100, 0.1, 0.0, 1.0, True, False),
    "capped": Options(-100, 0.0, 2.0, 1.0, True, False),
    "everything": Options(3, 0.2, 5.0, 0.5, True, True),
    "half sums": Options(-100, 0.0, 0.0, 1.0, False, False),
}


def test_this_file_interpreted(rerun_interpreted: Callable[[], None]) -> None:
    rerun_interpreted()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that a launcher allocates is full of NaN, so that a number that was not written is seen."""
    empty = torch.empty

    def full_of_nan(shape: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(shape, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", full_of_nan)


def inputs(dtype: torch.dtype, device: torch.device, seed: int, vocab: int, with_bias: bool) -> tuple[Any, ...]:
    draw = drawer(dtype, device, seed)
    labels = torch.randint(0, vocab, (2, 7), generator=torch.Generator().manual_seed(seed))
    labels[0, 1:4] = labels[1, 6] = -100
    labels[1, 0], labels[1, 1] = 0, vocab - 1
    return draw(2, 7, 16), draw(vocab, 16) * 0.4, labels.to(device), draw(vocab) if with_bias else None


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize(("vocab", "with_bias"), [(77, True), (64, False), (1, False)])
def test_the_law_holds(options: str, vocab: int, with_bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates bfloat16 where a GPU rounds")
    # A bias is added after logits were rounded, not before: an error of the same size, and under a cap not the same one.
    with_bias = with_bias and options != "capped"
    chosen, wanted = OPTIONS[options], Wanted(True, True, with_bias)
    draws: list[list[Sums]] = []
    for seed in range(16):  # a loss is one number: of a few, the largest error is a matter of luck
        hidden, weight, labels, bias = inputs(dtype, device, seed, vocab, with_bias)
        labels = torch.where(labels == -100, chosen.ignore_index, labels)
        if chosen.ignore_index == 3 and vocab == 1:
            labels[labels != 3] = 0
        given = (labels, bias, *chosen, *wanted)
        exact = (labels, None if bias is None else bias.double(), *chosen, *wanted)
        draws.append(
            [
                Sums(*kernels.launch_linear_cross_entropy(hidden, weight, *given, rows_per_chunk=5, blocks=SMALL)),
                Sums(*op.linear_cross_entropy_reference(hidden, weight, *given)),
                Sums(*op.linear_cross_entropy_reference(hidden.double(), weight.double(), *exact)),
            ]
        )
    for name in Sums._fields:
        ours, theirs, truth = (torch.cat([getattr(results[way], name).flatten() for results in draws]) for way in range(3))
        assert [getattr(r[0], name).shape for r in draws] == [getattr(r[1], name).shape for r in draws]
        if vocab > 1:
            assert_close_to_reference(ours, theirs, truth, f"{options}, {vocab}, {name}")
        elif name != "rows":  # one word: nothing is to be learned, but for rounding
            assert float(ours.abs().max() if ours.numel() else 0.0) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_and_blocks_of_the_heuristics(dtype: torch.dtype, device: torch.device) -> None:
    hidden, weight, labels, bias = inputs(dtype, device, 0, 77, True)
    given = (hidden, weight, labels, bias, *OPTIONS["smoothed"], *Wanted(True, True, True))
    for whole, cut in zip(
        kernels.launch_linear_cross_entropy(*given),
        kernels.launch_linear_cross_entropy(*given, rows_per_chunk=3, blocks=SMALL),
        strict=True,
    ):
        torch.testing.assert_close(whole, cut, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
def test_only_what_is_wanted_is_computed(device: torch.device) -> None:
    hidden, weight, labels, bias = inputs(torch.float32, device, 0, 77, True)
    full = Sums(*kernels.launch_linear_cross_entropy(hidden, weight, labels, bias, *OPTIONS["plain"], True, True, True))
    for wanted in (
        Wanted(False, False, False),
        Wanted(True, False, False),
        Wanted(False, True, False),
        Wanted(False, False, True),
    ):
        some = Sums(*kernels.launch_linear_cross_entropy(hidden, weight, labels, bias, *OPTIONS["plain"], *wanted))
        assert torch.equal(some.loss, full.loss)
        for name, is_wanted in wanted._asdict().items():
            ours, theirs = getattr(some, f"d{name}"), getattr(full, f"d{name}")
            assert torch.equal(ours, theirs) if is_wanted else ours.numel() == 0


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("compact", [False, True])
def test_rows_without_a_label(compact: bool, device: torch.device) -> None:
    hidden, weight, labels, bias = inputs(torch.bfloat16, device, 0, 77, True)
    options = OPTIONS["plain"]._replace(compact=compact)
    sums = Sums(*kernels.launch_linear_cross_entropy(hidden, weight, labels, bias, *options, True, True, True))
    assert not sums.dhidden[labels == -100].any()
    none = torch.full_like(labels, -100)
    for result in kernels.launch_linear_cross_entropy(hidden, weight, none, bias, *options, True, True, True):
        assert not result.any()


@pytest.mark.usefixtures("poisoned")
def test_labels_that_were_counted_before_give_the_same(device: torch.device) -> None:
    hidden, weight, labels, bias = inputs(torch.float32, device, 0, 77, True)
    options = OPTIONS["plain"]._replace(compact=True)
    for given in (labels, torch.full_like(labels, -100), labels.masked_fill(labels == -100, 3)):
        counted = op.LabelCount(given)
        assert counted.number == int((given != -100).sum())
        plain = kernels.launch_linear_cross_entropy(hidden, weight, given, bias, *options, True, True, True)
        ours = kernels.launch_linear_cross_entropy(hidden, weight, given, bias, *options, True, True, True, counted=counted)
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a, b)


def test_a_count_is_of_its_labels_alone(device: torch.device) -> None:
    labels = torch.randint(0, 7, (4, 6), device=device)
    counted = op.LabelCount(labels)
    assert counted.is_of(labels.view(-1), -100)
    assert not counted.is_of(labels, 0)
    assert not counted.is_of(labels[1:], -100)
    assert not counted.is_of(labels.clone(), -100)
    assert not counted.is_of(labels.t(), -100)
    labels[0, 0] = -100
    assert not counted.is_of(labels, -100)


def test_a_count_begins_when_it_is_told_to(device: torch.device) -> None:
    labels = torch.randint(0, 7, (4, 6), device=device)
    labels[1] = -100
    counted = op.LabelCount(labels)
    assert counted._number is None
    counted.start()
    first = counted._number
    counted.start()
    assert counted._number is first
    assert counted.number == 18


@pytest.mark.gpu
def test_labels_are_counted_after_what_makes_them_and_beside_what_follows() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    op.LabelCount(torch.zeros(64, 512, dtype=torch.int64, device="cuda")).start()  # a first launch may wait for the device
    for step in range(50):
        torch.cuda._sleep(2_000_000)  # the count must not read before this has passed and the labels are there
        labels = torch.where(torch.rand(64, 512, device="cuda") < (step + 1) / 60, step, -100)
        expected = (labels != -100).sum()
        counted = op.LabelCount(labels)
        torch.cuda._sleep(100_000_000)  # about 0.05 s, for which the count must not wait
        after = torch.cuda.Event()
        after.record()
        counted.start()
        number = counted.number
        assert not after.query()
        assert number == int(expected)


def test_the_lowest_maximum_loses_nothing_to_rounding() -> None:
    """One instruction multiplies and adds: what the other product lost to rounding stays, and is a power of two here."""
    lowest, log2e = (torch.tensor(value.value, dtype=torch.float32) for value in (kernels._LOWEST, kernels._LOG2E))
    assert (lowest * log2e).double() == lowest.double() * log2e.double()
    assert lowest < torch.finfo(torch.float16).min


def test_strided_inputs_and_forbidden_words(device: torch.device) -> None:
    hidden, weight, labels, bias = inputs(torch.float32, device, 0, 77, True)
    bias[:40] = -float("inf")
    bias[labels[labels >= 0]] = 0.5
    strided = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.cat([weight, weight], 1)[:, :16]
    given = (labels, bias, *OPTIONS["plain"], True, True, True)
    ours = kernels.launch_linear_cross_entropy(strided, wide, *given, blocks=SMALL)
    for a, b in zip(ours, op.linear_cross_entropy_reference(hidden, weight, *given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.isfinite().all()


def test_an_fp32_weight_under_half_hidden(device: torch.device) -> None:
    hidden, weight, labels, _ = inputs(torch.float32, device, 0, 77, False)
    for wide in (True, False):
        given = (labels, None, *OPTIONS["plain"]._replace(wide=wide), True, True, False)
        ours = Sums(*kernels.launch_linear_cross_entropy(hidden.bfloat16(), weight, *given))
        theirs = Sums(*op.linear_cross_entropy_reference(hidden.bfloat16(), weight, *given))
        assert ours.dweight.dtype == theirs.dweight.dtype == torch.float32
        torch.testing.assert_close(ours.dweight, theirs.dweight, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (64, 96), (0, 4)])
def test_scaling(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    d, factor = drawer(torch.float32, device)(*shape), torch.tensor(0.25, device=device)
    expected = (d * factor).to(dtype)
    result = kernels.launch_scale(d.clone(), factor, dtype)
    torch.testing.assert_close(result, expected, rtol=torch.finfo(dtype).eps, atol=0)
    kept = d.clone()
    assert kernels.launch_scale(kept, factor, torch.float32) is kept
    assert torch.equal(kept, d * factor)
    assert torch.equal(kernels.launch_scale(kept, torch.ones((), device=device), torch.float32), d * factor)


def test_the_eager_function_hands_its_gradients_over_once(device: torch.device) -> None:
    hidden, weight, labels, bias = inputs(torch.float32, device, 0, 77, True)
    results = []
    for eager in (True, False):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        if eager:
            loss, count = op._Loss.apply(leaves[0], leaves[1], labels, leaves[2], OPTIONS["smoothed"], None)
            loss = loss / count
        else:
            loss = op.linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], label_smoothing=0.1)
        results.append([loss, *torch.autograd.grad(loss * 3, leaves, retain_graph=True)])
        if eager:
            with pytest.raises(RuntimeError, match="backward ran already"):
                torch.autograd.grad(loss, leaves)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_launchers_check_first(device: torch.device) -> None:
    hidden, weight, labels, _ = inputs(torch.float32, device, 0, 77, False)
    with pytest.raises(ConfigError, match="labels: received shape"):
        kernels.launch_linear_cross_entropy(hidden, weight, labels[0], None, *OPTIONS["plain"], True, True, False)
    options = OPTIONS["plain"]._replace(label_smoothing=-1.0)
    with pytest.raises(ConfigError, match="label_smoothing"):
        kernels.launch_linear_cross_entropy(hidden, weight, labels, None, *options, True, True, False)
    if device.type == "cpu":
        with pytest.raises(ConfigError, match="labels: received 76"):
            kernels.launch_linear_cross_entropy(hidden, weight[:76], labels, None, *OPTIONS["plain"], True, True, False)


@pytest.mark.parametrize(
    ("rows", "dim", "vocab"), [(16384, 2048, 128256), (16384, 768, 50257), (5000, 768, 30522), (7, 64, 512)]
)
@pytest.mark.parametrize("wide", [True, False])
def test_chunks_are_even_and_bounded(rows: int, dim: int, vocab: int, wide: bool) -> None:
    chunk = chunk_rows(rows, dim, vocab, 2, wide)
    size = chunk * padded_width(vocab) * 2
    assert 1 <= chunk <= rows
    assert size <= max(vocab * dim * 2 // (1 if wide else 4), (256 if wide else 64) << 20)
    assert chunk == rows or chunk % 128 == 0
    assert rows - (-(-rows // chunk) - 1) * chunk > chunk - 128 * -(-rows // chunk)  # the last one is not a rest


def test_chunks_of_the_goal() -> None:
    assert chunk_rows(16384, 2048, 128256, 2, True) == 2048
    assert chunk_rows(16384, 2048, 128256, 2, False) == 512
    assert chunk_rows(0, 2048, 128256, 2, True) == 1
    assert [loss_blocks(128256, most) for most in (32, 16)] == [LossBlocks(8192, 32), LossBlocks(8192, 16)]
    assert loss_blocks(50257) == LossBlocks(4096, 16)
    assert loss_blocks(512) == LossBlocks(512, 4)
    assert [padded_width(n) for n in (1, 64, 50257)] == [64, 64, 50304]
    assert [rest_columns(n, 4096) for n in (1, 4096, 4097, 50257, 128256)] == [64, 0, 64, 2048, 2048]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("vocab", [30522, 50257, 128256])
@pytest.mark.parametrize("special", [False, True])
def test_kernels_compile_for_every_target(
    vocab: int, dtype: str, special: bool, compile_for_all_targets: Callable[..., Any]
) -> None:
    signature = {"logits_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}", "labels_ptr": "*i64", "losses_ptr": "*fp32"}
    signature |= {"ignore_index": "i32"}
    shape = {"VOCAB": vocab, "WIDTH": padded_width(vocab), "GRADIENT": True, "HAS_BIAS": special}
    options = {"SMOOTHING": 0.1 if special else 0.0, "CAP": 30.0 if special else 0.0, "SCALE": 0.5 if special else 1.0}
    absent = {} if special else {"bias_ptr": None}
    built = {}
    for most_warps, targets in ((16, ("gfx942", "gfx950")), (32, ("sm_80", "sm_90", "sm_100"))):
        blocks = loss_blocks(vocab, most_warps)
        cut = {"BLOCK": blocks.columns, "REST": rest_columns(vocab, blocks.columns)}
        # With all options a few scalars wait in memory while a row is read.
        built |= compile_for_all_targets(
            kernels._loss_kernel,
            signature,
            {**shape, **cut, **options, **absent},
            num_warps=blocks.warps,
            num_stages=3,
            targets=targets,
            spill_allowed=64 if special else 32,
        )
    reads = re.findall(r"ld\.global\S*\.v4\.b32", built["sm_90"].assembly)
    itemsize = 2 if dtype == "bf16" else 4
    assert len(reads) >= 2 * blocks.columns * itemsize // (16 * 32 * blocks.warps), "a row is not read 16 bytes at a time"
    assert re.search(r"st\.global\S*\.v4", built["sm_90"].assembly)


@pytest.mark.parametrize(("source", "result"), [("fp32", "bf16"), ("bf16", "bf16")])
def test_scaling_compiles_for_every_target(source: str, result: str, compile_for_all_targets: Callable[..., Any]) -> None:
    signature = {"d_ptr": f"*{source}", "factor_ptr": "*fp32", "result_ptr": f"*{result}", "num_units": "i32"}
    constants = {"UNIT": 16, "IN_PLACE": source == result, "BLOCK": 4096}
    built = compile_for_all_targets(kernels._scale_kernel, signature, constants, num_warps=8, num_stages=3)
    assert re.search(r"ld\.global\S*\.v4", built["sm_90"].assembly)
