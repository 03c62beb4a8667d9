"""The compiled extension, and nothing else: everything else about the package is in ``pyproject.toml``.

A missing compiler costs speed, never function, so by default a build that fails is one warning and the package installs
without the extension. ``OSLO_FUSION_EXTENSION`` decides:

====================  =======================================================
``auto`` (or unset)   build it if this machine can, warn and go on if it can't
``1``                 build it, or fail the installation
``0``                 don't try
====================  =======================================================

The torch that is installed is the one to compile against: ``pip install --no-build-isolation -e .``
"""

import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from setuptools import setup

SWITCH = "OSLO_FUSION_EXTENSION"
ROOT = Path(__file__).resolve().parent


def parse_switch() -> str:
    mode = os.environ.get(SWITCH, "").strip().lower() or "auto"
    if mode not in {"auto", "0", "1"}:
        raise SystemExit(f"{SWITCH}={mode!r} is not understood: set it to auto, 0 or 1")
    return mode


def warn_without_extension(reason: str) -> None:
    if {"egg_info", "dist_info"} & set(sys.argv):
        return  # pip asks for the metadata before it builds: the build itself says it, once
    # A warning and not a print: pip hides what a build prints, newer ones show what it warns of.
    warnings.warn(
        f"oslo_fusion installs without its compiled extension: {reason}. "
        f"To see the whole failure: {SWITCH}=1 pip install --no-build-isolation --no-deps -v -e .",
        stacklevel=2,
    )


def find_obstacle() -> str | None:
    """What stands in the way of a build, or None. Asked first, because the compiler's own message buries it."""
    try:
        import torch  # noqa: F401
    except Exception as error:  # a half-installed torch raises OSError, not only ImportError
        return f"torch cannot be imported here ({error}); install torch first, then use pip's --no-build-isolation"
    compiler = shlex.split(os.environ.get("CXX", "")) or ["cl" if sys.platform == "win32" else "c++"]
    if shutil.which(compiler[0]) is None:
        return f"no C++ compiler: {compiler[0]!r} is not found; install one, or name it in CXX"
    return None


def describe_extension(required: bool) -> dict[str, Any]:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, is_ninja_available

    class OptionalBuildExtension(BuildExtension):
        """torch's build; when optional, a failure is a warning and leaves nothing half-built behind."""

        def run(self) -> None:
            if required:
                super().run()
                return
            in_place = self.inplace or self.editable_mode
            try:
                super().run()
            except Exception as error:  # distutils, ninja, the compiler and the linker each raise their own kind
                warn_without_extension(f"the build failed ({type(error).__name__}: {error})")
                # Otherwise an extension left by an earlier build in place would be loaded as if it were this one.
                for stale in (ROOT / "oslo_fusion").glob("_C.*") if in_place else ():
                    stale.unlink()
                self.extensions = self.distribution.ext_modules = []

    if sys.platform == "win32":
        compile_args, link_args = ["/O2"], []
    else:
        # No -std: torch adds the one that its headers need. No -march=native: a wheel may be run on another machine.
        compile_args, link_args = ["-O3", "-g0", "-fvisibility=hidden"], []
        if sys.platform == "linux":  # at::parallel_for is serial in code that is compiled without it
            compile_args, link_args = [*compile_args, "-fopenmp"], ["-fopenmp"]

    extension = CppExtension(
        "oslo_fusion._C",
        sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "oslo_fusion" / "csrc").glob("*.cpp")),
        extra_compile_args={"cxx": compile_args},
        extra_link_args=link_args,
    )
    command = OptionalBuildExtension.with_options(use_ninja=is_ninja_available())
    return {"ext_modules": [extension], "cmdclass": {"build_ext": command}}


def choose() -> dict[str, Any]:
    mode = parse_switch()
    if mode == "0":
        return {}
    obstacle = find_obstacle()
    if obstacle is None:
        return describe_extension(required=mode == "1")
    if mode == "1":
        raise SystemExit(f"{SWITCH}=1, but the extension cannot be built: {obstacle}")
    warn_without_extension(obstacle)
    return {}


setup(**choose())
