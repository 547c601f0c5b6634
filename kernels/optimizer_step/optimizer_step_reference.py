"""One step of an optimizer in plain torch, tensor by tensor: the specification of the kernels, with
their order of operations, so that float32 on the CPU gives their bits. Any device, any dtype.

Sources: Kingma and Ba 2015 (Adam, Adamax), Reddi et al. 2018 (AMSGrad), Loshchilov and Hutter 2019
(AdamW), Sutskever et al. 2013 (momentum), Hinton 2012 and Graves 2013 (RMSprop).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.philox_reference import element_bits, philox

BLOCK_SIZE = 256  # elements that share a scale of int8 states
ROUNDING_STREAM = 3
SIGNED_CODE_BASE = 0x38000000  # 2^-15 as float bits
POSITIVE_CODE_BASE = 0x30000000  # 2^-31
MASK = 0xFFFFFFFF


class Rule(IntEnum):
    """The update; values as in optimizer_step.h."""

    NONE = 0
    ADAM = 1
    SGD = 2
    RMSPROP = 3
    ADAMAX = 4


class Flag(IntFlag):
    """What is done with a tensor; values as in optimizer_step.h."""

    AMSGRAD = 1
    NESTEROV = 2
    CENTERED = 4
    DECOUPLED_DECAY = 8
    DECOUPLED_L1 = 16
    MAXIMIZE = 32
    STOCHASTIC_ROUNDING = 64
    ZERO_GRADIENT = 128
    FIRST_STEP = 256


class Hyper(NamedTuple):
    """The numbers of a parameter group. ``beta2`` of RMSprop is its alpha."""

    lr: float | Tensor = 0.0
    beta1: float | Tensor = 0.0
    beta2: float | Tensor = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    l1: float = 0.0
    ema_decay: float = 0.0


@dataclass
class Item:
    """One tensor of a step.

    Attributes:
        gradient, states, ema: of the shape of the parameter.
        scales: of int8 states, whose codes are uint8: float32, one for 256 elements in row-major
            order.
        master: int16, the lower half of a float32 whose upper half is the bfloat16 parameter, or
            the float32 itself of a float16 parameter.
        step: which step this is, from 1 on.
        index: of the parameter in its optimizer.
        seed: of stochastic rounding and of the dither of int8 states.
    """

    parameter: Tensor | None
    gradient: Tensor
    hyper: Hyper = field(default_factory=Hyper)
    flags: int = 0
    states: tuple[Tensor | None, ...] = (None, None, None)
    scales: tuple[Tensor | None, ...] = (None, None, None)
    ema: Tensor | None = None
    master: Tensor | None = None
    step: int = 0
    index: int = 0
    seed: int = 0


def is_signed_state(rule: Rule, state: int) -> bool:
    """Whether a state takes both signs: those that do not have another int8 code."""
    return state != 0 if rule == Rule.RMSPROP else state == 0


def _blend(a: Tensor, b: Tensor, weight: float) -> Tensor:
    return a + (b - a) * weight if weight < 0.5 else b - (b - a) * (1 - weight)


def _sqrt(x: Tensor) -> Tensor:
    """Rounded correctly, which torch's own float32 is not everywhere."""
    return x.double().sqrt().to(x.dtype)


def _signed_by(magnitude: float | Tensor, x: Tensor) -> Tensor:
    magnitude = torch.as_tensor(magnitude, dtype=x.dtype, device=x.device)
    return torch.where(x > 0, magnitude, torch.where(x < 0, -magnitude, 0))


def _float_bits(x: Tensor) -> Tensor:
    return x.view(torch.int32).long() & MASK


def _from_bits(bits: Tensor) -> Tensor:
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)


def decode_int8(codes: Tensor, scale: Tensor, is_signed: bool) -> Tensor:
    """float32 of uint8 codes [...] and their scales [ceil(n / 256)]."""
    wide = codes.reshape(-1).long()
    if is_signed:
        value = _from_bits(SIGNED_CODE_BASE + ((wide & 0x7F) << 20)) - 2.0**-15
        value = torch.where(wide >= 128, -value, value)
    else:
        value = _from_bits(POSITIVE_CODE_BASE + (wide << 20))
    return (value * scale.repeat_interleave(BLOCK_SIZE)[: wide.numel()]).view(codes.shape)


