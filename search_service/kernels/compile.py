"""How kernels are compiled: every option, and the types their signatures are written in.

Inputs are signed for as read-only, because memory-mapped arrays are; Numba takes a writable array
there, too. Kernels are compiled on the first call or by `Kernel.compile`, never at import.

Two options are left off on purpose. ``fastmath`` would let the compiler reorder sums, and the same
query must give the same bits on every machine. ``boundscheck`` costs the vectoriser its loops; set
``NUMBA_BOUNDSCHECK=1`` to look for a fault.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numba
from numba import types

log = logging.getLogger(__name__)

INT64 = types.int64
BOOLEAN = types.boolean
VOID = types.void

U8_IN = types.Array(types.uint8, 1, "C", readonly=True)
U16_IN = types.Array(types.uint16, 1, "C", readonly=True)
U16_IN_3D = types.Array(types.uint16, 3, "C", readonly=True)
U32_IN = types.Array(types.uint32, 1, "C", readonly=True)
U64_IN = types.Array(types.uint64, 1, "C", readonly=True)
U64_IN_2D = types.Array(types.uint64, 2, "C", readonly=True)
I16_IN = types.Array(types.int16, 1, "C", readonly=True)
I64_IN = types.Array(types.int64, 1, "C", readonly=True)
I64_IN_3D = types.Array(types.int64, 3, "C", readonly=True)
F32_IN = types.Array(types.float32, 1, "C", readonly=True)
F64_IN = types.Array(types.float64, 1, "C", readonly=True)
F32_IN_2D = types.Array(types.float32, 2, "C", readonly=True)
U64_STRIDED_IN = types.Array(types.uint64, 1, "A", readonly=True)
"""A field of an array of records, say."""
U8_OUT = types.Array(types.uint8, 1, "C")
U16_OUT = types.Array(types.uint16, 1, "C")
U16_OUT_3D = types.Array(types.uint16, 3, "C")
I64_OUT = types.Array(types.int64, 1, "C")
U64_OUT_2D = types.Array(types.uint64, 2, "C")
U32_OUT = types.Array(types.uint32, 1, "C")
F32_OUT = types.Array(types.float32, 1, "C")
F64_OUT = types.Array(types.float64, 1, "C")
U8_OUT_2D = types.Array(types.uint8, 2, "C")
F64_OUT_2D = types.Array(types.float64, 2, "C")
I64_OUT_2D = types.Array(types.int64, 2, "C")
I64_OUT_3D = types.Array(types.int64, 3, "C")

_jit = functools.partial(numba.njit, nogil=True, error_model="numpy")

helper = _jit()
"""Decorator for what kernels call. A helper stands in the file of its kernels, because Numba's
cache notices a change of that file only."""


class Kernel:
    """A function compiled for one signature.

    Calling it compiles it first if need be; other argument types are a TypeError.

    Parameters
    ----------
    function
        What to compile, in the subset of Python that Numba knows.
    signature
        Numba signature.
    parallel
        Whether its ``prange`` loops enter the threading layer. Such a kernel must not be entered
        by two threads at once: Numba's ``workqueue`` layer aborts the process.
    """

    def __init__(self, function: Callable[..., Any], signature: Any, *, parallel: bool) -> None:
        self._function = function
        self._signature = signature
        self._parallel = parallel
        self._compiled: Any = None

    def __call__(self, *args: Any) -> Any:
        """Run the function."""
        if self._compiled is None:
            self.compile()
        return self._compiled(*args)

    def compile(self) -> None:
        """Compile, or load from Numba's cache; nothing if that is done."""
        if self._compiled is not None:
            return
        try:
            self._compiled = self._compile(cached=True)
        except (OSError, RuntimeError) as error:
            # No writable cache directory, or a full disk: slower to start, not wrong.
            log.info("kernel %s: not cached: %s", self._function.__name__, error)
            self._compiled = self._compile(cached=False)

    def assembly(self) -> str:
        """Compile anew and return the machine code as text; the cache keeps none."""
        return "\n".join(self._compile(cached=False).inspect_asm().values())

    def _compile(self, *, cached: bool) -> Any:
        dispatcher = _jit(parallel=self._parallel, cache=cached)(self._function)
        dispatcher.compile(self._signature)
        dispatcher.disable_compile()
        return dispatcher


def kernel(signature: Any, *, parallel: bool = False) -> Callable[[Callable[..., Any]], Kernel]:
    """Return a decorator that makes a `Kernel` of a function."""

    def decorate(function: Callable[..., Any]) -> Kernel:
        return Kernel(function, signature, parallel=parallel)

    return decorate
