"""The pattern that every op follows.

An op has one implementation per backend, all with the same arguments, and one pair
``setup_context`` / ``backward``. It runs in one of four ways:

* plain eager tensors: the implementation is called directly, inside an ``autograd.Function`` when a
  gradient is needed. This is the path whose cost must not exceed torch's own.
* forward-mode AD: the reference, which is plain torch and differentiates itself, whichever backend
  would serve the call.
* torch.func: an ``autograd.Function`` of the style that transforms understand.
* everything else (torch.compile, export, fake tensors, dispatch modes): the dispatcher op
  ``pyfast::name``, registered with ``define / impl / register_fake / register_autograd``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _backend, _random
from .._backend import KERNEL_DTYPES

_library = torch.library.Library("pyfast", "FRAGMENT")
_registry: dict[str, Op | ListOp] = {}

_forced = _backend.forced
_observers = _backend.observers
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
        and not tensor.is_neg()
    )


def is_distributed(tensor: Any) -> bool:
    """True for a DTensor, asked without importing its module."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def _register_sharding_rules() -> None:
    from ..distributed import register_sharding_rules

    register_sharding_rules()


# What torch.compiler.assume_constant_result does, which imports torch._dynamo: compilation then
# calls the function instead of looking into it.
_register_sharding_rules._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_plain(tensor: Tensor) -> bool:
    """True when the memory of ``tensor`` holds its values; asked when a kernel has refused."""
    with torch.inference_mode(tensor.is_inference()):
        plain = torch.empty(0, device=tensor.device)
    return bool(torch._C._dispatch_keys(tensor) == torch._C._dispatch_keys(plain))