def encode_int8(x: Tensor, is_signed: bool, salt: int) -> tuple[Tensor, Tensor]:
    """uint8 codes of a float32 tensor, and the scales of its blocks. The code is the upper bits of
    the float, dithered: see optimizer_math.h."""
    flat = x.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    largest = _from_bits((_float_bits(blocks) & 0x7FFFFFFF).amax(1)) if x.numel() else blocks[:, 0]
    scale = torch.where(largest < torch.finfo(torch.float32).tiny, 0.0, largest)
    scale = torch.where(scale.isnan(), torch.nan, scale)  # of the same bits everywhere
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    element = torch.arange(flat.numel(), device=x.device)
    dither = ((element * 0x9E3779B1 + salt) & MASK) >> 12
    y = flat * inverse.repeat_interleave(BLOCK_SIZE)[: flat.numel()]
    bits = _float_bits(y)
    if is_signed:
        offset = _float_bits(_from_bits(bits & 0x7FFFFFFF) + 2.0**-15)
        code = ((offset - SIGNED_CODE_BASE + dither) >> 20) & 0x7F | (bits >> 31) << 7
        code = torch.where(y.isnan(), 0x7F, code)
    else:
        bits = torch.where(bits >= 1 << 31, 0, bits).clamp(min=POSITIVE_CODE_BASE)
        code = ((bits - POSITIVE_CODE_BASE + dither) >> 20) & 0xFF
        code = torch.where(y.isnan(), 0xFF, code)
    return code.to(torch.uint8).view(x.shape), scale


def to_signed(word: int) -> int:
    """The int64 of the same bits."""
    return word - ((word >> 63) << 64)


def random_numbers(seed: int, step: int, index: int) -> tuple[int, int]:
    """The key of the bits of a parameter's elements at a step, and the salt of its dither."""
    counters = (step & MASK, (step >> 32) & MASK, index, ROUNDING_STREAM)
    words = philox(seed, *(torch.tensor(counter) for counter in counters))
    w0, w1, w2, _ = (int(word) for word in words)
    return w0 | w1 << 32, w2


def stochastic_bfloat16(x: Tensor, key: int) -> Tensor:
    """bfloat16 of float32, rounded up with the probability of what is cut off."""
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    bits, random = _float_bits(x), element_bits(key, index, ROUNDING_STREAM)
    bits = torch.where(x.isnan(), bits | 0x400000, bits + random) & 0xFFFF0000
    return _from_bits(bits).bfloat16()


