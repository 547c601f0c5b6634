"""RMSprop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops.optimizer_step import Flag, Hyper, Rule
from ._base import FusedOptimizer
from ._doc import documented
from ._extras import check_group


@documented
class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    _rule = Rule.RMSPROP
    _torch_class = torch.optim.RMSprop

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **extras: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
        )
        self._init_extras(extras)

    def _state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return (
            "square_avg",
            "momentum_buffer" if group["momentum"] > 0 else None,
            "grad_avg" if group["centered"] else None,
        )

    def _hyper(self, group: dict[str, Any]) -> tuple[Hyper, int]:
        if group["centered"] and group.get("state_dtype") == "int8":  # from a checkpoint
            check_group(type(self).__name__, group)
        flags = Flag.CENTERED * group["centered"] | Flag.MAXIMIZE * group["maximize"]
        hyper = Hyper(
            group["lr"],
            beta2=group["alpha"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
        )
        return hyper, flags
