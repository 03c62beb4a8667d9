"""What a plan is made of: sites, proposals, the plan itself and the protocol of a pass. Data, no hands.

A *site* is a place in a model that a room can make faster. A *proposal* is what a room wants to do there: fuse it,
refuse it (with a reason), or leave it because the room is off. A *plan* is all proposals for one model, in order.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from torch import nn

    from oslo_fusion.config import FusionConfig
    from oslo_fusion.environment import Environment

Outcome = Literal["fused", "refused", "off"]
Settings = Mapping[str, Any]

WINNING_FRACTION = 0.98
"""A fusion is taken where it needs at most this fraction of the time: a tie is no reason to change a model."""

_OUTCOME_STYLE = {"fused": "bold green", "refused": "yellow", "off": "dim"}
_TABLE_WIDTH = 150


@dataclass(frozen=True)
class Timing:
    """Median microseconds of one call at a stated problem size, before and after, measured on this device or one of its kind.

    ``None`` where that mode was not measured. ``source`` says where the figures come from if they were not measured just now.
    """

    dtype: str
    size: str
    inference_before: float | None = None
    inference_after: float | None = None
    training_before: float | None = None
    training_after: float | None = None
    source: str = ""

    def from_source(self, source: str) -> Timing:
        """The same figures, and where they come from."""
        return replace(self, source=source)

    @staticmethod
    def _wins(before: float | None, after: float | None) -> bool:
        return before is not None and after is not None and after <= WINNING_FRACTION * before

    @property
    def wins_inference(self) -> bool:
        """Whether the fused forward was faster by more than a tie."""
        return self._wins(self.inference_before, self.inference_after)

    @property
    def wins_training(self) -> bool:
        """Whether the fused forward and backward together were faster by more than a tie."""
        return self._wins(self.training_before, self.training_after)

    def __str__(self) -> str:
        parts = [
            f"{mode} {before:.0f} → {after:.0f} µs"
            for mode, before, after in (
                ("forward", self.inference_before, self.inference_after),
                ("with backward", self.training_before, self.training_after),
            )
            if before is not None and after is not None
        ]
        if not parts:
            return f"{self.dtype}: not measured"
        return f"{self.dtype} {self.size}: {', '.join(parts)}" + (f" ({self.source})" if self.source else "")


@dataclass(frozen=True)
class Site:
    """A place in the model: the path of the module that would change, the kind of pattern, and its class' name."""

    path: str
    kind: str
    module: str


@dataclass(frozen=True)
class Swap:
    """One change that surgery makes to the module at ``path``.

    Without ``attribute`` the module gets ``donor`` in front of its class, with ``settings``. With it the module instance gets
    that attribute, which is ``donor(module, settings)``: the way in for a method of a ``PreTrainedModel``, whose class is left
    alone because transformers keys its output recorders by it. Such a donor is a picklable class that holds its module weakly.
    With ``replaces`` the instance has such an attribute, which the donor may look at, and gets it back when it is restored.
    """

    path: str
    donor: type[Any]
    settings: Settings
    attribute: str = ""
    replaces: bool = False


class Runtime(Protocol):
    """What is known only once the model has run, of compiled graphs say. Picklable; a model's rows share one."""

    def __str__(self) -> str:
        """In the report this takes the place of the row's reason."""
        ...

    def rows(self) -> tuple[Proposal, ...]:
        """Rows for what turned out to go, or not to."""
        ...


