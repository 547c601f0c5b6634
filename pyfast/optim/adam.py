"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops.optimizer_step import Flag, Hyper, Rule
from ._base import FusedOptimizer
from ._doc import documented


class _AdamRule(FusedOptimizer):
    _rule = Rule.ADAM
    _torch_class = torch.optim.Adam

    def _state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return "exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None

    def _hyper(self, group: dict[str, Any]) -> tuple[Hyper, int]:
        beta1, beta2 = group["betas"]
        flags = Flag.AMSGRAD * group["amsgrad"] | Flag.MAXIMIZE * group["maximize"]
        flags |= Flag.DECOUPLED_DECAY * group["decoupled_weight_decay"]
        hyper = Hyper(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        return hyper, flags


@documented
class Adam(_AdamRule, torch.optim.Adam):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **extras: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._init_extras(extras)


@documented
class AdamW(_AdamRule, torch.optim.AdamW):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._init_extras(extras)
