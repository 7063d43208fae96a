"""Features in a quarter or half of their bytes, and what they prove about distances.

A row ``x`` is kept as one byte per number, ``y[i] = offset + scale * code[i]``, and the length of
what that loses, ``loss >= |x - y|``. A query ``q`` is rounded likewise, far finer, to ``p``. By the
triangle inequality, the distance ``|q - x|`` differs from ``|p - y|`` by no more than
``loss + |q - p|``; and ``|p - y|`` is one inner product of integers, which is exact, and a few
operations in double precision.

Rows come in blocks of a power of two of them: first the codes of all, each row padded with zeros to
whole cache lines, then a header of `HEADER_BYTES` for each: offset, scale, ``|y|**2`` and loss as
float64. So the codes of a row of 4096 numbers are exactly a page; if they began within one, they
would come a fifth slower.
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
    F32_IN_2D,
    F64_IN,
    F64_OUT,
    F64_OUT_2D,
    I16_IN,
    I64_IN,
    INT64,
    U8_OUT_2D,
    VOID,
    helper,
    kernel,
)
from search_service.kernels.euclidean import GROUP_ROWS

HEADER_BYTES = 32

LINE_BYTES = 64

LEVELS = 255
"""Greatest code."""

_LANES = 16
"""Running sums of the inner product, int32; each adds two products at a time."""

_AHEAD_BYTES = 1 << 13
"""How far ahead rows are asked for, where a group is shorter than that."""

_ROUNDING = 2.0**-42
"""Of ``|p - y|**2``: a few operations in double precision, relative to what they add up."""

_GROUP = types.UniTuple(types.int64, GROUP_ROWS)

_I8 = ir.IntType(8)
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


def query_levels(dim: int) -> int:
    """Return the greatest code of a query that cannot overflow a running sum, at most 32767."""
    n_products = -(-dim // _LANES) + LINE_BYTES // _LANES
    return min(32767, (2**31 - 1) // (LEVELS * n_products))


@kernel(VOID(F32_IN_2D, U8_OUT_2D, F64_OUT_2D))
def encode(features, codes, headers):  # type: ignore[no-untyped-def]
    """Round rows to one byte per number.

    Parameters
    ----------
    features
        float32, shape ``[n, dim]``. A row with infinity or NaN gets an infinite loss.
    codes
        Written: uint8, shape ``[n, dim]``.
    headers
        Written: float64, shape ``[n, 4]``: offset, scale, ``|y|**2``, loss.
    """
    dim = features.shape[1]
    for row in range(features.shape[0]):
        x, code = features[row], codes[row]
        low, high = np.float64(x[0]), np.float64(x[0])
        total = np.float64(0)
        for i in range(dim):
            number = np.float64(x[i])
            low = number if number < low else low
            high = number if number > high else high
            total += number
        if not math.isfinite(total):  # any infinity or NaN gets here: float32 cannot overflow it
            code[:] = 0
            headers[row, :3] = 0
            headers[row, 3] = np.inf
            continue
        scale = (high - low) / LEVELS
        inverse = 1 / scale if scale > 0 else 0.0
        squares = np.float64(0)
        code_sum, code_squares = np.int64(0), np.int64(0)
        for i in range(dim):
            level = np.int64((x[i] - low) * inverse + 0.5)
            level = np.int64(LEVELS) if level > LEVELS else level
            code[i] = level
            code_sum += level
            code_squares += level * level
            lost = x[i] - (low + scale * level)
            squares += lost * lost
        greatest = abs(low) if abs(low) > abs(high) else abs(high)
        headers[row, 0] = low
        headers[row, 1] = scale
        headers[row, 2] = (
            dim * low * low + 2 * low * scale * code_sum + scale * scale * code_squares
        )
        # Rounded up: the sum's own roundings, and those of each number that was subtracted.
        headers[row, 3] = math.sqrt(squares) * (1 + 2.0**-30) + math.sqrt(dim) * greatest * 2.0**-48


@kernel(VOID(I64_IN, INT64, INT64, I64_IN, I16_IN, F64_IN, F64_OUT, F64_OUT), parallel=True)
def bounds(  # type: ignore[no-untyped-def]
    addresses, block_bits, dim, rows, query_codes, query, near, least
):
    """Estimate the distance of a query to each of `rows`, and bound it from below.

    Nothing is checked: the caller vouches that every row lies in its block, and keeps the blocks
    alive.

    Parameters
    ----------
    addresses
        Where each block of rows begins: int64, shape ``[n_blocks]``.
    block_bits
        Row ``r`` is number ``r % 2**block_bits`` of block ``r >> block_bits``.
    dim
        Width of the features.
    rows
        int64, shape ``[n]``.
    query_codes
        int16, shape ``[dim, padded to whole cache lines of bytes]``; zeros at the end. None above
        `query_levels` in size.
    query
        float64, shape ``[4]``: the scale of its codes, their sum, ``|p|**2``, and ``|q - p|``.
    near
        Written: float64, shape ``[n]``: the estimate; infinite where nothing is known.
    least
        Written: float64, shape ``[n]``: `search_service.kernels.euclidean` finds no less.
    """
    n = rows.shape[0]
    row_bytes = query_codes.shape[0]
    headers = addresses + (row_bytes << block_bits)
    ahead = GROUP_ROWS * max(1, _AHEAD_BYTES // (GROUP_ROWS * row_bytes))
    # What float32 sums may fall short of the real distance: relatively by one rounding for each
    # addition in a lane and a few more (of the square, so twice what is needed), absolutely by
    # squares too small for it.
    kept = 1 - (dim / 32 + 16) * 2.0**-24
    vanished = math.sqrt(dim) * 2.0**-74
    for group in numba.prange((n + GROUP_ROWS - 1) // GROUP_ROWS):
        first = GROUP_ROWS * group
        these = _group(addresses, block_bits, row_bytes, rows, first)
        later = _group(addresses, block_bits, row_bytes, rows, first + ahead)
        for i in range(GROUP_ROWS):
            _want(_address(headers, block_bits, HEADER_BYTES, rows, first + i))
        products = _products(these, later, query_codes)
        for i in range(min(GROUP_ROWS, n - first)):
            header = _address(headers, block_bits, HEADER_BYTES, rows, first + i)
            offset, scale, row_square, loss = _header(header)
            inner = query[0] * (offset * query[1] + scale * products[i])
            squared = query[2] + row_square - 2 * inner
            greatest = max(abs(offset), abs(offset + LEVELS * scale))
            slack = _ROUNDING * (query[2] + dim * greatest * greatest)
            distance = math.sqrt(max(squared - slack, 0.0)) - loss - query[3]
            near[first + i] = np.inf if math.isinf(loss) else math.sqrt(max(squared, 0.0))
            least[first + i] = max(distance, 0.0) * kept - vanished


@helper
def _address(addresses, block_bits, row_bytes, rows, i):  # type: ignore[no-untyped-def]
    """Return where row number `i` of `rows` lies, or the last one if there are not so many."""
    row = rows[min(i, rows.shape[0] - 1)]
    return addresses[row >> block_bits] + (row & ((1 << block_bits) - 1)) * row_bytes


@helper
def _group(addresses, block_bits, row_bytes, rows, i):  # type: ignore[no-untyped-def]
    """Return where `GROUP_ROWS` rows lie, from number `i` of `rows` on."""
    return (
        _address(addresses, block_bits, row_bytes, rows, i),
        _address(addresses, block_bits, row_bytes, rows, i + 1),
        _address(addresses, block_bits, row_bytes, rows, i + 2),
        _address(addresses, block_bits, row_bytes, rows, i + 3),
        _address(addresses, block_bits, row_bytes, rows, i + 4),
        _address(addresses, block_bits, row_bytes, rows, i + 5),
        _address(addresses, block_bits, row_bytes, rows, i + 6),
        _address(addresses, block_bits, row_bytes, rows, i + 7),
    )


def _typed_header(typing: Any, address: Any) -> Any:
    """Read the four numbers of a header: ``(address) -> (float64, ...)``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        header = builder.inttoptr(args[0], ir.DoubleType().as_pointer())
        numbers = [builder.load(builder.gep(header, [_I32(i)])) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, numbers)

    return types.UniTuple(types.float64, 4)(types.int64), generate


