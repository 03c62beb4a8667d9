"""The kernels of attention: under the law against eager code, on a GPU or interpreted; and compiled for absent GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops import attention as op
from oslo_fusion.ops.attention_cases import ATTENTION_CASES, AttentionCase, eager_attention
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.probe import compare
from oslo_fusion.triton import attention as kernels
from oslo_fusion.triton.attention import (
    AttentionBlocks,
    BackwardBlocks,
    backward_blocks,
    forward_blocks,
    near_distances,
    padded_dim,
    table_parts,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RESULTS = ("result", "dq", "dk", "dv", "dtable")


@pytest.mark.timeout(900)  # two and a half minutes on a shared core
def test_this_file_interpreted(rerun_interpreted: Callable[[], None]) -> None:
    rerun_interpreted()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that a launcher allocates is full of NaN, so that a number that was not written is seen."""

    def full(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", full)


def cut(monkeypatch: pytest.MonkeyPatch, forward: AttentionBlocks, backward: BackwardBlocks) -> None:
    monkeypatch.setattr(kernels, "forward_blocks", lambda *_: forward)
    monkeypatch.setattr(kernels, "backward_blocks", lambda *_: backward)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of few queries and keys, of unequal sides, so that short sequences have several, near and far."""
    wide = AttentionBlocks(32, 16, 4, 2)
    backward = BackwardBlocks(wide, AttentionBlocks(16, 16, 4, 2), wide)
    cut(monkeypatch, AttentionBlocks(16, 32, 4, 2), backward)


def launch(case: AttentionCase, device: torch.device) -> Callable[..., Tensor]:
    """Kernels and their gradient, as eager code reaches them on a GPU."""
    options = case.options(device)

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        result: Tensor = op._Attention.apply(*op.prepare(q, k, v, bias_table=table, **options))
        return result

    return call


def results(call: Callable[..., Tensor], draws: list[list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """The result and its gradients, of all draws in one tensor each."""
    columns = []
    for number, tensors in enumerate(draws):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        y = call(*leaves)
        g = drawer(draws[0][0].dtype, y.device, 100 + number)(*y.shape).to(dtype)
        columns.append([y, *torch.autograd.grad(y, leaves, g)])
    return [torch.cat([x.flatten() for x in column]) for column in zip(*columns, strict=True)]


def check(case: AttentionCase, dtype: torch.dtype, device: torch.device, draws: int, name: str) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates bfloat16 where a GPU rounds")
    given = [case.tensors(drawer(dtype, device, seed)) for seed in range(draws)]
    eager = eager_attention(case)
    columns = results(launch(case, device), given, dtype), results(eager, given, dtype), results(eager, given, torch.float64)
    for what, ours, theirs, truth in zip(RESULTS, *columns, strict=False):
        rounding = max(case.rounding(tensors) for tensors in given)
        if truth.abs().max() <= 1e-6 * rounding:  # zero but for rounding, in float64 too
            assert ours.abs().max() <= rounding, f"{name} {dtype}, {what}: {ours.abs().max()} of {rounding}"
        else:
            comparison = compare(ours, theirs, truth)
            assert comparison.same, f"{name} {dtype}, {what}: {comparison}"


@pytest.fixture
def dot_as_on_a_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """k qᵀ to the bit what q kᵀ is: on a GPU both are the same sum in the same order, and numpy rounds them differently."""
    if device.type == "cuda":
        return
    from triton.runtime import interpreter

    def dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        product = a.data.astype("float64") @ b.data.astype("float64")
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


FLOAT32 = ("one token", "causal, queries before the keys", "grouped", "head size 1", "a mask, T5 decoder")


@pytest.mark.usefixtures("poisoned", "small", "dot_as_on_a_gpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(ATTENTION_CASES))
def test_the_law_holds(name: str, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and dtype == torch.float32 and name not in FLOAT32:
        pytest.skip("interpreted, float32 is judged in a few cases")
    check(ATTENTION_CASES[name], dtype, device, 3, name)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("what", ["plain", "causal", "padded", "a mask", "grouped, causal"])
@pytest.mark.parametrize("tokens", [1, 16, 31, 100])
def test_the_law_holds_for_short_texts(
    tokens: int, what: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu" and (tokens == 100 or what == "a mask"):
        pytest.skip("interpreted, larger tiles are judged by others")
    options: dict[str, Any] = {
        "plain": {},
        "causal": {"causal": True},
        "padded": {"padding": "right"},
        "a mask": {"mask_sizes": (2, 1, tokens)},
        "grouped, causal": {"heads": 4, "causal": True},
    }[what]
    case = AttentionCase(queries=tokens, keys=tokens, dim=64, **options)
    chosen = forward_blocks(64, 2, SHARED["sm_90"], major=9, tokens=tokens)
    backward = backward_blocks(64, 2, SHARED["sm_90"]) if device.type == "cuda" else BackwardBlocks(*[chosen] * 3)
    cut(monkeypatch, chosen, backward)
    check(case, dtype, device, 3, f"{what}, {tokens} tokens")


@pytest.mark.parametrize(("case", "longest"), [(AttentionCase(queries=3, keys=17), 17), (AttentionCase(packed=(5, 19)), 19)])
def test_the_longest_sequence_chooses_the_tile(
    case: AttentionCase, longest: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(kernels, "forward_blocks", lambda *given: asked.append(given) or AttentionBlocks(16, 16, 4, 1))
    launch(case, device)(*case.tensors(drawer(torch.float16, device)))
    assert [given[-1] for given in asked] == [longest]


def test_short_texts_have_tiles_of_their_own() -> None:
    tiles = [forward_blocks(64, 2, SHARED["sm_90"], major=9, tokens=tokens) for tokens in (1, 16, 17, 32, 33, 256, 257)]
    assert [tile.queries for tile in tiles] == [16, 16, 32, 32, 64, 64, 128]
    assert {forward_blocks(128, 2, SHARED["sm_90"], major=9, tokens=tokens).queries for tokens in (16, 1024)} == {128}
    assert forward_blocks(64, 2, SHARED["sm_90"], True, 9, tokens=16) == forward_blocks(64, 2, SHARED["sm_90"], True, 9)
    assert forward_blocks(64, 2, SHARED["sm_80"], major=8, tokens=16) == forward_blocks(64, 2, SHARED["sm_80"], major=8)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["plain", "T5 decoder", "packed with everything", "head size 80", "dropout, causal, grouped"])
def test_the_law_holds_in_tiles_of_the_heuristic(name: str, device: torch.device) -> None:
    check(ATTENTION_CASES[name], torch.float16, device, 2, name)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("length", [1, 17, 33, 100])
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
def test_lengths_and_head_sizes(dim: int, length: int, device: torch.device) -> None:
    # Of one key with dropout the gradient is a difference of two rounded numbers that are equal.
    dropout = 0.1 if length > 1 else 0.0
    case = AttentionCase(1, 2, 2, length, length, dim, True, scale=1.0, dropout=dropout, table="decoder", padding="left")
    check(case, torch.float16, device, 2, f"{length}×{dim}")


WHOLE_CASES = {
    "encoder, dropout": AttentionCase(batch=1, queries=64, keys=64, scale=1.0, table="encoder", dropout=0.1),
    "queries before the keys": AttentionCase(batch=1, queries=32, keys=64, causal=True, table="decoder"),
    "shifted by half a tile": AttentionCase(batch=1, queries=32, keys=48, table="encoder"),
    "padded, grouped": AttentionCase(batch=3, heads=2, kv_heads=1, queries=32, keys=32, padding="left", dropout=0.1),
}


@pytest.mark.usefixtures("poisoned", "small")
@pytest.mark.parametrize("name", list(WHOLE_CASES))
def test_tiles_that_lie_inside(name: str, device: torch.device) -> None:
    """Loads have no masks there."""
    check(WHOLE_CASES[name], torch.float16, device, 2, name)


@pytest.mark.usefixtures("poisoned", "small")
def test_a_batch_larger_than_a_grid(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = AttentionCase(batch=3, queries=20, keys=20, table="encoder", padding="right", dropout=0.1)
    at_once = results(launch(case, device), [case.tensors(drawer(torch.float16, device))], torch.float16)
    monkeypatch.setattr(kernels, "_MOST_BATCHES", 2)
    for split, whole in zip(
        results(launch(case, device), [case.tensors(drawer(torch.float16, device))], torch.float16), at_once, strict=True
    ):
        assert torch.equal(split, whole)


@pytest.mark.gpu
def test_a_batch_larger_than_a_grid_on_a_gpu() -> None:
    case = AttentionCase(batch=65_600, heads=1, kv_heads=1, queries=3, keys=3, dim=16, dropout=0.1)
    q, k, v = case.tensors(drawer(torch.float16, "cuda"))
    y = launch(case, torch.device("cuda"))(q, k, v)
    assert y[-70:].isfinite().all()
    assert y[-70:].any(dim=-1).float().mean() > 0.9
    free = AttentionCase(**{**case.__dict__, "dropout": 0.0})
    last = [t[-70:] for t in (q, k, v)]
    theirs, truth = eager_attention(free)(*last), eager_attention(free)(*(t.double() for t in last))
    comparison = compare(launch(free, torch.device("cuda"))(q, k, v)[-70:], theirs, truth)
    assert comparison.same, comparison


LARGE = {
    "T5-base encoder": AttentionCase(heads=12, kv_heads=12, dim=64, scale=1.0, table="encoder", buckets=32, max_distance=128),
    "T5-base decoder": AttentionCase(
        heads=12, kv_heads=12, dim=64, scale=1.0, table="decoder", causal=True, buckets=32, max_distance=128, dropout=0.1
    ),
    "BERT": AttentionCase(heads=12, kv_heads=12, dim=64, dropout=0.1, padding="right", batch=3),
    "grouped": AttentionCase(heads=8, kv_heads=2, dim=128, causal=True),
    "window": AttentionCase(heads=4, kv_heads=4, dim=96, causal=True, window=(200, None), padding="left"),
    "holes": AttentionCase(heads=4, kv_heads=4, dim=80, padding="holes", slopes=True),
    "wide": AttentionCase(heads=2, kv_heads=2, dim=256, table="encoder", buckets=32, max_distance=128),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [333, 512, 1000, 2048])
@pytest.mark.parametrize("name", list(LARGE))
def test_the_law_holds_for_long_sequences(name: str, length: int, dtype: torch.dtype) -> None:
    case = LARGE[name]
    check(AttentionCase(**{**case.__dict__, "queries": length, "keys": length}), dtype, torch.device("cuda"), 1, name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_of_all_lengths(dtype: torch.dtype) -> None:
    case = AttentionCase(packed=(333, 1, 1000, 64, 17), heads=4, kv_heads=4, dim=64, table="encoder", dropout=0.1)
    check(case, dtype, torch.device("cuda"), 1, "packed")


@pytest.mark.gpu
def test_16384_tokens_fit_into_the_memory_of_inputs_and_outputs() -> None:
    case = AttentionCase(1, 12, 12, 16384, 16384, 64, scale=1.0, table="encoder", buckets=32, max_distance=128)
    leaves = [t.requires_grad_() for t in case.tensors(drawer(torch.bfloat16, "cuda"))]
    call = launch(case, torch.device("cuda"))
    call(*leaves).sum().backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(*leaves).sum().backward()
    taken = torch.cuda.max_memory_allocated() - before
    size = leaves[0].numel() * 2
    assert taken < 8 * size + (32 << 20)  # result, its gradient twice, three gradients; sums, and tiles of the table's


@pytest.mark.usefixtures("small")
def test_backward_is_the_same_every_time(device: torch.device) -> None:
    case = ATTENTION_CASES["T5 with dropout"]
    leaves = [t.detach().requires_grad_() for t in case.tensors(drawer(torch.float16, device))]
    runs = []
    for _ in range(2):
        y = launch(case, device)(*leaves)
        runs.append((y, *torch.autograd.grad(y.float().square().sum(), leaves)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("small")
def test_forward_and_backward_drop_the_same(device: torch.device) -> None:
    # With v the identity the result is the dropped probabilities themselves, and dv those summed over queries.
    case = AttentionCase(batch=1, heads=1, kv_heads=1, queries=64, keys=64, dim=64, dropout=0.3)
    q, k, _ = case.tensors(drawer(torch.float32, device))
    v = torch.eye(64, device=device)[None, None].clone().requires_grad_()
    p = launch(case, device)(q, k, v)
    rng = case.options(device)["rng"]
    assert torch.equal(p[0, 0] != 0, op.kept_elements(rng, 0.3, 1, 1, 64, 64)[0, 0])
    dv = torch.autograd.grad(p, v, torch.ones_like(p))[0]
    torch.testing.assert_close(dv[0, 0], p[0, 0].sum(0)[:, None].expand(64, 64).detach())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("queries", [40, 45])
def test_the_mask_does_not_depend_on_the_tiles(queries: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # 45 queries of 50 keys: tiles of the table's kernel then begin at keys that are no multiple of 16.
    case = AttentionCase(queries=queries, keys=50, table="encoder", dropout=0.4)
    leaves = [t.detach().requires_grad_() for t in case.tensors(drawer(torch.float32, device))]
    runs = []
    for tile in (AttentionBlocks(16, 16, 4, 1), AttentionBlocks(64, 32, 4, 1)):
        cut(monkeypatch, tile, BackwardBlocks(AttentionBlocks(tile.keys, tile.queries, 4, 1), tile, tile))
        y = launch(case, device)(*leaves)
        runs.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y) + y.detach())))
    for first, second in zip(*runs, strict=True):
        torch.testing.assert_close(first, second, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("poisoned", "small")
@pytest.mark.parametrize(("queries", "dtype"), [(37, torch.float16), (50, torch.float32)])
def test_bias_read_in_pairs_is_the_bias(
    queries: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the instruction reads it, two neighbours at once, distances odd and even: interpreted, bit for bit as single loads.

    On a GPU the logarithm is another besides: there each is judged for itself, and the next test has one logarithm for both.
    """
    case = AttentionCase(queries=queries, keys=50, table="encoder", buckets=8, max_distance=20)
    leaves = [t.detach().requires_grad_() for t in case.tensors(drawer(dtype, device))]
    runs = []
    for how in (0, -1):
        monkeypatch.setattr(kernels, "_reads_by_instruction", lambda _, how=how: how)
        if device.type == "cuda":
            check(case, dtype, device, 3, f"read {how}")
            continue
        y = launch(case, device)(*leaves)
        runs.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y) + y.detach())))
    for first, second in zip(*runs, strict=False):
        assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tile", [(64, 64, 4, 2), (128, 64, 8, 2), (64, 128, 4, 2), (32, 64, 4, 2), (64, 64, 8, 2), (16, 32, 4, 1)]
)
def test_bias_read_in_pairs_by_the_instruction(tile: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    device, blocks = torch.device("cuda"), AttentionBlocks(*tile)
    case = AttentionCase(queries=333, keys=400, dim=64, scale=0.5, table="encoder", buckets=32, max_distance=128)
    q, k, v, table = case.tensors(drawer(torch.bfloat16, device))
    arguments = op.prepare(q, k, v, bias_table=table, **case.options(device))
    cut(monkeypatch, blocks, BackwardBlocks(blocks, blocks, blocks))
    runs, state = [], ()
    for how in (0, torch.cuda.get_device_capability()[0]):
        monkeypatch.setattr(kernels, "_reads_by_instruction", lambda _, how=how: how)
        out, *found = kernels.launch_attention(*arguments)
        state = state or (out, *found)  # one logarithm for both: the instruction's is another
        runs.append((out, *kernels.launch_attention_backward(q, q, k, v, *state, *arguments[3:], True)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("poisoned", "small")
def test_strides_of_all_kinds(device: torch.device) -> None:
    draw = drawer(torch.float32, device)
    packed = draw(2, 20, 3, 2, 24)
    strided = [packed[:, :, number].transpose(1, 2)[..., 3:19] for number in range(3)]
    expanded = [x[:1].expand(2, -1, -1, -1) for x in strided]
    every_other = [draw(2, 2, 20, 32)[..., ::2] for _ in range(3)]
    contiguous = [draw(2, 2, 20, 16) for _ in range(3)]
    for q, k, v in (strided, expanded, every_other, contiguous):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        dense = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k, v)]
        ours = op._Attention.apply(*op.prepare(*leaves, causal=True))
        theirs = op.attention_reference(*op.prepare(*dense, causal=True))[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        for g in (torch.ones((), device=device).expand(ours.shape), draw(2, 2, 16, 20).transpose(2, 3)):
            gradients = torch.autograd.grad(ours, leaves, g, retain_graph=True)
            arguments = op.prepare(*dense, causal=True)
            found = op.attention_reference(*arguments)
            expected = op.attention_backward_reference(g, *arguments[:3], *found, *arguments[3:], False)
            for a, b in zip(gradients, expected, strict=False):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("poisoned", "small")
@pytest.mark.parametrize(("dim", "packed"), [(33, None), (16, (9, 1, 20))])
def test_gradients_written_beside_one_another(dim: int, packed: tuple[int, ...] | None, device: torch.device) -> None:
    case = AttentionCase(2, 4, 2, 20, 20, dim, causal=True, dropout=0.1, packed=packed)
    leaves = [t.requires_grad_() for t in case.tensors(drawer(torch.float16, device))]
    arguments = list(op.prepare(*leaves, **case.options(str(device))))
    q, k, v = arguments[:3] = [t.detach() for t in leaves]
    state = kernels.launch_attention(*arguments)
    given = (drawer(torch.float16, device)(*q.shape), q, k, v, *state, *arguments[3:], False)
    *apart, _ = kernels.launch_attention_backward(*given)
    joined, gradients = op.new_joined(q, k)
    kernels.launch_attention_backward(*given, gradients=gradients)
    assert torch.equal(joined, torch.cat([x if packed else x.transpose(1, 2) for x in apart], dim=-2))


@pytest.mark.usefixtures("poisoned", "small")
def test_masks_of_all_strides(device: torch.device) -> None:
    """A view of a larger mask, one expanded, one whose keys lie apart: as their copies."""
    draw = drawer(torch.float16, device)
    leaves = [draw(2, 3, 20, 16).requires_grad_() for _ in range(3)]
    large = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)).to(device) > 0.4
    masks = [large[:, :, 7:27, 11:31], large[:, :1, :20, :20].transpose(2, 3), large[:1, :1, :1, :20].expand(2, 3, 20, 20)]
    for mask in masks:
        runs = []
        for given in (mask, mask.clone(memory_format=torch.contiguous_format)):
            y = op._Attention.apply(*op.prepare(*leaves, mask=given))
            runs.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y) + y.detach())))
        for first, second in zip(*runs, strict=True):
            assert torch.equal(first, second)


