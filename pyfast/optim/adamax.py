"""Adamax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops.optimizer_step import Flag, Hyper, Rule
from ._base import FusedOptimizer
from ._doc import documented


@documented
class Adamax(FusedOptimizer, torch.optim.Adamax):
    _rule = Rule.ADAMAX
    _torch_class = torch.optim.Adamax

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **extras: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )
        self._init_extras(extras)

    def _state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return "exp_avg", "exp_inf", None

    def _hyper(self, group: dict[str, Any]) -> tuple[Hyper, int]:
        beta1, beta2 = group["betas"]
        hyper = Hyper(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        return hyper, Flag.MAXIMIZE * group["maximize"]
