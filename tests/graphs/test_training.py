"""Forward and backward captured as CUDA graphs: the answers of the uncaptured function, whatever the caller does between."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from oslo_fusion import initialize, report
from oslo_fusion.graphs import State, TrainingGraphs, training
from oslo_fusion.graphs.training import WARM_CALLS, Captured
from oslo_fusion.models import build_model
from oslo_fusion.workload import switch_off_dropout

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


class Two(nn.Module):
    """Two results, one without a gradient."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.dropout = nn.Linear(16, 32), nn.Linear(32, 16), nn.Dropout(dropout)

    def forward(self, x: Tensor, flag: bool = True) -> dict[str, Any]:
        hidden = self.dropout(torch.relu(self.first(x)))
        return {"result": self.second(hidden), "mask": hidden > 0 if flag else None}


class Chain(nn.Module):
    """Enough layers for what they keep to be most of the memory."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Two() for _ in range(length))

    def forward(self, x: Tensor) -> dict[str, Any]:
        for part in self.parts:
            x = part(x)["result"]
        return {"result": x}


class Runner:
    """A module, its graphs, and what was noted."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        self.module, self.graphs, self.notes = module, TrainingGraphs(**options), list[str]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.graphs.run(self.module, self.module, args, kwargs, self.notes.append)

    def warm(self, *args: Any) -> None:
        for _ in range(WARM_CALLS):
            self(*args)["result"].sum().backward()
        self.module.zero_grad()
        for x in args:
            x.grad = None


