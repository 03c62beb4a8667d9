"""The compiler: Dynamo's graph → AOT Autograd and min-cut rematerialization → Inductor, whose internals only this file names.

How much of the forward is kept for the backward is the dial ``activation_memory_budget``. In functorch it is a setting of the
process; here it is set around each compilation only, so that two models may have two budgets and nobody else sees either.

As a backend of ``torch.compile``, by name or with one's own kernels in place of patterns::

    model = torch.compile(model, backend="oslo_fusion", options={"activation_memory_budget": 0.5})

    gated = Replacement(
        pattern=lambda gate, up: torch.nn.functional.silu(gate) * up,  # plain PyTorch
        kernel=my_gated_product,  # an operator with a gradient of its own
        example=(torch.randn(4, 8), torch.randn(4, 8)),
    )
    model = torch.compile(model, backend=Backend(replacements=[gated]))
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from oslo_fusion.aot.cudnn_workspaces import spare_cudnn_workspaces
from oslo_fusion.aot.error_functions import shorten_error_functions
from oslo_fusion.aot.feed_forwards import fuse_feed_forwards
from oslo_fusion.aot.gated_mlps import CUT_AT, Parts, cut_gated_mlps
from oslo_fusion.aot.joined_gradients import join_gradients
from oslo_fusion.aot.masks import simplify_masks
from oslo_fusion.aot.record import Break, Graph, Record
from oslo_fusion.config import MemoryEfficientFusion
from oslo_fusion.errors import ConfigError, OsloFusionError

GraphPass = Callable[[fx.Graph], None]

_UNSUPPORTED = "step_unsupported"  # Dynamo's reason where it gives none
COMPILERS = ("inductor", "eager")
_PARTITION: dict[str, Any] = {"ban_recompute_materialized_backward": False, "unsafe_treat_script_objects_as_zero_size": True}
"""torch keeps what a matmul of the backward reads even if it is one pointwise kernel away from what is kept anyway: a norm's
output, the product of a gated MLP. Made again, by the kernel that reads the same inputs for their gradients, they cost next
to nothing. Llama 1.24B 8×2048: 236.5 ms and 27.2 GiB, then 236.8 ms and 21.2. GPT-2 16×1024: 42.4 ms and 6.1 GiB, then 40.5
and 4.4.

