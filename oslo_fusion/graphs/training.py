"""Forward and backward of a module, captured as one CUDA graph each, per shape of its inputs.

A training step of a small model waits for the host: T5-base 32×512+512 on one NVIDIA H200, all compiled, has 77 ms of kernels
in 2,100 launches, and Python needs 98 ms to launch them. Replaying a graph costs the host one call.

What a graph reads and writes lies at fixed addresses, so the care that others leave to the caller is taken here:

- Inputs and the gradient of the output are copied in, results and gradients are handed out as copies: nothing that a caller
  keeps (hidden states, ``.grad`` over several steps of accumulation) is overwritten by the next replay.
- What a forward keeps for its backward lies in the graphs' own memory, which all shapes of a module share. While a forward
  waits for its backward, another call runs as it did before, uncaptured; a second backward through one forward is an error.
- Parameters are read where they lie, so an optimizer's update in place is seen. If one lies elsewhere than when the graphs were
  captured, or a part of the module is another, or a number or a flag on one (the probability of a dropout), they are captured
  again.

Random numbers go on from replay to replay: torch's generator gives a graph its offset when it is replayed.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Function = Callable[..., Any]
Note = Callable[[str], None]

WARM_CALLS = 2
"""Calls with a shape before it is captured: they compile, and settle what is chosen at a first call."""

MOST_SHAPES = 16
"""Shapes that are captured of one module. Each keeps its own inputs, results and gradients; what lies between is shared."""

MOST_CAPTURES = 8
"""How often a shape is captured. What has to be captured more often changes all the time, and gains nothing."""

_generation = [0]
_REQUIRES_GRAD: Callable[[Tensor], bool] = cast(Any, Tensor).requires_grad.__get__


class TrainingGraphs:
    """The captured forms of one module's function, for training; made at run time, never pickled.

    Args:
        most_shapes: further shapes run uncaptured.
    """

    def __init__(self, most_shapes: int = MOST_SHAPES) -> None:
        self.most_shapes = most_shapes
        self._pairs: dict[Hashable, Pair] = {}
        self._memory = Memory()
        self._state: State | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.most_shapes,)

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingGraphs:
        return type(self)(self.most_shapes)

    @property
    def captured(self) -> int:
        """How many shapes are captured now."""
        return sum(pair.captured is not None for pair in self._pairs.values())

    def look_ahead(self) -> State | None:
        """The state of the module that was captured last, if it is that now and has no hooks on its parts.

        A call that is given it need not look again.
        """
        state = self._state
        return state if state is not None and not state.is_hooked and state.is_current else None

    def run(self, function: Function, module: nn.Module, args: Any, kwargs: Any, note: Note, ahead: State | None = None) -> Any:
        """``function(*args, **kwargs)``, replayed where that can be done.

        Args:
            function: of tensors and plain values, the gradient of whose results reaches ``module``'s parameters.
            module: whose parameters are read.
            args, kwargs: its arguments.
            note: is told why a call runs uncaptured.
            ahead: what :meth:`look_ahead` found, if nothing was done to the module since.
        """
        leaves, spec = _flattened(args, kwargs)
        device = next(module.parameters()).device if ahead is None else ahead.device
        key, reason = _key(device, leaves, spec)
        if key is None:
            note(reason)
            return function(*args, **kwargs)
        pair = self._pairs.get(key)
        if pair is None:
            if len(self._pairs) >= self.most_shapes:
                note(f"{self.most_shapes} shapes are captured as CUDA graphs; calls of others run uncaptured")
                return function(*args, **kwargs)
            pair = self._pairs[key] = Pair(leaves, spec, self._memory)
        if pair.failure or pair.calls < WARM_CALLS:
            pair.calls += 1
            return function(*args, **kwargs)
        if self._memory.waits:
            note("a forward was called while another waits for its backward: it runs outside of the CUDA graph")
            return function(*args, **kwargs)
        captured = pair.captured
        if captured is None or not (captured.state.is_known(ahead) or captured.state.is_current):
            captured = pair.capture(function, module, leaves)
            if captured is None:
                note(f"it cannot be captured as a CUDA graph: {pair.failure}")
                return function(*args, **kwargs)
            # Shapes that were captured of the same module have one state, so that one look ahead serves whichever comes.
            if self._state is not None and self._state.is_current:
                captured.state = self._state
            self._state = captured.state
        return pair.replay(captured, leaves)


class Memory:
    """Where the graphs of one module's shapes keep what their forwards leave for their backwards: one after the other.

    So one of them at a time may stand between forward and backward, and shapes cost little memory but the first.
    """

    def __init__(self) -> None:
        self._place: tuple[Any, torch.cuda.Stream] | None = None
        self._token: weakref.ref[Token] | None = None

    def place(self, device: torch.device) -> tuple[Any, torch.cuda.Stream]:
        """The pool that torch's allocator takes the memory from, and the stream to capture on.

        The allocator gives memory that was used on one stream to no other. And torch's own stream for captures is of whichever
        device was captured on first.
        """
        if self._place is None or self._place[1].device != device:
            self._place = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        return self._place

    def leave(self) -> None:
        """A capture failed, and the allocator may hold its pool for one that goes on: later ones take another."""
        self._place = None

    @property
    def waits(self) -> bool:
        """Whether a forward was replayed, and its backward may still come."""
        return self._token is not None and self._token() is not None

    def take(self) -> Token:
        """A forward is replayed: its backward may come while the token lives."""
        token = Token()
        self._token = weakref.ref(token)
        return token

    def give_back(self, token: Token) -> bool:
        """The backward of this token's forward begins; False if it has been, or another forward has the memory."""
        held = self._token is not None and self._token() is token
        if held:
            self._token = None
        return held