_header: Any = intrinsic(_typed_header)


def _typed_want(typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address: ``(address)``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _prefetch(builder, builder.inttoptr(args[0], _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), generate


_want: Any = intrinsic(_typed_want)


def _typed_products(typing: Any, addresses: Any, later: Any, query: Any) -> Any:
    """Multiply the codes of `GROUP_ROWS` rows with a query's, asking for those of `later` rows.

    The rows go side by side; `search_service.kernels.euclidean` says why.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[2])(context, builder, args[2])
        size = builder.extract_value(array.shape, 0)
        rows, later_rows = (
            [
                builder.inttoptr(row, _I8.as_pointer())
                for row in cgutils.unpack_tuple(builder, group, GROUP_ROWS)
            ]
            for group in args[:2]
        )
        kind = ir.VectorType(_I32, _LANES)
        sums = [cgutils.alloca_once(builder, kind) for _ in rows]
        for lanes in sums:
            builder.store(kind(None), lanes)
        with cgutils.for_range_slice(builder, size.type(0), size, size.type(LINE_BYTES)) as (i, _):
            for row in later_rows:
                _prefetch(builder, builder.gep(row, [i]))
            for part in range(0, LINE_BYTES, 2 * _LANES):
                place = builder.add(i, i.type(part))
                codes = _load(builder, builder.gep(array.data, [place]), _I16)
                for row, lanes in zip(rows, sums, strict=True):
                    bytes_ = _load(builder, builder.gep(row, [place]), _I8)
                    wide = builder.zext(bytes_, codes.type)
                    product = _multiply_add(context, builder, wide, codes)
                    builder.store(builder.add(builder.load(lanes), product), lanes)
        totals = [_add_halves(builder, builder.load(lanes)) for lanes in sums]
        return context.make_tuple(builder, signature.return_type, totals)

    return types.UniTuple(types.int64, GROUP_ROWS)(_GROUP, _GROUP, I16_IN), generate


_products: Any = intrinsic(_typed_products)


def _multiply_add(context: Any, builder: Any, a: Any, b: Any) -> Any:
    """Multiply int16 numbers and add neighbours, as int32: one instruction where there is one."""
    features = context.codegen().magic_tuple()[2].split(",")
    kind = ir.VectorType(_I32, _LANES)
    if "+avx512bw" in features:
        instruction = ir.FunctionType(kind, [a.type, a.type])
        name = "llvm.x86.avx512.pmaddw.d.512"
        return builder.call(
            cgutils.get_or_insert_function(builder.module, instruction, name), [a, b]
        )
    unused = ir.Constant(a.type, ir.Undefined)

    def chosen(vector: Any, places: range) -> Any:
        mask = ir.Constant(ir.VectorType(_I32, len(places)), list(places))
        return builder.shuffle_vector(vector, unused, mask)

    if "+avx2" in features:
        half = ir.FunctionType(ir.VectorType(_I32, _LANES // 2), [ir.VectorType(_I16, _LANES)] * 2)
        multiply = cgutils.get_or_insert_function(builder.module, half, "llvm.x86.avx2.pmadd.wd")
        low, high = (
            builder.call(multiply, [chosen(a, part), chosen(b, part)])
            for part in (range(_LANES), range(_LANES, 2 * _LANES))
        )
        both = ir.Constant(kind, list(range(_LANES)))
        return builder.shuffle_vector(low, high, both)
    even, odd = (
        builder.mul(
            builder.sext(chosen(a, range(first, 2 * _LANES, 2)), kind),
            builder.sext(chosen(b, range(first, 2 * _LANES, 2)), kind),
        )
        for first in (0, 1)
    )
    return builder.add(even, odd)


def _load(builder: Any, pointer: Any, element: ir.IntType) -> Any:
    kind = ir.VectorType(element, 2 * _LANES)
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=element.width // 8)


def _prefetch(builder: Any, pointer: Any) -> None:
    """Emit a prefetch into the second level of cache."""
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(prefetch, [pointer, _I32(0), _I32(2), _I32(1)])


def _add_halves(builder: Any, vector: Any) -> Any:
    vector = builder.sext(vector, ir.VectorType(_I64, _LANES))  # all of them may overflow int32
    width = _LANES
    while width > 1:
        width //= 2
        unused = ir.Constant(vector.type, ir.Undefined)
        low = ir.Constant(ir.VectorType(_I32, width), list(range(width)))
        high = ir.Constant(ir.VectorType(_I32, width), list(range(width, 2 * width)))
        vector = builder.add(
            builder.shuffle_vector(vector, unused, low),
            builder.shuffle_vector(vector, unused, high),
        )
    return builder.extract_element(vector, _I32(0))