Since 2.13 a budget below 1 fails on objects that are no tensors, of which it does not know the size. What a graph of DTensors
has are meshes and process groups, which hold none."""


@dataclass(frozen=True)
class Replacement:
    """One's own kernel wherever a graph computes a pattern. The model's source stays as it is.

    The pattern is looked for in the joint graph of forward and backward, so the kernel brings its own gradient (a
    ``torch.library`` operator with ``register_autograd``, say), and in graphs without gradients.

    Attributes:
        pattern: a function of tensors in plain PyTorch. What is matched are the ATen operators that it becomes.
        kernel: a function of the same tensors that returns the same, and that AOT Autograd can trace.
        example: tensors to trace both with. Their shapes and device do not matter, their number of dimensions and dtypes may.
        gradient: the kernel has a gradient. Without one it is used in inference only.
    """

    pattern: Callable[..., Any]
    kernel: Callable[..., Any]
    example: tuple[Tensor, ...]
    gradient: bool = True


class Backend:
    """A Dynamo backend with a memory budget, graph passes, replacements and a record, all of this instance alone.

    Args:
        activation_memory_budget: 1 keeps what min-cut finds fastest, 0 recomputes everything in the backward but what is
            random, as checkpointing the whole graph would; between them the dearest to recompute is kept, up to this share of
            memory. Up to a quarter, our kernel computes the backward of cuDNN's attention where key-value heads are shared,
            without a workspace, and gated MLPs have their backward in parts; unless there are replacements, of which one may
            be part of them. At every budget, and under the same condition, GELU's gradient and that of the bias before it
            are one kernel. Our attention writes gradients side by side where they would be concatenated.
        passes: called in order with each graph of ATen and ``oslo_fusion::`` operators, forward and backward apart, just
            before Inductor generates its code. They change the graph in place.
        replacements: one's own kernels in place of patterns.
        record: where each compiled graph is written down; by default a new one.
        compiler: ``inductor``; or ``eager`` to run the partitioned graphs as they are, which compiles faster and is for
            tests and debugging. ``passes`` are then not run.

    Raises:
        ConfigError: an argument is unusable.
    """

    def __init__(
        self,
        activation_memory_budget: float = 1.0,
        *,
        passes: Sequence[GraphPass] = (),
        replacements: Sequence[Replacement] = (),
        record: Record | None = None,
        compiler: str = "inductor",
    ) -> None:
        if compiler not in COMPILERS:
            raise ConfigError(f"compiler: received {compiler!r}. Allowed: {', '.join(COMPILERS)}. Remedy: compiler='inductor'.")
        self.activation_memory_budget = MemoryEfficientFusion(activation_memory_budget).activation_memory_budget
        self.record = record if record is not None else Record()
        self.compiler = compiler
        own = (shorten_error_functions, join_gradients)
        last = _graph_pass(*passes, *own, name="" if passes else " ".join(function.__name__ for function in own))
        self._patches: dict[str, Any] = {"post_grad_custom_pre_pass": last}
        self._replaces = bool(replacements)
        if replacements:
            self._patches["joint_custom_pre_pass"] = _graph_pass(_matcher(replacements))
        if self.activation_memory_budget < 1:
            self._patches["joint_custom_post_pass"] = _graph_pass(keep_random_numbers, name=keep_random_numbers.__name__)

    def __call__(self, graph: fx.GraphModule, example_inputs: Sequence[Any], program: str = "") -> Callable[..., Any]:
        """Compile one graph. Dynamo calls this; ``program`` names in the record what the graph is part of."""
        from torch._functorch import config as functorch_config

        compile_fx = load_inductor()
        simplify_masks(graph)
        written = _describe(graph, program)
        inner: dict[str, Any] = {"inner_compile": _as_it_is} if self.compiler == "eager" else {}
        patches = dict(self._patches)
        if _on_a_cpu(example_inputs):
            # Inductor draws a CPU's random numbers one by one. torch's own generator is faster (a step of a small GPT with
            # dropout on one core: 46 → 36 ms, uncompiled 41), and drops what the uncompiled model would.
            patches["fallback_random"] = True
        start = time.perf_counter()
        spares = self.activation_memory_budget <= CUT_AT and not self._replaces
        parts = cut_gated_mlps(graph) if spares else Parts()
        workspaces = spare_cudnn_workspaces(graph) if spares else 0
        fused = 0 if self._replaces else fuse_feed_forwards(graph)
        # At exactly 0 the partitioner forgets what must be kept; the smallest budget above it gives the same otherwise.
        budget = max(self.activation_memory_budget, 1e-9)
        partition = {name: value for name, value in _PARTITION.items() if hasattr(functorch_config, name)}
        with functorch_config.patch(**partition, activation_memory_budget=budget):
            compiled: Any = compile_fx(graph, example_inputs, config_patches=patches or None, **inner)
        done = written(time.perf_counter() - start)
        self.record.graphs.append(replace(done, parts=parts.cut, whole=parts.whole, workspaces=workspaces, feed_forwards=fused))
        return compiled  # type: ignore[no-any-return]


def load_inductor() -> Callable[..., Any]:
    """Import the compiler, and let it start the processes in which it compiles Triton kernels, which takes them seconds.

    torch does so where its own backend is asked for the first graph, and then compiles the first kernels itself, one by one.
    """
    from torch._inductor import async_compile

    if torch.cuda.is_available() and hasattr(async_compile, "maybe_warm_pool"):
        async_compile.maybe_warm_pool()
    from torch._inductor.compile_fx import compile_fx

    return compile_fx


def dynamo_backend(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """``torch.compile(model, backend="oslo_fusion", options={"activation_memory_budget": 0.5})``: the entry point's function.

    Raises:
        ConfigError: an option is unknown or out of range.
    """
    given = dict(options or {})
    budget = given.pop("activation_memory_budget", 1.0)
    if given:
        raise ConfigError(
            f"options: received {', '.join(given)}. Allowed: activation_memory_budget. Remedy: "
            "options={'activation_memory_budget': 0.5}."
        )
    return Backend(budget)(graph, example_inputs)


def compiler_failure(error: Exception) -> str:
    """Why the compiler failed, in short; empty for any other error, of which the model's own code or memory is the cause."""
    from torch._dynamo.exc import BackendCompilerFailed

    if not isinstance(error, BackendCompilerFailed):
        return ""
    cause = error.inner_exception
    if isinstance(cause, (torch.OutOfMemoryError, MemoryError, OsloFusionError)):
        return ""
    return f"{type(cause).__name__}: {_in_short(str(cause))}"


@contextlib.contextmanager
def breaks_noticed(record: Record) -> Iterator[None]:
    """Complete the record with what Dynamo counts but does not hand to its backend.

    A break before the first operator leaves no graph, and a graph that ends in a block that cannot be resumed does not say why.
    """
    from torch._dynamo.utils import counters

    before, known = Counter(counters["graph_break"]), len(record.graphs)
    yield
    unexplained: Counter[str] = Counter()
    for reason, count in (Counter(counters["graph_break"]) - before).items():
        unexplained[_in_short(reason)] += count
    for graph in record.graphs[known:]:
        if graph.ended_by is not None:
            unexplained.pop(graph.ended_by.reason, None)
    for index, graph in enumerate(record.graphs[known:], known):
        if unexplained and graph.ended_by is not None and graph.ended_by.reason == _UNSUPPORTED:
            reason = next(iter(unexplained))
            unexplained -= Counter([reason])
            record.graphs[index] = replace(graph, ended_by=replace(graph.ended_by, reason=reason))
    record.silent_breaks += map(Break, unexplained)


