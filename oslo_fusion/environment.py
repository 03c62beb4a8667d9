"""Facts of this machine: versions, devices, what can be used and, if not, why. Read lazily, cached, never guessed."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass

import torch

_TRITON_CAPABILITY = (7, 0)
SUPPORTED_PYTHON = "3.10 to 3.13"
SUPPORTED_TORCH = "2.11 to 2.13, newer where it works"
SUPPORTED_TRANSFORMERS = "5.x, tested with 5.17"


@dataclass(frozen=True)
class Device:
    """One accelerator: its index, name, compute capability, and memory in GiB."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_gib: float


@dataclass(frozen=True)
class Ability:
    """Whether this machine can do a thing, and the reason if it cannot (or what provides it if it can)."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Environment:
    """The facts a plan may depend on."""

    python: str
    torch: str
    transformers: str | None
    triton: str | None
    cuda: str | None
    hip: str | None
    devices: tuple[Device, ...]
    cpu: str
    cpu_threads: int

    def torchscript_fuser(self, device_type: str) -> Ability:
        """Whether TorchScript's pointwise fuser makes kernels for tensors on ``device_type`` (``cpu`` or ``cuda``)."""
        name = f"TorchScript fuser on {device_type}"
        if device_type == "cuda":
            if not self.devices:
                return Ability(name, False, "no CUDA device is visible")
            if not (torch._C._jit_texpr_fuser_enabled() and torch._C._jit_can_fuse_on_gpu()):
                return Ability(name, False, "the fuser is switched off for GPUs in this process")
            return Ability(name, True, "NNC generates one CUDA kernel per fused group")
        if device_type == "cpu":
            if not torch._C._llvm_enabled():
                return Ability(name, False, "the TorchScript fuser cannot fuse on the CPU: this torch is built without LLVM")
            if not torch._C._jit_can_fuse_on_cpu():
                return Ability(name, False, "the TorchScript fuser is switched off for the CPU in this process")
            return Ability(name, True, "NNC with LLVM")
        return Ability(name, False, f"the TorchScript fuser knows no device of type {device_type!r}")

    def inductor(self, device_type: str) -> Ability:
        """Whether Inductor can generate code for tensors on ``device_type`` (``cpu`` or ``cuda``)."""
        name = f"Inductor on {device_type}"
        if device_type == "cuda":
            if not self.devices:
                return Ability(name, False, "no CUDA device is visible")
            if self.triton is None:
                return Ability(name, False, "Inductor writes Triton kernels, and triton is not installed")
            if self.hip is None and min(device.capability for device in self.devices) < _TRITON_CAPABILITY:
                return Ability(name, False, "Triton needs a GPU of compute capability 7.0 or later")
            return Ability(name, True, f"Triton {self.triton}")
        if device_type == "cpu":
            compiler = next(filter(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))), None)
            if compiler is None:
                return Ability(name, False, "Inductor writes C++, and no C++ compiler is found (CXX, g++, clang++)")
            return Ability(name, True, f"C++ with {compiler}")
        return Ability(name, False, f"Inductor is not tried on devices of type {device_type!r}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def environment() -> Environment:
    """The facts of this process, read once. Asks the CUDA driver for its devices; importing this module does not."""
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                Device(
                    index=index,
                    name=properties.name,
                    capability=(properties.major, properties.minor),
                    memory_gib=properties.total_memory / 2**30,
                )
            )
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=_version("transformers"),
        triton=_version("triton"),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        devices=tuple(devices),
        cpu=_cpu_name(),
        cpu_threads=torch.get_num_threads(),
    )
