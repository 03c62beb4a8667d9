"""What was done to a model: the plan as applied, and the check that was run on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from oslo_fusion.plan import FusionPlan, Outcome, Proposal, render


@dataclass(frozen=True)
class Verification:
    """The whole model on one sample input before and after, from ``verify: true``.

    ``max_difference`` is the largest absolute difference of the first floating-point output; ``max_value`` its largest
    absolute value before.
    """

    max_difference: float
    max_value: float
    sample: str


@dataclass(frozen=True)
class FusionReport:
    """A row per site: where, which room, what ran before and runs now, the outcome and the reason.

    ``str()`` is the table for people, ``to_dict()`` the same for machines.
    """

    plan: FusionPlan
    verification: Verification | None = None

    @property
    def rows(self) -> tuple[Proposal, ...]:
        """One row per site, in the plan's order, with what has been found since the model ran."""
        rows = [row if row.runtime is None else replace(row, reason=str(row.runtime)) for row in self.plan.proposals]
        for runtime in {id(row.runtime): row.runtime for row in rows if row.runtime is not None}.values():
            rows += runtime.rows()
        return tuple(rows)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that belong to no single site."""
        if self.verification is None:
            return self.plan.notes
        v = self.verification
        return (
            *self.plan.notes,
            f"verified on {v.sample}: largest difference {v.max_difference:.3g} in outputs of up to {v.max_value:.3g}",
        )

    def count(self, outcome: Outcome, kind: str | None = None) -> int:
        """How many sites have this outcome (and, if given, this kind)."""
        return sum(row.outcome == outcome and kind in (None, row.site.kind) for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, ready for JSON."""
        return {
            **self.plan.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
            "verification": None if self.verification is None else vars(self.verification),
        }

    def __str__(self) -> str:
        return render(f"Report for {self.plan.model_class}", self.rows, self.notes)