def test_lengths_on_a_gpu_never_lead_out_of_memory(device: torch.device) -> None:
    q, k, v = (drawer(torch.float32, device)(6, 1, 16) for _ in range(3))
    offsets = torch.tensor([0, 4, 99, -3], dtype=torch.int32, device=device)
    extras = op.Extras(None, None, None, None, None, offsets, offsets, None)
    options = op.Options(1.0, -1, -1, True, 128, 0.0, 64, 64)
    if device.type == "cpu":
        with pytest.raises(ConfigError, match=r"cu_seqlens_q: received \[0, 4, 99, -3\]"):
            kernels.launch_attention(q, k, v, *extras, *options)
        return
    out, *_ = kernels.launch_attention(q, k, v, *extras, *options)
    fixed = torch.tensor([0, 4, 6], dtype=torch.int32, device=device)
    expected, *_ = kernels.launch_attention(q, k, v, *extras._replace(q_offsets=fixed, k_offsets=fixed), *options)
    assert torch.equal(out, expected)


@pytest.mark.usefixtures("poisoned", "small")
def test_what_is_rounded_away_makes_the_gradient_exact_where_keys_are_alike(device: torch.device) -> None:
    """As in the last layers of T5's decoder, where ``dp`` and what is subtracted from it are nearly one number."""
    draw = drawer(torch.float16, device)
    q, dout = draw(1, 2, 48, 32), draw(1, 2, 48, 32) / 8 + draw(1, 2, 1, 32)
    k, v = (draw(1, 2, 48, 32) / 2 + 3 * draw(1, 2, 1, 32) for _ in range(2))
    assert op.prepare(q.clone().requires_grad_(), k, v)[-1], "a call with a gradient keeps it"
    assert not op.prepare(q, k, v)[-1]
    arguments = (*op.prepare(q, k, v, causal=True, scale=0.05)[:-1], True)
    out, sums, rest, kept = kernels.launch_attention(*arguments)
    assert rest.dtype == out.dtype
    wide = [x.detach().double() for x in (q, k, v)]
    truth, *_ = op.attention_backward_reference(dout.double(), *wide, out, sums, rest, kept, *arguments[3:], False)
    errors = []
    for given in (rest, rest.new_empty(0)):
        dq, *_ = kernels.launch_attention_backward(dout, *arguments[:3], out, sums, given, kept, *arguments[3:], False)
        errors.append((dq.double() - truth).norm() / truth.norm())
    assert errors[0] < errors[1] / 3, errors


