"""The meaning of rms_norm: what the modules it replaces compute, under the law, with gradients, and clear errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from oslo_fusion import extension
from oslo_fusion.errors import ConfigError, ExtensionError
from oslo_fusion.ops import rms_norm as op
from oslo_fusion.ops.kernels import choices, is_here, missing
from oslo_fusion.ops.rms_norm import ADD_RMS_NORM, RMS_NORM, RMS_NORM_BACKWARD, _Norm, rms_norm
from oslo_fusion.ops.row_cases import ROW_CASES, drawer, draws_of
from oslo_fusion.probe import prove
from oslo_fusion.testing import assert_close_to_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
EPS = 1e-5
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMESPACE = torch.ops.oslo_fusion


def plain(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None, offset: float = 0.0) -> Tensor:
    """What PyTorch code in the same dtype computes; in float64 the truth. With a residual the two outputs side by side."""
    s = x if residual is None else x + residual
    wide = s if s.dtype == torch.float64 else s.float()
    y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(s.dtype)
    y = y if weight is None else y * (weight + offset)
    return y if residual is None else torch.cat([y, s], -1)


def ours(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None, offset: float = 0.0) -> Tensor:
    result = rms_norm(x, weight, eps=EPS, residual=residual, weight_offset=offset)
    return torch.cat(result, -1) if isinstance(result, tuple) else result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(ROW_CASES))
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_law_holds(case: str, dtype: torch.dtype, with_residual: bool, device: str) -> None:
    draws = []
    for seed in range(draws_of(case)):
        draw = drawer(dtype, device, seed)
        x = ROW_CASES[case](draw)
        draws.append([x, draw(x.shape[-1]), *([draw(*x.shape)] if with_residual else [])])
    for what, comparison in zip(("output", "dx", "dweight", "dresidual"), prove(ours, plain, *draws), strict=False):
        if case != "one number" or what not in ("dx", "dresidual"):  # zero but for rounding
            assert comparison.same, f"{case}, {what}: {comparison}"
    with torch.no_grad():  # prove clones its inputs, so the strides are seen here only
        assert_close_to_reference(ours(*draws[0]), plain(*draws[0]), plain(*(t.double() for t in draws[0])), case)


@pytest.mark.parametrize("device", DEVICES)
def test_without_weight_and_with_offset(device: str) -> None:
    draws = [[drawer(torch.bfloat16, device, seed)(4, 96)] for seed in range(3)]
    assert all(c.same for c in prove(ours, plain, *draws))
    draws = [[*inputs, drawer(torch.bfloat16, device, 9)(96)] for inputs in draws]
    for comparison in prove(lambda x, w: ours(x, w, offset=1.0), lambda x, w: plain(x, w, offset=1.0), *draws):
        assert comparison.same, str(comparison)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_those_of_the_modules_it_replaces(dtype: torch.dtype, weight_dtype: torch.dtype, device: str) -> None:
    draw = drawer(dtype, device)
    x, weight = draw(6, 64), drawer(weight_dtype, device, 1)(64)
    for make, options in (
        (LlamaRMSNorm, {}),
        (T5LayerNorm, {"out_dtype": weight_dtype} if weight_dtype != torch.float32 else {}),
        (GemmaRMSNorm, {"out_dtype": dtype, "weight_offset": 1.0}),
    ):
        module = make(64, eps=EPS).to(device, weight_dtype)
        with torch.no_grad():
            module.weight.copy_(weight)
            expected = module(x)
            result = rms_norm(x, module.weight, eps=EPS, **options)
        assert result.dtype == expected.dtype, make.__name__
        exact = op.rms_norm_reference(x.double(), weight.double(), None, EPS, options.get("weight_offset", 0.0), None)[0]
        assert_close_to_reference(result, expected, exact, make.__name__)


@pytest.mark.parametrize("device", DEVICES)
def test_operators_pass_opcheck(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        draw = drawer(dtype, device)
        x, residual, weight = draw(3, 5, 16), draw(3, 5, 16), draw(16)
        for t in (x, residual, weight):
            t.requires_grad_()
        rstd = draw(3, 5).float()
        torch.library.opcheck(RMS_NORM, (x, weight, EPS, 0.0, None))
        torch.library.opcheck(RMS_NORM, (x.transpose(0, 1), None, EPS, 1.0, torch.float32))
        torch.library.opcheck(ADD_RMS_NORM, (x, residual, weight, EPS, 1.0, None))
        x, residual, weight = x.detach(), residual.detach(), weight.detach()
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        torch.library.opcheck(RMS_NORM_BACKWARD, (residual, None, x, weight, rstd, 0.0, True))
        torch.library.opcheck(RMS_NORM_BACKWARD, (residual, x, strided, None, rstd, 0.0, False))
        for name, arguments in (
            ("rms_norm_cuda", (x.requires_grad_(), weight, EPS, 0.0, None)),
            ("add_rms_norm_cuda", (x, residual, weight, EPS, 1.0, None)),
            ("rms_norm_backward_cuda", (residual, None, x.detach(), weight, rstd, 0.0, True)),
        ):
            if device == "cpu" or is_here("rms_norm", "cuda", "cuda"):
                torch.library.opcheck(getattr(NAMESPACE, name).default, arguments)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y, s = rms_norm(x, weight, eps=EPS, residual=residual, weight_offset=1.0)
    return y, s


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_twice_and_of_one_output_only(device: str) -> None:
    draw = drawer(torch.float64, device)
    x, residual, weight = (t.requires_grad_() for t in (draw(3, 7), draw(3, 7), draw(7)))
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, eps=EPS), (x, weight))
    assert torch.autograd.gradgradcheck(lambda *a: rms_norm(*a, eps=EPS), (x, weight))
    both = (x, residual, weight)
    assert torch.autograd.gradcheck(lambda *a: add_norm(*a)[0] * add_norm(*a)[1], both)
    assert torch.autograd.gradgradcheck(lambda *a: add_norm(*a), both)
    assert torch.autograd.gradcheck(lambda *a: add_norm(*a)[0], both)
    assert torch.autograd.gradcheck(lambda *a: add_norm(*a, weight.detach())[1], (x, residual))
    frozen = weight.detach().float()
    leaf = draw(5, 7).float().requires_grad_()
    rms_norm(leaf, frozen, eps=EPS).sum().backward()
    assert leaf.grad is not None
    assert frozen.grad is None


def test_the_eager_function_has_the_same_gradients_twice() -> None:
    pytest.importorskip("triton")
    draw = drawer(torch.float64)
    x, residual, weight = (t.requires_grad_() for t in (draw(3, 7), draw(3, 7), draw(7)))
    assert torch.autograd.gradgradcheck(lambda x, w: _Norm.apply(x, None, w, EPS, 1.0, None, "auto"), (x, weight))
    assert torch.autograd.gradgradcheck(lambda *a: _Norm.apply(*a, EPS, 0.0, None, "auto"), (x, residual, weight))
    assert torch.autograd.gradcheck(lambda x, r: _Norm.apply(x, r, weight.detach(), EPS, 0.0, None, "auto")[1], (x, residual))
    half = draw(2, 4).bfloat16().requires_grad_()
    wide = draw(2, 4).requires_grad_()
    y, s = _Norm.apply(half, wide, None, EPS, 0.0, None, "auto")
    (y + s).sum().backward()
    assert half.grad is not None
    assert wide.grad is not None
    assert (half.grad.dtype, wide.grad.dtype) == (torch.bfloat16, torch.float64)


def test_torch_compile_takes_it_whole() -> None:
    draw = drawer(torch.float32)
    inputs = [t.requires_grad_() for t in (draw(4, 32), draw(32), draw(4, 32))]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected, result = ours(*inputs), compiled(*inputs)
    torch.testing.assert_close(result, expected)
    for a, b in zip(torch.autograd.grad(result.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(4, 8, dtype=torch.int64)}, "x: received dtype torch.int64"),
    ({"x": torch.tensor(1.0)}, "x: received shape []"),
    ({"x": torch.zeros(4, 0)}, "x: received shape [4, 0]"),
    ({"weight": torch.ones(7)}, "weight: received shape [7], must be [8]"),
    ({"weight": torch.ones(1, 8)}, "weight: received shape [1, 8]"),
    ({"weight": torch.ones(8, dtype=torch.int32)}, "weight: received dtype torch.int32"),
    ({"weight": torch.ones(8, device="meta")}, "weight: is on meta"),
    ({"residual": torch.ones(1, 8)}, "residual: received shape [1, 8]"),
    ({"residual": torch.ones(4, 8, dtype=torch.bool)}, "residual: received dtype torch.bool"),
    ({"residual": torch.ones(4, 8, device="meta")}, "residual: is on meta"),
    ({"eps": -1e-6}, "eps: received -1e-06"),
    ({"eps": float("nan")}, "eps: received nan"),
    ({"out_dtype": torch.int8}, "out_dtype: received torch.int8"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    given = {"x": torch.zeros(4, 8), "weight": torch.ones(8), "eps": EPS, **arguments}
    with pytest.raises(ConfigError) as error:
        rms_norm(given.pop("x"), given.pop("weight"), **given)
    assert message in str(error.value)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["triton", "cuda"])
def test_more_than_two_to_the_31_elements(kernel: str) -> None:
    if kernel not in choices("rms_norm", "cuda", "auto"):
        pytest.skip(missing("rms_norm", "cuda", kernel))
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16).expand(600_000, 4096)
    y = rms_norm(x, eps=EPS, kernel=kernel)
    assert torch.equal(y[-1], y[0])
    assert torch.isfinite(y[-1]).all()


# --- every implementation, called without what lies between it and the public function ---------------------------------------


class Implementation(NamedTuple):
    """Functions with the arguments of the references, and where their tensors lie."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    device: torch.device