class _Flat(NamedTuple):
    """How arguments are put together that hold no others: how many come without a name, and the names of the rest."""

    unnamed: int
    names: tuple[str, ...]


_LEAVES = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, str, torch.dtype})


def _flattened(args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """As pytree does it, which takes 0.1 ms for ten arguments while the device may wait. Most calls have nothing to flatten."""
    leaves = [*args, *kwargs.values()]
    if _LEAVES.issuperset(map(type, leaves)):
        return leaves, _Flat(len(args), tuple(kwargs))
    return pytree.tree_flatten((args, kwargs))


def _unflattened(leaves: Sequence[Any], spec: Any) -> tuple[Any, Any]:
    if not isinstance(spec, _Flat):
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return args, kwargs
    return tuple(leaves[: spec.unnamed]), dict(zip(spec.names, leaves[spec.unnamed :], strict=True))


def _key(device: torch.device, leaves: Sequence[Any], spec: Any) -> tuple[Hashable | None, str]:
    """What a captured form serves; or None, and why there can be none."""
    parts: list[Hashable] = [spec]
    numbers: dict[int, int] = {}
    for leaf in leaves:
        if type(leaf) is Tensor or type(leaf) is nn.Parameter:
            if leaf.device != device:
                return None, f"an input is on {leaf.device}, not on {device}: it is not captured as a CUDA graph"
            if any(size > 1 and stride == 0 for size, stride in zip(leaf.shape, leaf.stride(), strict=True)):
                return None, "an input is expanded: it is not captured as a CUDA graph"
            number = numbers.setdefault(id(leaf), len(numbers))
            parts.append((number, leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad))
        elif leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype)):
            parts.append((type(leaf), leaf))
        else:
            return None, f"an input is a {type(leaf).__name__}: it is not captured as a CUDA graph"
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return None, "no input is a tensor: it is not captured as a CUDA graph"
    return tuple(parts), ""


