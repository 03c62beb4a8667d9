"""The meaning of attention: what eager code, torch's own and transformers' T5 compute, under the law, and clear errors."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops import attention as op
from oslo_fusion.ops.attention import ATTENTION, attention, kept_elements, relative_position_bucket
from oslo_fusion.ops.attention_cases import ATTENTION_CASES, AttentionCase, eager_attention
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.probe import prove

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
RNG = torch.tensor([7, 11])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(ATTENTION_CASES))
def test_the_law_holds(name: str, dtype: torch.dtype, device: str) -> None:
    case = ATTENTION_CASES[name]
    options, eager = case.options(device), eager_attention(case)

    def ours(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        return attention(q, k, v, bias_table=table, **options)

    draws = [case.tensors(drawer(dtype, device, seed)) for seed in range(8)]
    for what, comparison in zip(("result", "dq", "dk", "dv", "dtable"), prove(ours, eager, *draws), strict=False):
        if name == "one token" and what in ("dq", "dk"):  # zero but for rounding
            assert comparison.ours <= max(case.rounding(tensors) for tensors in draws), f"{what}: {comparison}"
        else:
            assert comparison.same, f"{name}, {what}: {comparison}"


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 9), (64, 512)])
def test_buckets_are_those_of_t5(buckets: int, max_distance: int, bidirectional: bool) -> None:
    distance = torch.arange(-600, 600)
    expected = T5Attention._relative_position_bucket(distance, bidirectional, buckets, max_distance)
    assert torch.equal(relative_position_bucket(distance, bidirectional, buckets, max_distance), expected)


@pytest.mark.parametrize("decoder", [False, True])
def test_it_is_what_t5_computes(decoder: bool) -> None:
    config = T5Config(d_model=32, d_kv=8, num_heads=4, is_decoder=decoder, attn_implementation="eager")
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0, is_causal=decoder).double().eval()
    x = torch.randn(2, 200, 32, dtype=torch.float64)
    mask = torch.full((200, 200), float("-inf"), dtype=x.dtype).triu(1)[None, None] if decoder else None
    q, k, v = (p(x).view(2, 200, 4, 8).transpose(1, 2) for p in (layer.q, layer.k, layer.v))
    table = layer.relative_attention_bias.weight
    ours = attention(q, k, v, scale=1.0, causal=decoder, bias_table=table, bidirectional=not decoder)
    theirs = layer(x, mask=mask)[0]
    torch.testing.assert_close(layer.o(ours.transpose(1, 2).reshape(2, 200, 32)), theirs)


def test_rows_without_a_key_are_zero_as_in_torch() -> None:
    q, k, v = (torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True] * 5, [False] * 5])
    ours = attention(q, k, v, key_mask=mask)
    theirs = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :].expand(2, 2, 5, 5))
    torch.testing.assert_close(ours, theirs)
    assert not ours[1].any()
    for gradient in torch.autograd.grad(ours.sum(), (q, k, v)):
        assert not gradient[1].any()


def test_packed_sequences_are_as_alone() -> None:
    draw, lengths = drawer(torch.float64), (9, 1, 30)
    q, k, v = (draw(40, 2, 8) for _ in range(3))
    table = draw(8, 2)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    together = attention(q, k, v, bias_table=table, max_distance=9, cu_seqlens_q=offsets, causal=True)
    alone = [
        attention(*(x.transpose(0, 1)[None] for x in part), bias_table=table, max_distance=9, causal=True)[0].transpose(0, 1)
        for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_drops_its_share_everywhere(dropout: float) -> None:
    kept = kept_elements(RNG, dropout, 4, 8, 128, 256).double()
    assert kept.mean().item() == pytest.approx(1 - dropout, abs=5 * (dropout * (1 - dropout) / kept.numel()) ** 0.5)
    deviation = (dropout * (1 - dropout)) ** 0.5
    for dims in ((0, 1, 2), (0, 1, 3), (2, 3)):  # of each key, each query, each head
        share = kept.mean(dims)
        number = kept.numel() / share.numel()
        assert float((share - (1 - dropout)).abs().max()) < 5 * deviation / number**0.5
        assert share.std().item() == pytest.approx(deviation / number**0.5, rel=0.35)
    centred = kept - (1 - dropout)
    for shift in ((0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 0, 8), (0, 0, 8, 0), (0, 1, 0, 0), (1, 0, 0, 0)):
        together = (centred * centred.roll(shift, (0, 1, 2, 3))).mean().item() / deviation**2
        assert abs(together) < 5 / kept.numel() ** 0.5


def test_dropout_is_new_with_each_seed_and_offset_and_off_at_zero() -> None:
    masks = [kept_elements(torch.tensor(rng), 0.5, 1, 1, 64, 64) for rng in ([7, 11], [7, 12], [8, 11], [7 + (1 << 32), 11])]
    masks.append(kept_elements(torch.tensor([7, 11 + (1 << 32)]), 0.5, 1, 1, 64, 64))
    for number, one in enumerate(masks):
        for other in masks[:number]:
            assert 0.4 < (one == other).double().mean() < 0.6
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    assert torch.equal(attention(q, k, v, dropout=0.0, rng=RNG), attention(q, k, v))
    assert not torch.equal(attention(q, k, v, dropout=0.5), attention(q, k, v, dropout=0.5))
    torch.manual_seed(3)
    first = attention(q, k, v, dropout=0.5)
    torch.manual_seed(3)
    assert torch.equal(attention(q, k, v, dropout=0.5), first)


def test_gradients_in_double_and_no_second_one() -> None:
    draw = drawer(torch.float64)
    leaves = [draw(1, 4, 6, 4), draw(1, 2, 9, 4), draw(1, 2, 9, 4), draw(8, 4)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def result(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attention(q, k, v, bias_table=table, max_distance=9, bidirectional=False, causal=True, dropout=0.3, rng=RNG)

    assert torch.autograd.gradcheck(result, leaves)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(result(*leaves).sum(), leaves, create_graph=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name", ["causal, a cache before", "T5 with dropout", "lengths", "packed", "ALiBi", "holes", "a mask, T5 decoder"]
)
def test_the_operator_passes_opcheck(name: str, device: str) -> None:
    case = ATTENTION_CASES[name]
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [t.requires_grad_() for t in case.tensors(drawer(dtype, device))]
        options = case.options(device) | ({"bias_table": tensors[3]} if case.table else {})
        torch.library.opcheck(ATTENTION, op.prepare(*tensors[:3], **options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["T5 with dropout", "packed", "grouped"])
def test_joined_gradients_are_the_three_beside_one_another(name: str, device: str) -> None:
    case = {**ATTENTION_CASES, "grouped": AttentionCase(heads=4, causal=True, dropout=0.1)}[name]
    tensors = [t.requires_grad_() for t in case.tensors(drawer(torch.bfloat16, device))]
    table = {"bias_table": tensors[3]} if case.table else {}
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in op.prepare(*tensors[:3], **case.options(device), **table)]
    out, *state = ATTENTION(*arguments)
    given = (drawer(torch.bfloat16, device)(*out.shape), *arguments[:3], out, *state, *arguments[3:], case.table is not None)
    *apart, dtable = op.ATTENTION_BACKWARD(*given)
    joined, also_dtable = op.ATTENTION_BACKWARD_JOINED(*given)
    rows = [x if case.packed else x.transpose(1, 2) for x in apart]
    assert joined.is_contiguous()
    assert torch.equal(joined, torch.cat(rows, dim=-2))
    assert torch.equal(dtable, also_dtable)
    torch.library.opcheck(op.ATTENTION_BACKWARD_JOINED, given)


def test_joined_gradients_are_of_as_many_queries_as_keys() -> None:
    arguments = op.prepare(Z(1, 2, 5, 8), Z(1, 2, 7, 8), Z(1, 2, 7, 8))
    with pytest.raises(ConfigError, match=r"k: received 7 keys. Allowed: 5, as many as queries"):
        op.ATTENTION_BACKWARD_JOINED(arguments[0], *arguments[:3], *op.attention_reference(*arguments), *arguments[3:], False)


def test_torch_compile_takes_it_whole() -> None:
    case = AttentionCase(table="encoder", padding="right")
    leaves, options = [t.requires_grad_() for t in case.tensors(drawer(torch.float32))], case.options("cpu")

    def result(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attention(q * 2, k, v, bias_table=table, **options).square().sum()

    compiled = torch.compile(result, fullgraph=True, backend="aot_eager")
    expected, got = result(*leaves), compiled(*leaves)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_rounds_the_inputs(device: str) -> None:
    q, k, v = (torch.randn(1, 2, 9, 16, device=device, requires_grad=True) for _ in range(3))
    with torch.autocast(device, dtype=torch.bfloat16):
        result = attention(q, k, v)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, attention(*(x.bfloat16() for x in (q, k, v))))
    assert torch.autograd.grad(result.float().sum(), q)[0].dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_do(device: str) -> None:
    for queries, keys, batch in ((0, 4, 2), (4, 0, 2), (4, 4, 0)):
        q = torch.randn(batch, 2, queries, 8, device=device, requires_grad=True)
        k, v = (torch.randn(batch, 2, keys, 8, device=device, requires_grad=True) for _ in range(2))
        result = attention(q, k, v)
        assert result.shape == q.shape
        assert not result.any()
        for gradient in torch.autograd.grad(result.sum(), (q, k, v)):
            assert not gradient.any()


Z = torch.zeros
OFFSETS = torch.tensor([0, 2, 6], dtype=torch.int32)
PACKED = {"q": Z(6, 2, 8), "k": Z(6, 2, 8), "v": Z(6, 2, 8), "cu_seqlens_q": OFFSETS}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"q": Z(1, 2, 5, 8, dtype=torch.int64)}, "q: received dtype torch.int64"),
    ({"q": Z(2, 5, 8)}, "q: received shape [2, 5, 8]. Allowed: [batch, heads, queries, dim] without cu_seqlens"),
    ({"q": Z(1, 2, 5, 512)}, "q: received a head size of 512. Allowed: 1 to 256"),
    ({"k": Z(1, 2, 5, 9)}, "k: received shape [1, 2, 5, 9]. Allowed: [1, kv_heads, keys, 8]"),
    ({"k": Z(1, 3, 5, 8), "v": Z(1, 3, 5, 8)}, "k: received 3 heads. Allowed: a divisor of 2"),
    ({"v": Z(1, 2, 4, 8)}, "v: received shape [1, 2, 4, 8]. Allowed: [1, 2, 5, 8]"),
    ({"v": Z(1, 2, 5, 8).half()}, "v: received dtype torch.float16. Allowed: torch.float32"),
    ({"k": Z(1, 2, 5, 8, device="meta")}, "k: received a tensor on meta"),
    ({"scale": float("nan")}, "scale: received nan"),
    ({"window": (-3, 0)}, "window: received (-3, 0)"),
    ({"dropout": 1.0}, "dropout: received 1.0"),
    ({"dropout": 0.1, "rng": Z(2)}, "rng: received torch.float32 [2]"),
    ({"bias_table": Z(8, 3)}, "bias_table: received torch.float32 [8, 3]. Allowed: [buckets, 2]"),
    ({"bias_table": Z(3, 2)}, "bias_table: received 3 buckets. Allowed: at least 4"),
    ({"bias_table": Z(32, 2), "max_distance": 8}, "max_distance: received 8. Allowed: more than 8"),
    ({"alibi_slopes": Z(3)}, "alibi_slopes: received torch.float32 [3]. Allowed: [2]"),
    ({"alibi_slopes": Z(2), "bias_table": Z(8, 2), "max_distance": 9}, "one of the two"),
    ({"alibi_slopes": Z(2, requires_grad=True)}, "alibi_slopes: received slopes that require a gradient"),
    ({"key_mask": Z(1, 5)}, "key_mask: received torch.float32 [1, 5]. Allowed: bool [1, 5]"),
    ({"key_mask": Z(1, 4, dtype=torch.bool)}, "key_mask: received torch.bool [1, 4]"),
    ({"key_lengths": Z(1, dtype=torch.int64)}, "key_lengths: received torch.int64 [1]. Allowed: int32 [1]"),
    ({"key_lengths": torch.tensor([6], dtype=torch.int32)}, "key_lengths: received [6]. Allowed: 0 to 5"),
    ({"key_lengths": Z(1, dtype=torch.int32), "key_mask": Z(1, 5, dtype=torch.bool)}, "one of the two"),
    ({"cu_seqlens_k": OFFSETS}, "cu_seqlens: received one of queries and keys"),
    ({**PACKED, "q": Z(1, 2, 5, 8)}, "q: received shape [1, 2, 5, 8]. Allowed: [tokens, heads, dim] with cu_seqlens"),
    ({**PACKED, "cu_seqlens_q": torch.tensor([0, 2, 5]).int()}, "cu_seqlens_q: received [0, 2, 5]. Allowed: numbers that rise"),
    ({**PACKED, "cu_seqlens_q": torch.tensor([0, 7, 6]).int()}, "cu_seqlens_q: received [0, 7, 6]"),
    ({**PACKED, "cu_seqlens_q": torch.tensor([0, 6])}, "cu_seqlens_q: received torch.int64 [2]"),
    ({**PACKED, "max_seqlen_q": 3}, "max_seqlen_q: received 3. Allowed: at least 4"),
    ({**PACKED, "key_mask": Z(1, 5, dtype=torch.bool)}, "mask, key_mask, key_lengths: received padding in packed sequences"),
    ({**PACKED, "mask": Z(1, 1, 1, 5, dtype=torch.bool)}, "mask, key_mask, key_lengths: received padding in packed sequences"),
    ({"mask": Z(1, 1, 5, 5)}, "mask: received torch.float32 [1, 1, 5, 5]. Allowed: bool [1, 2, 5, 5]"),
    ({"mask": Z(1, 1, 5, 1, dtype=torch.bool)}, "mask: received torch.bool [1, 1, 5, 1]"),
    ({"mask": Z(2, 1, 5, 5, dtype=torch.bool)}, "mask: received torch.bool [2, 1, 5, 5]"),
    ({"mask": Z(1, 5, dtype=torch.bool)}, "mask: received torch.bool [1, 5]"),
    ({"mask": Z(1, 1, 1, 5, dtype=torch.bool, device="meta")}, "mask: received a tensor on meta"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    given = {"q": Z(1, 2, 5, 8), "k": Z(1, 2, 5, 8), "v": Z(1, 2, 5, 8), **arguments}
    with pytest.raises(ConfigError) as error:
        attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    assert message in str(error.value)


def test_importing_it_imports_no_triton() -> None:
    code = "import sys, torch; before = set(sys.modules); import oslo_fusion.ops.attention; "
    code += "print({'triton', 'transformers'} & (set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