def _operators(suffix: str, device: str) -> Implementation:
    norm, add_norm = (getattr(NAMESPACE, f"{name}{suffix}").default for name in ("rms_norm", "add_rms_norm"))

    def forward(x: Tensor, weight: Tensor | None, residual: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
        if residual is not None:
            result: tuple[Tensor, Tensor, Tensor] = add_norm(x, residual, weight, *options)
            return result
        y, rstd = norm(x, weight, *options)
        return y, x, rstd

    return Implementation(forward, getattr(NAMESPACE, f"rms_norm_backward{suffix}").default, torch.device(device))


def _reference() -> Implementation:
    return Implementation(op.rms_norm_reference, op.rms_norm_backward_reference, torch.device("cpu"))


def _cpp() -> Implementation:
    if op.implementation("cpu") != "c++":
        pytest.skip(f"the extension's C++ kernel is not here: {extension.failure()}")
    return _operators("", "cpu")


def _triton() -> Implementation:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 as tests/triton/test_rms_norm.py sets it")
    kernels: Any = pytest.importorskip("oslo_fusion.triton.rms_norm", reason="needs triton", exc_type=ImportError)
    device = torch.device("cpu" if INTERPRETED else "cuda")
    return Implementation(kernels.launch_rms_norm, kernels.launch_rms_norm_backward, device)


def _cuda() -> Implementation:
    try:
        op.implementation("cuda", "cuda")
    except ImportError as error:
        pytest.skip(str(error))
    return _operators("_cuda", "cuda")


MAKERS = {"reference": _reference, "c++": _cpp, "triton": _triton, "cuda": _cuda}
IMPLEMENTATIONS = [
    pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" or (name == "triton" and not INTERPRETED) else name
    for name in MAKERS
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Implementation:
    return MAKERS[request.param]()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch fills every new buffer with NaN, in C++ too, so that a number that was not written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _judge(implementation: Implementation, draws: list[list[Any]], case: str, offset: float = 0.0, **options: Any) -> None:
    """Forward, and backward from the reference's numbers. A draw is x, weight, residual, dy and ds; all are judged together."""
    results: list[list[list[Tensor]]] = [[], [], []]
    wanted = options.get("out_dtype")
    for x, weight, residual, dy, ds in draws:
        kept: tuple[Tensor, Tensor] | None = None
        ways = (op.rms_norm_reference, op.rms_norm_backward_reference)
        for place, (forward, backward), exact in ((1, ways, False), (2, ways, True), (0, implementation[:2], False)):
            cast = lambda t, exact=exact: t.double() if exact and t is not None else t  # noqa: E731
            y, s, rstd = forward(cast(x), cast(weight), cast(residual), EPS, offset, None if exact else wanted)
            kept = kept or (s, rstd)
            grad = dy if dy is not None else drawer(y.dtype, y.device, 5)(*y.shape)
            want = weight is not None
            gradients = backward(cast(grad), cast(ds), cast(kept[0]), cast(weight), cast(kept[1]), offset, want)
            results[place].append([y, s, *gradients])
    for position, what in enumerate(("y", "s", "dx", "dweight")):
        ours, theirs, truth = (torch.cat([draw[position].flatten() for draw in way]) for way in results)
        assert results[0][0][position].shape == results[1][0][position].shape
        if case == "one number" and what == "dx":
            continue  # zero but for rounding
        if theirs.dtype == torch.float64:  # computed in what s has, so its ulp is no measure, or the reference is its own truth
            digits = 1e-12 if results[1][0][1].dtype == torch.float64 else 1e-5
            torch.testing.assert_close(ours, theirs, rtol=digits, atol=digits)
        else:
            assert_close_to_reference(ours, theirs, truth, f"{case}, {what}")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(ROW_CASES))
@pytest.mark.parametrize("with_residual", [False, True])
def test_every_implementation(implementation: Implementation, case: str, dtype: torch.dtype, with_residual: bool) -> None:
    draws = []
    for seed in range(draws_of(case)):
        draw = drawer(dtype, implementation.device, seed)
        x = ROW_CASES[case](draw)
        dy = draw(x.shape[-1], *x.shape[:-1]).movedim(0, -1) if seed % 2 else draw(*x.shape)
        residual, ds = (draw(*x.shape), draw(*x.shape)) if with_residual else (None, None)
        draws.append([x, draw(x.shape[-1]), residual, dy, ds])
    _judge(implementation, draws, case)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(9, 2048), (2, 2048), (2, 16384), (2, 40000), (3, 1501), (700, 24)], ids=str)
