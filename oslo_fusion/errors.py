"""Every exception that oslo_fusion raises on purpose. Each message says what, where, what was received and the remedy."""

from __future__ import annotations


class OsloFusionError(Exception):
    """Base of all errors raised by oslo_fusion."""


class ConfigError(OsloFusionError, ValueError):
    """An argument or a configuration key is unusable. The model has not been touched."""


class PlanError(OsloFusionError, RuntimeError):
    """A plan contradicts itself or does not belong to the model it is applied to. The model has not been touched."""


class RefusalError(OsloFusionError, RuntimeError):
    """A site was refused and the configuration says ``on_refusal: raise``. The model has not been touched."""


class ExtensionError(OsloFusionError, ImportError):
    """The compiled extension was needed and could not be loaded."""