class State:
    """What a module's graphs have read of it and were made for: they serve it while it is that.

    Asked at every call while the device waits, hence by the dictionaries that hold it, as walking over a module's parts takes 1
    to 2 ms; and by whole columns and tuples, with no Python for each of the 1,300 things that BERT-base has.

    Args:
        module: as its graphs know it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.generation = _generation[0]
        parts = list(module.modules())
        holders = [holder for part in parts for holder in (part._parameters, part._buffers) if holder]
        self._holders: list[dict[str, Any]] = cast("list[dict[str, Any]]", holders)
        self._tensors = _values(self._holders)
        self._read = [tensor for tensor in self._tensors if tensor is not None]
        self._addresses = list(map(Tensor.data_ptr, self._read))
        self._trained = list(map(_REQUIRES_GRAD, self._read))
        self._parents = [cast("dict[str, Any]", part._modules) for part in parts if part._modules]
        self._children = _values(self._parents)
        self._settings = [(part.__dict__, getter) for part in parts if (getter := _getter(part.__dict__)) is not None]
        self._numbers = [getter(held) for held, getter in self._settings]
        self._hooks = [part.__dict__[name] for part in parts[1:] for name in _HOOKS]

    @property
    def device(self) -> torch.device:
        """The device of its tensors, which is one."""
        device: torch.device = self._read[0].device
        return device

    @property
    def is_hooked(self) -> bool:
        """Whether anything listens to a part that the module had. It has no others where it is current."""
        return any(self._hooks)

    def is_known(self, ahead: State | None) -> bool:
        """Whether it was looked at ahead. A capture that failed since, of another part, leaves nothing to replay."""
        return ahead is self and self.generation == _generation[0]

    @property
    def is_current(self) -> bool:
        """Whether the module's tensors are those that the graphs read, where they lay, and its parts and settings what they
        were."""
        if self.generation != _generation[0]:
            return False
        # Tensors and parts by identity, as two tensors that are equal lie elsewhere.
        for holders, then in ((self._holders, self._tensors), (self._parents, self._children)):
            now = _values(holders)
            if len(now) != len(then) or not all(map(operator.is_, now, then)):
                return False
        if list(map(Tensor.data_ptr, self._read)) != self._addresses or list(map(_REQUIRES_GRAD, self._read)) != self._trained:
            return False
        try:
            return [getter(held) for held, getter in self._settings] == self._numbers
        except Exception:  # one is gone, or is an array of several numbers now, or whatever else is not a number
            return False


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _values(holders: Sequence[dict[str, Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(map(dict.values, holders)))


def _getter(held: dict[str, Any]) -> Callable[[dict[str, Any]], Any] | None:
    """What looks the numbers and flags up that a part holds."""
    names = [name for name, x in held.items() if isinstance(x, (bool, int, float))]
    return operator.itemgetter(*names) if names else None


@dataclass
class Captured:
    """Both graphs of a pair, and the memory that they read and write.

    Attributes:
        forward, backward: the graphs.
        inputs: tensors among the arguments, unknown to autograd.
        results: of the function, flattened, as they lie in the graph's memory; ``spec`` puts them together.
        outputs: those of them that have a gradient, and ``output_gradients`` what the backward reads.
        wanted: numbers of the inputs that get a gradient.
        parameters: those that get one.
        gradients: of both, in this order.
        state: of the module.
    """

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    results: list[Any]
    spec: Any
    is_output: list[bool]
    outputs: list[Tensor]
    output_gradients: list[Tensor]
    wanted: list[int]
    parameters: list[nn.Parameter]
    gradients: tuple[Tensor | None, ...]
    state: State


class Pair:
    """Forward and backward of one shape.

    Args:
        leaves, spec: the flattened arguments of a call.
        memory: of all shapes of the module.
    """

    def __init__(self, leaves: Sequence[Any], spec: Any, memory: Memory) -> None:
        self.spec, self.memory = spec, memory
        self.places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        numbers: dict[int, int] = {}
        self.distinct = [index for index in self.places if numbers.setdefault(id(leaves[index]), index) == index]
        self.calls = 0
        self.captures = 0
        self.failure = ""
        self.captured: Captured | None = None

    def capture(self, function: Function, module: nn.Module, leaves: Sequence[Any]) -> Captured | None:
        """Capture both, on copies of these inputs; on failure say why in :attr:`failure`. Arguments: as of
        :meth:`TrainingGraphs.run`."""
        self.captured = None  # the memory of earlier graphs is free first
        self.captures += 1
        if self.captures > MOST_CAPTURES:
            self.failure = f"its parameters or settings have changed {MOST_CAPTURES} times"
            return None
        device = leaves[self.places[0]].device
        try:
            with torch.cuda.device(device):
                self.captured = self._capture(function, module, leaves, device)
        except Exception as error:  # whatever cannot be captured runs as it did
            self.failure = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            self.memory.leave()
            _release_generator(device)
        return self.captured

    def _capture(self, function: Function, module: nn.Module, leaves: Sequence[Any], device: torch.device) -> Captured:
        read = [
            (holder, name, tensor)
            for part in module.modules()
            for holder in cast("tuple[dict[str, Any], ...]", (part._parameters, part._buffers))
            for name, tensor in holder.items()
            if tensor is not None
        ]
        parameters = [p for p in module.parameters() if p.requires_grad]
        filled, copies = list(leaves), dict[int, Tensor]()
        for place in self.places:  # one tensor given twice stays one: compiled code is specialised to that
            given = leaves[place]
            if id(given) not in copies:
                copies[id(given)] = _like(given).copy_(given.detach()).requires_grad_(given.requires_grad)
            filled[place] = copies[id(given)]
        inputs = list(copies.values())
        args, kwargs = _unflattened(filled, self.spec)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        pool, stream = self.memory.place(device)
        torch.cuda.synchronize(device)
        aliases = {id(tensor): _alias(tensor) for _, _, tensor in read}
        try:
            for holder, name, tensor in read:
                holder[name] = aliases[id(tensor)]
            with torch.cuda.graph(forward, pool=pool, stream=stream):
                result = function(*args, **kwargs)
        finally:
            for holder, name, tensor in read:
                holder[name] = tensor
        results, spec = pytree.tree_flatten(result)
        is_output = [isinstance(x, Tensor) and x.requires_grad for x in results]
        outputs = [x for x, mine in zip(results, is_output, strict=True) if mine]
        output_gradients = [torch.zeros_like(x) for x in outputs]
        wanted = [index for index, t in enumerate(inputs) if t.requires_grad]
        sources = [*(inputs[index] for index in wanted), *(aliases[id(p)] for p in parameters)]
        with torch.cuda.graph(backward, pool=pool, stream=stream):
            gradients = torch.autograd.grad(outputs, sources, output_gradients, allow_unused=True)
        return Captured(
            forward,
            backward,
            [x.detach() for x in inputs],
            # autograd's graph went with the backward; what the forward kept lies in the graphs' memory.
            [x.detach() if isinstance(x, Tensor) else x for x in results],
            spec,
            is_output,
            [x.detach() for x in outputs],
            output_gradients,
            wanted,
            parameters,
            gradients,
            State(module),
        )

    def replay(self, captured: Captured, leaves: Sequence[Any]) -> Any:
        """The forward on these inputs; its backward follows with autograd."""
        given = [leaves[place] for place in self.distinct]
        # Replayed before autograd is told: noting 200 parameters takes it 0.15 ms, for which the device need not wait.
        token = self.forward(captured, given)
        outputs = iter(_Replay.apply(self, captured, token, *given, *captured.parameters))
        results = [
            next(outputs) if mine else x.clone() if isinstance(x, Tensor) else x
            for x, mine in zip(captured.results, captured.is_output, strict=True)
        ]
        return pytree.tree_unflatten(results, captured.spec)

    def forward(self, captured: Captured, given: Sequence[Tensor]) -> Token:
        """Replay the forward; its backward may come while the token lives."""
        for place, tensor in zip(captured.inputs, given, strict=True):
            place.copy_(tensor.detach())
        token = self.memory.take()
        captured.forward.replay()
        return token

    def backward(self, captured: Captured, token: Token, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Replay the backward.

        Returns:
            A gradient of each input and of each parameter.

        Raises:
            RuntimeError: what the forward kept is not there any more.
        """
        if captured is not self.captured or not self.memory.give_back(token):
            raise RuntimeError(
                "memory_efficient_fusion.cuda_graphs: a second backward through one forward, whose memory the first one used. "
                "Remedy: call the model again, or cuda_graphs: false."
            )
        for place, gradient in zip(captured.output_gradients, gradients, strict=True):
            if gradient is None:
                place.zero_()
            else:
                place.copy_(gradient)
        captured.backward.replay()
        found = _copies(captured.gradients)
        of_inputs: list[Tensor | None] = [None] * len(captured.inputs)
        for index, of_input in zip(captured.wanted, found, strict=False):
            of_inputs[index] = of_input
        return (*of_inputs, *found[len(captured.wanted) :])


