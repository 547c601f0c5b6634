"""Launches the Triton kernel of an optimizer's step: once for the tensors of all groups that share
dtypes and options. Tensors whose operands differ in layout are copied before and after.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .optimizer_kernel_triton import optimizer_step_kernel
from .optimizer_step_reference import (
    Flag,
    Item,
    Rule,
    is_signed_state,
    random_numbers,
    to_signed,
)

BLOCK = 1024
NUM_NUMBERS = 16
SIZE_COLUMN = 10  # of the table: behind the addresses of _operands


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
    ALIGNED: bool


def _type_of(tensor: Tensor | None) -> Any:
    return None if tensor is None else getattr(tl, str(tensor.dtype).removeprefix("torch."))


def _signature(rule: Rule, item: Item) -> _Signature:
    h, flags = item.hyper, item.flags
    decoupled, proximal = flags & Flag.DECOUPLED_DECAY, flags & Flag.DECOUPLED_L1
    weights = (1 - float(h.beta1), 1 - float(h.beta2), 1 - h.ema_decay)
    signed = sum(is_signed_state(rule, i) << i for i in range(3))
    master = 0 if item.master is None else 1 if item.master.dtype == torch.int16 else 2
    operands = [t for t in _operands(item) if t is not None]
    kept = ~(Flag.DECOUPLED_DECAY | Flag.DECOUPLED_L1)
    if item.parameter is None or item.parameter.dtype != torch.bfloat16 or master:
        kept &= ~Flag.STOCHASTIC_ROUNDING
    return _Signature(
        _type_of(item.parameter),
        _type_of(item.gradient),
        S0=_type_of(item.states[0]),
        S1=_type_of(item.states[1]),
        S2=_type_of(item.states[2]),
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
        ALIGNED=item.gradient.numel() % 16 == 0
        and all(t.data_ptr() % 16 == 0 or not t.is_contiguous() for t in operands),
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


def _programs(sizes: Tensor, num_programs: int) -> Tensor:
    """The row of the table and the first element of each program, made on the device."""
    counts = (sizes + (BLOCK - 1)) // BLOCK
    rows = torch.arange(sizes.numel(), device=sizes.device)
    row = torch.repeat_interleave(rows, counts, output_size=num_programs)
    first = torch.arange(num_programs, device=sizes.device) - (counts.cumsum(0) - counts)[row]
    return torch.stack([row, first * BLOCK], dim=1)


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
        addresses, numbers, copies = [], [], []
        for item in members:
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
        table = torch.tensor(addresses, device=device)
        floats = torch.tensor(numbers, dtype=torch.float32, device=device)
        num_programs = sum(-(-item.gradient.numel() // BLOCK) for item in members)
        optimizer_step_kernel[(num_programs,)](
            table,
            floats,
            _programs(table[:, SIZE_COLUMN], num_programs),
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
