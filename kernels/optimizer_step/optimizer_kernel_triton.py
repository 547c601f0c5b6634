"""The Triton kernel of an optimizer's step: a program takes N elements of one tensor, whose
addresses it finds in a table. Bound by bytes, as the CUDA kernel is.

The formulas are those of optimizer_math.h, in its order and without contraction: results have the
same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.philox_triton import block_bits
from .optimizer_step_reference import BLOCK_SIZE

_ADAM, _SGD = tl.constexpr(1), tl.constexpr(2)
_RMSPROP, _ADAMAX = tl.constexpr(3), tl.constexpr(4)
_SIGNED_BASE, _POSITIVE_BASE = tl.constexpr(0x38000000), tl.constexpr(0x30000000)
_DITHER_STEP = tl.constexpr(0x9E3779B1 - (1 << 32))
_STREAM = tl.constexpr(3)
_SCALE_BLOCK = tl.constexpr(BLOCK_SIZE)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _pointer(address, T: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(T))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _blend(a, b, weight, FROM_END: tl.constexpr):
    way = (b - a) * weight
    if FROM_END:
        out = b - way
    else:
        out = a + way
    return out


@triton.jit
def _maximum(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _signed_by(magnitude, x):
    return tl.where(x > 0, magnitude, tl.where(x < 0, -magnitude, 0.0))


@triton.jit
def _decode(address, scales, index, mask, SIGNED: tl.constexpr, ALIGNED: tl.constexpr):
    codes = tl.load(_pointer(address, tl.uint8, ALIGNED) + index, mask=mask, other=0).to(tl.int32)
    scale = tl.load(_pointer(scales, tl.float32, ALIGNED) + index // _SCALE_BLOCK, mask=mask)
    if SIGNED:
        offset = _float(((codes & 0x7F) << 20) + _SIGNED_BASE) - 0.000030517578125
        value = tl.where(codes >= 128, -offset, offset)
    else:
        value = _float((codes << 20) + _POSITIVE_BASE)
    return value * scale


@triton.jit
def _encode(
    x, address, scales, begin, size, salt, SIGNED: tl.constexpr, ALIGNED: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    index = begin + tl.arange(0, N)
    mask = index < size
    bits = tl.where(mask, _bits(x) & 0x7FFFFFFF, 0)
    largest = tl.max(tl.reshape(bits, (N // _SCALE_BLOCK, _SCALE_BLOCK)), axis=1)
    largest = tl.where(largest > 0x7F800000, 0x7FC00000, largest)
    scale = tl.where(largest < 0x00800000, 0.0, _float(largest))
    inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(tl.zeros_like(scale) + 1.0, scale))
    spread = tl.broadcast_to(inverse[:, None], (N // _SCALE_BLOCK, _SCALE_BLOCK))
    y = _bits(x * tl.reshape(spread, (N,)))
    product = index.to(tl.int32) * _DITHER_STEP + salt.to(tl.int32)
    dither = (product >> 12) & 0xFFFFF
    is_nan = (y & 0x7FFFFFFF) > 0x7F800000
    if SIGNED:
        offset = _float(y & 0x7FFFFFFF) + 0.000030517578125
        code = ((_bits(offset) - _SIGNED_BASE + dither) >> 20) & 0x7F
        code = tl.where(is_nan, 0x7F, code | tl.where(y < 0, 128, 0))
    else:
        clamped = tl.where(y > _POSITIVE_BASE, y, _POSITIVE_BASE)
        code = tl.where(is_nan, 0xFF, ((clamped - _POSITIVE_BASE + dither) >> 20) & 0xFF)
    tl.store(_pointer(address, tl.uint8, ALIGNED) + index, code.to(tl.uint8), mask=mask)
    block = begin // _SCALE_BLOCK + tl.arange(0, N // _SCALE_BLOCK)
    wanted = block * _SCALE_BLOCK < size
    tl.store(_pointer(scales, tl.float32, ALIGNED) + block, scale, mask=wanted)


@triton.jit
def _load_state(
    address, scales, index, mask, T: tl.constexpr, INT8: tl.constexpr, SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    if T is None:
        state = tl.zeros((N,), tl.float32)
    elif INT8:
        state = _decode(address, scales, index, mask, SIGNED, ALIGNED)
    else:
        state = tl.load(_pointer(address, T, ALIGNED) + index, mask=mask, other=0.0)
        state = state.to(tl.float32)
    return state


@triton.jit
def _store_state(
    x, address, scales, begin, size, salt, T: tl.constexpr, INT8: tl.constexpr,
    SIGNED: tl.constexpr, ALIGNED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    if T is not None:
        if INT8:
            _encode(x, address, scales, begin, size, salt, SIGNED, ALIGNED, N)
        else:
            index = begin + tl.arange(0, N)
            tl.store(_pointer(address, T, ALIGNED) + index, x.to(T), mask=index < size)


@triton.jit
def _update(
    p, g, s0, s1, s2, n, RULE: tl.constexpr, FLAGS: tl.constexpr, FROM_END: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
):  # fmt: skip
    """The new parameter and states; ``n`` points to the numbers of the tensor."""
    step_size, weight1 = tl.load(n + 0), tl.load(n + 1)
    decay2, weight2, blend2 = tl.load(n + 2), tl.load(n + 3), tl.load(n + 4)
    eps, root_scale, momentum = tl.load(n + 5), tl.load(n + 6), tl.load(n + 7)
    if RULE == _ADAM:
        s0 = _blend(s0, g, weight1, (FROM_END & 1) != 0)
        s1 = s1 * decay2 + weight2 * g * g
        second = s1
        if FLAGS & 1:
            s2 = _maximum(s2, s1)
            second = s2
        p = p - tl.div_rn(step_size * s0, tl.sqrt_rn(second) * root_scale + eps)
    if RULE == _SGD:
        direction = g
        if HAS_MOMENTUM:
            if FLAGS & 256:
                s0 = g
            else:
                s0 = momentum * s0 + weight1 * g
            direction = s0
            if FLAGS & 2:
                direction = g + momentum * s0
        p = p - step_size * direction
    if RULE == _RMSPROP:
        s0 = s0 * decay2 + weight2 * g * g
        variance = s0
        if FLAGS & 4:
            s2 = _blend(s2, g, blend2, (FROM_END & 2) != 0)
            variance = _maximum(s0 - s2 * s2, tl.zeros_like(s0))
        denominator = tl.sqrt_rn(variance) + eps
        if HAS_MOMENTUM:
            s1 = momentum * s1 + tl.div_rn(g, denominator)
            p = p - step_size * s1
        else:
            p = p - tl.div_rn(step_size * g, denominator)
    if RULE == _ADAMAX:
        s0 = _blend(s0, g, weight1, (FROM_END & 1) != 0)
        s1 = _maximum(s1 * decay2, tl.abs(g) + eps)
        p = p - tl.div_rn(step_size * s0, s1)
    return p, s0, s1, s2


@triton.jit
def optimizer_step_kernel(
    table, numbers, programs, found_inf, clip_scale, unscale,
    P: tl.constexpr, G: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    SIGNED: tl.constexpr, INT8: tl.constexpr, EMA: tl.constexpr, MASTER: tl.constexpr,
    RULE: tl.constexpr, FLAGS: tl.constexpr, FROM_END: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    HAS_L2: tl.constexpr, HAS_L1: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_FOUND_INF: tl.constexpr, HAS_CLIP: tl.constexpr,
    HAS_UNSCALE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(programs + 2 * program)
    begin = tl.multiple_of(tl.load(programs + 2 * program + 1), N)
    is_alive = begin >= 0
    if HAS_FOUND_INF:
        is_alive = tl.load(found_inf) == 0
    at = table + row * 13
    n = numbers + row * 16
    size = tl.load(at + 10)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    index = begin + tl.arange(0, N)
    exists = index < size
    mask = exists & is_alive
    g_at = _pointer(tl.load(at + 1), G, ALIGNED) + index
    g = tl.load(g_at, mask=exists, other=0.0).to(tl.float32)
    if HAS_UNSCALE:
        gradient_scale = (1.0 / tl.load(unscale).to(tl.float64)).to(tl.float32)
        g = g * gradient_scale
    raw = g
    p_address = tl.load(at + 0)
    p = g
    if P is not None:
        p = tl.load(_pointer(p_address, P, ALIGNED) + index, mask=exists, other=0.0).to(tl.float32)
    master_at = tl.load(at + 9)
    if MASTER == 1:
        low = tl.load(_pointer(master_at, tl.int16, ALIGNED) + index, mask=exists, other=0)
        joined = _float(_bits(p) + low.to(tl.int32))
        p = tl.where(joined != joined, p, joined)
    if MASTER == 2:
        wide = tl.load(_pointer(master_at, tl.float32, ALIGNED) + index, mask=exists, other=0.0)
        p = tl.where(wide.to(P).to(tl.float32) == p, wide, p)
    if RULE != 0:
        if HAS_CLIP:
            g = g * (tl.load(clip_scale).to(tl.float32))
        if FLAGS & 32:
            g = -g
        p = p * tl.load(n + 8)
        if HAS_L2:
            g = g + tl.load(n + 9) * p
        if HAS_L1:
            g = g + _signed_by(tl.load(n + 10), p)
        s0_at, s1_at, s2_at = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
        c0_at, c1_at, c2_at = tl.load(at + 5), tl.load(at + 6), tl.load(at + 7)
        s0 = _load_state(s0_at, c0_at, index, exists, S0, INT8, (SIGNED & 1) != 0, ALIGNED, N)
        s1 = _load_state(s1_at, c1_at, index, exists, S1, INT8, (SIGNED & 2) != 0, ALIGNED, N)
        s2 = _load_state(s2_at, c2_at, index, exists, S2, INT8, (SIGNED & 4) != 0, ALIGNED, N)
        p, s0, s1, s2 = _update(p, g, s0, s1, s2, n, RULE, FLAGS, FROM_END, HAS_MOMENTUM)
        if HAS_THRESHOLD:
            left = tl.abs(p) - tl.load(n + 11)
            p = _signed_by(_maximum(left, tl.zeros_like(p)), p)
        last = tl.where(is_alive, size, 0)
        salt = tl.load(at + 12)
        _store_state(s0, s0_at, c0_at, begin, last, salt, S0, INT8, (SIGNED & 1) != 0, ALIGNED, N)
        _store_state(s1, s1_at, c1_at, begin, last, salt, S1, INT8, (SIGNED & 2) != 0, ALIGNED, N)
        _store_state(s2, s2_at, c2_at, begin, last, salt, S2, INT8, (SIGNED & 4) != 0, ALIGNED, N)
        if MASTER == 1:
            bits = _bits(p)
            upper = tl.where(p != p, (bits >> 16) & 0xFFFF | 0x40, ((bits + 0x8000) >> 16) & 0xFFFF)
            low = tl.where(p != p, 0, bits - (upper << 16))
            tl.store(_pointer(master_at, tl.int16, ALIGNED) + index, low.to(tl.int16), mask=mask)
            rounded = upper.to(tl.int16)
            tl.store(_pointer(p_address, tl.int16, ALIGNED) + index, rounded, mask=mask)
        else:
            if MASTER == 2:
                tl.store(_pointer(master_at, tl.float32, ALIGNED) + index, p, mask=mask)
            if FLAGS & 64:
                random = block_bits(tl.load(at + 11), begin, _STREAM, N).to(tl.int32)
                bits = tl.where(p != p, _bits(p) | 0x400000, _bits(p) + random)
                p = _float(bits & -65536)
            tl.store(_pointer(p_address, P, ALIGNED) + index, p.to(P), mask=mask)
            if MASTER == 0:
                p = p.to(P).to(tl.float32)
    if EMA:
        ema_at = _pointer(tl.load(at + 8), tl.float32, ALIGNED) + index
        average = tl.load(ema_at, mask=exists, other=0.0)
        tl.store(ema_at, _blend(average, p, tl.load(n + 12), (FROM_END & 4) != 0), mask=mask)
    if FLAGS & 128:
        tl.store(g_at, tl.zeros_like(raw).to(G), mask=exists)
    elif HAS_UNSCALE:
        tl.store(g_at, raw.to(G), mask=mask)
