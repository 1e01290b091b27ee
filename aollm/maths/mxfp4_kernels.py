"""The loops of MXFP4 that numba compiles: rows times packed weights, and packed weights to numbers.

Sixteen lanes, a group of 32 weights at a time: its 16 bytes become 16 numbers from the low nibbles and 16 from the high ones. numba
does not see that a nibble is an index into one vector register, so that and little else is said in LLVM's words: measured 4.8 times as
fast as the same loop in plain numba. Addresses and counts are taken on trust; `mxfp4` checks them. It knows nothing of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pickle import UnpicklingError
from threading import Lock
from typing import Any

from llvmlite import ir
from numba import get_num_threads, njit, prange, set_num_threads, types
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, register_model

from .mxfp4 import DOUBLED

Operation = tuple[Any, Callable[..., Any]]

FLOAT, INT, BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(8)
FLOATS, INTS, BYTES = (ir.VectorType(element, 16) for element in (FLOAT, INT, BYTE))


class Floats(types.Type):
    """Sixteen float32."""

    def __init__(self) -> None:
        super().__init__(name="Floats")


class Ints(types.Type):
    """Sixteen int32."""

    def __init__(self) -> None:
        super().__init__(name="Ints")


primitive: Any = PrimitiveModel
register_model(Floats)(lambda manager, kind: primitive(manager, kind, FLOATS))
register_model(Ints)(lambda manager, kind: primitive(manager, kind, INTS))

floats, ints, address, number = Floats(), Ints(), types.intp, types.float32


def each(value: float, vector: Any = INTS) -> Any:
    """A vector of one constant."""
    return ir.Constant(vector, [value] * 16)


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """Call one of LLVM's own functions."""
    return builder.call(builder.module.declare_intrinsic(name, (), ir.FunctionType(result, [arg.type for arg in args])), args)


def operation(build: Callable[..., Operation]) -> Any:
    """What the loops below call: without types, because numba gives other ones than Python would."""
    return intrinsic(build)


@operation
def zeros(typing: Any) -> Operation:
    """Sixteen zeros."""
    return floats(), lambda context, builder, signature, args: each(0.0, FLOATS)


@operation
def load(typing: Any, at: Any) -> Operation:
    """Sixteen float32 at an address."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], FLOATS.as_pointer()), align=4)

    return floats(address), build


@operation
def load_bytes(typing: Any, at: Any) -> Operation:
    """Sixteen bytes at an address, as int32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.load(builder.inttoptr(args[0], BYTES.as_pointer()), align=1), INTS)

    return ints(address), build


@operation
def load_scale(typing: Any, at: Any) -> Operation:
    """Half of the power of two that the e8m0 byte at an address stands for, sixteen times: so also the largest is finite."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = builder.zext(builder.load(builder.inttoptr(args[0], BYTE.as_pointer()), align=1), INT)
        normal, tiny = builder.shl(builder.sub(byte, INT(1)), INT(23)), builder.shl(INT(1 << 21), byte)
        power = builder.bitcast(builder.select(builder.icmp_unsigned(">", byte, INT(1)), normal, tiny), FLOAT)
        first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), power, INT(0))
        return builder.shuffle_vector(first, first, each(0))

    return floats(address), build


@operation
def values(typing: Any, codes: Any) -> Operation:
    """Twice what the low four bits of each lane stand for: a look into a register with AVX-512, else a shift by the code."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if "+avx512f" in context.codegen().magic_tuple()[2].split(","):
            table = ir.Constant(FLOATS, [*DOUBLED, *(-double for double in DOUBLED)])
            return call(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, table, args[0])
        packed = sum(int(double) << 4 * code for code, double in enumerate(DOUBLED))
        shift = builder.shl(builder.and_(args[0], each(7)), each(2))
        size = builder.sitofp(builder.and_(builder.lshr(each(packed), shift), each(15)), FLOATS)
        sign = builder.shl(builder.and_(args[0], each(8)), each(28))
        return builder.bitcast(builder.or_(builder.bitcast(size, INTS), sign), FLOATS)

    return floats(ints), build


