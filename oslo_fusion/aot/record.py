"""What the compiler did to one model: its graphs, what broke them and how often one was made again. Data, picklable."""

from __future__ import annotations

import linecache
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oslo_fusion.plan import Proposal, Site

ROOM = "aot"
VERSIONS = 8
"""Of one function, as many as Dynamo makes by default. Where none of them fits, the function runs uncompiled."""


@dataclass(frozen=True)
class Break:
    """Where Dynamo could not go on, so that Python ran in between.

    ``file`` and ``line`` are empty where Dynamo gives the reason only.
    """

    reason: str
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        if not self.file:
            return self.reason
        source = linecache.getline(self.file, self.line).strip()
        return f"{Path(self.file).name}:{self.line} `{source}`: {self.reason}"


@dataclass(frozen=True)
class Graph:
    """One compiled graph.

    Attributes:
        program: the function that was compiled, and the mode it ran in.
        operators: calls in the graph that Dynamo captured.
        seconds: that AOT Autograd and the code generator took.
        version: 0 for the first of its function; more is a recompile.
        reason: why the earlier versions did not fit.
        ended_by: the break at the graph's end, None where it ends with its function.
        parts: gated MLPs in it whose backward runs in parts.
        whole: why it does not for others, each reason once.
        workspaces: attentions by cuDNN whose backward is ours, without a workspace.
        feed_forwards: of those in it, how many have GELU's gradient and the one of the bias before it in one kernel.
    """

    program: str
    operators: int
    seconds: float
    version: int = 0
    reason: str = ""
    ended_by: Break | None = None
    parts: int = 0
    whole: tuple[str, ...] = ()
    workspaces: int = 0
    feed_forwards: int = 0


@dataclass
class Record:
    """Everything that was compiled for one model, in order."""

    graphs: list[Graph] = field(default_factory=list)
    silent_breaks: list[Break] = field(default_factory=list)
    """Breaks before the first operator, which leave no graph."""

    left: list[str] = field(default_factory=list)
    """Why calls were not compiled and the original ran, each reason once."""

    def leave(self, reason: str) -> None:
        """Note that the original runs."""
        if reason not in self.left:
            self.left.append(reason)

    @property
    def seconds(self) -> float:
        """Seconds of compilation in all."""
        return sum(graph.seconds for graph in self.graphs)

    @property
    def recompiles(self) -> int:
        """How many graphs are another version of a function that was compiled before."""
        return sum(graph.version > 0 for graph in self.graphs)

    @property
    def breaks(self) -> tuple[Break, ...]:
        """Different breaks, in order."""
        ended = [graph.ended_by for graph in self.graphs if graph.ended_by is not None]
        return tuple(dict.fromkeys((*ended, *self.silent_breaks)))

    @property
    def storms(self) -> tuple[Graph, ...]:
        """The last version of each function that has as many as Dynamo allows: where none fits, it runs uncompiled."""
        return tuple(graph for graph in self.graphs if graph.version == VERSIONS - 1)

    def rows(self) -> tuple[Proposal, ...]:
        """A row per function with gated MLPs and with cuDNN's attention, where the dial is low, and with feed-forward networks;
        per break, which runs as plain Python between two graphs; and per function with too many versions.
        """
        rows = []
        for program in dict.fromkeys(graph.program for graph in self.graphs):
            site, before = Site(program, "gated MLP", "-"), "backward whole"
            graphs = [graph for graph in self.graphs if graph.program == program]
            if any(graph.parts for graph in graphs):
                reason = "at this budget: three tensors of a part of its width in memory, where six of the whole would be"
                rows.append(Proposal(site, ROOM, before, "backward in parts", "fused", reason))
            for reason in dict.fromkeys(reason for graph in graphs for reason in graph.whole):
                rows.append(Proposal(site, ROOM, before, before, "refused", reason))
            if any(graph.workspaces for graph in graphs):
                site, after = Site(program, "attention", "-"), "cuDNN's forward, our backward"
                reason = "at this budget: cuDNN's workspace is not needed (as fast on one NVIDIA H200)"
                rows.append(Proposal(site, ROOM, "cuDNN", after, "fused", reason))
            if any(graph.feed_forwards for graph in graphs):
                site, two = Site(program, "feed-forward", "-"), "GELU's gradient, then the sum for the bias"
                reason = "what GELU's gradient kernel writes is added up on its way, not read again"
                rows.append(Proposal(site, ROOM, two, "both in one kernel", "fused", reason))
        for broken in self.breaks:
            site = Site(f"{Path(broken.file).name}:{broken.line}" if broken.file else "somewhere", "graph break", "-")
            rows.append(Proposal(site, ROOM, "one graph", "eager here, graphs around it", "refused", str(broken)))
        for reason in self.left:
            rows.append(Proposal(Site("some calls", "not compiled", "-"), ROOM, "eager", "eager", "refused", reason))
        for graph in self.storms:
            site = Site(graph.program, "recompiles", "-")
            reason = f"{VERSIONS} versions are there, the last because {graph.reason}; what fits none runs uncompiled"
            rows.append(Proposal(site, ROOM, "one graph", f"{VERSIONS} graphs", "refused", reason))
        return tuple(rows)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, ready for JSON."""
        return {
            "graphs": len(self.graphs),
            "breaks": [str(broken) for broken in self.breaks],
            "not_compiled": list(self.left),
            "recompiles": self.recompiles,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        if not self.graphs and not self.silent_breaks and not self.left:
            return "not run yet: compiled at the first step"
        parts = [_count(len(self.graphs), "graph"), _count(len(self.breaks), "break"), _count(self.recompiles, "recompile")]
        return f"{', '.join(parts)}; compiled in {self.seconds:.1f} s"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
