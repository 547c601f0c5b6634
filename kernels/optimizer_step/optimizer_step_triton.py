"""One step of an optimizer in Triton: a launch for the tensors of all groups that share dtypes and
options, through a table of addresses. A program takes 1024 elements of one tensor. Tensors whose
operands differ in layout are copied before and after. Bound by bytes, as the CUDA kernel is.

The formulas are those of optimizer_math.h, in its order and without contraction: results have the
same bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.philox_triton import block_bits
from .optimizer_step_reference import (
    BLOCK_SIZE,
    Flag,
    Item,
    Rule,
    is_signed_state,
    random_numbers,
    to_signed,
)

BLOCK = 1024
NUM_ADDRESSES = 13  # p, g, three states, their scales, ema, master, number of elements, key, salt
NUM_NUMBERS = 16

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
def _decode(address, scales, index, mask, SIGNED: tl.constexpr):
    codes = tl.load(address.to(tl.pointer_type(tl.uint8)) + index, mask=mask, other=0).to(tl.int32)
    scale = tl.load(scales.to(tl.pointer_type(tl.float32)) + index // _SCALE_BLOCK, mask=mask)
    if SIGNED:
        offset = _float(((codes & 0x7F) << 20) + _SIGNED_BASE) - 0.000030517578125
        value = tl.where(codes >= 128, -offset, offset)
    else:
        value = _float((codes << 20) + _POSITIVE_BASE)
    return value * scale


@triton.jit
def _encode(x, address, scales, begin, size, salt, SIGNED: tl.constexpr, N: tl.constexpr):
    index = begin + tl.arange(0, N)
    mask = index < size
    bits = tl.where(mask, _bits(x) & 0x7FFFFFFF, 0)
    largest = tl.max(tl.reshape(bits, (N // _SCALE_BLOCK, _SCALE_BLOCK)), axis=1)
    scale = tl.where(largest < 0x00800000, 0.0, _float(largest))
    inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(tl.zeros_like(scale) + 1.0, scale))
    spread = tl.broadcast_to(inverse[:, None], (N // _SCALE_BLOCK, _SCALE_BLOCK))
    y = _bits(x * tl.reshape(spread, (N,)))
    product = index.to(tl.int32) * _DITHER_STEP + salt.to(tl.int32)
    dither = (product >> 12) & 0xFFFFF
    if SIGNED:
        offset = _float(y & 0x7FFFFFFF) + 0.000030517578125
        code = ((_bits(offset) - _SIGNED_BASE + dither) >> 20) & 0x7F
        code = code | tl.where(y < 0, 128, 0)
    else:
        clamped = tl.where(y > _POSITIVE_BASE, y, _POSITIVE_BASE)
        code = ((clamped - _POSITIVE_BASE + dither) >> 20) & 0xFF
    tl.store(address.to(tl.pointer_type(tl.uint8)) + index, code.to(tl.uint8), mask=mask)
    block = begin // _SCALE_BLOCK + tl.arange(0, N // _SCALE_BLOCK)
    wanted = block * _SCALE_BLOCK < size
    tl.store(scales.to(tl.pointer_type(tl.float32)) + block, scale, mask=wanted)


@triton.jit
def _load_state(
    address, scales, index, mask, T: tl.constexpr, INT8: tl.constexpr, SIGNED: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    if T is None:
        state = tl.zeros((N,), tl.float32)
    elif INT8:
        state = _decode(address, scales, index, mask, SIGNED)
    else:
        state = tl.load(address.to(tl.pointer_type(T)) + index, mask=mask, other=0.0)
        state = state.to(tl.float32)
    return state


@triton.jit
def _store_state(
    x, address, scales, begin, size, salt, T: tl.constexpr, INT8: tl.constexpr,
    SIGNED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    if T is not None:
        if INT8:
            _encode(x, address, scales, begin, size, salt, SIGNED, N)
        else:
            index = begin + tl.arange(0, N)
            tl.store(address.to(tl.pointer_type(T)) + index, x.to(T), mask=index < size)


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
    HAS_FOUND_INF: tl.constexpr, HAS_CLIP: tl.constexpr, HAS_UNSCALE: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(programs + 2 * program)
    begin = tl.load(programs + 2 * program + 1)
    is_alive = begin >= 0
    if HAS_FOUND_INF:
        is_alive = tl.load(found_inf) == 0
    at = table + row * 13
    n = numbers + row * 16
    size = tl.load(at + 10)
    index = begin + tl.arange(0, N)
    exists = index < size
    mask = exists & is_alive
    g_at = tl.load(at + 1).to(tl.pointer_type(G)) + index
    g = tl.load(g_at, mask=exists, other=0.0).to(tl.float32)
    if HAS_UNSCALE:
        gradient_scale = (1.0 / tl.load(unscale).to(tl.float64)).to(tl.float32)
        g = g * gradient_scale
    raw = g
    p_address = tl.load(at + 0)
    p = g
    if P is not None:
        p = tl.load(p_address.to(tl.pointer_type(P)) + index, mask=exists, other=0.0).to(tl.float32)
    master_at = tl.load(at + 9)
    if MASTER == 1:
        low = tl.load(master_at.to(tl.pointer_type(tl.int16)) + index, mask=exists, other=0)
        p = _float(_bits(p) + low.to(tl.int32))
    if MASTER == 2:
        wide = tl.load(master_at.to(tl.pointer_type(tl.float32)) + index, mask=exists, other=0.0)
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
        s0 = _load_state(s0_at, c0_at, index, exists, S0, INT8, (SIGNED & 1) != 0, N)
        s1 = _load_state(s1_at, c1_at, index, exists, S1, INT8, (SIGNED & 2) != 0, N)
        s2 = _load_state(s2_at, c2_at, index, exists, S2, INT8, (SIGNED & 4) != 0, N)
        p, s0, s1, s2 = _update(p, g, s0, s1, s2, n, RULE, FLAGS, FROM_END, HAS_MOMENTUM)
        if HAS_THRESHOLD:
            left = tl.abs(p) - tl.load(n + 11)
            p = _signed_by(_maximum(left, tl.zeros_like(p)), p)
        last = tl.where(is_alive, size, 0)
        salt = tl.load(at + 12)
        _store_state(s0, s0_at, c0_at, begin, last, salt, S0, INT8, (SIGNED & 1) != 0, N)
        _store_state(s1, s1_at, c1_at, begin, last, salt, S1, INT8, (SIGNED & 2) != 0, N)
        _store_state(s2, s2_at, c2_at, begin, last, salt, S2, INT8, (SIGNED & 4) != 0, N)
        if MASTER == 1:
            bits = _bits(p)
            upper = tl.where(p != p, (bits >> 16) & 0xFFFF | 0x40, ((bits + 0x8000) >> 16) & 0xFFFF)
            low = tl.where(p != p, 0, bits - (upper << 16))
            tl.store(master_at.to(tl.pointer_type(tl.int16)) + index, low.to(tl.int16), mask=mask)
            rounded = upper.to(tl.int16)
            tl.store(p_address.to(tl.pointer_type(tl.int16)) + index, rounded, mask=mask)
        else:
            if MASTER == 2:
                tl.store(master_at.to(tl.pointer_type(tl.float32)) + index, p, mask=mask)
            if FLAGS & 64:
                random = block_bits(tl.load(at + 11), begin, _STREAM, N).to(tl.int32)
                bits = tl.where(p != p, _bits(p) | 0x400000, _bits(p) + random)
                p = _float(bits & -65536)
            tl.store(p_address.to(tl.pointer_type(P)) + index, p.to(P), mask=mask)
            if MASTER == 0:
                p = p.to(P).to(tl.float32)
    if EMA:
        ema_at = tl.load(at + 8).to(tl.pointer_type(tl.float32)) + index
        average = tl.load(ema_at, mask=exists, other=0.0)
        tl.store(ema_at, _blend(average, p, tl.load(n + 12), (FROM_END & 4) != 0), mask=mask)
    if FLAGS & 128:
        tl.store(g_at, tl.zeros_like(raw).to(G), mask=exists)
    elif HAS_UNSCALE:
        tl.store(g_at, raw.to(G), mask=mask)


class _Signature(NamedTuple):
    """What items of one launch share: the constants of the kernel."""

    P: Any
    G: Any
    S0: Any
    S1: Any
    S2: Any
    SIGNED: int
    INT8: bool
    EMA: bool
    MASTER: int
    RULE: int
    FLAGS: int
    FROM_END: int
    HAS_MOMENTUM: bool
    HAS_L2: bool
    HAS_L1: bool
    HAS_THRESHOLD: bool


def _type_of(tensor: Tensor | None) -> Any:
    return None if tensor is None else getattr(tl, str(tensor.dtype).removeprefix("torch."))


def _signature(rule: Rule, item: Item) -> _Signature:
    h, flags = item.hyper, item.flags
    decoupled, proximal = flags & Flag.DECOUPLED_DECAY, flags & Flag.DECOUPLED_L1
    weights = (1 - float(h.beta1), 1 - float(h.beta2), 1 - h.ema_decay)
    signed = sum(is_signed_state(rule, i) << i for i in range(3))
    master = 0 if item.master is None else 1 if item.master.dtype == torch.int16 else 2
    kept = ~(Flag.DECOUPLED_DECAY | Flag.DECOUPLED_L1)
    if item.parameter is None or item.parameter.dtype != torch.bfloat16 or master:
        kept &= ~Flag.STOCHASTIC_ROUNDING
    return _Signature(
        _type_of(item.parameter),
        _type_of(item.gradient),
        *(_type_of(state) for state in item.states),
        SIGNED=signed,
        INT8=any(scale is not None for scale in item.scales),
        EMA=item.ema is not None,
        MASTER=master,
        RULE=int(rule),
        FLAGS=int(flags) & int(kept),
        FROM_END=sum((weight >= 0.5) << i for i, weight in enumerate(weights)),
        HAS_MOMENTUM=h.momentum != 0,
        HAS_L2=h.weight_decay != 0 and not decoupled,
        HAS_L1=h.l1 != 0 and not proximal,
        HAS_THRESHOLD=h.l1 != 0 and bool(proximal),
    )


def _numbers(rule: Rule, item: Item) -> list[float]:
    """As optimizer_numbers() of optimizer_numbers.h, and in its order."""
    h = item.hyper
    lr, beta1, beta2 = (float(x) for x in (h.lr, h.beta1, h.beta2))
    step_size, root_scale = lr, 1.0
    if rule in (Rule.ADAM, Rule.ADAMAX):
        step_size = lr / (1 - beta1**item.step)
    if rule == Rule.ADAM:
        root_scale = 1 / math.sqrt(1 - beta2**item.step)

    def way(weight: float) -> float:
        return weight if weight < 0.5 else 1 - weight

    weight1 = 1 - h.dampening if rule == Rule.SGD else way(1 - beta1)
    decay = 1 - lr * h.weight_decay if item.flags & Flag.DECOUPLED_DECAY else 1.0
    threshold, ema_weight = lr * h.l1, way(1 - h.ema_decay)
    found = [step_size, weight1, beta2, 1 - beta2, way(1 - beta2), h.eps, root_scale, h.momentum]
    found += [decay, h.weight_decay, h.l1, threshold, ema_weight]
    return found + [0.0] * (NUM_NUMBERS - len(found))


def _operands(item: Item) -> list[Tensor | None]:
    return [item.parameter, item.gradient, *item.states, *item.scales, item.ema, item.master]


def optimizer_step_triton(
    rule: Rule,
    items: list[Item],
    unscale: Tensor | None = None,
    clip_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Step every item in place. The scalars are on the device of the items: gradients are divided
    by ``unscale`` and written back so, then multiplied by ``clip_scale``; nothing but zeroing of
    gradients is done where ``found_inf`` is not zero."""
    launches: dict[_Signature, list[Item]] = {}
    for item in items:
        if item.gradient.numel():
            launches.setdefault(_signature(rule, item), []).append(item)
    for signature, members in launches.items():
        device = members[0].gradient.device
        addresses, numbers, programs, copies = [], [], [], []
        for row, item in enumerate(members):
            dense = [None if t is None else t.contiguous() for t in _operands(item)]
            copies += [
                (t, d)
                for t, d in zip(_operands(item), dense, strict=True)
                if t is not None and d is not None and d is not t and d.data_ptr() != t.data_ptr()
            ]
            size = item.gradient.numel()
            key, salt = 0, 0
            if signature.INT8 or signature.FLAGS & Flag.STOCHASTIC_ROUNDING:
                key, salt = random_numbers(item.seed, item.step, item.index)
            pointers = [0 if t is None else t.data_ptr() for t in dense]
            addresses.append([*pointers, size, to_signed(key), to_signed(salt)])
            numbers.append(_numbers(rule, item))
            programs += [[row, begin] for begin in range(0, size, BLOCK)]
        kept = [torch.tensor(rows, device=device) for rows in (addresses, programs)]
        floats = torch.tensor(numbers, dtype=torch.float32, device=device)
        optimizer_step_kernel[(len(programs),)](
            kept[0],
            floats,
            kept[1],
            found_inf,
            clip_scale,
            unscale,
            **signature._asdict(),
            HAS_FOUND_INF=found_inf is not None,
            HAS_CLIP=clip_scale is not None,
            HAS_UNSCALE=unscale is not None,
            N=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
        for target, source in copies:
            if 0 not in target.stride() or target.numel() == 1:  # expanded gradients stay
                target.copy_(source)