def _describe(graph: fx.GraphModule, program: str) -> Callable[[float], Graph]:
    """What is known of a graph before it is compiled, which uses it up."""
    ended: Any = getattr(graph, "compile_subgraph_reason", None)
    broken = None
    if ended is not None and ended.graph_break:
        # The stack goes from the outermost caller to the line that broke.
        frame = ended.user_stack[-1] if ended.user_stack else None
        broken = Break(_in_short(ended.reason), frame.filename if frame else "", (frame.lineno or 0) if frame else 0)
    operators = sum(node.op.startswith("call") for node in graph.graph.nodes)
    identity = torch._guards.CompileContext.current_compile_id()
    version = (identity.frame_compile_id if identity is not None else None) or 0
    reason = _recompile_reason() if version else ""
    return lambda seconds: Graph(program, operators, seconds, version, reason, broken)


def _recompile_reason() -> str:
    from torch._dynamo import utils

    try:
        reason = utils.get_metrics_context()._metrics.get("recompile_reason")
    except AttributeError:
        return ""
    return _in_short(str(reason)) if reason else ""


def _in_short(text: str) -> str:
    """Dynamo's first line, and of its many others the explanation."""
    if text.startswith("generic_jump"):
        return "a branch that depends on a tensor's value"
    lines = [line.strip() for line in text.strip().splitlines()] or [""]
    explanations = [line.removeprefix("Explanation:").strip() for line in lines if line.startswith("Explanation:")]
    return ": ".join([lines[0], *explanations[:1]])[:300]


def _as_it_is(graph: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
    def run(arguments: list[Any]) -> Any:
        taken = list(arguments)
        arguments.clear()  # what Inductor's calling convention promises: nothing but the graph holds the inputs
        return graph(*taken)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _on_a_cpu(example_inputs: Sequence[Any]) -> bool:
    return all(x.device.type == "cpu" for x in example_inputs if isinstance(x, Tensor))


def keep_random_numbers(graph: fx.Graph) -> None:
    """A pass over a joint graph, before it is cut: what is random is kept for the backward, whatever the budget.

    Below a budget of 1 the partitioner of torch 2.11 to 2.13 takes drawing again for recomputing: the backward would drop other
    elements than the forward did, and every gradient before a dropout would be wrong. Inductor draws one seed per mask, so what
    is kept is small.
    """
    from torch.utils.checkpoint import CheckpointPolicy

    for node in graph.nodes:
        tags = getattr(node.target, "tags", ()) if node.op == "call_function" else ()
        if torch.Tag.nondeterministic_seeded in tags and "recompute" not in node.meta and _draws(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _draws(node: fx.Node) -> bool:
    """Attention counts as random, but is so with dropout only."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return "dropout_p" not in names or given.get("dropout_p", 0.0) != 0


def _graph_pass(*functions: GraphPass, name: str = "") -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Passes(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for function in functions:
                function(graph)

        def uuid(self) -> str | None:
            """The name of our own; nothing tells a user's functions apart for good, so they prevent caching on disk."""
            return f"oslo_fusion {name}" if name else None

    return Passes()


def _matcher(replacements: Sequence[Replacement]) -> GraphPass:
    from torch._inductor.pattern_matcher import (
        PatternMatcherPass,
        fwd_only,
        joint_fwd_bwd,
        register_replacement,
        stable_topological_sort,
    )

    patterns = PatternMatcherPass(pass_name="oslo_fusion_replacements")
    for replacement in replacements:
        traced: list[tuple[Any, bool]] = [(fwd_only, False)]
        if replacement.gradient:
            traced.append((joint_fwd_bwd, True))
        for trace, gradient in traced:
            example = [t.detach().requires_grad_(gradient and t.is_floating_point()) for t in replacement.example]
            register_replacement(replacement.pattern, replacement.kernel, example, trace, [patterns])

    def apply(graph: fx.Graph) -> None:
        # What an operator keeps of its own result (tanh, a sigmoid) reaches the backward by an alias; no pattern has one.
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0], delete_user_cb=lambda user: user.op != "output")
            if not node.users:
                graph.erase_node(node)
        if patterns.apply(graph):
            stable_topological_sort(graph)  # a replacement stands where its pattern began, before some of its inputs

    return apply
