"""The pattern that every op follows.

An op has one implementation per backend, all with the same arguments, and one pair
``setup_context`` / ``backward``. It runs in one of three ways:

* plain eager tensors: the implementation is called directly, inside an ``autograd.Function`` when a
gradient is
  needed. This is the path whose cost must not exceed torch's own.
* forward-mode AD: the reference, which is plain torch and differentiates itself.
* everything else (torch.compile, export, torch.func, fake tensors, dispatch modes): the dispatcher
op ``pyfast::name``
  registered with ``define / impl / register_fake / register_autograd / register_vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _backend
from .._backend import KERNEL_DTYPES

_library = torch.library.Library("pyfast", "FRAGMENT")
_registry: dict[str, Op] = {}

_forced = _backend.forced
_is_grad_enabled = torch.is_grad_enabled
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_jit_tracing_state = torch._C._get_tracing_state
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def is_eager(tensor: Tensor) -> bool:
    """True when ``tensor`` has data here and now, and nothing watches the dispatcher."""
    return (
        not _is_dynamo_compiling()
        and type(tensor) in _PLAIN_TYPES
        and not _functorch_active()
        and not _num_dispatch_modes()
        and _jit_tracing_state() is None
    )


def registered() -> Mapping[str, Op]:
    return _registry


class Op:
    """One op: a schema, a kernel per backend, and a derivative.

    Args:
        schema: the dispatcher schema without the namespace; its first argument is the tensor that
            decides the backend.
        kernels: ``{backend: function}``; every function takes the arguments of the schema (a seed
            may be an int).
        fake: shapes and dtypes of the result.
        setup_context: as ``torch.library.register_autograd`` takes it; it must not save what it can
            recompute.
        backward: gradients of every argument, None where there is none. It calls ops, never
            kernels.
        vmap: as ``torch.library.register_vmap`` takes it.
        differentiable: positions, after the first tensor, of further arguments that may need a
            gradient.
    """

    def __init__(
        self,
        schema: str,
        kernels: dict[str, Callable[..., Any]],
        *,
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        vmap: Callable[..., Any] | None = None,
        differentiable: tuple[int, ...] = (),
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.kernels = kernels
        self._differentiable = differentiable
        self._cpu = kernels.get("cpu") if _backend.native is not None else None
        _registry[self.name] = self
        qualified = f"pyfast::{self.name}"
        # The strides of a fake result follow those of its inputs, so these must reach the kernel
        # unchanged.
        _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
        for key in ("CPU", "CUDA"):
            _library.impl(self.name, self.run, key)
        torch.library.register_fake(qualified, fake, lib=_library)
        if vmap is not None:
            torch.library.register_vmap(qualified, vmap, lib=_library)
        if backward is not None and setup_context is not None:
            torch.library.register_autograd(
                qualified, backward, setup_context=setup_context, lib=_library
            )
            self._function = self._make_function(setup_context, backward)
        self.dispatched: Callable[..., Any] = getattr(torch.ops.pyfast, self.name).default

    def backend_of(self, tensor: Tensor) -> str:
        """The backend that serves a call on ``tensor``; RuntimeError where a forced one cannot."""
        return _backend.choose(self.name, self.kernels, tensor)

    def run(self, tensor: Tensor, *arguments: Any) -> Any:
        """Call the kernel of the chosen backend. No autograd."""
        if (
            tensor.is_cpu
            and _forced() is None
            and self._cpu is not None
            and tensor.dtype in KERNEL_DTYPES
        ):
            return self._cpu(
                tensor, *arguments
            )  # what backend_of would find, at a third of its cost
        return self.kernels[self.backend_of(tensor)](tensor, *arguments)

    def __call__(self, tensor: Tensor, *arguments: Any) -> Any:
        return (
            self.eager(tensor, *arguments)
            if is_eager(tensor)
            else self.dispatched(tensor, *arguments)
        )

    def eager(self, tensor: Tensor, *arguments: Any) -> Any:
        """The call of plain tensors: the caller has asked is_eager."""
        if forward_ad._current_level >= 0:
            return self.kernels["reference"](tensor, *arguments)
        if _is_grad_enabled() and (
            tensor.requires_grad or (self._differentiable and self._any_requires_grad(arguments))
        ):
            return self._function(tensor, *arguments)
        return self.run(tensor, *arguments)

    def _any_requires_grad(self, arguments: tuple[Any, ...]) -> bool:
        candidates = (arguments[i] for i in self._differentiable)
        return any(a is not None and a.requires_grad for a in candidates)

    def _make_function(
        self, setup_context: Callable[..., None], backward: Callable[..., Any]
    ) -> Callable[..., Any]:
        run = self.run

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            setup_context(ctx, inputs, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(self.name, (torch.autograd.Function,), members)
        # Function.apply less its check for functorch, which is_eager has made already: 1.5 us a
        # call.
        apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        return apply
