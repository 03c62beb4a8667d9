"""The tolerance law and named cases, for tests and benchmarks alike."""

from __future__ import annotations

from torch import Tensor

from oslo_fusion.probe import compare


def assert_close_to_reference(
    ours: Tensor, same_dtype: Tensor, reference: Tensor, what: str = "result", norm: str = "max"
) -> None:
    """The law: our error against the reference is at most twice that of the same-dtype PyTorch code, plus one ulp.

    Args:
        ours: our result.
        same_dtype: what plain PyTorch gives in the same dtype, same shape.
        reference: the truth in float32 or float64, same shape.
        what: named in the message.
        norm: ``max`` for one operation, ``l2`` for gradients of whole models.

    Raises:
        AssertionError: with both errors and the bound.
    """
    comparison = compare(ours, same_dtype, reference, norm)
    assert comparison.same, f"{what}: {comparison}"


ACTIVATION_SHAPES = {
    "one element": (1,),
    "odd": (3, 7, 13),
    "one row": (1, 768),
    "zero rows": (0, 768),
    "wide": (2, 4097),
}
