"""n-gram blocking in ``generate``: transformers' processors with our operator inside, and the way in for one model.

transformers is imported with this module, so the room imports it only once a model that generates has been seen.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
)

from oslo_fusion.ops.no_repeat_ngram import IDS_DTYPES, encoder_no_repeat_ngram, implementation, no_repeat_ngram
from oslo_fusion.surgery import Standing

METHOD = "_get_logits_processor"


class FusedNoRepeatNGramLogitsProcessor(NoRepeatNGramLogitsProcessor):
    """transformers' processor in one launch, bit for bit. The scores it is given are not changed.

    Args:
        ngram_size: n; every n-gram may occur once.
        kernel: ``auto``, ``triton`` or ``cuda``.

    Raises:
        ValueError: ``ngram_size`` is no integer of 1 or more.
    """

    def __init__(self, ngram_size: int, kernel: str = "auto") -> None:
        super().__init__(ngram_size)
        self.kernel = kernel

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[-1] < self.ngram_size:
            return scores
        return no_repeat_ngram(scores, input_ids, self.ngram_size, kernel=self.kernel)


class FusedEncoderNoRepeatNGramLogitsProcessor(EncoderNoRepeatNGramLogitsProcessor):
    """transformers' processor without its dictionaries: the encoder's input stays on the device and is searched there.

    Args:
        encoder_ngram_size: n.
        encoder_input_ids: ``[batch, source_length]`` or ``[source_length]``, int32 or int64.
        kernel: ``auto``, ``triton`` or ``cuda``.

    Raises:
        ValueError: ``encoder_ngram_size`` is no integer of 1 or more.
    """

    def __init__(self, encoder_ngram_size: int, encoder_input_ids: Tensor, kernel: str = "auto") -> None:
        # The parent's own __init__ builds the dictionaries, from an empty text at no cost. It also checks the size.
        source = encoder_input_ids.unsqueeze(0) if encoder_input_ids.dim() == 1 else encoder_input_ids
        super().__init__(encoder_ngram_size, cast(torch.LongTensor, source[:, :0]))
        self.encoder_input_ids = source
        self.kernel = kernel

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.encoder_input_ids.device != scores.device:
            self.encoder_input_ids = self.encoder_input_ids.to(scores.device)
        return encoder_no_repeat_ngram(scores, input_ids, self.encoder_input_ids, self.ngram_size, kernel=self.kernel)


class FusedLogitsProcessors(Standing):
    """Stands on a model instance as ``_get_logits_processor``, which ``generate`` calls once, and exchanges what it returns.

    transformers' own method decides which processors there are, with what values and in which order; its two n-gram processors
    are then replaced, each in its place. So it makes no difference whether a size came as an argument or in a
    ``generation_config``. What the caller passed in ``logits_processor`` is left as it is. Building the encoder's
    processor first costs its dictionaries once per ``generate``; transformers would look them up at every step.

    Its only setting is ``kernel``.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        model = self.module
        method = getattr(type(model), METHOD)
        processors: LogitsProcessorList = method(model, *args, **kwargs)
        given = inspect.signature(method).bind(model, *args, **kwargs).arguments
        theirs = {id(processor) for processor in given.get("logits_processor") or ()}
        source = given.get("encoder_input_ids")
        kernel = self._kernel(given.get("device"))
        for index, processor in enumerate(processors):
            if id(processor) in theirs:
                continue
            if type(processor) is NoRepeatNGramLogitsProcessor:
                processors[index] = FusedNoRepeatNGramLogitsProcessor(processor.ngram_size, kernel)
            elif type(processor) is EncoderNoRepeatNGramLogitsProcessor and _is_text(source):
                processors[index] = FusedEncoderNoRepeatNGramLogitsProcessor(processor.ngram_size, source, kernel)
        return processors

    def _kernel(self, device: Any) -> str:
        """The planned kernel, or ``auto`` where a model was loaded on a machine that does not have it."""
        kernel: str = self.settings["kernel"]
        try:
            implementation(torch.device(device or "cpu").type, kernel)
        except ImportError:
            return "auto"
        return kernel


def _is_text(source: object) -> TypeGuard[Tensor]:
    # Audio models hand their waveform over here, as [batch, samples] in floating point.
    return isinstance(source, Tensor) and source.dim() == 2 and source.dtype in IDS_DTYPES
