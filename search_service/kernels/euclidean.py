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
    kernel,
)

LANES = 32
"""Running sums per row; a power of two. Part of the definition of the distance."""

_I32 = ir.IntType(32)
_F32 = ir.FloatType()
_F16 = ir.HalfType()
_VECTOR = ir.VectorType(_F32, LANES)


def _squared_distance(element: ir.Type) -> Any:
    """Make the intrinsic ``(address, query) -> float32`` for rows of one number format."""

    @intrinsic
    def squared_distance(typing: Any, address: Any, query: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            array = context.make_array(signature.args[1])(context, builder, args[1])
            row = builder.inttoptr(args[0], element.as_pointer())
            dim = builder.extract_value(array.shape, 0)
            return _emit(builder, row, array.data, dim, native=_converts_half(context))

        return types.float32(types.int64, F32_IN), generate

    return squared_distance


def _emit(builder: Any, row: Any, query: Any, dim: Any, *, native: bool) -> Any:
    """Emit the sum; `row` and `query` are pointers, `dim` is an i64."""
    element = row.type.pointee
    rows_vector = ir.VectorType(element, LANES)
    sums = cgutils.alloca_once(builder, _VECTOR)
    builder.store(_VECTOR(None), sums)

    def add_block(row_block: Any, query_block: Any) -> None:
        a = _widen(builder, _load(builder, row_block, rows_vector), native=native)
        b = _load(builder, query_block, _VECTOR)
        difference = builder.fsub(a, b)
        square = builder.fmul(difference, difference)
        builder.store(builder.fadd(builder.load(sums), square), sums)

    lanes = dim.type(LANES)
    tail = builder.urem(dim, lanes)
    whole = builder.sub(dim, tail)
    with cgutils.for_range_slice(builder, dim.type(0), whole, lanes) as (i, _):
        add_block(builder.gep(row, [i]), builder.gep(query, [i]))
    # A last block padded with zeros on both sides adds exactly +0.0 to the unused lanes.
    with builder.if_then(builder.icmp_unsigned("!=", tail, tail.type(0)), likely=False):
        padded = []
        for source, kind in ((row, rows_vector), (query, _VECTOR)):
            block = cgutils.alloca_once(builder, kind, zfill=True)
            target = builder.bitcast(block, source.type)
            cgutils.raw_memcpy(
                builder, target, builder.gep(source, [whole]), tail, _n_bytes(kind.element)
            )
            padded.append(target)
        add_block(*padded)
    return _add_halves(builder, builder.load(sums))


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


_squared_f32 = _squared_distance(_F32)
_squared_f16 = _squared_distance(_F16)


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
    in_segment = (1 << segment_bits) - 1
    for i in numba.prange(rows.shape[0]):
        address = addresses[rows[i] >> segment_bits] + (rows[i] & in_segment) * row_bytes
        squared = _squared_f16(address, query) if is_half else _squared_f32(address, query)
        distance = math.sqrt(squared)
        out[i] = np.float32(np.inf) if math.isnan(distance) else distance
