"""no_repeat_ngram: transformers' processors bit for bit, and the same cases and the same bad input for every implementation."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import EncoderNoRepeatNGramLogitsProcessor, NoRepeatNGramLogitsProcessor

from oslo_fusion import extension
from oslo_fusion.ops import no_repeat_ngram as op

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMESPACE = torch.ops.oslo_fusion


@dataclass(frozen=True)
class Implementation:
    """Two functions of (scores, ids, source, size, sizes, length, device_length), and where their tensors lie."""

    in_place: Callable[..., None]
    functional: Callable[..., Tensor]
    device: torch.device


def _reference() -> Implementation:
    return Implementation(op.no_repeat_ngram_reference_, op.no_repeat_ngram_reference, torch.device("cpu"))


def _cpp() -> Implementation:
    if op.implementation("cpu") != "c++":
        pytest.skip(f"the extension's C++ kernel is not here: {extension.failure()}")
    return Implementation(NAMESPACE.no_repeat_ngram_.default, NAMESPACE.no_repeat_ngram.default, torch.device("cpu"))


def _triton() -> Implementation:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 as tests/triton/test_no_repeat_ngram.py sets it")
    kernels: Any = pytest.importorskip("oslo_fusion.triton.no_repeat_ngram", reason="needs triton", exc_type=ImportError)
    device = torch.device("cpu" if INTERPRETED else "cuda")
    return Implementation(kernels.launch_no_repeat_ngram_, kernels.launch_no_repeat_ngram, device)


def _cuda() -> Implementation:
    try:
        op.implementation("cuda", "cuda")
    except ImportError as error:
        pytest.skip(str(error))
    operators = NAMESPACE.no_repeat_ngram_cuda_.default, NAMESPACE.no_repeat_ngram_cuda.default
    return Implementation(*operators, torch.device("cuda"))


MAKERS = {"reference": _reference, "c++": _cpp, "triton": _triton, "cuda": _cuda}
IMPLEMENTATIONS = [
    pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" or (name == "triton" and not INTERPRETED) else name
    for name in MAKERS
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Implementation:
    return MAKERS[request.param]()


@dataclass(frozen=True)
class Case:
    """A problem: tokens are drawn from ``0 … alphabet - 1``, so that a small alphabet repeats its n-grams often."""

    rows: int = 3
    vocab: int = 37
    length: int = 40
    n: int = 2
    alphabet: int = 5
    dtype: torch.dtype = torch.float32
    ids_dtype: torch.dtype = torch.int64

    def draw(self, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, ids, and a source with half as many rows."""
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(self.rows, self.vocab, generator=generator).to(self.dtype)
        if scores.numel():
            scores[0, 0], scores[-1, -1] = float("nan"), -float("inf")
        ids = torch.randint(0, self.alphabet, (self.rows, self.length), generator=generator)
        sources = max(self.rows // 2, min(self.rows, 1)) if self.rows % 2 == 0 else min(self.rows, 1)
        source = torch.randint(0, self.alphabet, (sources, self.length + 3), generator=generator)
        return scores.to(device), ids.to(device, self.ids_dtype), source.to(device, self.ids_dtype)


CASES = {
    "as in generate": Case(rows=4, vocab=301, length=20, n=3),
    "empty text": Case(length=0),
    "one token": Case(length=1, n=1),
    "shorter than n": Case(length=2, n=3),
    "one less than n": Case(length=2, n=3, alphabet=1),
    "exactly n": Case(length=3, n=3, alphabet=1),
    "n is 1": Case(n=1),
    "n beyond the unrolled ones": Case(n=11, alphabet=1),
    "all tokens alike": Case(alphabet=1, n=4),
    "nothing repeats": Case(vocab=100_003, alphabet=100_003, n=2),
    "ids outside the vocabulary": Case(vocab=3, alphabet=9, n=2),
    "one row": Case(rows=1),
    "zero rows": Case(rows=0),
    "no vocabulary": Case(vocab=0),
    "one token of vocabulary": Case(vocab=1),
    "odd": Case(rows=7, vocab=1031, length=131),
    "beyond one block": Case(rows=2, length=1500, n=3),
    "beyond one launch": Case(rows=2, length=3000, n=3),
    "vocabulary beyond one stretch": Case(rows=2, vocab=8200, alphabet=8200, length=300, n=1),
    "vocabulary of whole units": Case(vocab=48, alphabet=48, n=1),
    "whole units beyond one stretch": Case(rows=2, vocab=4112, alphabet=4112, length=300, n=1, dtype=torch.bfloat16),
    "int32 ids": Case(ids_dtype=torch.int32),
    **{str(dtype): Case(dtype=dtype) for dtype in DTYPES},
}


def oracle(scores: Tensor, ids: Tensor, n: int, source: Tensor | None = None) -> Tensor:
    """What transformers gives, row for row, also where it would raise: for ids outside the vocabulary."""
    vocab = max(scores.shape[1], int(ids.max()) + 1 if ids.numel() else 0)
    if source is not None and source.numel():
        vocab = max(vocab, int(source.max()) + 1)
    wide = torch.zeros(scores.shape[0], vocab, dtype=scores.dtype)
    wide[:, : scores.shape[1]] = scores.cpu()
    if scores.shape[0] == 0:
        return wide[:, : scores.shape[1]]
    processor: Any = (
        NoRepeatNGramLogitsProcessor(n) if source is None else EncoderNoRepeatNGramLogitsProcessor(n, source.cpu().long())
    )
    result: Tensor = processor(ids.cpu().long(), wide)
    return result[:, : scores.shape[1]]


def bits(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view(torch.uint8)


def check(implementation: Implementation, scores: Tensor, arguments: tuple[Any, ...], expected: Tensor) -> None:
    """In place and functional give the expected bits, and the functional form leaves its input alone."""
    kept = scores.clone()
    result = implementation.functional(scores, *arguments)
    assert torch.equal(bits(result), bits(expected))
    assert torch.equal(bits(scores), bits(kept))
    assert result.is_contiguous()
    owned = scores.clone()
    implementation.in_place(owned, *arguments)
    assert torch.equal(bits(owned), bits(expected))


@pytest.mark.parametrize("name", CASES)
def test_every_case(implementation: Implementation, name: str) -> None:
    case = CASES[name]
    scores, ids, source = case.draw(implementation.device)
    n, length = case.n, case.length
    check(implementation, scores, (ids, None, n, None, length, None), oracle(scores, ids, n))
    check(implementation, scores, (ids, source, n, None, length, None), oracle(scores, ids, n, source))


@pytest.mark.parametrize(
    "name", ["as in generate", "shorter than n", "beyond one block", "zero rows", "n beyond the unrolled ones"]
)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_length_and_sizes_on_the_device(implementation: Implementation, name: str, ids_dtype: torch.dtype) -> None:
    case = CASES[name]
    scores, ids, source = case.draw(implementation.device)
    device, rows, n = implementation.device, case.rows, case.n
    # What lies behind the length must not be read: here it would ban everything.
    buffer = torch.cat([ids, ids[:, -1:].expand(-1, 25)], 1) if case.length else ids
    length = torch.tensor(case.length, device=device, dtype=ids_dtype)
    expected, encoder = oracle(scores, ids, n), oracle(scores, ids, n, source)
    check(implementation, scores, (buffer, None, n, None, 0, length), expected)
    check(implementation, scores, (buffer, source, n, None, 0, length), encoder)
    check(implementation, scores, (buffer, None, n, None, case.length, None), expected)
    sizes = torch.tensor([(n, 1, 0, -3, 2)[r % 5] for r in range(rows)], device=device, dtype=ids_dtype)
    mixed = [oracle(scores, ids, k)[r] if (k := int(sizes[r])) > 0 else scores.cpu()[r] for r in range(rows)]
    if rows:
        check(implementation, scores, (buffer, None, 0, sizes, 0, length), torch.stack(mixed))


def test_a_size_far_beyond_the_text_costs_nothing(implementation: Implementation) -> None:
    """Were its row's ending read, it would lie before the ids; were its n - 1 tokens gone through, it would take minutes."""
    scores, ids, source = Case(rows=4).draw(implementation.device)
    sizes = torch.tensor([2, 2**40, 42, 2**31], device=implementation.device)
    expected = torch.cat([oracle(scores[:1], ids[:1], 2), scores[1:].cpu()])
    check(implementation, scores, (ids, None, 0, sizes, 40, None), expected)
    encoder = torch.cat([oracle(scores[:1], ids[:1], 2, source[:1]), oracle(scores[1:], ids[1:], 50)])
    check(implementation, scores, (ids, source, 0, sizes, 40, None), encoder)


def test_a_length_on_the_device_is_clamped(implementation: Implementation) -> None:
    scores, ids, _ = Case().draw(implementation.device)
    for value, expected in ((10**9, oracle(scores, ids, 2)), (-5, scores.cpu())):
        length = torch.tensor(value, device=implementation.device)
        check(implementation, scores, (ids, None, 2, None, 0, length), expected)


def test_negative_ids_are_text_and_ban_nothing(implementation: Implementation) -> None:
    scores = torch.zeros(1, 5, device=implementation.device)
    ids = torch.tensor([[1, -1, 1, -7, 1, 2, 1]], device=implementation.device)
    expected = torch.tensor([[0, 0, -torch.inf, 0, 0]])
    check(implementation, scores, (ids, None, 2, None, 7, None), expected)
    ids = torch.tensor([[-7, 3, -7, 2**31 - 1, -7]], device=implementation.device)
    check(implementation, scores, (ids, None, 2, None, 5, None), torch.tensor([[0, 0, 0, -torch.inf, 0]]))


def test_strided_and_expanded_inputs(implementation: Implementation) -> None:
    device = implementation.device
    scores, ids, source = Case(rows=4).draw(device)
    wide = torch.zeros(4, 80, device=device)
    strided = wide[:, 3:77:2].copy_(scores)
    turned = ids.t().contiguous().t()
    arguments = (turned, source.repeat(1, 2)[:, : source.shape[1]], 2, None, ids.shape[1], None)
    check(implementation, strided, arguments, oracle(scores, ids, 2, source))
    kept = wide.clone()
    implementation.in_place(strided, ids, None, 2, None, ids.shape[1], None)
    assert torch.equal(bits(strided), bits(oracle(scores, ids, 2)))
    untouched = torch.ones(80, dtype=torch.bool, device=device)
    untouched[3:77:2] = False
    assert torch.equal(wide[:, untouched], kept[:, untouched])
    one_text, one_score = ids[:1].expand(4, -1), scores[1:2].expand(4, -1)
    result = implementation.functional(one_score, one_text, None, 2, None, ids.shape[1], None)
    assert torch.equal(bits(result), bits(oracle(one_score, one_text, 2)))
    sizes = torch.tensor(3, device=device).expand(4)
    check(implementation, scores, (one_text, None, 0, sizes, ids.shape[1], None), oracle(scores, one_text, 3))


def test_rows_of_whole_units_a_stride_apart(implementation: Implementation) -> None:
    """What divides a row's width and not its stride, or the other way round, must not be taken for a unit of both."""
    scores, ids, _ = Case(rows=4, vocab=96, alphabet=48).draw(implementation.device)
    for width, shift in ((48, 0), (48, 4), (47, 0), (40, 1)):
        part = scores[:, shift : shift + width]
        check(implementation, part, (ids, None, 1, None, ids.shape[1], None), oracle(part, ids, 1))
        wide = scores[:, : 2 * width].reshape(-1)[: 4 * (width + 1)].as_strided((4, width), (width + 1, 1))
        check(implementation, wide, (ids, None, 1, None, ids.shape[1], None), oracle(wide, ids, 1))


def test_ids_and_source_of_different_widths(implementation: Implementation) -> None:
    scores, ids, source = Case(rows=4).draw(implementation.device)
    arguments = (ids.int(), source, 2, None, ids.shape[1], None)
    check(implementation, scores, arguments, oracle(scores, ids, 2, source))


def test_source_shorter_than_n(implementation: Implementation) -> None:
    scores, ids, source = Case().draw(implementation.device)
    for width in (0, 1):
        check(implementation, scores, (ids, source[:, :width], 2, None, ids.shape[1], None), scores.cpu())


BAD = {
    "scores of one dimension": (lambda s, i: (s[0], i, None, 2, None, 40, None), "scores"),
    "scores of integers": (lambda s, i: (s.nan_to_num(0, 0, 0).int(), i, None, 2, None, 40, None), "scores"),
    "ids of one dimension": (lambda s, i: (s, i[0], None, 2, None, 40, None), "ids"),
    "ids of other rows": (lambda s, i: (s, i[:2], None, 2, None, 40, None), "ids"),
    "ids of floats": (lambda s, i: (s, i.float(), None, 2, None, 40, None), "ids"),
    "ids on another device": (lambda s, i: (s, i.to("meta"), None, 2, None, 40, None), "ids"),
    "source that does not divide": (lambda s, i: (s, i, i[:2], 2, None, 40, None), "source"),
    "source without rows": (lambda s, i: (s, i, i[:0], 2, None, 40, None), "source"),
    "source of bytes": (lambda s, i: (s, i, i.byte(), 2, None, 40, None), "source"),
    "n of zero": (lambda s, i: (s, i, None, 0, None, 40, None), "size"),
    "negative n": (lambda s, i: (s, i, None, -1, None, 40, None), "size"),
    "sizes of other rows": (lambda s, i: (s, i, None, 0, i[0, :2], 40, None), "sizes"),
    "sizes of floats": (lambda s, i: (s, i, None, 0, s[:, 0].float(), 40, None), "sizes"),
    "length beyond the text": (lambda s, i: (s, i, None, 2, None, 41, None), "length"),
    "negative length": (lambda s, i: (s, i, None, 2, None, -1, None), "length"),
    "length per row": (lambda s, i: (s, i, None, 2, None, 0, i[:, 0]), "length"),
    "length as a float": (lambda s, i: (s, i, None, 2, None, 0, s[0, 0].float()), "length"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(implementation: Implementation, name: str) -> None:
    make, what = BAD[name]
    scores, ids, _ = Case().draw(implementation.device)
    for function in (implementation.in_place, implementation.functional):
        with pytest.raises(ValueError, match=rf"no_repeat_ngram: {what}: received .*Remedy"):
            function(*make(scores.clone(), ids))


def test_expanded_scores_cannot_be_changed_in_place(implementation: Implementation) -> None:
    scores, ids, _ = Case().draw(implementation.device)
    with pytest.raises(ValueError, match="expanded"):
        implementation.in_place(scores[:1].expand(3, -1), ids, None, 2, None, 40, None)


@settings(max_examples=150 if not INTERPRETED else 15, deadline=None)
@given(data=st.data())
def test_any_text_as_transformers(data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 24))
    vocab, n = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    tokens = st.lists(st.integers(0, vocab - 1), min_size=length, max_size=length)
    ids = torch.tensor(data.draw(st.lists(tokens, min_size=rows, max_size=rows)), dtype=torch.long).reshape(rows, length)
    beams = data.draw(st.sampled_from([k for k in (1, 2, 3, 4) if rows % k == 0]))
    source = ids.flip(1)[: rows // beams]
    scores = torch.randn(rows, vocab).to(data.draw(st.sampled_from(DTYPES[:3])))
    for name in ("triton",) if INTERPRETED else ("reference", "c++"):
        if name == "c++" and op.implementation("cpu") != "c++":
            continue
        implementation = MAKERS[name]()
        check(implementation, scores, (ids, None, n, None, length, None), NoRepeatNGramLogitsProcessor(n)(ids, scores))
        expected = EncoderNoRepeatNGramLogitsProcessor(n, source)(ids, scores)
        check(implementation, scores, (ids, source, n, None, length, None), expected)


# --- the operators and the public functions ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no_repeat_ngram", "no_repeat_ngram_", "no_repeat_ngram_cuda", "no_repeat_ngram_cuda_"])
def test_opcheck(name: str) -> None:
    scores, ids, source = Case(rows=2, vocab=7, length=9).draw(torch.device("cpu"))
    scores = scores.nan_to_num()
    operator = getattr(NAMESPACE, name).default
    for arguments in (
        (ids, None, 2, None, 9, None),
        (ids, source, 0, torch.tensor([1, 2]), 0, torch.tensor(7)),
    ):
        torch.library.opcheck(operator, (scores, *arguments))
    if not name.endswith("_"):
        torch.library.opcheck(operator, (scores.requires_grad_(), ids, source, 2, None, 9, None))


def test_gradient_is_zero_at_bans_and_one_elsewhere() -> None:
    scores = torch.zeros(1, 4, requires_grad=True)
    result = op.no_repeat_ngram(scores, torch.tensor([[1, 2, 1]]), 2)
    (grad,) = torch.autograd.grad(result[:, [0, 1, 3]].sum() + result[:, 2].clamp(min=0).sum(), scores)
    assert grad.tolist() == [[1, 1, 0, 1]]
    with pytest.raises(ValueError, match="requires grad"):
        op.no_repeat_ngram_(scores, torch.tensor([[1, 2, 1]]), 2)


def test_only_plain_calls_pass_by_the_dispatcher() -> None:
    """Under ``no_grad`` the gradient's key is left out; with a gradient, and for tensors of another kind, it is not."""
    scores, ids, _ = Case().draw(torch.device("cpu"))
    expected = oracle(scores, ids, 2)
    scores.requires_grad_()
    assert op.no_repeat_ngram(scores, ids, 2).grad_fn is not None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = op.no_repeat_ngram(scores, ids, 2)
        assert result.grad_fn is None
        assert torch.equal(bits(result), bits(expected))
    plain_scores = scores.detach()
    with FakeTensorMode() as fake:
        imagined = op.no_repeat_ngram(fake.from_tensor(plain_scores), fake.from_tensor(ids), 2)
    assert isinstance(imagined, FakeTensor)
    if op.implementation("cpu") == "c++":
        _, operator, _, plain = op._functions(scores.device, "auto")
        assert plain is not operator


def test_public_functions() -> None:
    scores, ids, source = Case(rows=4).draw(torch.device("cpu"))
    expected, encoder = oracle(scores, ids, 2), oracle(scores, ids, 2, source)
    assert torch.equal(bits(op.no_repeat_ngram(scores, ids, 2)), bits(expected))
    assert torch.equal(bits(op.no_repeat_ngram(scores, ids, torch.full((4,), 2), torch.tensor(40))), bits(expected))
    assert torch.equal(bits(op.no_repeat_ngram(scores, ids, 2, 20)), bits(oracle(scores, ids[:, :20], 2)))
    assert torch.equal(bits(op.encoder_no_repeat_ngram(scores, ids, source, 2)), bits(encoder))
    for function, arguments, wanted in (
        (op.no_repeat_ngram_, (ids, 2), expected),
        (op.encoder_no_repeat_ngram_, (ids, source, 2), encoder),
    ):
        owned = scores.clone()
        assert function(owned, *arguments) is owned
        assert torch.equal(bits(owned), bits(wanted))


@pytest.mark.parametrize(
    "arguments",
    [{"sizes": True}, {"sizes": 2.0}, {"sizes": None}, {"sizes": 2, "length": 3.0}, {"sizes": 2, "kernel": "cublas"}],
)
def test_public_functions_refuse_other_types(arguments: dict[str, Any]) -> None:
    scores, ids, _ = Case().draw(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"no_repeat_ngram: .*Remedy"):
        op.no_repeat_ngram(scores, ids, **arguments)


def test_torch_compile_takes_both_forms() -> None:
    def functional(scores: Tensor, ids: Tensor) -> Tensor:
        return op.no_repeat_ngram(scores * 2, ids, 2) + 1

    def in_place(scores: Tensor, ids: Tensor) -> Tensor:
        doubled = scores * 2
        return op.no_repeat_ngram_(doubled, ids, 2) + 1

    for function in (functional, in_place):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for length in (20, 21, 33):
            scores, ids, _ = Case(length=length).draw(torch.device("cpu"))
            assert torch.equal(bits(compiled(scores, ids)), bits(function(scores, ids)))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["triton", "cuda"])
def test_one_cuda_graph_serves_every_length(kernel: str) -> None:
    MAKERS[kernel]()
    scores, ids, _ = Case(rows=4, vocab=1000, length=3000).draw(torch.device("cuda"))
    length = torch.zeros((), dtype=torch.long, device="cuda")
    buffer = scores.clone()
    op.no_repeat_ngram_(buffer, ids, 2, length, kernel=kernel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffer.copy_(scores)
        op.no_repeat_ngram_(buffer, ids, 2, length, kernel=kernel)
        result = op.no_repeat_ngram(scores, ids[:, :2000], 2, length.clamp(max=2000), kernel=kernel)
    for value in (0, 1, 2, 40, 1999, 3000):
        length.fill_(value)
        graph.replay()
        assert torch.equal(bits(buffer), bits(oracle(scores, ids[:, :value], 2)))
        assert torch.equal(bits(result), bits(oracle(scores, ids[:, : min(value, 2000)], 2)))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["triton", "cuda"])
def test_another_stream_and_another_device(kernel: str) -> None:
    MAKERS[kernel]()
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    scores, ids, _ = Case(rows=4).draw(last)
    with torch.cuda.stream(torch.cuda.Stream(last)):
        torch.cuda._sleep(10_000_000)
        late = torch.zeros_like(scores).copy_(scores)
        result = op.no_repeat_ngram(late, ids, 2, kernel=kernel)
    torch.cuda.synchronize(last)
    assert torch.equal(bits(result), bits(oracle(scores, ids, 2)))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["triton", "cuda"])
def test_more_than_two_to_the_31_scores(kernel: str) -> None:
    MAKERS[kernel]()
    rows, vocab = 16_500, 131_072
    scores = torch.zeros(rows, vocab, dtype=torch.float16, device="cuda")
    ids = torch.tensor([[1, vocab - 1, 1]], device="cuda").expand(rows, -1)
    result = op.no_repeat_ngram(scores, ids, 2, kernel=kernel)
    op.no_repeat_ngram_(scores, ids, 2, kernel=kernel)
    for banned in (scores, result):
        assert bool((banned[:, -1] == -torch.inf).all())
        assert int(torch.isinf(banned[-1]).sum()) == 1
        assert int(torch.isinf(banned[rows // 2]).sum()) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["triton", "cuda"])
def test_a_text_of_100_000_tokens(kernel: str) -> None:
    MAKERS[kernel]()
    scores, ids, source = Case(rows=2, vocab=5000, alphabet=60, length=100_000, n=3).draw(torch.device("cuda"))
    expected = torch.stack([oracle(scores[r : r + 1], ids[r : r + 1], 3)[0] for r in range(2)])
    assert torch.equal(bits(op.no_repeat_ngram(scores, ids, 3, kernel=kernel)), bits(expected))
    encoder = op.encoder_no_repeat_ngram(scores, ids, source, 3, kernel=kernel)
    assert torch.equal(bits(encoder), bits(op.no_repeat_ngram_reference(scores, ids, source, 3, None, 100_000, None)))