def test_rows_in_registers_and_wider(implementation: Implementation, shape: tuple[int, int]) -> None:
    if INTERPRETED and shape[0] > 100:
        pytest.skip("takes minutes when interpreted")
    for dtype in (torch.float32, torch.bfloat16):
        draw = drawer(dtype, implementation.device)
        draws = [[draw(*shape), draw(shape[1]), draw(*shape), draw(*shape), draw(*shape)] for _ in range(2)]
        _judge(implementation, draws, str(shape), offset=1.0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("out_dtype", [None, *DTYPES])
@pytest.mark.parametrize("weight_dtype", [None, *DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_mixed_dtypes(
    implementation: Implementation, dtype: torch.dtype, weight_dtype: torch.dtype | None, out_dtype: torch.dtype | None
) -> None:
    device, draws = implementation.device, []
    for seed in range(8):
        draw = drawer(dtype, device, seed)
        weight = None if weight_dtype is None else drawer(weight_dtype, device, 50 + seed)(96)
        draws.append([draw(6, 96), weight, None, None, drawer(torch.float32, device, seed)(6, 96)])
    _judge(implementation, draws, "mixed", offset=1.0, out_dtype=out_dtype)


@pytest.mark.parametrize("other", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_residual_of_another_dtype(implementation: Implementation, dtype: torch.dtype, other: torch.dtype) -> None:
    device = implementation.device
    x, residual, weight = drawer(dtype, device)(6, 96), drawer(other, device, 1)(6, 96), drawer(dtype, device, 2)(96)
    _judge(implementation, [[x, weight, residual, None, None]], "residual")


def test_a_negated_view_is_what_it_means(implementation: Implementation) -> None:
    x = torch.randn(5, 16, dtype=torch.complex64, device=implementation.device).conj().imag
    assert x.is_neg()
    y, _, _ = implementation.forward(x, x[0], None, EPS, 0.0, None)
    expected, _, _ = op.rms_norm_reference(x.resolve_neg(), x[0].resolve_neg(), None, EPS, 0.0, None)
    torch.testing.assert_close(y, expected)
    if implementation.device.type == "cpu" and not INTERPRETED:
        torch.testing.assert_close(rms_norm(x, x[0], eps=EPS), expected)


def test_weight_gradients_are_the_same_bits_every_time(implementation: Implementation) -> None:
    draw = drawer(torch.float16, implementation.device)
    x, weight, dy = draw(150, 64), draw(64), draw(150, 64)
    _, _, rstd = implementation.forward(x, weight, None, EPS, 0.0, None)
    first, second = (implementation.backward(dy, None, x, weight, rstd, 0.0, True)[1] for _ in range(2))
    assert torch.equal(first, second)
    dx, nothing = implementation.backward(dy, None, x, weight, rstd, 0.0, False)
    assert nothing.numel() == 0
    torch.testing.assert_close(dx, implementation.backward(dy, None, x, weight, rstd, 0.0, True)[0])  # other tiles, other sums


def test_weight_gradients_over_many_rows_keep_their_digits() -> None:
    """A plain float32 sum of 40,000 rows loses what PyTorch's pairwise one keeps."""
    _judge(
        _cpp(), [[*(drawer(torch.float32)(*shape) for shape in ((40_000, 8), (8,))), None, torch.ones(40_000, 8), None]], "long"
    )


def test_two_threads_share_the_rows() -> None:
    implementation, before = _cpp(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        draw = drawer(torch.float32)
        for rows in (1, 3, 4097):
            _judge(implementation, [[draw(rows, 96), draw(96), None, draw(rows, 96), None]], f"{rows} rows")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan"), 0.0, 1e-30, 6e4, 1e-7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_numbers(implementation: Implementation, dtype: torch.dtype, special: float) -> None:
    x = drawer(dtype, implementation.device)(4, 64)
    x[1, 3] = special
    x[2] = special
    ours, theirs = (f(x, x[3].clone(), None, EPS, 0.0, None)[0] for f in (implementation.forward, op.rms_norm_reference))
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=4 * ulp, atol=torch.finfo(dtype).smallest_normal * ulp, equal_nan=True)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) and value.device.type == "cpu" else value


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_by_name(implementation: Implementation, arguments: dict[str, Any], message: str) -> None:
    given = {"x": torch.zeros(4, 8), "weight": torch.ones(8), "residual": None, "eps": EPS, "out_dtype": None, **arguments}
    x, weight, residual, eps, out_dtype = (_to(value, implementation.device) for value in given.values())
    with pytest.raises(ValueError, match=rf"rms_norm: {message.split(':')[0]}: "):
        implementation.forward(x, weight, residual, eps, 0.0, out_dtype)


BAD_GRADIENTS: dict[str, tuple[int, Any]] = {
    "dy of another shape": (0, torch.zeros(4, 7)),
    "dy of integers": (0, torch.zeros(4, 8, dtype=torch.int32)),
    "ds of another shape": (1, torch.zeros(1, 8)),
    "weight of another shape": (3, torch.ones(7)),
    "rstd of another shape": (4, torch.ones(5)),
    "rstd in half precision": (4, torch.ones(4).half()),
}


@pytest.mark.parametrize("name", ["c++", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bad", BAD_GRADIENTS)
def test_a_gradient_that_would_be_read_out_of_bounds_is_refused(name: str, bad: str) -> None:
    implementation = MAKERS[name]()
    arguments: list[Any] = [torch.zeros(4, 8), None, torch.zeros(4, 8), torch.ones(8), torch.ones(4), 0.0, True]
    position, value = BAD_GRADIENTS[bad]
    arguments[position] = value
    with pytest.raises(ValueError, match=f"{bad.split()[0]}: received"):
        implementation.backward(*(_to(value, implementation.device) for value in arguments))


def test_the_kernel_that_is_asked_for_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"kernel: received 'cublas'. Allowed: auto, triton, cuda"):
        rms_norm(torch.zeros(2, 8), eps=EPS, kernel="cublas")
    for kernel in ("auto", "triton", "cuda"):  # on the CPU there is no choice
        assert op.implementation("cpu", kernel) in ("c++", "reference")
    if "cuda" not in choices("rms_norm", "cuda", "auto"):
        with pytest.raises(ExtensionError, match="OSLO_FUSION"):
            op.implementation("cuda", "cuda")
        assert "OSLO_FUSION" in missing("rms_norm", "cuda", "cuda")


def test_importing_it_imports_no_triton() -> None:
    code = "import sys, torch; before = set(sys.modules); import oslo_fusion.ops.rms_norm, oslo_fusion.ops.layer_norm; "
    code += "print({'triton', 'transformers'} & (set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
