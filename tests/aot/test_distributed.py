"""Two processes on the CPU (gloo): DDP, FSDP2 and tensor parallelism of an initialized model give the gradients of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import oslo_fusion
from oslo_fusion import models

CONFIG = {"kernel_fusion": {"enable": True, "autotune": "off", "memory_efficient_fusion": True}}
Wrap = Callable[[nn.Module], nn.Module]


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module) -> nn.Module:
    """transformers' own, which puts a forward with DTensors on each projection."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    return apply_tensor_parallelism(model, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)))


def _whole(gradient: Any) -> torch.Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def _train(rank: int, world: int, meeting: str, wrap: Wrap, results: Any) -> None:
    from oslo_fusion.aot import room

    room.COMPILER = "eager"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    try:
        model = models.build_model("llama", dtype="float32", device="cpu", size="tiny").train()
        oslo_fusion.initialize(model, CONFIG)
        wrapped = wrap(model)
        ids = torch.arange(3, 3 + 4 * 8).reshape(4, 8)
        mine = ids if wrap is tensor_parallel else ids[rank * 2 : rank * 2 + 2]
        for _ in range(2):
            wrapped.zero_grad(set_to_none=True)
            wrapped(input_ids=mine, labels=mine).loss.backward()
        gradients = {name.removeprefix("module."): _whole(p.grad) for name, p in wrapped.named_parameters()}
        report = oslo_fusion.report(wrapped)
        if rank == 0:
            record = next(row.runtime for row in report.plan.proposals if row.room == "aot")
            found = (len(record.graphs), record.breaks, record.left)
            results.put(({name: g.numpy() for name, g in gradients.items()}, found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [ddp, fsdp2, tensor_parallel])
def test_two_processes_give_the_gradients_of_one(wrap: Wrap, tmp_path: Path) -> None:
    meeting = f"file://{tmp_path / 'meeting'}"  # a free port found here may be taken by the time it is used
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_train, args=(rank, 2, meeting, wrap, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        gradients, found = results.get(timeout=200)
    finally:
        for process in processes:
            process.join(timeout=30)
            if process.is_alive():
                process.kill()
    assert all(process.exitcode == 0 for process in processes)
    model = models.build_model("llama", dtype="float32", device="cpu", size="tiny").train()
    ids = torch.arange(3, 3 + 4 * 8).reshape(4, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(torch.from_numpy(gradients[name]), p.grad, rtol=1e-4, atol=1e-6)
    assert found == (1, (), []), "one graph for all layers, whole"