KEPT = ("T5 with dropout", "T5 with dropout, unaligned", "dropout, causal, grouped", "packed with everything")


@pytest.mark.usefixtures("poisoned", "small")
@pytest.mark.parametrize("name", KEPT)
def test_what_dropout_kept_is_written_as_the_reference_does(name: str, device: torch.device) -> None:
    """Where a probability is not zero; elsewhere nothing has to be written."""
    case = ATTENTION_CASES[name]
    tensors = case.tensors(drawer(torch.float16, device))
    arguments = op.prepare(*tensors[:3], bias_table=tensors[3] if case.table else None, **case.options(device))
    arguments = (*arguments[:-1], True)
    extras, options, _ = op.split(arguments[3:])
    ours, theirs = kernels.launch_attention(*arguments)[3], op.attention_reference(*arguments)[3]
    assert ours.shape == theirs.shape
    for part in op._parts(extras):
        qs, ks = (
            op._take(x, tokens, torch.float32, x.dim() == 3)
            for x, tokens in ((tensors[0], part.queries), (tensors[1], part.keys))
        )
        ks = ks.repeat_interleave(qs.shape[1] // ks.shape[1], 1)
        seen = op.pack_kept(op._probabilities(qs, ks, part.number, extras, options).p > 0)
        if extras.q_offsets is not None:
            first = part.queries.start // 64 + part.number
            both = (x[None, :, : seen.shape[2], first : first + seen.shape[3]] for x in (ours, theirs))
        else:
            both = iter((ours, theirs))
        found, expected = (x & seen for x in both)
        assert expected.any()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (70, 130)])
