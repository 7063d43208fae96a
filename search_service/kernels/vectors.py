"""Codes in vector registers: what the kernels of the Hamming distance are made of.

Each function here becomes LLVM instructions in the kernel that calls it. Codes are compared in
groups of `GROUP_ROWS`: eight vectors of eight 64-bit words, a population count each. The columns of
codes come as addresses and nothing is checked. Numba's cache of a kernel does not notice a change
of this file: clear it after one.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from search_service.kernels.compile import U8_IN

GROUP_ROWS = 64
"""Rows that are compared at a time."""

_LANES = 8
_VECTORS = GROUP_ROWS // _LANES

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_WORDS = ir.VectorType(_I64, _LANES)


def _distances(builder: Any, columns: list[Any], words: list[Any], byte: Any, vector: int) -> Any:
    """Emit the distances of eight rows; one column and one word of the query for each word."""
    total = None
    for column, word in zip(columns, words, strict=True):
        address = builder.add(column, builder.add(byte, _I64(vector * _LANES * 8)))
        codes = builder.load(builder.inttoptr(address, _WORDS.as_pointer()), align=8)
        differing = _popcount_vector(builder, builder.xor(codes, _splat(builder, word)))
        total = differing if total is None else builder.add(total, differing)
    return total


def _popcount_vector(builder: Any, vector: Any) -> Any:
    kind = ir.FunctionType(_WORDS, [_WORDS])
    name = f"llvm.ctpop.v{_LANES}i64"
    return builder.call(builder.module.declare_intrinsic(name, fnty=kind), [vector])


def _splat(builder: Any, value: Any) -> Any:
    unused = ir.Constant(_WORDS, ir.Undefined)
    first = builder.insert_element(unused, value, _I32(0))
    lanes = ir.Constant(ir.VectorType(_I32, _LANES), [0] * _LANES)
    return builder.shuffle_vector(first, unused, lanes)


def _any_within(builder: Any, distances: list[Any], ceiling: Any) -> Any:
    """Emit whether a distance is within the ceiling, as 0 or 1."""
    smallest = distances[0]
    for vector in distances[1:]:
        nearer = builder.icmp_unsigned("<", vector, smallest)
        smallest = builder.select(nearer, vector, smallest)
    near = _within(builder, smallest, _splat(builder, ceiling))
    return builder.zext(builder.icmp_unsigned("!=", near, _I8(0)), _I64)


def _members(builder: Any, distances: list[Any], ceiling: Any) -> Any:
    """Emit which distances are within the ceiling, one bit each."""
    limit = _splat(builder, ceiling)
    members = _I64(0)
    for i, vector in enumerate(distances):
        near = builder.zext(_within(builder, vector, limit), _I64)
        members = builder.or_(members, builder.shl(near, _I64(i * _LANES)))
    return members


def _within(builder: Any, vector: Any, limit: Any) -> Any:
    return builder.bitcast(builder.icmp_unsigned("<=", vector, limit), _I8)


def _fixed_width(n_words: int) -> tuple[Any, Any]:
    """Make both intrinsics for codes of so many words, all in registers."""
    columns_type = types.UniTuple(types.int64, n_words)
    query_type = types.UniTuple(types.uint64, n_words)

    def distances(builder: Any, args: Any) -> list[Any]:
        column, word = (list(cgutils.unpack_tuple(builder, args[i], n_words)) for i in (0, 1))
        byte = builder.shl(args[2], _I64(3))
        return [_distances(builder, column, word, byte, i) for i in range(_VECTORS)]

    @intrinsic
    def any_near(typing: Any, columns: Any, query: Any, row: Any, ceiling: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _any_within(builder, distances(builder, args), args[3])

        return types.int64(columns_type, query_type, types.int64, types.int64), generate

    @intrinsic
    def members(typing: Any, columns: Any, query: Any, row: Any, ceiling: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _members(builder, distances(builder, args), args[3])

        return types.uint64(columns_type, query_type, types.int64, types.int64), generate

    return any_near, members


def _any_width() -> tuple[Any, Any]:
    """Make both intrinsics for codes of any number of words, given as addresses."""

    def distances(builder: Any, args: Any) -> list[Any]:
        columns, query, row, n_words = args[:4]
        byte = builder.shl(row, _I64(3))
        sums = [cgutils.alloca_once(builder, _WORDS) for _ in range(_VECTORS)]
        for one in sums:
            builder.store(_WORDS(None), one)
        with cgutils.for_range(builder, n_words) as loop:

            def element(array: Any) -> Any:
                address = builder.add(array, builder.shl(loop.index, _I64(3)))
                return builder.load(builder.inttoptr(address, _I64.as_pointer()))

            column, word = element(columns), element(query)
            for i, one in enumerate(sums):
                some = _distances(builder, [column], [word], byte, i)
                builder.store(builder.add(builder.load(one), some), one)
        return [builder.load(one) for one in sums]

    @intrinsic
    def any_near(
        typing: Any, columns: Any, query: Any, row: Any, n_words: Any, ceiling: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _any_within(builder, distances(builder, args), args[4])

        return types.int64(*[types.int64] * 5), generate

    @intrinsic
    def members(typing: Any, columns: Any, query: Any, row: Any, n_words: Any, ceiling: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _members(builder, distances(builder, args), args[4])

        return types.uint64(*[types.int64] * 5), generate

    return any_near, members


def _define_alive(typing: Any, flags: Any, row: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        group = ir.VectorType(_I8, GROUP_ROWS)
        address = builder.bitcast(builder.gep(array.data, [args[1]]), group.as_pointer())
        alive = builder.icmp_unsigned("==", builder.load(address, align=1), group(None))
        return builder.bitcast(alive, _I64)

    return types.uint64(U8_IN, types.int64), generate


def _define_word_at(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _I64.as_pointer()))

    return types.uint64(types.int64), generate


def _define_popcount(typing: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate


def _define_lowest_set_bit(typing: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


# Of each width two: whether any row of a group is within the ceiling, as 0 or 1, and which are, one
# bit each.
any_near_1, members_1 = _fixed_width(1)
any_near_2, members_2 = _fixed_width(2)
any_near_n, members_n = _any_width()

alive: Any = intrinsic(_define_alive)
"""Which rows of a group are not dead, one bit each."""

word_at: Any = intrinsic(_define_word_at)
"""The uint64 at an address."""

popcount: Any = intrinsic(_define_popcount)
"""Set bits of a uint64."""

lowest_set_bit: Any = intrinsic(_define_lowest_set_bit)
"""Position of the lowest set bit of a uint64 that has one."""