@dataclass(frozen=True)
class Proposal:
    """What a room wants to do at a site.

    ``before`` and ``after`` say in a few words what runs there; ``claims`` are the module paths that nobody else may
    change; ``swaps`` is empty unless the outcome is ``fused``; ``runtime`` is what the report asks for news.
    """

    site: Site
    room: str
    before: str
    after: str
    outcome: Outcome
    reason: str
    claims: tuple[str, ...] = ()
    swaps: tuple[Swap, ...] = ()
    timings: tuple[Timing, ...] = ()
    runtime: Runtime | None = None

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, ready for JSON. Swaps are named by their donor."""
        return {
            "site": self.site.path,
            "kind": self.site.kind,
            "module": self.site.module,
            "room": self.room,
            "before": self.before,
            "after": self.after,
            "outcome": self.outcome,
            "reason": self.reason,
            "donors": [swap.donor.__name__ for swap in self.swaps],
            "timings_us": [vars(timing) for timing in self.timings],
        }


Taken = Mapping[str, Proposal]
"""Module path → the proposal of an earlier pass that claims it."""

NOTHING_TAKEN: Taken = MappingProxyType({})


@dataclass(frozen=True)
class FusionPlan:
    """Everything that ``initialize`` would do to one model, and everything it would not, with the reason.

    Printing it gives a table. It holds no reference to the model.
    """

    model_class: str
    config: FusionConfig
    proposals: tuple[Proposal, ...]
    notes: tuple[str, ...] = ()

    def count(self, outcome: Outcome, kind: str | None = None) -> int:
        """How many sites have this outcome (and, if given, this kind)."""
        return sum(p.outcome == outcome and kind in (None, p.site.kind) for p in self.proposals)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, ready for JSON."""
        return {
            "model": self.model_class,
            "config": self.config.to_dict(),
            "rows": [p.to_dict() for p in self.proposals],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return render(f"Plan for {self.model_class}", self.proposals, self.notes)


class Pass(Protocol):
    """A room's way into the plan. ``propose`` is pure: it reads the model, may run copies of its parts, changes nothing."""

    name: str
    kernels: tuple[str, ...]
    """The names in ``custom_cuda_kernels`` that this room answers for."""

    def propose(
        self, model: nn.Module, config: FusionConfig, environment: Environment, taken: Taken = NOTHING_TAKEN
    ) -> Iterable[Proposal]:
        """Yield one proposal for every candidate site of this room that no earlier pass has taken.

        Args:
            model: read, never written.
            config, environment: what is asked for, and the facts of the machine.
            taken: what earlier passes have claimed; a module there is theirs (see :func:`leave`).
        """
        ...


def leave(proposal: Proposal, taken: Taken) -> Proposal:
    """The proposal, or an ``off`` row in its place where it claims a module that an earlier pass has taken."""
    owner = next((taken[path] for path in proposal.claims if path in taken), None)
    if owner is None:
        return proposal
    reason = f"taken by the {owner.room} room: {owner.site.kind} at {owner.site.path}"
    return replace(proposal, after=proposal.before, outcome="off", reason=reason, claims=(), swaps=())


@dataclass
class _Group:
    """Rows that differ only in the layer number, shown as one."""

    row: Proposal
    paths: list[str] = field(default_factory=list)


def collapse_paths(paths: Sequence[str]) -> str:
    """``h.0.mlp, h.1.mlp, h.2.mlp`` → ``h.{0-2}.mlp``; paths that differ otherwise are listed in short.

    Args:
        paths: module paths with the same text outside their numbers.
    """
    if len(paths) == 1:
        return paths[0]
    pieces = [re.split(r"(\d+)", path) for path in paths]
    columns = []
    for column in zip(*pieces, strict=True):
        distinct = list(dict.fromkeys(column))
        if len(distinct) == 1:
            columns.append(distinct[0])
            continue
        numbers = sorted(int(number) for number in distinct)
        runs: list[list[int]] = []
        for number in numbers:
            if runs and number == runs[-1][-1] + 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        columns.append("{" + ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) + "}")
    return "".join(columns)


def _grouped(rows: Iterable[Proposal]) -> list[_Group]:
    groups: dict[tuple[str, ...], _Group] = {}
    for row in rows:
        shape = re.sub(r"\d+", "#", row.site.path)
        key = (shape, row.site.kind, row.room, row.before, row.after, row.outcome, row.reason)
        groups.setdefault(key, _Group(row)).paths.append(row.site.path)
    return list(groups.values())


def render(title: str, rows: Sequence[Proposal], notes: Sequence[str] = (), width: int | None = None) -> str:
    """The table that people read: repeated layers in one line, a count, the outcome and the reason.

    Args:
        title: the table's heading.
        rows: proposals in order.
        notes: sentences printed under the table.
        width: characters per line; by default 150.
    """
    table = Table(title=title, title_justify="left", show_lines=False, expand=False)
    table.add_column("site", overflow="fold")
    table.add_column("n", justify="right")
    for name in ("room", "before", "after", "outcome", "reason"):
        table.add_column(name, overflow="fold")
    for group in _grouped(rows):
        row = group.row
        table.add_row(
            Text(f"{collapse_paths(group.paths)}\n({row.site.kind})"),
            str(len(group.paths)),
            row.room,
            Text(row.before),
            Text(row.after),
            Text(row.outcome, style=_OUTCOME_STYLE[row.outcome]),
            Text(row.reason),
        )
    buffer = io.StringIO()
    console = Console(file=buffer, width=width or _TABLE_WIDTH, color_system=None, highlight=False, force_jupyter=False)
    console.print(table)
    counts = ", ".join(
        f"{sum(row.outcome == outcome for row in rows)} {outcome}"
        for outcome in ("fused", "refused", "off")
        if any(row.outcome == outcome for row in rows)
    )
    console.print(Text(f"{len(rows)} sites: {counts}" if rows else "no candidate sites"))
    for note in notes:
        console.print(Text(f"note: {note}"))
    return buffer.getvalue().rstrip()