@operation
def upper(typing: Any, codes: Any) -> Operation:
    """The high nibbles of bytes."""
    return ints(ints), lambda context, builder, signature, args: builder.lshr(args[0], each(4))


@operation
def times(typing: Any, a: Any, b: Any) -> Operation:
    """a b, lane by lane."""
    return floats(floats, floats), lambda context, builder, signature, args: builder.fmul(*args)


@operation
def plus(typing: Any, total: Any, a: Any, b: Any) -> Operation:
    """total + a b, lane by lane."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return call(builder, "llvm.fmuladd.v16f32", FLOATS, args[1], args[2], args[0])

    return floats(floats, floats, floats), build


@operation
def store_sum(typing: Any, at: Any, total: Any) -> Operation:
    """Write the sum of the lanes as one float32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        width, total = 8, args[1]
        while width:
            moved = ir.Constant(INTS, [(lane + width) % 16 for lane in range(16)])
            total = builder.fadd(total, builder.shuffle_vector(total, total, moved))
            width //= 2
        builder.store(builder.extract_element(total, INT(0)), builder.inttoptr(args[0], FLOAT.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(address, floats), build


@operation
def store_halves(typing: Any, at: Any, low: Any, high: Any) -> Operation:
    """Write low and high in turn, as 32 bfloat16: their upper halves, which hold all digits of such numbers."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        low, high = (builder.bitcast(arg, INTS) for arg in args[1:])
        pairs = builder.or_(builder.lshr(low, each(16)), builder.and_(high, each(0xFFFF0000)))
        builder.store(pairs, builder.inttoptr(args[0], INTS.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(address, floats, floats), build


@operation
def store_wholes(typing: Any, at: Any, low: Any, high: Any) -> Operation:
    """Write low and high in turn, as 32 float32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pairs = ir.Constant(ir.VectorType(INT, 32), [lane // 2 + lane % 2 * 16 for lane in range(32)])
        both = builder.shuffle_vector(args[1], args[2], pairs)
        builder.store(both, builder.inttoptr(args[0], both.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(address, floats, floats), build


def one_row(y: int, x: int, blocks: int, scales: int, groups: int, first: int, last: int) -> None:
    """Outputs first to last of one row: each group's sum is scaled once."""
    odd = x + groups * 64
    for out in range(first, last):
        block, scale, total = blocks + out * groups * 16, scales + out * groups, zeros()
        for group in range(groups):
            codes = load_bytes(block + group * 16)
            part = plus(times(values(codes), load(x + group * 64)), values(upper(codes)), load(odd + group * 64))
            total = plus(total, load_scale(scale + group), part)
        store_sum(y + out * 4, total)


def four_rows(y: int, x: int, blocks: int, scales: int, groups: int, outs: int, first: int, last: int) -> None:
    """Outputs first to last of four rows, two at a time: what is decoded serves four times, what is loaded of x twice."""
    half, row = groups * 64, groups * 128
    for out in range(first, last, 2):
        beside = min(out + 1, last - 1)
        a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
        b0, b1, b2, b3 = zeros(), zeros(), zeros(), zeros()
        for group in range(groups):
            codes, scale = load_bytes(blocks + (out * groups + group) * 16), load_scale(scales + out * groups + group)
            a_even, a_odd = times(values(codes), scale), times(values(upper(codes)), scale)
            codes, scale = load_bytes(blocks + (beside * groups + group) * 16), load_scale(scales + beside * groups + group)
            b_even, b_odd = times(values(codes), scale), times(values(upper(codes)), scale)
            at = x + group * 64
            even, odd = load(at), load(at + half)
            a0, b0 = plus(plus(a0, a_even, even), a_odd, odd), plus(plus(b0, b_even, even), b_odd, odd)
            even, odd = load(at + row), load(at + row + half)
            a1, b1 = plus(plus(a1, a_even, even), a_odd, odd), plus(plus(b1, b_even, even), b_odd, odd)
            even, odd = load(at + 2 * row), load(at + 2 * row + half)
            a2, b2 = plus(plus(a2, a_even, even), a_odd, odd), plus(plus(b2, b_even, even), b_odd, odd)
            even, odd = load(at + 3 * row), load(at + 3 * row + half)
            a3, b3 = plus(plus(a3, a_even, even), a_odd, odd), plus(plus(b3, b_even, even), b_odd, odd)
        for column, totals in ((beside, (b0, b1, b2, b3)), (out, (a0, a1, a2, a3))):
            to = y + column * 4
            store_sum(to, totals[0])
            store_sum(to + outs * 4, totals[1])
            store_sum(to + outs * 8, totals[2])
            store_sum(to + outs * 12, totals[3])


def halves(to: int, blocks: int, scales: int, first: int, last: int) -> None:
    """Groups first to last as bfloat16."""
    for group in range(first, last):
        codes, scale = load_bytes(blocks + group * 16), load_scale(scales + group)
        store_halves(to + group * 64, times(values(codes), scale), times(values(upper(codes)), scale))


def wholes(to: int, blocks: int, scales: int, first: int, last: int) -> None:
    """Groups first to last as float32."""
    for group in range(first, last):
        codes, scale = load_bytes(blocks + group * 16), load_scale(scales + group)
        store_wholes(to + group * 128, times(values(codes), scale), times(values(upper(codes)), scale))


def product(y: int, x: int, blocks: int, scales: int, rows: int, groups: int, outs: int, parts: int) -> None:
    """y float32 [rows, outs] = x [rows, even and odd, groups, 16] times the weights [outs, groups], in parts beside each other."""
    for part in prange(parts):
        first, last = outs * part // parts, outs * (part + 1) // parts
        fours = rows // 4 * 4
        for row in range(0, fours, 4):
            four_rows(y + row * outs * 4, x + row * groups * 128, blocks, scales, groups, outs, first, last)
        for row in range(fours, rows):
            one_row(y + row * outs * 4, x + row * groups * 128, blocks, scales, groups, first, last)


def decode(to: int, blocks: int, scales: int, groups: int, half: bool, parts: int) -> None:
    """Groups of 32 weights in a row as bfloat16 (`half`) or float32, in parts beside each other."""
    for part in prange(parts):
        first, last = groups * part // parts, groups * (part + 1) // parts
        if half:
            halves(to, blocks, scales, first, last)
        else:
            wholes(to, blocks, scales, first, last)


one_row, four_rows, halves, wholes = (njit(nogil=True)(loop) for loop in (one_row, four_rows, halves, wholes))


@dataclass(frozen=True, slots=True)
class Kernels:
    """`product` and `decode` as machine code. They run in numba's threads: torch's own ones where both found the same OpenMP."""

    product: Callable[..., None]
    decode: Callable[..., None]
    most_threads: int
    turn: Lock  # numba's simplest layer of threads ends the process when two callers meet

    def run(self, loop: Callable[..., None], *args: int, threads: int) -> None:
        """`loop(*args, parts)` on at most `threads` threads; one caller at a time."""
        threads = min(threads, self.most_threads)
        with self.turn:
            if get_num_threads() != threads:
                set_num_threads(threads)
            loop(*args, threads)


def kernels() -> Kernels:
    """The machine code: from the cache that an earlier process left, else compiled in about two seconds."""
    try:
        return _compiled(cache=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError):  # no folder to write to, a full one, or a damaged cache
        return _compiled(cache=False)


def _compiled(cache: bool) -> Kernels:
    def machine(loop: Callable[..., None], *given: Any) -> Any:
        return njit(types.void(*given), parallel=True, nogil=True, cache=cache)(loop)

    return Kernels(machine(product, *[address] * 8), machine(decode, *[address] * 4, types.boolean, address), get_num_threads(), Lock())
