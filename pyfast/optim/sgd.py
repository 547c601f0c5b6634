"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops.optimizer_step import Flag, Hyper, Rule
from ._base import FusedOptimizer
from ._doc import documented


@documented
class SGD(FusedOptimizer, torch.optim.SGD):
    _rule = Rule.SGD
    _torch_class = torch.optim.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._init_extras(extras)

    def _state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return "momentum_buffer" if group["momentum"] != 0 else None, None, None

    def _hyper(self, group: dict[str, Any]) -> tuple[Hyper, int]:
        flags = Flag.NESTEROV * group["nesterov"] | Flag.MAXIMIZE * group["maximize"]
        hyper = Hyper(
            group["lr"],
            weight_decay=float(group["weight_decay"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
        )
        return hyper, flags

    def _counts_steps(self, group: dict[str, Any]) -> bool:
        return False