def split_master(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 of a float32 (halfway: away from zero), and the rest as int16."""
    bits = _float_bits(x)
    upper = torch.where(x.isnan(), bits >> 16 | 0x40, (bits + 0x8000) >> 16)
    remainder = torch.where(x.isnan(), 0, bits - (upper << 16))
    return _from_bits(upper << 16 & MASK).bfloat16(), remainder.to(torch.int16)


def join_master(parameter: Tensor, remainder: Tensor) -> Tensor:
    """The float32 that a bfloat16 and its remainder stand for; the bfloat16 alone where they do not
    belong together, because it was set to zero or Inf from outside."""
    rounded = parameter.float()
    joined = _from_bits((_float_bits(rounded) + remainder.long()) & MASK)
    return torch.where(joined.isnan(), rounded, joined)


def _value(item: Item, dtype: torch.dtype) -> Tensor:
    assert item.parameter is not None
    if item.master is None:
        return item.parameter.to(dtype)
    if item.master.dtype == torch.int16:
        return join_master(item.parameter, item.master)
    is_current = item.master.to(item.parameter.dtype) == item.parameter
    return torch.where(is_current, item.master, item.parameter.float())


def _update(
    rule: Rule, item: Item, p: Tensor, g: Tensor, s: list[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """The new value of the parameter and of its states."""
    h, flags = item.hyper, item.flags
    lr, beta1, beta2 = (float(x) for x in (h.lr, h.beta1, h.beta2))
    decoupled = bool(flags & Flag.DECOUPLED_DECAY)
    p = p * (1 - lr * h.weight_decay if decoupled else 1.0)
    if h.weight_decay != 0 and not decoupled:
        g = g + h.weight_decay * p
    if h.l1 != 0 and not flags & Flag.DECOUPLED_L1:
        g = g + _signed_by(h.l1, p)
    s0, s1, s2 = s
    if rule == Rule.ADAM:
        assert s0 is not None and s1 is not None
        s0 = _blend(s0, g, 1 - beta1)
        second = s1 = s1 * beta2 + (1 - beta2) * g * g
        if flags & Flag.AMSGRAD:
            assert s2 is not None
            second = s2 = torch.maximum(s2, s1)
        root_scale = 1 / math.sqrt(1 - beta2**item.step)
        step_size = lr / (1 - beta1**item.step)
        p = p - step_size * s0 / (_sqrt(second) * root_scale + h.eps)
    elif rule == Rule.SGD:
        direction = g
        if h.momentum != 0:
            assert s0 is not None
            first = flags & Flag.FIRST_STEP
            s0 = g if first else h.momentum * s0 + (1 - h.dampening) * g
            direction = g + h.momentum * s0 if flags & Flag.NESTEROV else s0
        p = p - lr * direction
    elif rule == Rule.RMSPROP:
        assert s0 is not None
        variance = s0 = s0 * beta2 + (1 - beta2) * g * g
        if flags & Flag.CENTERED:
            assert s2 is not None
            s2 = _blend(s2, g, 1 - beta2)
            variance = (s0 - s2 * s2).clamp(min=0)
        denominator = _sqrt(variance) + h.eps
        if h.momentum != 0:
            assert s1 is not None
            s1 = h.momentum * s1 + g / denominator
            p = p - lr * s1
        else:
            p = p - lr * g / denominator
    elif rule == Rule.ADAMAX:
        assert s0 is not None and s1 is not None
        s0 = _blend(s0, g, 1 - beta1)
        s1 = torch.maximum(s1 * beta2, g.abs() + h.eps)
        p = p - lr / (1 - beta1**item.step) * s0 / s1
    if h.l1 != 0 and flags & Flag.DECOUPLED_L1:
        p = _signed_by((p.abs() - lr * h.l1).clamp(min=0), p)
    return p, [s0, s1, s2]


def _step(
    rule: Rule,
    item: Item,
    gradient_scale: float,
    clip_scale: float,
    write_gradient: bool,
) -> None:
    like = item.gradient if item.parameter is None else item.parameter
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    unscaled = item.gradient.to(dtype) * gradient_scale
    key, salt = random_numbers(item.seed, item.step, item.index)
    if item.parameter is not None:
        p = _value(item, dtype)
        if rule != Rule.NONE:
            sign = -1.0 if item.flags & Flag.MAXIMIZE else 1.0
            states = [
                None
                if state is None
                else state.to(dtype)
                if scale is None
                else decode_int8(state, scale, is_signed_state(rule, i))
                for i, (state, scale) in enumerate(zip(item.states, item.scales, strict=True))
            ]
            p, states = _update(rule, item, p, unscaled * (sign * clip_scale), states)
            _store_states(rule, item, states, salt)
            _store_parameter(item, p, key)
        if item.ema is not None:
            average = _blend(item.ema, _value(item, dtype), 1 - item.hyper.ema_decay)
            item.ema.copy_(average)
    if item.flags & Flag.ZERO_GRADIENT:
        item.gradient.zero_()
    elif write_gradient:
        item.gradient.copy_(unscaled)


def _store_states(rule: Rule, item: Item, states: list[Tensor | None], salt: int) -> None:
    for i, (target, scale, state) in enumerate(zip(item.states, item.scales, states, strict=True)):
        if target is None or state is None:
            continue
        if scale is None:
            target.copy_(state)
        else:
            codes, scales = encode_int8(state, is_signed_state(rule, i), salt)
            target.copy_(codes)
            scale.copy_(scales)


def _store_parameter(item: Item, p: Tensor, key: int) -> None:
    assert item.parameter is not None
    if item.master is not None and item.master.dtype == torch.int16:
        upper, remainder = split_master(p)
        item.parameter.copy_(upper)
        item.master.copy_(remainder)
        return
    if item.master is not None:
        item.master.copy_(p)
    if item.flags & Flag.STOCHASTIC_ROUNDING and item.parameter.dtype == torch.bfloat16:
        p = stochastic_bfloat16(p, key)
    item.parameter.copy_(p)


@torch.no_grad()
def optimizer_step_reference(
    rule: Rule,
    items: list[Item],
    gradient_scale: float = 1.0,
    clip_scale: float = 1.0,
    write_gradient: bool = False,
) -> None:
    """Step every item in place.

    Args:
        rule: the update; ``Rule.NONE`` averages and scales alone.
        items: the tensors.
        gradient_scale: the gradient is multiplied by it, and by ``clip_scale``.
        write_gradient: write the gradient, times ``gradient_scale``, back.
    """
    for item in items:
        _step(rule, item, gradient_scale, clip_scale, write_gradient)
