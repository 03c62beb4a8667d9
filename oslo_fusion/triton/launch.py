"""Launches a kernel again without asking triton what to compile.

Triton's own launch inspects every argument, each time. In eager training that is a large part of what a small norm costs. What
the compiler looks at is known here: the dtypes of the tensors, whether their memory is aligned to 16 bytes, and the constants.
So the compiled kernel is kept under these.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from oslo_fusion.rehearsal import THREAD, Rehearsal

_ALIGNMENT = 16
_WIDE = 1 << 31
_HIP = torch.version.hip is not None
WARP_SIZE = 64 if _HIP else 32  # threads; of every AMD GPU that is compiled for


@triton.jit  # type: ignore[untyped-decorator]
def wait_for_previous(CHAIN: tl.constexpr) -> None:
    """Where a kernel needs what was written before it: see :func:`chain`."""
    if CHAIN == 2:
        gdc_wait()


@triton.jit  # type: ignore[untyped-decorator]
def let_next_begin(CHAIN: tl.constexpr) -> None:
    """Where the kernel after this one may begin: see :func:`chain`."""
    if CHAIN > 0:
        gdc_launch_dependents()


@triton.jit  # type: ignore[untyped-decorator]
def chained(CHAIN: tl.constexpr) -> None:
    """Both, for a kernel whose programs are short."""
    wait_for_previous(CHAIN)
    let_next_begin(CHAIN)


@functools.lru_cache(maxsize=64)
def _major(device: int | None) -> int:
    return torch.cuda.get_device_capability(device)[0]


def compute_capability(x: Tensor) -> int:
    """The major compute capability of NVIDIA's device that ``x`` is on, 0 elsewhere."""
    return _major(x.device.index) if x.is_cuda and not _HIP else 0


def chain(x: Tensor, early: bool = True) -> int:
    """The constant CHAIN of a kernel that begins with a wait: 2 on the device of ``x``, or 0 where none is chained.

    2 is programmatic dependent launch (compute capability 9): the kernel is launched when the programs of the one before it,
    whose ever that is, have ended, or have all said that it may begin, as ours do. Where it needs what was written before, it
    waits for the end of that one. Without, a launch costs a microsecond or two of idle device. Every kernel waits for the end
    of the one before, or begins after it, so the end of one is the end of all before it; and none reads or writes before it has
    waited what another may write. 1: tells the next kernel that it may begin, but is itself launched when the one before it is
    over, and does not wait.

    Programs that wait take time from those that work: a kernel whose programs walk over rows says so at the end of the walk
    (said at its begin, rms norm's backward took 852 µs for 32768×16384 bfloat16 instead of 783, one H200).

    Args:
        x: a tensor of the launch.
        early: 1 in place of 2 unless this is true. A walk has as many programs as are wanted on every multiprocessor. Launched
            while the kernel before it still holds some of these, they are put where room is, and where more fit than are
            wanted, some multiprocessors get two or three times their share and others nothing: 32768×4096 float32, 1 wanted
            and 3 that fit, took 456 µs so and 385 one after the other.
    """
    if compute_capability(x) < 9:
        return 0
    return 2 if early else 1


class _Pointer:
    """What Triton's compiler looks at in a tensor, without its memory."""

    def __init__(self, x: Tensor) -> None:
        self.dtype = x.dtype
        self._place, self._size = x.data_ptr() % _ALIGNMENT, x.untyped_storage().size()

    def data_ptr(self) -> int:
        return self._place

    def ptr_range(self) -> int:
        return self._size  # looked at on AMD's


def note(
    rehearsal: Rehearsal, key: Hashable, jitted: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Have a kernel compiled beside that would now be launched on the current device.

    Args:
        rehearsal: that is under way.
        key: the same for what is the same kernel to Triton.
        jitted: what ``triton.jit`` made.
        grid, arguments, options: of the launch.
    """
    device = torch._C._cuda_getDevice()
    jitted.device_caches[device]  # made here: two threads would make two, and what one of them compiles would be lost
    standing = tuple(_Pointer(x) if isinstance(x, Tensor) else x for x in arguments)
    rehearsal.note(key, functools.partial(_compile, jitted, device, grid, standing, options))


def _compile(jitted: Any, device: int, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What Triton does at a first launch, but for the launch: it finds the kernel among its own then."""
    with torch.cuda.device(device):
        compiled = jitted.warmup(*arguments, grid=grid, **options)
        compiled.run  # noqa: B018  # loads it, with a launcher that Triton 3.6 has the host's C compiler make


class Kernel:
    """A jitted kernel whose parameters are, in this order: pointers, numbers, constants.

    With a constant ``CHAIN`` of 2 it is launched before the kernel before it has ended (:func:`chain`).

    Numbers must stand in the kernel's ``do_not_specialize``: otherwise triton compiles another kernel for the value 1 and for
    multiples of 16, which is not noticed here.

    Args:
        jitted: what ``triton.jit`` made.
    """

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._chain: int | None = None
        if isinstance(jitted, triton.runtime.JITFunction):
            loose = [p.name for p in jitted.params if not p.is_constexpr and not p.do_not_specialize and "_ptr" not in p.name]
            constants = [p.name for p in jitted.params if p.is_constexpr]
            self._chain = constants.index("CHAIN") if "CHAIN" in constants else None
            assert not loose, f"{jitted.__name__}: {loose} must stand in do_not_specialize"

    def __call__(
        self,
        grid: tuple[int, ...],
        pointers: tuple[Tensor | None, ...],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        registers: int | None = None,
    ) -> None:
        """Launch on the current device and stream.

        Args:
            grid: up to three numbers of programs.
            pointers: tensors, or None where the constants say that there is none.
            numbers: int or float arguments.
            constants: values of the ``tl.constexpr`` parameters.
            num_warps: warps per program.
            registers: at most so many per thread, None as many as the compiler takes. AMD's compiler is not told.
        """
        first = pointers[0]
        assert first is not None
        if not first.is_cuda:
            self.jitted[grid](*pointers, *numbers, *constants, num_warps=num_warps)
            return
        device = torch._C._cuda_getDevice()
        kinds: list[Any] = [None if p is None else (p.dtype, p.data_ptr() % _ALIGNMENT == 0) for p in pointers]
        if _HIP:  # there triton also looks whether offsets into the tensor fit into 32 bits
            kinds += [p is not None and p.untyped_storage().size() < _WIDE for p in pointers]
        widths = [float if type(n) is float else -_WIDE <= n < _WIDE for n in numbers]
        key = (device, num_warps, registers, constants, *kinds, *widths)
        compiled = self._compiled.get(key)
        if THREAD.rehearsal is not None:
            if compiled is None:
                options = self._options(constants, num_warps, registers)
                note(THREAD.rehearsal, (self, *key), self.jitted, grid, (*pointers, *numbers, *constants), options)
            return
        if compiled is None:
            options = self._options(constants, num_warps, registers)
            self._compiled[key] = self.jitted[grid](*pointers, *numbers, *constants, **options)
            return
        grid = (*grid, 1, 1)[:3]
        compiled[grid](*pointers, *numbers, *constants, stream=torch._C._cuda_getCurrentRawStream(device))

    def _options(self, constants: tuple[Any, ...], num_warps: int, registers: int | None) -> dict[str, Any]:
        options: dict[str, Any] = {"num_warps": num_warps}
        if registers is not None and not _HIP:
            options["maxnreg"] = registers
        if self._chain is not None and constants[self._chain] == 2:
            options["launch_pdl"] = True
        return options
