"""Euclidean distances of one query to chosen rows, the same bits on every machine.

Floating-point sums depend on their order, so the order is part of the definition. With `LANES`
running sums, number ``i`` of a row belongs to lane ``i % LANES``; each lane adds its squares from
left to right, in float32, starting at 0. Then the upper half of the lanes is added to the lower
half, until one is left, and its square root is the distance. Multiplication and addition stay two
roundings: nothing is fused.

The loop is written out as LLVM vectors, because a compiler free to vectorise a sum is free to
reorder it. Half-precision rows are widened exactly.

Squares beyond the range of float32 make a distance infinite; so does NaN. Such rows come last and
among themselves are ordered by what breaks ties.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from search_service.kernels.compile import (
    BOOLEAN,
    F32_IN,
    F32_OUT,
    I64_IN,
    INT64,
    VOID,
    helper,
    kernel,
)

LANES = 32
"""Running sums per row; a power of two. Part of the definition of the distance."""

GROUP_ROWS = 8
"""Rows that a thread reads side by side. One row after the other keeps a core waiting: it has room
for some twenty cache lines on their way, and hardware looks ahead within a stream only, by more of
it the more streams there are. Eight of them, each asked for a group in advance, come nearly as fast
as memory that is read from end to end, if rows are wide; twelve or sixteen come no faster."""

_AHEAD_BYTES = 1 << 13
"""How far ahead rows are asked for, where a group is shorter than that."""

_LINE_BYTES = 64

_GROUP = types.UniTuple(types.int64, GROUP_ROWS)

_I32 = ir.IntType(32)
_F32 = ir.FloatType()
_F16 = ir.HalfType()
_VECTOR = ir.VectorType(_F32, LANES)


def _squared_distances(element: ir.Type) -> Any:
    """Make the intrinsic ``(addresses, later, query) -> sums`` for rows of one number format.

    It takes the addresses of `GROUP_ROWS` rows, and of as many that will be wanted later.
    """

    @intrinsic
    def squared_distances(typing: Any, addresses: Any, later: Any, query: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            array = context.make_array(signature.args[2])(context, builder, args[2])
            dim = builder.extract_value(array.shape, 0)
            rows, later_rows = (
                [
                    builder.inttoptr(part, element.as_pointer())
                    for part in cgutils.unpack_tuple(builder, group, GROUP_ROWS)
                ]
                for group in args[:2]
            )
            at_once = _rows_at_once(context)
            sums: list[Any] = []
            for lo in range(0, GROUP_ROWS, at_once):
                part = slice(lo, lo + at_once)
                sums += _emit(
                    builder,
                    rows[part],
                    later_rows[part],
                    array.data,
                    dim,
                    native=_converts_half(context),
                )
            return context.make_tuple(builder, signature.return_type, sums)

        return types.UniTuple(types.float32, GROUP_ROWS)(_GROUP, _GROUP, F32_IN), generate

    return squared_distances


def _emit(
    builder: Any, rows: list[Any], later: list[Any], query: Any, dim: Any, *, native: bool
) -> list[Any]:
    """Emit the sums; `rows`, `later` and `query` are pointers, `dim` is an i64."""
    element = rows[0].type.pointee
    rows_vector = ir.VectorType(element, LANES)
    sums = [cgutils.alloca_once(builder, _VECTOR) for _ in rows]
    for lanes in sums:
        builder.store(_VECTOR(None), lanes)

    def add_blocks(row_blocks: list[Any], query_block: Any) -> None:
        b = _load(builder, query_block, _VECTOR)
        for row_block, lanes in zip(row_blocks, sums, strict=True):
            a = _widen(builder, _load(builder, row_block, rows_vector), native=native)
            difference = builder.fsub(a, b)
            square = builder.fmul(difference, difference)
            builder.store(builder.fadd(builder.load(lanes), square), lanes)

    width = dim.type(LANES)
    tail = builder.urem(dim, width)
    whole = builder.sub(dim, tail)
    with cgutils.for_range_slice(builder, dim.type(0), whole, width) as (i, _):
        for line in range(0, LANES, _LINE_BYTES // _n_bytes(element)):
            place = builder.add(i, i.type(line))
            for row in later:
                _prefetch(builder, builder.gep(row, [place]))
        add_blocks([builder.gep(row, [i]) for row in rows], builder.gep(query, [i]))
    # A last block padded with zeros on both sides adds exactly +0.0 to the unused lanes.
    with builder.if_then(builder.icmp_unsigned("!=", tail, tail.type(0)), likely=False):

        def padded(source: Any, kind: ir.VectorType) -> Any:
            block = cgutils.alloca_once(builder, kind, zfill=True)
            target = builder.bitcast(block, source.type)
            cgutils.raw_memcpy(
                builder, target, builder.gep(source, [whole]), tail, _n_bytes(kind.element)
            )
            return target

        add_blocks([padded(row, rows_vector) for row in rows], padded(query, _VECTOR))
    return [_add_halves(builder, builder.load(lanes)) for lanes in sums]


def _prefetch(builder: Any, pointer: Any) -> None:
    """Emit a prefetch into the second level of cache; an address that is not there does nothing."""
    pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    to_read, second_level, data = _I32(0), _I32(2), _I32(1)
    builder.call(prefetch, [pointer, to_read, second_level, data])


def _load(builder: Any, pointer: Any, kind: ir.VectorType) -> Any:
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=_n_bytes(kind.element))


def _n_bytes(element: ir.Type) -> int:
    return 2 if element == _F16 else 4


def _widen(builder: Any, vector: Any, *, native: bool) -> Any:
    if vector.type == _VECTOR:
        return vector
    if native:
        return builder.fpext(vector, _VECTOR)

    # Move exponent and mantissa into a float32's place, then mend the exponent's bias, 15 for 127,
    # by an exact multiplication, which also normalises subnormal numbers.
    integers = ir.VectorType(_I32, LANES)

    def constant(value: int) -> Any:
        return ir.Constant(integers, [value] * LANES)

    half = builder.zext(builder.bitcast(vector, ir.VectorType(ir.IntType(16), LANES)), integers)
    magnitude = builder.shl(builder.and_(half, constant(0x7FFF)), constant(13))
    scale = ir.Constant(_VECTOR, [2.0**112] * LANES)
    finite = builder.bitcast(builder.fmul(builder.bitcast(magnitude, _VECTOR), scale), integers)
    special = builder.or_(magnitude, constant(0x7F800000))  # infinity and NaN
    is_special = builder.icmp_unsigned(">=", magnitude, constant(0x1F << 23))
    sign = builder.shl(builder.and_(half, constant(0x8000)), constant(16))
    return builder.bitcast(builder.or_(builder.select(is_special, special, finite), sign), _VECTOR)


def _converts_half(context: Any) -> bool:
    """Tell whether the target has an instruction for it; else LLVM calls a function Numba lacks."""
    triple, _, features = context.codegen().magic_tuple()
    return "+f16c" in features.split(",") or triple.startswith(("aarch64", "arm64"))


def _rows_at_once(context: Any) -> int:
    """Return for how many rows the running sums stay in registers."""
    features = context.codegen().magic_tuple()[2]
    return GROUP_ROWS if "+avx512f" in features.split(",") else 2


def _add_halves(builder: Any, vector: Any) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        unused = ir.Constant(vector.type, ir.Undefined)
        low = ir.Constant(ir.VectorType(_I32, width), list(range(width)))
        high = ir.Constant(ir.VectorType(_I32, width), list(range(width, 2 * width)))
        vector = builder.fadd(
            builder.shuffle_vector(vector, unused, low),
            builder.shuffle_vector(vector, unused, high),
        )
    return builder.extract_element(vector, _I32(0))


_squared_f32 = _squared_distances(_F32)
_squared_f16 = _squared_distances(_F16)


@helper
def _address(addresses, segment_bits, row_bytes, rows, i):  # type: ignore[no-untyped-def]
    """Return where row number `i` of `rows` lies, or the last one if there are not so many."""
    row = rows[min(i, rows.shape[0] - 1)]
    return addresses[row >> segment_bits] + (row & ((1 << segment_bits) - 1)) * row_bytes


@helper
def _group(addresses, segment_bits, row_bytes, rows, i):  # type: ignore[no-untyped-def]
    """Return where `GROUP_ROWS` rows lie, from number `i` of `rows` on."""
    return (
        _address(addresses, segment_bits, row_bytes, rows, i),
        _address(addresses, segment_bits, row_bytes, rows, i + 1),
        _address(addresses, segment_bits, row_bytes, rows, i + 2),
        _address(addresses, segment_bits, row_bytes, rows, i + 3),
        _address(addresses, segment_bits, row_bytes, rows, i + 4),
        _address(addresses, segment_bits, row_bytes, rows, i + 5),
        _address(addresses, segment_bits, row_bytes, rows, i + 6),
        _address(addresses, segment_bits, row_bytes, rows, i + 7),
    )


@kernel(VOID(I64_IN, INT64, BOOLEAN, I64_IN, F32_IN, F32_OUT), parallel=True)
def distances(addresses, segment_bits, is_half, rows, query, out):  # type: ignore[no-untyped-def]
    """Compute the distance of a query to each of `rows`.

    Nothing is checked: the caller vouches that every row lies in its segment, and keeps the
    segments alive.

    Parameters
    ----------
    addresses
        Where each segment of features begins: int64, shape ``[n_segments]``.
    segment_bits
        Row ``r`` is number ``r % 2**segment_bits`` of segment ``r >> segment_bits``.
    is_half
        Whether features are float16, else float32.
    rows
        int64, shape ``[n]``; ascending is kindest to the page cache.
    query
        float32, shape ``[dim]``.
    out
        Written: float32, shape ``[n]``; never NaN.
    """
    row_bytes = query.shape[0] * (2 if is_half else 4)
    n = rows.shape[0]
    ahead = GROUP_ROWS * max(1, _AHEAD_BYTES // (GROUP_ROWS * max(1, row_bytes)))
    for group in numba.prange((n + GROUP_ROWS - 1) // GROUP_ROWS):
        first = GROUP_ROWS * group
        these = _group(addresses, segment_bits, row_bytes, rows, first)
        later = _group(addresses, segment_bits, row_bytes, rows, first + ahead)
        squared = (
            _squared_f16(these, later, query) if is_half else _squared_f32(these, later, query)
        )
        for i in range(min(GROUP_ROWS, n - first)):
            distance = math.sqrt(squared[i])
            out[first + i] = np.float32(np.inf) if math.isnan(distance) else distance
