"""The tolerance law and named cases, for tests and benchmarks alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

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


def curves_apart(ours: Sequence[Sequence[float]], eager: Sequence[Sequence[float]], window: int = 20) -> float:
    """How far two mean loss curves are from each other where they are farthest apart, in standard deviations of a run, of
    which all runs have a part.

    Args:
        ours: the losses of each run, all of as many steps.
        eager: of at least two runs that differ by their dropout alone.
        window: steps of which the mean is one point of a curve.
    """
    points = [[_curve(run, window) for run in side] for side in (ours, eager)]
    mine, theirs = (list(zip(*side, strict=True)) for side in points)
    degrees = len(ours) + len(eager) - 2
    spread = [
        math.sqrt(sum((x - statistics.mean(side)) ** 2 for side in pair for x in side) / degrees)
        for pair in zip(mine, theirs, strict=True)
    ]
    usual: float = statistics.mean(spread)
    gaps = [abs(statistics.mean(a) - statistics.mean(b)) for a, b in zip(mine, theirs, strict=True)]
    return max((gap / max(own, usual) for gap, own in zip(gaps, spread, strict=True)), default=0.0)


def _curve(losses: Sequence[float], window: int) -> list[float]:
    return [statistics.mean(losses[start : start + window]) for start in range(0, len(losses), window)]


ACTIVATION_SHAPES = {
    "one element": (1,),
    "odd": (3, 7, 13),
    "one row": (1, 768),
    "zero rows": (0, 768),
    "wide": (2, 4097),
}
