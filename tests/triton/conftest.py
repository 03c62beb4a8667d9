"""What the Triton room's tests share: where kernels run here, and compiling them for GPUs that are not here.

Kernels run on a GPU if there is one, and else under Triton's interpreter. The interpreter is chosen when triton is imported, so
a test process without a GPU skips what needs kernels to run, and one test per file (``rerun_interpreted``) runs the same file
in a process of its own with ``TRITON_INTERPRET=1``. Compilation for other GPUs needs no device at all.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parents[2]

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]

# Shared memory that one block may use, in bytes.
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536, "gfx950": 163_840}
MOST_THREADS = 1024  # of a block, on every target


@dataclass(frozen=True)
class Compiled:
    """What a kernel compiled for one target needs.

    Attributes:
        target: ``sm_90``, ``gfx942``, ...
        shared: bytes of shared memory per block.
        registers: per thread, None where the target's tools do not say.
        spilled: bytes per thread that went from registers to memory.
        assembly: PTX or AMD assembly.
        cubin: what the device runs, on NVIDIA's targets.
    """

    target: str
    shared: int
    registers: int | None
    spilled: int
    assembly: str
    cubin: bytes = field(default=b"", repr=False)

    def count(self, *instructions: str) -> tuple[int, ...]:
        """How often the machine code for NVIDIA's targets has each of these instructions."""
        code = _read_cubin(self.cubin, "nvdisasm", "-c")
        return tuple(code.count(instruction) for instruction in instructions)

    def resident(self, warps: int) -> int:
        """How many programs of so many warps fit on a multiprocessor of compute capability 9.0 at once."""
        assert self.target == "sm_90"
        assert self.registers is not None
        per_warp = -(-self.registers // 8) * 8 * 32  # of 16384 in each of four parts
        per_program = self.shared + 1024  # of 228 KB
        return min(4 * (16_384 // per_warp) // warps, 228 * 1024 // per_program, 64 // warps, 32)


def _read_cubin(cubin: bytes, tool: str, option: str) -> str:
    import triton.backends.nvidia

    path = Path(next(iter(triton.backends.nvidia.__path__))) / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(path), option, file.name], capture_output=True, text=True, check=True).stdout


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    text = _read_cubin(cubin, "cuobjdump", "-res-usage")
    numbers = {word: int(number) for word, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def _amd_resources(assembly: str) -> tuple[int, int]:
    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, f"the assembly does not say {name}"
        return int(found[1])

    return value("vgpr_count"), value("private_segment_fixed_size")


def _compile(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    aligned: Sequence[str] | None = None,
    targets: Sequence[str] = tuple(SHARED_MEMORY),
    spill_allowed: int = 0,
    registers: int | None = None,
    walks: bool | None = None,
) -> dict[str, Compiled]:
    """Compile a kernel for every target and check shared memory and spills.

    Args:
        kernel: the ``@triton.jit`` function.
        signature: type of every argument that is no constexpr, such as ``{"x_ptr": "*bf16", "eps": "fp32"}``.
        constexprs: value of every constexpr argument; an argument that is None at run time belongs here too. Without ``CHAIN``
            it is launched early where it can be, and must wait before it reads or writes.
        num_warps, num_stages: as at the launch.
        aligned: arguments divisible by 16, as triton would notice at a launch; all pointers unless given.
        targets: names out of ``SHARED_MEMORY``.
        spill_allowed: bytes per thread that may spill.
        registers: at most per thread, as at the launch; for NVIDIA's targets.
        walks: whether its programs are long and must say at the end that the next kernel may begin; by default those of a
            kernel that asks how many there are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if INTERPRETED:
        pytest.skip("an interpreted kernel cannot be compiled")
    names = list(kernel.arg_names)
    chained = "CHAIN" in names and "CHAIN" not in constexprs
    types = {name: "constexpr" if name in constexprs or (chained and name == "CHAIN") else signature[name] for name in names}
    aligned = [name for name in names if types[name].startswith("*")] if aligned is None else aligned
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    walks = "num_programs" in kernel.src if walks is None else walks
    results = {}
    for name in targets:
        gpu = GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)
        chain = 2 if name in ("sm_90", "sm_100") else 0
        values = {**constexprs, "CHAIN": chain} if chained else dict(constexprs)
        source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=attributes)
        assert num_warps * gpu.warp_size <= MOST_THREADS, f"{kernel.__name__} for {name}: {num_warps} warps are no block"
        options = {"num_warps": num_warps, "num_stages": num_stages}
        if registers is not None and gpu.backend == "cuda":
            options["maxnreg"] = registers
        built = triton.compile(source, target=gpu, options=options)
        assembly = built.asm["ptx" if gpu.backend == "cuda" else "amdgcn"]
        if chained and chain:
            before, waits, rest = assembly.partition("griddepcontrol.wait")
            assert waits and "ld.global" not in before and "st.global" not in before, (  # noqa: PT018
                f"{kernel.__name__} for {name}: reads or writes before it has waited for the kernel before"
            )
            walk, says, _ = rest.partition("griddepcontrol.launch_dependents")
            if walks:
                assert "st.global" in walk and (says or "_bwd_" not in kernel.__name__), (  # noqa: PT018
                    f"{kernel.__name__} for {name}: the next kernel's programs would wait beside its whole walk"
                )
            else:
                assert says and "ld.global" not in walk, (  # noqa: PT018
                    f"{kernel.__name__} for {name}: its programs are short, and say late or never that the next may begin"
                )
        used, spilled = _cubin_resources(built.asm["cubin"]) if gpu.backend == "cuda" else _amd_resources(assembly)
        shared = built.metadata.shared
        assert shared <= SHARED_MEMORY[name], (
            f"{kernel.__name__} for {name}: {shared} bytes of {SHARED_MEMORY[name]} shared memory"
        )
        assert spilled <= spill_allowed, (
            f"{kernel.__name__} for {name}: {spilled} bytes spill per thread ({used} registers, {num_warps} warps)"
        )
        results[name] = Compiled(name, shared, used, spilled, assembly, built.asm.get("cubin", b""))
    return results


@pytest.hookimpl(tryfirst=True)  # before -m takes its choice
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, whatever runs kernels is a test of the GPU: ``-m gpu`` leaves none of them out."""
    if INTERPRETED or not torch.cuda.is_available():
        return
    for item in items:
        if "device" in getattr(item, "fixturenames", ()) and Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def compile_for_all_targets() -> Callable[..., dict[str, Compiled]]:
    """``compile_for_all_targets(kernel, signature, constexprs, num_warps=4)``: see :func:`_compile`."""
    return _compile


@pytest.fixture
def device() -> torch.device:
    """Where kernels run in this process; skips, with the reason, where they cannot."""
    if INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1; the test that reruns this file runs it interpreted")


@pytest.fixture
def rerun_interpreted(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``rerun_interpreted()``: run the tests of this file that use ``device`` in a process with the interpreter.

    With arguments: those of pytest, in place of this file.
    """

    def rerun(*arguments: str) -> None:
        if INTERPRETED:
            pytest.skip("this is the rerun")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(arguments or (str(request.path),))]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        environment.pop("PYTEST_XDIST_WORKER", None)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert " passed" in done.stdout, done.stdout[-2000:]

    return rerun