def test_kept_bits_lie_where_they_are_said_to_lie(shape: tuple[int, int]) -> None:
    kept = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0)) < 0.5
    words = op.pack_kept(kept)
    i, j = torch.arange(shape[0])[:, None], torch.arange(shape[1])[None, :]
    place = i % 64 // 16 * 32 + j % 8 // 2 * 8 + i % 8
    bit = j % 64 // 8 * 4 + j % 2 * 2 + i % 16 // 8
    assert torch.equal((words[:, :, j // 64, i // 64, place] >> bit) & 1 == 1, kept)


def test_launchers_check_first(device: torch.device) -> None:
    q = torch.zeros(1, 2, 5, 8, device=device)
    with pytest.raises(ConfigError, match="k: received 3 heads"):
        kernels.launch_attention(*op.prepare(q, *(torch.zeros(1, 3, 5, 8, device=device),) * 2))
    arguments = op.prepare(q, q, q, dropout=-0.5)
    with pytest.raises(ConfigError, match=r"dropout: received -0\.5"):
        kernels.launch_attention_backward(q, *arguments[:3], q, q[..., 0], *(q.new_empty(0),) * 2, *arguments[3:], False)
    arguments = op.prepare(q, q, q, dropout=0.5)
    with pytest.raises(ConfigError, match=r"kept: received shape \[0\].*\[1, 2, 1, 1, 128\].*keep=True in the forward"):
        kernels.launch_attention_backward(q, *arguments[:3], q, q[..., 0], *(q.new_empty(0),) * 2, *arguments[3:], False)


def test_what_is_far() -> None:
    assert near_distances(True, 32, 128) == (92, 92)
    assert near_distances(False, 32, 128) == (114, 0)
    for bidirectional, buckets, most in ((True, 8, 9), (False, 8, 9), (True, 64, 500)):
        left, right = near_distances(bidirectional, buckets, most)
        distances = torch.arange(-2 * most, 2 * most + 1)
        names = op.relative_position_bucket(distances, bidirectional, buckets, most)
        assert len(names[distances <= -left].unique()) == 1
        assert len(names[distances >= right].unique()) == 1


def test_tiles_of_the_heuristic() -> None:
    assert [padded_dim(dim) for dim in (1, 16, 17, 80, 96, 128, 256)] == [16, 16, 32, 128, 128, 128, 256]
    assert backward_blocks(64, 2, SHARED["sm_90"], True, 9).keys.registers == 168
    assert backward_blocks(64, 2, SHARED["sm_90"], False, 9).keys.registers is None
    assert backward_blocks(64, 2, SHARED["sm_90"], True, 10).keys.registers is None
    assert table_parts([192, 224, 256, 224, 192], 12, 132) == (7, 37), "33 programs of a head, none far longer than the others"
    assert table_parts([2, 2, 2], 12, 132) == (2, 1)
    assert table_parts([128] * 1000, 1, 132) == (1, 128)
    assert table_parts([0, 4, 0], 1, 132) == (4, 1)
    for dim, itemsize, shared in (
        (d, i, s) for d in (16, 64, 80, 128, 256) for i in (2, 4) for s in (65_536, 166_912, 232_448)
    ):
        backward = backward_blocks(dim, itemsize, shared)
        assert backward.table.queries % backward.queries.queries == 0, "what is far is cut by blocks of queries"
        forwards = (forward_blocks(dim, itemsize, shared, table) for table in (False, True))
        for tile in (*forwards, backward.keys, backward.queries, backward.table):
            assert tile.queries % 16 == tile.keys % 16 == 0
            assert tile.queries + tile.keys <= kernels._REACH


# --- compiled for absent GPUs -----------------------------------------------------------------------------------------------

POINTERS = {
    "sums_ptr": "*fp32",
    "delta_ptr": "*fp32",
    "far_ptr": "*fp32",
    "parts_ptr": "*fp32",
    "distances_ptr": "*fp32",
    "slopes_ptr": "*fp32",
    "mask_ptr": "*i1",
    "pairs_ptr": "*i1",
    "range_ptr": "*i32",
    "q_offsets_ptr": "*i32",
    "k_offsets_ptr": "*i32",
    "rng_ptr": "*i64",
    "kept_ptr": "*i32",
    "buckets_ptr": "*i32",
    "diagonals_ptr": "*fp32",
}
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536, "gfx950": 163_840}
PLAIN: dict[str, Any] = {
    "HAS_TABLE": False,
    "HAS_SLOPES": False,
    "HAS_MASK": False,
    "HAS_PAIRS": False,
    "RANGE": 0,
    "PACKED": False,
    "HAS_LEFT": False,
    "HAS_RIGHT": False,
    "DROPOUT": False,
    "REST": False,
    "KEEP": False,
    "TABLE_GRADIENT": False,
    "DELTA": 0,
    "APART": False,
    "ALIGNED": True,
    "GROUPED": False,
    "WHOLE_QUERIES": False,
    "WHOLE_KEYS": False,
    "WHOLE": False,
}
WHOLE = {"WHOLE_QUERIES": True, "WHOLE_KEYS": True, "WHOLE": True}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, whole": {"REST": True, **WHOLE},
    "T5": {"HAS_TABLE": True, "TABLE_GRADIENT": True, "HAS_RIGHT": True, "REST": True},
    "T5 encoder": {"HAS_TABLE": True, "TABLE_GRADIENT": True, "REST": True},
    "T5 encoder, whole": {"HAS_TABLE": True, "TABLE_GRADIENT": True, "REST": True, **WHOLE},
    "T5, dropout": {"HAS_TABLE": True, "TABLE_GRADIENT": True, "REST": True, "DROPOUT": True, "KEEP": True},
    "T5, dropout, whole": {"HAS_TABLE": True, "TABLE_GRADIENT": True, "REST": True, "DROPOUT": True, "KEEP": True, **WHOLE},
    "BERT, whole": {"REST": True, "DROPOUT": True, "KEEP": True, **WHOLE},
    "everything": {
        name: 2 if name == "RANGE" else True
        for name in PLAIN
        if name not in ("HAS_SLOPES", "ALIGNED", "DELTA", "APART", *WHOLE)
    },
    "ALiBi, dropout": {"HAS_SLOPES": True, "DROPOUT": True, "KEEP": True},
    "T5, padded": {"HAS_TABLE": True, "TABLE_GRADIENT": True, "HAS_PAIRS": True},
    "sums": {"DELTA": 1, "HAS_RIGHT": True},
    "grouped": {"APART": True, "GROUPED": True, "HAS_RIGHT": True},
}
NEEDED = {
    "distances_ptr": "HAS_TABLE",
    "slopes_ptr": "HAS_SLOPES",
    "mask_ptr": "HAS_MASK",
    "pairs_ptr": "HAS_PAIRS",
    "range_ptr": "RANGE",
    "q_offsets_ptr": "PACKED",
    "k_offsets_ptr": "PACKED",
    "rng_ptr": "DROPOUT",
    "rest_ptr": "REST",
    "kept_ptr": "DROPOUT",
    "far_ptr": "TABLE_GRADIENT",
}


def compiled(kernel: Any, kind: str, dtype: str, dim: int, tile: AttentionBlocks, target: str, compile_: Any) -> Any:
    flags = {**PLAIN, **KINDS[kind]}
    constants = {**flags, "DIM": dim, "WIDTH": padded_dim(dim), "UNIT": 16}
    major = int(target[3:]) // 10 if target.startswith("sm_") else 0
    folds = dtype != "fp32" and not flags["HAS_SLOPES"] and not (flags["HAS_TABLE"] and major >= 10)
    constants |= {"ASM": major, "FOLD": folds, "CHAIN": 2 if major >= 9 and dtype != "fp32" else 0}
    constants |= {"QUERIES": tile.queries, "KEYS": tile.keys, "STAGES": tile.stages}
    constants |= {"COUNT": 32, "SPAN": 1 << (tile.queries + tile.keys - 2).bit_length()}
    constants |= {pointer: None for pointer, flag in NEEDED.items() if not flags[flag]}
    names = kernel.arg_names
    floats = ("scale", "inverse", "natural", "factor", "share")
    signature = {
        name: POINTERS.get(name, f"*{dtype}") if name.endswith("_ptr") else "fp32" if name in floats else "i32"
        for name in names
    }
    if dtype == "fp32":
        signature["sums_ptr"] = "*fp64"
    constants = {name: value for name, value in constants.items() if name in names}
    cut = {"num_warps": tile.warps, "num_stages": tile.stages, "registers": tile.registers}
    return compile_(kernel, signature, constants, **cut, targets=[target], spill_allowed=1088)[target]


@pytest.mark.parametrize("tokens", [16, 32, 256])
def test_tiles_of_short_texts_spill_nothing(tokens: int, compile_for_all_targets: Callable[..., Any]) -> None:
    tile = forward_blocks(64, 2, SHARED["sm_90"], major=9, tokens=tokens)
    for kind in ("plain", "everything"):
        built = compiled(kernels._attention_fwd_kernel, kind, "bf16", 64, tile, "sm_90", compile_for_all_targets)
        assert built.spilled == 0, f"{kind}: {built.registers} registers, {built.spilled} bytes spill"


@pytest.mark.parametrize("target", list(SHARED))
@pytest.mark.parametrize(("dtype", "dim"), [("bf16", 64), ("fp16", 80), ("bf16", 128), ("bf16", 256), ("fp32", 64)])
def test_kernels_compile_for_every_target(
    dtype: str, dim: int, target: str, compile_for_all_targets: Callable[..., Any]
) -> None:
    itemsize = 4 if dtype == "fp32" else 2
    backward = backward_blocks(dim, itemsize, SHARED[target])
    if dtype == "fp32":
        compiled(kernels._attention_dq_kernel, "sums", dtype, dim, backward.queries, target, compile_for_all_targets)
        compiled(kernels._attention_dkdv_kernel, "grouped", dtype, dim, backward.keys, target, compile_for_all_targets)
    for kind in ("T5", "everything", "ALiBi, dropout") if (dtype, dim) == ("bf16", 64) else ("everything",):
        forward = forward_blocks(dim, itemsize, SHARED[target], KINDS[kind].get("HAS_TABLE", False), 9 * (target == "sm_90"))
        for kernel, tile in (
            (kernels._attention_fwd_kernel, forward),
            (kernels._attention_dkdv_kernel, backward.keys),
            (kernels._attention_dq_kernel, backward.queries),
            *([(kernels._attention_dtable_kernel, backward.table)] if KINDS[kind].get("HAS_TABLE") else []),
        ):
            compiled(kernel, kind, dtype, dim, tile, target, compile_for_all_targets)


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "plain, whole",
        "T5",
        "T5 encoder",
        "T5 encoder, whole",
        "T5, dropout",
        "T5, dropout, whole",
        "BERT, whole",
        "T5, padded",
        "ALiBi, dropout",
    ],
)
def test_nothing_spills_and_nothing_is_sorted_on_the_way(kind: str, compile_for_all_targets: Callable[..., Any]) -> None:
    """On an H200's kind of GPU at T5's and BERT's head size: bias and random mask are made where they are needed."""
    bare = kind.startswith("T5 encoder")
    with_dropout, pairs = (KINDS[kind].get(name, False) for name in ("DROPOUT", "HAS_PAIRS"))
    backward = backward_blocks(64, 2, SHARED["sm_90"], bare, 9, with_dropout, pairs)
    flags = KINDS[kind]
    forward = forward_blocks(64, 2, SHARED["sm_90"], flags.get("HAS_TABLE", False), 9, flags.get("DROPOUT", False))
    for kernel, tile, allowed in (
        (kernels._attention_fwd_kernel, forward, 0),
        (kernels._attention_dkdv_kernel, backward.keys, 160 if bare else 128),  # up to 40 where registers are not limited
        (kernels._attention_dq_kernel, backward.queries, 64),
    ):
        plain = compiled(kernel, "plain", "bf16", 64, replace(tile, registers=None), "sm_90", compile_for_all_targets)
        built = compiled(kernel, kind, "bf16", 64, tile, "sm_90", compile_for_all_targets)
        assert built.spilled <= allowed, f"{kernel.__name__}: {built.registers} registers, {built.spilled} bytes spill"
        assert built.shared <= plain.shared + 2048, "a tile goes through shared memory"
        waits, matmuls = built.count("WARPGROUP.DEPBAR", "HGMMA")
        assert waits < matmuls, f"{kernel.__name__}: {waits} waits for {matmuls} matmuls, ptxas lets none overlap"
        _, waits, rest = built.assembly.partition("griddepcontrol.wait")
        assert waits
        assert built.assembly.count("ld.global.v2.f32") == rest.count("ld.global.v2.f32"), "reads the bias before it is there"
        assert built.assembly.count("st.global") == rest.count("st.global")
    if KINDS[kind].get("HAS_TABLE"):
        built = compiled(kernels._attention_dtable_kernel, kind, "bf16", 64, backward.table, "sm_90", compile_for_all_targets)
        allowed = 128 if KINDS[kind].get("HAS_PAIRS") else 16 if bare else 0  # 22 of 255 registers, once a tile of 128×128
        assert built.spilled <= allowed, f"{built.registers} registers, {built.spilled} bytes spill"


