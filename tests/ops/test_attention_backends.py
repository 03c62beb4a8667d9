"""The vendors' kernels: what each can serve, in words; that a compiler keeps them; on a GPU that all agree under the law."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oslo_fusion.aot.backend import keep_random_numbers
from oslo_fusion.errors import ConfigError
from oslo_fusion.ops import attention_backends
from oslo_fusion.ops.attention import attention
from oslo_fusion.ops.attention_backends import (
    BACKENDS,
    CUDNN,
    EFFICIENT,
    FLASH,
    OURS,
    PACKED,
    Case,
    is_of_keys,
    obstacle,
    packed_obstacle,
    run,
    run_packed,
    torch_obstacle,
)
from oslo_fusion.testing import assert_close_to_reference

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
VENDORS = (CUDNN, FLASH, EFFICIENT)
OPERATORS = {
    CUDNN: torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    FLASH: torch.ops.aten._scaled_dot_product_flash_attention.default,
    EFFICIENT: torch.ops.aten._scaled_dot_product_efficient_attention.default,
}


@pytest.mark.parametrize(
    ("changes", "able"),
    [
        ({}, {CUDNN, FLASH, EFFICIENT}),
        ({"dtype": FP32}, {EFFICIENT}),
        ({"dtype": FP32, "training": True}, set()),
        ({"dtype": FP64}, set()),
        ({"device": "cpu"}, set()),
        ({"masked": True}, {CUDNN, EFFICIENT}),
        ({"dropout": 0.1}, {FLASH, EFFICIENT}),
        ({"dropout": 0.125}, {CUDNN, FLASH, EFFICIENT}),
        ({"dim": 44}, {FLASH}),
        ({"dim": 44, "dtype": FP32}, {EFFICIENT}),
        ({"dim": 192}, {FLASH, EFFICIENT}),
        ({"dim": 264}, {EFFICIENT}),
        ({"kv_heads": 3}, {CUDNN, FLASH, EFFICIENT}),
        ({"kv_heads": 5}, set()),
    ],
    ids=lambda given: str(given if isinstance(given, dict) else sorted(given)),  # the same in every process
)
def test_who_can_serve_what(changes: dict[str, Any], able: set[str]) -> None:
    case = Case(**{"device": "cuda", "dtype": BF16, "heads": 12, "kv_heads": 12, "dim": 64, **changes})
    reasons = {backend: obstacle(backend, case) for backend in VENDORS}
    assert {backend for backend, reason in reasons.items() if not reason} == able, reasons
    assert {obstacle(backend, case, "triton") for backend in able} <= {"kernel: triton"}


def test_reasons_name_what_is_wrong() -> None:
    case = Case("cuda", BF16, 12, 5, 64, dropout=0.1)
    assert obstacle(FLASH, case) == "12 heads of q, and 5 of k do not divide them"
    case = Case("cuda", BF16, 12, 12, 64, dropout=0.1)
    assert obstacle(CUDNN, case) == "a dropout of 0.1, no multiple of 1/16"
    assert packed_obstacle(EFFICIENT, case) == "no packed sequences"
    assert packed_obstacle(FLASH, Case("cuda", BF16, 12, 12, 44)) == "a head size of 44, no multiple of 8 (packed)"
    assert obstacle(OURS, Case("cpu", FP32, 4, 4, 8)) == "no kernel on the CPU: the extension has none for attention"
    assert obstacle(OURS, Case("cuda", FP32, 4, 4, 257)) == "a head size of 257, and its largest is 256"


def test_a_mask_of_keys_is_seen_as_one() -> None:
    k = torch.empty(2, 4, 9, 8)
    row = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    assert is_of_keys(row.expand(2, 1, 5, 9), k)
    assert is_of_keys(row, k)
    assert not is_of_keys(row.expand(2, 1, 5, 9).contiguous(), k)
    assert not is_of_keys(row[:1].expand(1, 1, 5, 9), k), "one text's for all is a mask of pairs"
    assert not is_of_keys(row.expand(2, 4, 5, 9), k)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_in_a_mask_of_pairs_is_found(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 4, 9, 8) for _ in range(3))
    keys = torch.arange(9) < torch.tensor([[6], [9]])
    pairs = keys[:, None, None, :].expand(2, 1, 9, 9).contiguous()
    if causal:
        pairs = pairs & torch.ones(9, 9, dtype=torch.bool).tril()
    given: list[Any] = []
    real = attention_backends.attention
    monkeypatch.setattr(attention_backends, "attention", lambda *a, **k: given.append(k["key_mask"]) or real(*a, **k))
    ours = run(OURS, q, k, v, scale=0.3, mask=pairs)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, pairs, scale=0.3))
    assert torch.equal(given[0], keys)
    run(OURS, q, k, v, scale=0.3, mask=pairs.expand(2, 4, 9, 9))
    assert given[1] is None, "heads may see different keys"


def on_meta(samples: int = 2, heads: int = 4, kv_heads: int = 2, tokens: int = 21, dim: int = 44) -> list[Tensor]:
    return [
        torch.empty(samples, tokens, h, dim, device="meta", dtype=BF16).transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("backend", VENDORS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_operators_and_their_gradients_are_called(backend: str, masked: bool) -> None:
    """Without a device, so without numbers: shapes, strides, the operator, and a gradient of each input."""
    if backend == FLASH and masked:
        pytest.skip("flash has no masks")
    q, k, v = on_meta(dim=48)
    mask = torch.empty(2, 1, 21, 21, device="meta", dtype=torch.bool) if masked else None
    out = run(backend, q, k, v, scale=0.3, causal=not masked, mask=mask, dropout=0.125)
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous(), "as the projection after it reads it"
    assert OPERATORS[backend].name().split("::_")[1].split(".")[0].replace("_", "") in type(out.grad_fn).__name__.lower()
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_flash_pads_odd_head_sizes_and_packs() -> None:
    q, k, v = on_meta(dim=44)
    assert run(FLASH, q, k, v, scale=0.3).shape == q.shape
    q, k, v = (x[0].transpose(0, 1) for x in on_meta(dim=48))
    offsets = torch.empty(4, device="meta", dtype=torch.int32)
    out = run_packed(FLASH, q, k, v, offsets, offsets, (9, 9), scale=0.3, causal=True, window=5, dropout=0.1)
    assert (out.shape, type(out.grad_fn).__name__) == (q.shape, "FlashAttentionBackward0")
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_a_caller_may_name_the_kernel() -> None:
    q, k, v = on_meta(dim=48)
    for options, reason in (
        ({"kernel": "fast"}, "received 'fast'. Allowed: triton, cudnn, flash, efficient"),
        ({"kernel": FLASH}, "no kernel for meta"),
        ({"kernel": FLASH, "alibi_slopes": torch.ones(4)}, "no alibi_slopes"),
        ({"kernel": FLASH, "window": (3, 0)}, "no window but in packed sequences"),
        ({"kernel": CUDNN, "causal": True, "key_mask": torch.ones(2, 21, dtype=torch.bool)}, "causal attention has no mask"),
    ):
        with pytest.raises(ConfigError, match=re.escape(reason)):
            attention(q, k, v, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", VENDORS)
def test_a_named_kernel_on_a_gpu(backend: str) -> None:
    q, k, v = leaves(BF16, 3, 4, 4, 45, 64)
    torch.testing.assert_close(attention(q, k, v, causal=True, kernel=backend), run(backend, q, k, v, scale=0.125, causal=True))
    if backend == FLASH:
        flat, offsets = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)], torch.arange(4, device="cuda").int() * 45
        out = attention(*flat, cu_seqlens_q=offsets, max_seqlen_q=45, causal=True, kernel=backend)
        torch.testing.assert_close(out.unflatten(0, (3, 45)).transpose(1, 2), run(backend, q, k, v, scale=0.125, causal=True))


@pytest.mark.parametrize("target", [*OPERATORS.values(), torch.ops.aten._flash_attention_forward.default])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_they_draw_is_kept_for_the_backward(target: Any, dropout: float) -> None:
    """A recomputed dropout would be another one."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    names = [argument.name for argument in target._schema.arguments]
    given = [dropout if name == "dropout_p" else x for name in names[: names.index("dropout_p") + 1]]
    node = graph.call_function(target, tuple(given))
    keep_random_numbers(graph)
    assert ("recompute" in node.meta) == (dropout > 0)


