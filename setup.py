"""The compiled extension, and nothing else: everything else about the package is in ``pyproject.toml``.

A missing compiler costs speed, never function, so by default a build that fails is one warning and the package installs
without the extension. ``OSLO_FUSION_EXTENSION`` decides:

====================  =======================================================
``auto`` (or unset)   build it if this machine can, warn and go on if it can't
``1``                 build it, or fail the installation
``0``                 don't try
====================  =======================================================

``OSLO_FUSION_CUDA`` decides in the same words whether its CUDA kernels are part of it. ``auto`` compiles them where torch is
built for CUDA and ``nvcc`` is found, and builds the C++ part alone where that fails; ``1`` makes the extension required too.
``TORCH_CUDA_ARCH_LIST`` names the GPUs to compile for; by default torch takes those it sees.

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
CUDA_SWITCH = "OSLO_FUSION_CUDA"
ROOT = Path(__file__).resolve().parent


def parse_switch(name: str = SWITCH) -> str:
    mode = os.environ.get(name, "").strip().lower() or "auto"
    if mode not in {"auto", "0", "1"}:
        raise SystemExit(f"{name}={mode!r} is not understood: set it to auto, 0 or 1")
    return mode


def warn_without_extension(reason: str, what: str = "its compiled extension") -> None:
    if {"egg_info", "dist_info"} & set(sys.argv):
        return  # pip asks for the metadata before it builds: the build itself says it, once
    # A warning and not a print: pip hides what a build prints, newer ones show what it warns of.
    warnings.warn(
        f"oslo_fusion installs without {what}: {reason}. "
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


def find_cuda_obstacle() -> str | None:
    """What stands in the way of the CUDA kernels, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"the installed torch {torch.__version__} is not built for CUDA"
    if CUDA_HOME is None or shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")) is None:
        return "nvcc is not found; install the CUDA toolkit, or name its folder in CUDA_HOME"
    return None


def describe_extension(required: bool, cuda: bool, cuda_required: bool) -> dict[str, Any]:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, is_ninja_available

    class OptionalBuildExtension(BuildExtension):
        """torch's build; when optional, a failure is a warning and leaves nothing half-built behind."""

        def run(self) -> None:
            if required:
                self.build_what_can_be()
                return
            in_place = self.inplace or self.editable_mode
            try:
                self.build_what_can_be()
            except Exception as error:  # distutils, ninja, the compiler and the linker each raise their own kind
                warn_without_extension(f"the build failed ({type(error).__name__}: {error})")
                # Otherwise an extension left by an earlier build in place would be loaded as if it were this one.
                for stale in (ROOT / "oslo_fusion").glob("_C.*") if in_place else ():
                    stale.unlink()
                self.extensions = self.distribution.ext_modules = []

        def build_what_can_be(self) -> None:
            if not cuda or cuda_required:
                super().run()
                return
            try:
                super().run()
            except Exception as error:
                warn_without_extension(f"they failed to build ({type(error).__name__}: {error})", "its CUDA kernels")
                self.extensions = self.distribution.ext_modules = [describe(with_cuda=False)]
                super().run()

    if sys.platform == "win32":
        compile_args, link_args = ["/O2"], []
    else:
        # No -std: torch adds the one that its headers need. No -march=native: a wheel may be run on another machine.
        compile_args, link_args = ["-O3", "-g0", "-fvisibility=hidden"], []
        if sys.platform == "linux":  # at::parallel_for is serial in code that is compiled without it
            compile_args, link_args = [*compile_args, "-fopenmp"], ["-fopenmp"]
        else:
            compile_args = [*compile_args, "-fopenmp-simd"]  # the loops of rms_norm_cpu.cpp say what may be vectorised

    def describe(with_cuda: bool) -> Any:
        suffixes = ("*.cpp", "*.cu") if with_cuda else ("*.cpp",)
        folder = ROOT / "oslo_fusion" / "csrc"
        sources = sorted(path.relative_to(ROOT).as_posix() for suffix in suffixes for path in folder.glob(suffix))
        if not with_cuda:
            arguments = {"cxx": compile_args}
            return CppExtension("oslo_fusion._C", sources, extra_compile_args=arguments, extra_link_args=link_args)
        arguments = {
            "cxx": [*compile_args, "-DOSLO_FUSION_WITH_CUDA"],
            "nvcc": ["-O3", "-lineinfo", "-DOSLO_FUSION_WITH_CUDA", "-Xcompiler", "-fvisibility=hidden"],
        }
        return CUDAExtension("oslo_fusion._C", sources, extra_compile_args=arguments, extra_link_args=link_args)

    command = OptionalBuildExtension.with_options(use_ninja=is_ninja_available())
    return {"ext_modules": [describe(cuda)], "cmdclass": {"build_ext": command}}


def choose() -> dict[str, Any]:
    mode, cuda = parse_switch(), parse_switch(CUDA_SWITCH)
    if mode == "0":
        return {}
    if cuda == "1":
        mode = "1"  # CUDA kernels that are required need the extension that holds them
    obstacle = find_obstacle()
    if obstacle is None:
        cuda_obstacle = find_cuda_obstacle() if cuda != "0" else f"{CUDA_SWITCH}=0"
        if cuda == "1" and cuda_obstacle is not None:
            raise SystemExit(f"{CUDA_SWITCH}=1, but the CUDA kernels cannot be built: {cuda_obstacle}")
        return describe_extension(required=mode == "1", cuda=cuda_obstacle is None, cuda_required=cuda == "1")
    if mode == "1":
        raise SystemExit(f"{SWITCH}=1, but the extension cannot be built: {obstacle}")
    warn_without_extension(obstacle)
    return {}


setup(**choose())