def test_other_kernels_compile_for_every_target(compile_for_all_targets: Callable[..., Any]) -> None:
    signature = {
        "table_ptr": "*bf16",
        "buckets_ptr": "*i32",
        "distances_ptr": "*fp32",
        "factor": "fp32",
        "heads": "i32",
        "width": "i32",
    }
    compile_for_all_targets(kernels._attention_distances_kernel, signature, {"BLOCK": 512, "CHAIN": 0})
    signature = {"mask_ptr": "*i1", "range_ptr": "*i32", "keys": "i32", "batch_stride": "i32", "key_stride": "i32"}
    compile_for_all_targets(kernels._attention_range_kernel, signature, {"BLOCK": 1024})
    signature = {"diagonals_ptr": "*fp32", "far_ptr": "*fp32", "buckets_ptr": "*i32", "dtable_ptr": "*bf16"}
    signature |= dict.fromkeys(("heads", "batches", "blocks", "tiles", "reach"), "i32")
    constants: dict[str, Any] = {"CHAIN": 0, "BUCKETS": 32, "COUNT": 32, "ROWS": 16, "FAR": 1024}
    compile_for_all_targets(kernels._attention_dtable_sum_kernel, signature, constants, num_warps=8)


def test_the_law_is_not_met_by_a_wrong_bias(device: torch.device) -> None:
    case = ATTENTION_CASES["T5 decoder"]
    tensors = case.tensors(drawer(torch.float32, device))
    other = AttentionCase(**{**case.__dict__, "max_distance": 12})
    exact = eager_attention(case)(*(t.double() for t in tensors))
    assert not compare(launch(other, device)(*tensors), eager_attention(case)(*tensors), exact).same
