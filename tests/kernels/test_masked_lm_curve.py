"""A small BERT trained on ragged batches: the loss curve of eager within its run-to-run spread."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

import oslo_fusion
from oslo_fusion.ops.pack_tokens import IGNORED
from oslo_fusion.testing import curves_apart
from tutorials.small_gpt import SIZES, Text

STEPS, ON_A_GPU = 90, 300
TEXT = Text()
MASK, PAD = len(TEXT.alphabet), len(TEXT.alphabet) + 1


def build(size: str, dropout: float = 0.1) -> Any:
    sizes = SIZES[size]
    config = BertConfig(
        vocab_size=len(TEXT.alphabet) + 2,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
        max_position_embeddings=sizes.characters,
        pad_token_id=PAD,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(0)
    return BertForMaskedLM(config).train()


def batches(size: str, device: str, steps: int) -> Iterator[dict[str, Tensor]]:
    """Texts of an eighth of the length to all of it, 15 % of the characters to be guessed: the same ones for everybody."""
    sizes = SIZES[size]
    draw, generator = TEXT.batches(sizes, 0), torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = draw()
        lengths = torch.randint(sizes.characters // 8, sizes.characters + 1, (len(ids), 1), generator=generator)
        mask = torch.arange(sizes.characters) < lengths
        guessed = mask & (torch.rand(ids.shape, generator=generator) < 0.15)
        guessed[:, 0] = True
        labels = ids.masked_fill(~guessed, IGNORED)
        ids = ids.masked_fill(guessed, MASK).masked_fill(~mask, PAD)
        yield {"input_ids": ids.to(device), "attention_mask": mask.long().to(device), "labels": labels.to(device)}


def train(model: Any, seeds: Sequence[int], size: str, rate: float = 2e-3) -> list[list[float]]:
    """The losses of a run for each seed of the dropout, all from the same weights; on a GPU under autocast to bfloat16."""
    start, device = copy.deepcopy(model.state_dict()), next(model.parameters()).device.type
    found = []
    for seed in seeds:
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        torch.manual_seed(seed)
        losses = []
        for given in batches(size, device, ON_A_GPU if device == "cuda" else STEPS):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model(**given).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach().float())
        found.append(torch.stack(losses).tolist())
    return found


def test_the_loss_curve_is_eagers_within_its_spread() -> None:
    """Packed, that is; and another dropout is outside of it."""
    eager = train(build("tiny"), range(5), "tiny")
    block = {"enable": True, "autotune": "off", "padding_free": True, "custom_cuda_kernels": ["FusedLinearCrossEntropy"]}
    model = oslo_fusion.initialize(build("tiny"), {"kernel_fusion": block})
    ours = train(model, (11, 12, 13), "tiny")
    assert curves_apart(ours, eager, 30) < 3
    assert curves_apart(train(build("tiny", 0.0), (0,), "tiny"), eager, 30) > 3
    assert statistics.mean(ours[0][-30:]) < statistics.mean(ours[0][:30]) - 0.5, "it learns"


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_the_loss_curve_on_a_gpu(captured: bool) -> None:
    """Every kernel, under autocast, packed and not; and another dropout is outside of it."""

    def of(dropout: float = 0.1) -> Any:
        return build("small", dropout).to("cuda")

    eager = train(of(), range(8), "small", 5e-4)
    aot = {"scope": "model", "cuda_graphs": True} if captured else True
    block = {"enable": True, "autotune": "off", "custom_cuda_kernels": ["all", "FusedLinearCrossEntropy"]}
    for padding_free in (False, True):
        settings = {**block, "memory_efficient_fusion": aot, "padding_free": padding_free}
        model = oslo_fusion.initialize(of(), {"kernel_fusion": settings})
        assert curves_apart(train(model, range(11, 17), "small", 5e-4), eager, 30) < 3
    assert curves_apart(train(of(0.3), range(2), "small", 5e-4), eager, 30) > 3
