"""``torch.fx`` keeps the modules of torch.nn as calls, so that ``eval()`` and ``train()`` of a
traced graph reach them. It knows them by their package's name; pyfast's have to ask for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn
from torch.fx import Proxy


def leaf(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward`` that symbolic tracing records as one call of its module."""

    @functools.wraps(forward)
    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Proxy):
                tracer: Any = value.tracer
                path = tracer.path_of_module(self)
                if path:  # empty for the module that is traced itself: there is nothing to call
                    return tracer.create_proxy("call_module", path, args, kwargs)
        return forward(self, *args, **kwargs)

    return call