def answers(call: Any, module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    result = call(x)["result"]
    result.square().sum().backward()
    return [result.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


def test_copies_and_pickles_begin_without_graphs() -> None:
    graphs = TrainingGraphs(3)
    for other in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert other.most_shapes == 3
        assert other.captured == 0


def test_what_is_no_tensor_and_no_number_runs_as_it_was() -> None:
    class Other:
        pass

    class Adding(nn.Linear):
        def forward(self, x: Tensor, other: Other | None = None) -> Tensor:
            return x + 1

    run = Runner(Adding(1, 1))
    torch.testing.assert_close(run(torch.ones(2), Other()), torch.full((2,), 2.0))
    torch.testing.assert_close(run(torch.ones(1).expand(2)), torch.full((2,), 2.0))
    assert "a Other" in run.notes[0]
    assert "expanded" in run.notes[1]


def test_what_a_graph_has_read_is_compared_before_a_replay() -> None:
    module = Two(0.5)
    module.register_buffer("counts", torch.zeros(1))
    state = State(module)
    assert state.is_current
    module.dropout.p = 0.25
    assert not state.is_current
    module.dropout.p = 0.5
    assert state.is_current
    module.second.eval()
    assert not state.is_current
    module.train()
    module.dropout.p = torch.tensor([0.5, 0.5])  # type: ignore[assignment]
    assert not state.is_current
    del module.dropout.p
    assert not state.is_current
    module.dropout.p = 0.5
    second, module.second = module.second, nn.Linear(32, 16)
    assert not state.is_current
    module.second = second
    assert state.is_current
    module.counts = torch.zeros(1)  # equal, and elsewhere
    assert not state.is_current
    state = State(module)
    module.first.weight.requires_grad_(False)
    assert not state.is_current
    module.first.weight.requires_grad_(True)
    assert state.is_current
    module.first.weight.data = module.first.weight.data.clone()
    assert not state.is_current
    state = State(module)
    module.first.bias = None
    assert not state.is_current


def test_hooks_on_parts_are_seen() -> None:
    module = Two()
    state = State(module)
    own = module.register_forward_hook(lambda *_: None)  # called around what is replayed
    assert not state.is_hooked
    own.remove()
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(module.second, f"register_{register}")(lambda *_: None)
        assert state.is_hooked
        handle.remove()
        assert not state.is_hooked


def test_one_look_ahead_serves_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was looked at is not looked at again; but what was captured of another state is."""
    module, looks = Two(), list[int]()

    def capture(self: training.Pair, function: Any, of: nn.Module, leaves: Any) -> Captured:
        nothing: Any = None
        self.captured = Captured(*[nothing] * 2, [], [], None, [], [], [], [], [], (), State(of))
        return self.captured

    current = State.is_current.fget
    assert current is not None
    monkeypatch.setattr(training, "WARM_CALLS", 0)
    monkeypatch.setattr(training.Pair, "capture", capture)
    monkeypatch.setattr(training.Pair, "replay", lambda self, captured, leaves: captured)
    monkeypatch.setattr(State, "is_current", property(lambda self: looks.append(1) or current(self)))
    graphs = TrainingGraphs()

    def run(size: int, ahead: State | None) -> Captured:
        found: Captured = graphs.run(module, module, (torch.ones(size, 16),), {"flag": True}, pytest.fail, ahead)
        return found

    assert graphs.look_ahead() is None
    first, second = run(1, None), run(2, None)
    assert first.state is second.state
    state = graphs.look_ahead()
    assert state is first.state
    looks.clear()
    assert [run(1, state), run(2, state)] == [first, second]
    assert not looks
    assert run(1, None) is first
    assert looks
    hook = module.second.register_forward_hook(lambda *_: None)
    assert graphs.look_ahead() is None
    hook.remove()
    module.second.eval()
    assert graphs.look_ahead() is None
    third = run(1, None)
    assert third.state is not first.state
    assert graphs.look_ahead() is third.state
    looks.clear()
    assert run(2, third.state) is not second  # captured before
    assert looks
    monkeypatch.setattr(training, "_generation", [training._generation[0] + 1])  # a capture failed since
    assert run(1, third.state) is not third


def test_arguments_that_hold_no_others_are_put_together_as_pytree_does() -> None:
    x = torch.ones(1)
    for args, kwargs in (((), {}), ((x, None), {}), ((x,), {"a": 1, "b": x}), (([x],), {"a": 1}), ((), {"a": {"b": x}})):
        leaves, spec = training._flattened(args, kwargs)
        assert all(a is b for a, b in zip(leaves, pytree.tree_leaves((args, kwargs)), strict=True))
        found_args, found_kwargs = training._unflattened(leaves, spec)
        assert (repr(found_args), repr(found_kwargs)) == (repr(args), repr(kwargs))
    specs = [training._flattened(*given)[1] for given in (((1, 2), {}), ((1,), {"a": 2}), ((1,), {"b": 2}))]
    assert len(set(specs)) == 3


class Computing:
    """Stands for a graph: does at a replay what it was made of."""

    def __init__(self, replay: Callable[[], object]) -> None:
        self.replay = replay


def test_the_forward_is_replayed_before_autograd_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module, log = nn.Linear(3, 2, bias=False), list[str]()
    x = torch.randn(4, 3, requires_grad=True)
    place, out, dout, dx, dw = (torch.full(s, torch.nan) for s in ((4, 3), (4, 2), (4, 2), (4, 3), (2, 3)))
    weight = module.weight.detach()

    def forward() -> None:
        log.append("replay")
        torch.mm(place, weight.t(), out=out)

    def backward() -> None:
        torch.mm(dout, weight, out=dx)
        torch.mm(dout.t(), place, out=dw)

    def told(*args: Any) -> Any:
        log.append("autograd")
        return real(*args)

    real = training._Replay.apply
    monkeypatch.setattr(training._Replay, "apply", told)
    leaves, spec = pytree.tree_flatten(((x,), {}))
    _, result_spec = pytree.tree_flatten(out)
    pair = training.Pair(leaves, spec, training.Memory())
    graphs: Any = (Computing(forward), Computing(backward))
    pair.captured = captured = Captured(
        *graphs, [place], [out], result_spec, [True], [out], [dout], [0], [module.weight], (dx, dw), State(module)
    )
    result = pair.replay(captured, leaves)
    assert log == ["replay", "autograd"]
    assert pair.memory.waits
    result.square().sum().backward(retain_graph=True)
    assert not pair.memory.waits
    found = x.grad, module.weight.grad
    x.grad = module.weight.grad = None
    expected = module(x)
    expected.square().sum().backward()
    torch.testing.assert_close([result, *found], [expected, x.grad, module.weight.grad])
    with pytest.raises(RuntimeError, match="a second backward"):
        result.sum().backward()
    result = pair.replay(captured, leaves)
    assert pair.memory.waits
    del result
    assert not pair.memory.waits


@gpu
@needs_gpu
def test_another_dropout_is_seen() -> None:
    module = Two(0.5).cuda()
    run = Runner(module)
    x = torch.randn(64, 16, device="cuda", requires_grad=True)
    run.warm(x)
    run(x)
    module.dropout.p = 0.0
    torch.testing.assert_close(answers(run, module, x), answers(module, module, x))


@gpu
@needs_gpu
def test_replays_give_the_answers_of_the_function() -> None:
    torch.manual_seed(0)
    module = Two().cuda()
    run = Runner(module)
    for _ in range(WARM_CALLS + 3):
        x = torch.randn(8, 16, device="cuda")
        for ours, theirs in zip(answers(run, module, x), answers(module, module, x), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert run.graphs.captured == 1
    assert not run.notes


@gpu
@needs_gpu
def test_updates_in_place_and_moved_parameters_are_seen() -> None:
    module = Two().cuda()
    run = Runner(module)
    x = torch.randn(8, 16, device="cuda")
    run.warm(x.requires_grad_())
    answers(run, module, x)
    with torch.no_grad():
        module.first.weight.mul_(2.0)
    torch.testing.assert_close(answers(run, module, x), answers(module, module, x))
    module.second.weight.data = module.second.weight.data.clone() * 3
    torch.testing.assert_close(answers(run, module, x), answers(module, module, x))


@gpu
@needs_gpu
def test_nothing_that_a_caller_keeps_is_overwritten() -> None:
    module = Two().cuda()
    run = Runner(module)
    inputs = [torch.randn(8, 16, device="cuda", requires_grad=True) for _ in range(3)]
    run.warm(inputs[0])
    kept = []
    for x in inputs:  # gradients are accumulated over three steps
        made = run(x)
        kept.append((made["result"].detach(), made["mask"], module(x)["result"].detach()))
        made["result"].square().sum().backward()
    ours = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    for x in inputs:
        module(x)["result"].square().sum().backward()
    torch.testing.assert_close(ours, [p.grad for p in module.parameters()])
    for result, mask, expected in kept:
        torch.testing.assert_close(result, expected)
        assert mask.dtype == torch.bool


@gpu
@needs_gpu
def test_two_forwards_before_a_backward() -> None:
    module = Two().cuda()
    run = Runner(module)
    a, b = (torch.randn(8, 16, device="cuda", requires_grad=True) for _ in range(2))
    run.warm(a)
    (run(a)["result"] * run(b)["result"]).sum().backward()
    ours = [a.grad.clone(), b.grad.clone(), *(p.grad.clone() for p in module.parameters())]
    module.zero_grad()
    a.grad = b.grad = None
    (module(a)["result"] * module(b)["result"]).sum().backward()
    torch.testing.assert_close(ours, [a.grad, b.grad, *(p.grad for p in module.parameters())])
    assert "outside of the CUDA graph" in run.notes[0]
    run.notes.clear()
    run(a)  # dropped without a backward: the next one may be replayed again
    run(b)
    assert not run.notes


@gpu
@needs_gpu
def test_a_tensor_given_twice_stays_one() -> None:
    module = Two().cuda()
    seen: list[bool] = []

    def function(a: Tensor, b: Tensor) -> Any:
        seen.append(a is b)
        return {"result": module(a)["result"] + b}

    x = torch.randn(8, 16, device="cuda", requires_grad=True)
    graphs = TrainingGraphs()
    for _ in range(WARM_CALLS + 2):
        x.grad = None
        graphs.run(function, module, (x, x), {}, lambda note: None)["result"].sum().backward()
    assert graphs.captured == 1
    assert all(seen)
    ours = x.grad
    (theirs,) = torch.autograd.grad(function(x, x)["result"].sum(), x)
    torch.testing.assert_close(ours, theirs)


@gpu
@needs_gpu
def test_a_second_backward_is_an_error() -> None:
    module = Two().cuda()
    run = Runner(module)
    x = torch.randn(8, 16, device="cuda", requires_grad=True)
    run.warm(x)
    loss = run(x)["result"].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@gpu
@needs_gpu
def test_shapes_have_graphs_of_their_own_up_to_a_number() -> None:
    module = Two().cuda()
    run = Runner(module, most_shapes=2)
    for size in (4, 8, 12):
        x = torch.randn(size, 16, device="cuda", requires_grad=True)
        run.warm(x)
        torch.testing.assert_close(answers(run, module, x), answers(module, module, x))
    assert run.graphs.captured == 2
    assert "2 shapes" in run.notes[0]


@gpu
@needs_gpu
def test_shapes_take_turns_in_one_memory() -> None:
    """The second shape keeps what it needs where the first did: both go on giving their answers, in any order."""
    chain = Chain(8).cuda()
    run = Runner(chain)
    inputs = [torch.randn(size, 16, device="cuda", requires_grad=True) for size in (1 << 15, 1 << 14)]
    used = []
    for x in inputs:
        run.warm(x)
        before = torch.cuda.memory_reserved()
        answers(run, chain, x)
        used.append(torch.cuda.memory_reserved() - before)
    for index in (0, 1, 1, 0, 1, 0):
        x = inputs[index] + index
        torch.testing.assert_close(answers(run, chain, x), answers(chain, chain, x))
    assert run.graphs.captured == 2
    assert used[1] < used[0] / 4, used
    (run(inputs[0])["result"].sum() + run(inputs[1])["result"].sum()).backward()
    assert "outside of the CUDA graph" in run.notes[0]


@gpu
@needs_gpu
def test_dropout_differs_from_replay_to_replay() -> None:
    module = Two(0.5).cuda()
    run = Runner(module)
    x = torch.randn(64, 16, device="cuda", requires_grad=True)
    run.warm(x)
    masks = [run(x)["mask"] for _ in range(4)]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


@gpu
@needs_gpu
def test_what_cannot_be_captured_runs_and_says_so() -> None:
    module = Two().cuda()
    plain = module.forward
    module.forward = lambda x: plain(x) if float(x.sum()) != 0.5 else {}  # type: ignore[assignment]
    run = Runner(module)
    x = torch.randn(8, 16, device="cuda", requires_grad=True)
    run.warm(x)
    torch.testing.assert_close(answers(run, module, x), answers(module, module, x))
    assert "cannot be captured" in run.notes[0]
    a, b = torch.randn(64, device="cuda"), torch.randn(64, device="cuda")
    assert not torch.equal(a, b), "random numbers go on"


@gpu
@needs_gpu
@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_models_train_captured_as_they_do_without(name: str) -> None:
    def trained(cuda_graphs: bool) -> tuple[list[float], Any]:
        model: Any = build_model(name, size="tiny", dtype="float32", device="cuda", seed=1).train()
        model.config.use_cache = False
        switch_off_dropout(model)
        block = {"scope": "model", "cuda_graphs": cuda_graphs}
        kernels = ["FusedLinearCrossEntropy"]
        initialize(model, {"kernel_fusion": {"enable": True, "memory_efficient_fusion": block, "custom_cuda_kernels": kernels}})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(8):
            ids = torch.randint(5, 500, (4, 16), generator=generator).cuda()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        return losses, model

    plain, _ = trained(False)
    captured, model = trained(True)
    torch.testing.assert_close(torch.tensor(captured), torch.tensor(plain), rtol=1e-4, atol=0.0)
    said = [row.reason for row in report(model).rows if row.outcome == "refused"]
    assert not [reason for reason in said if "CUDA graph" in reason]
