"""Two processes on the CPU (gloo): DDP, FSDP2 and tensor parallelism of an initialized model give the gradients of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import oslo_fusion
from benchmarks.distributed import WAYS, gathered
from oslo_fusion import models

CONFIG = {"kernel_fusion": {"enable": True, "autotune": "off", "memory_efficient_fusion": True}}


def _train(rank: int, world: int, meeting: str, way: str, results: Any) -> None:
    from oslo_fusion.aot import room

    room.COMPILER = "eager"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    try:
        model = models.build_model("llama", dtype="float32", device="cpu", size="tiny").train()
        oslo_fusion.initialize(model, CONFIG)
        wrapped = WAYS[way](model, torch.device("cpu"))
        ids = torch.arange(3, 3 + 4 * 8).reshape(4, 8)
        mine = ids if way == "tensor parallelism" else ids[rank * 2 : rank * 2 + 2]
        for _ in range(2):
            wrapped.zero_grad(set_to_none=True)
            wrapped(input_ids=mine, labels=mine).loss.backward()
        gradients = {name.removeprefix("module."): gathered(p.grad) for name, p in wrapped.named_parameters()}
        report = oslo_fusion.report(wrapped)
        if rank == 0:
            record = next(row.runtime for row in report.plan.proposals if row.room == "aot")
            found = (len(record.graphs), record.breaks, record.left)
            results.put(({name: g.numpy() for name, g in gradients.items()}, found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_the_gradients_of_one(way: str, tmp_path: Path) -> None:
    meeting = f"file://{tmp_path / 'meeting'}"  # a free port found here may be taken by the time it is used
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_train, args=(rank, 2, meeting, way, results)) for rank in range(2)]
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