def _copies(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A copy of each, by few launches: BERT has 200 gradients, and one by one their copies take 0.9 ms of the device."""
    copies = [None if x is None else torch.empty_like(x) for x in tensors]
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for copy, x in zip(copies, tensors, strict=True):
        if copy is not None and x is not None:
            targets, sources = by_dtype.setdefault(x.dtype, ([], []))
            targets.append(copy)
            sources.append(x)
    for targets, sources in by_dtype.values():
        torch._foreach_copy_(targets, sources)
    return copies


def _release_generator(device: torch.device) -> None:
    """After a capture that failed the state of torch's generator still counts for a graph, and refuses every draw and replay.

    Another state takes its place, and what was captured with the first one is captured again.
    """
    _generation[0] += 1
    generator = torch.cuda.default_generators[device.index or 0]
    generator.graphsafe_set_state(generator.clone_state())


class Token:
    """Lives as long as a forward's node in autograd's graph."""


def _alias(tensor: Tensor) -> Tensor:
    """The same memory, unknown to autograd.

    A parameter that is used elsewhere in the same step, T5's embedding say, has a node in autograd's graph already, which
    belongs to the stream it was made on. A gradient for it would make that stream wait for one that is being captured, which
    cannot be.
    """
    found = tensor.detach()
    return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


class _Replay(torch.autograd.Function):
    """A forward that was replayed, with inputs and parameters as what its backward gives gradients to."""

    @staticmethod
    def forward(ctx: Any, pair: Pair, captured: Captured, token: Token, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.pair, ctx.captured, ctx.token = pair, captured, token
        ctx.set_materialize_grads(False)
        return tuple(x.clone() for x in captured.outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return None, None, None, *ctx.pair.backward(ctx.captured, ctx.token, gradients)