# --- on a GPU ----------------------------------------------------------------------------------------------------------------


def leaves(dtype: torch.dtype, samples: int, heads: int, kv_heads: int, tokens: int, dim: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(samples, tokens, h, dim, device="cuda").to(dtype).transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Eager code that rounds as autocast's would: matmuls in the dtype, softmax in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).to(torch.promote_types(q.dtype, FP32)) * scale
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], device=q.device, dtype=torch.bool).tril()[None, None]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    p = torch.softmax(scores, -1)
    if mask is not None:
        p = p.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return p.to(q.dtype) @ v


def assert_law(ours: Any, theirs: Any, inputs: list[Tensor]) -> None:
    """Output and gradients of one function against another, which is also the truth in float64."""
    torch.manual_seed(1)
    weight = torch.randn_like(inputs[0])
    results = []
    for function, dtype in ((ours, None), (theirs, None), (theirs, FP64)):
        given = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        out = function(*given)
        results.append((out, *torch.autograd.grad(out, given, weight.to(out.dtype))))
    for name, mine, same, truth in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        assert_close_to_reference(mine, same, truth, name)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
@pytest.mark.parametrize("kind", ["plain", "causal", "keys", "pairs", "grouped", "odd"])
def test_all_agree(backend: str, dtype: torch.dtype, kind: str) -> None:
    samples, heads, tokens, dim = 3, 4, 45, 44 if kind == "odd" else 64
    kv_heads = 2 if kind == "grouped" else heads
    causal = kind in ("causal", "grouped")
    token = torch.arange(tokens, device="cuda")
    lengths = torch.tensor([45, 31, 7], device="cuda")
    mask = None
    if kind == "keys":
        mask = (token < lengths[:, None])[:, None, None].expand(samples, 1, tokens, tokens)
    if kind == "pairs":  # padded on the left: rows that see nothing
        mask = (token >= tokens - lengths[:, None])[:, None, None] & (token[:, None] >= token)
    case = Case("cuda", dtype, heads, kv_heads, dim, causal, 0.0, mask is not None, True)
    reason = obstacle(backend, case) or torch_obstacle(backend, case, torch.device("cuda"))
    if reason:
        pytest.skip(f"{backend}: {reason}")
    inputs, scale = leaves(dtype, samples, heads, kv_heads, tokens, dim), 0.2
    assert_law(
        lambda q, k, v: run(backend, q, k, v, scale=scale, causal=causal, mask=mask),
        lambda q, k, v: expected(q, k, v, mask, causal, scale),
        inputs,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", PACKED)
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 7), (False, 5)])
def test_packed_agree(backend: str, dtype: torch.dtype, causal: bool, window: int | None) -> None:
    lengths = torch.tensor([45, 1, 31, 128, 7], device="cuda")
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    tokens = int(offsets[-1])
    token = torch.arange(tokens, device="cuda")
    number = torch.bucketize(token, offsets[1:].long(), right=True)
    distance = token[:, None] - token
    seen = number[:, None] == number
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window

    def ours(*given: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in given)
        out = run_packed(backend, q, k, v, offsets, offsets, (128, 128), scale=0.2, causal=causal, window=window)
        return out.transpose(0, 1)[None]

    assert_law(ours, lambda q, k, v: expected(q, k, v, seen[None, None], False, 0.2), leaves(dtype, 1, 4, 2, tokens, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_drops_its_share_and_the_same_in_the_backward(backend: str, packed: bool) -> None:
    """Values of ones and equal scores: an output is the share that was kept, and so is the sum of what reaches the values."""
    dropout = 0.125
    if packed and backend not in PACKED:
        pytest.skip(f"{backend}: no packed sequences")
    case = Case("cuda", FP16, 4, 4, 64, False, dropout, False, True)
    reason = obstacle(backend, case) or torch_obstacle(backend, case, torch.device("cuda"))
    if reason:
        pytest.skip(f"{backend}: {reason}")
    q, k = (torch.zeros(8, 256, 4, 64, device="cuda", dtype=FP16) for _ in range(2))
    v = torch.ones(8, 256, 4, 64, device="cuda", dtype=FP16, requires_grad=True)

    def function() -> Tensor:
        if not packed:
            return run(backend, *(x.transpose(1, 2) for x in (q, k, v)), scale=1.0, dropout=dropout).transpose(1, 2)
        offsets = torch.arange(9, device="cuda", dtype=torch.int32) * 256
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        return run_packed(backend, *flat, offsets, offsets, (256, 256), scale=1.0, dropout=dropout).unflatten(0, (8, 256))

    out = function()
    kept = out.detach().double()[..., 0] * (1 - dropout)  # the share of 256 keys
    deviation = (dropout * (1 - dropout) / kept.numel() / 256) ** 0.5
    assert float(kept.mean()) == pytest.approx(1 - dropout, abs=6 * deviation + 2**-11)  # and its rounding
    spread = (dropout * (1 - dropout) / 256) ** 0.5
    assert float(kept.std()) == pytest.approx(spread, rel=0.1)
    weight = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, weight)
    # Both are the same sum over the elements that were kept, but for the rounding of each output; another mask is far off.
    left, right = dv.double().sum(), (weight.double() * out.detach().double()).sum()
    assert float(left) == pytest.approx(float(right), rel=0, abs=3 * float(weight.double().norm()) * 2**-11)
    assert not torch.equal(function(), out), "another call, another mask"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", VENDORS)
def test_inductor_keeps_the_operator(backend: str) -> None:
    """With dropout, forward and backward: one call of the vendor's kernel each."""
    inputs = leaves(BF16, 4, 4, 4, 128, 64)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.gelu(run(backend, q, k, v, scale=0.125, dropout=0.125))

    from torch._inductor.utils import run_fw_bw_and_get_code

    _, codes = run_fw_bw_and_get_code(lambda: torch.compile(function)(*inputs))
    name = OPERATORS[backend].name().removeprefix("aten::")
    assert sum(code.count(f"{name}.default(") for code in codes) == 1
    assert sum(code.count(f"{name}_backward.default(") for code in codes) == 1
