"""Loads the compiled extension; keeps its failure and raises it at first use.

A missing compiler costs speed, never function. So importing :mod:`oslo_fusion` must not fail where the extension was
not built: nothing is loaded before somebody asks, the attempt is made once, and its reason is kept for whoever must say
why something is not available.
"""

import functools
import importlib
from types import ModuleType

from oslo_fusion.errors import ExtensionError

_MODULE = "oslo_fusion._C"
_REMEDY = "OSLO_FUSION_EXTENSION=1 pip install --no-build-isolation --no-deps -v -e ."


def load() -> ModuleType:
    """Return the compiled extension, loading it on the first call.

    Raises:
        ExtensionError: it was not built, or doesn't fit the torch that is running. The message holds the reason and the
            command that rebuilds it; the original exception is its ``__cause__``.
    """
    outcome = _attempt()
    if isinstance(outcome, ModuleType):
        return outcome
    raise ExtensionError(
        f"the compiled extension {_MODULE} cannot be used: {_explain(outcome)}. Rebuild it from a checkout with: {_REMEDY}"
    ) from outcome


def failure() -> str | None:
    """Say why the extension can't be used, or None if it can. Tries to load it, never raises."""
    outcome = _attempt()
    return None if isinstance(outcome, ModuleType) else _explain(outcome)


def build_info() -> dict[str, str]:
    """Say how the extension was compiled.

    Returns:
        ``compiler`` (name and version), ``cpp_standard`` (``"20"``), ``torch`` (the version compiled against),
        ``openmp`` and ``cuda`` (``"yes"`` or ``"no"``), ``vector_extension`` (``"AVX512"``, ``"AVX2"``, ``"NEON"`` or
        ``"none"``: what the compiler was allowed to use).

    Raises:
        ExtensionError: as :func:`load`.
    """
    return dict(load().build_info())


@functools.cache
def _attempt() -> ModuleType | Exception:
    try:
        import torch  # the extension links against torch's libraries: they must be in the process before it is

        module = importlib.import_module(_MODULE)
        compiled, running = module.build_info()["torch"], str(torch.__version__)
    except Exception as error:  # a wrong ABI is an ImportError, a broken torch an OSError
        return error
    # torch's C++ interface holds within a minor version. A mismatch may load, and then crash far from here.
    if compiled.split(".")[:2] != running.split(".")[:2]:
        return ImportError(f"it was compiled against torch {compiled}, and torch {running} is running")
    return module


def _explain(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == _MODULE:
        return "it was not built when oslo_fusion was installed"
    return str(error) or type(error).__name__