def loop_vmap(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule that calls ``op`` for each sample and stacks the results."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        columns = [
            argument.unbind(dim) if dim is not None else (argument,) * info.batch_size
            for argument, dim in zip(arguments, in_dims, strict=True)
        ]
        outputs = [op(*sample) for sample in zip(*columns, strict=True)]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        stacked = tuple(torch.stack(column) for column in zip(*outputs, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, wherever its tensors are."""

    def run(tensor: Tensor, *arguments: Any) -> Any:
        # Asked first: entering the context takes longer than a launch.
        if tensor.is_cuda and tensor.get_device() == torch.cuda.current_device():
            return kernel(tensor, *arguments)
        with torch.cuda.device_of(tensor):
            return kernel(tensor, *arguments)

    return run


def registered() -> Mapping[str, Op | ListOp]:
    return _registry


class ListOp:
    """An op over lists of tensors, which it changes in place: without a schema, because nothing
    differentiates or compiles it.

    Args:
        name: of the op.
        kernels: ``{backend: function}``.
    """

    def __init__(self, name: str, kernels: dict[str, Callable[..., Any]]) -> None:
        self.name, self.kernels = name, kernels
        _registry[name] = self

    def backend_of(self, tensor: Tensor) -> str:
        """The backend that serves a call on ``tensor``; RuntimeError where a forced one cannot."""
        backend = _backend.choose(self.name, self.kernels, tensor)
        if _observers:
            _backend.report(self.name, self.kernels, tensor, backend, "", "")
        return backend


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
        differentiable: positions, after the first tensor, of further arguments that may need a
            gradient.
        limits: of a call's arguments, the reason why no kernel but the reference can serve it, or
            an empty string.
    """

    def __init__(
        self,
        schema: str,
        kernels: dict[str, Callable[..., Any]],
        *,
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        differentiable: tuple[int, ...] = (),
        limits: Callable[..., str] | None = None,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        if "triton" in kernels:
            kernels = {**kernels, "triton": _on_its_device(kernels["triton"])}
        self.kernels = kernels
        self._limits = limits
        self._differentiable = differentiable
        self._cpu = kernels.get("cpu") if _backend.native is not None else None
        _registry[self.name] = self
        qualified = f"pyfast::{self.name}"
        # The strides of a fake result follow those of its inputs, so these must reach the kernel
        # unchanged.
        _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
        for key in ("CPU", "CUDA"):
            _library.impl(self.name, self._run_dispatched, key)
        torch.library.register_fake(qualified, fake, lib=_library)
        torch.library.register_vmap(qualified, loop_vmap(self), lib=_library)
        self.dispatched: Callable[..., Any] = getattr(torch.ops.pyfast, self.name).default
        names = [argument.name for argument in self.dispatched._schema.arguments]
        self._seed_position = names.index("seed") if "seed" in names else None
        self._transformed: Callable[..., Any] = self.dispatched
        if backward is not None and setup_context is not None:
            torch.library.register_autograd(
                qualified, backward, setup_context=setup_context, lib=_library
            )
            self._function = self._eager_function(setup_context, backward)
            self._transformed = self._transformed_function(setup_context, backward)

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
            kernel = self._cpu  # what backend_of would find, at a third of its cost
        else:
            kernel = self.kernels[self.backend_of(tensor)]
        if self._limits is not None:
            kernel = self._within_limits(kernel, tensor, arguments)
        if _observers:
            self._report(kernel, tensor, arguments)
        try:
            return kernel(tensor, *arguments)
        except RuntimeError:
            if all(_is_plain(t) for t in (tensor, *arguments) if isinstance(t, Tensor)):
                raise
        # A tensor without memory of its own that is_eager has not seen through (a ZeroTensor, the
        # batched gradient of is_grads_batched, what torch.func.vjp has saved): the dispatcher
        # knows what to make of it.
        return self.dispatched(tensor, *self._with_seed_tensor(tensor, arguments))

    def _run_dispatched(self, tensor: Tensor, *arguments: Any) -> Any:
        kernel = self.kernels[self.backend_of(tensor)]
        if self._limits is not None:
            kernel = self._within_limits(kernel, tensor, arguments)
        if _observers:
            self._report(kernel, tensor, arguments)
        return kernel(tensor, *arguments)

    def _report(
        self,
        kernel: Callable[..., Any],
        tensor: Tensor,
        arguments: tuple[Any, ...],
        reason: str = "",
    ) -> None:
        backend = self.backend_of(tensor)
        if self.kernels[backend] is not kernel:
            backend = next(name for name, k in self.kernels.items() if k is kernel)
        limit = "" if self._limits is None else self._limits(tensor, *arguments)
        _backend.report(self.name, self.kernels, tensor, backend, reason, limit)

    def check_limits(self, tensor: Tensor, *arguments: Any) -> None:
        """RuntimeError where a backend that was asked for cannot serve the call."""
        if self._limits is not None:
            self._within_limits(self.kernels[self.backend_of(tensor)], tensor, arguments)

    def _within_limits(
        self, kernel: Callable[..., Any], tensor: Tensor, arguments: tuple[Any, ...]
    ) -> Callable[..., Any]:
        """The kernel, or the reference for a call that the kernel cannot serve."""
        reference = self.kernels["reference"]
        reason = "" if kernel is reference else self._limits(tensor, *arguments)  # type: ignore[misc]
        if not reason:
            return kernel
        if _forced() is not None:
            raise RuntimeError(
                f"{self.name}: the backend {_forced()!r} was asked for, but {reason}"
            )
        return reference

    def __call__(self, tensor: Tensor, *arguments: Any) -> Any:
        call = self.eager if is_eager(tensor) else self.traced
        return call(tensor, *arguments)

    def eager(self, tensor: Tensor, *arguments: Any) -> Any:
        """The call of plain tensors: the caller has asked is_eager."""
        if forward_ad._current_level >= 0:
            return self._forward_mode(tensor, arguments)
        if _is_grad_enabled() and (
            tensor.requires_grad or (self._differentiable and self._any_requires_grad(arguments))
        ):
            return self._function(tensor, *arguments)
        return self.run(tensor, *arguments)

    def traced(self, tensor: Tensor, *arguments: Any) -> Any:
        """The call of every other tensor."""
        if is_distributed(tensor):
            _register_sharding_rules()
        arguments = self._with_seed_tensor(tensor, arguments)
        if not _is_dynamo_compiling():
            if forward_ad._current_level >= 0:
                return self._forward_mode(tensor, arguments)
            if _functorch_active():
                return self._transformed(tensor, *arguments)
        return self.dispatched(tensor, *arguments)

    def _forward_mode(self, tensor: Tensor, arguments: tuple[Any, ...]) -> Any:
        self.backend_of(tensor)  # raises where a forced backend could not have served the call
        reference = self.kernels["reference"]
        if _observers:
            self._report(reference, tensor, arguments, "forward-mode AD differentiates plain torch")
        return reference(tensor, *arguments)

    def _with_seed_tensor(self, tensor: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._seed_position is None:
            return arguments
        i = self._seed_position - 1
        if isinstance(arguments[i], Tensor):
            return arguments
        # As resolve_seed has it.
        like = torch.empty((), device="cpu") if is_distributed(tensor) else tensor
        return (*arguments[:i], _random.as_seed_tensor(arguments[i], like), *arguments[i + 1 :])

    def _any_requires_grad(self, arguments: tuple[Any, ...]) -> bool:
        candidates = (arguments[i] for i in self._differentiable)
        return any(a is not None and a.requires_grad for a in candidates)

    def _eager_function(
        self, setup_context: Callable[..., None], backward: Callable[..., Any]
    ) -> Callable[..., Any]:
        run = self.run

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            setup_context(ctx, inputs, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(self.name, (torch.autograd.Function,), members)
        # Function.apply less its check for functorch, which is_eager makes: 1.5 us a call.
        base: Any = super(torch.autograd.Function, function)
        return base.apply  # type: ignore[no-any-return]

    def _transformed_function(
        self, setup_context: Callable[..., None], backward: Callable[..., Any]
    ) -> Callable[..., Any]:
        members = {
            "forward": staticmethod(self.__call__),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
            "vmap": staticmethod(loop_vmap(self)),
        }
        function = type(self.name, (torch.autograd.Function,), members)
        apply: Callable[..., Any] = function.apply  # type: ignore[attr-defined]
        return apply
