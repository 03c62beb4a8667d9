"""The generation room: what runs between a model's logits and its next token. transformers' internals are named here."""

from oslo_fusion.generation.room import GenerationPass

__all__ = ["GenerationPass"]
