"""``pyfast.activate``: torch's own functions go through pyfast, for code that nobody can edit.

Two functions of torch.nn.functional are replaced under their names, which threads may do at any
time. What is called by other names, from compiled graphs or from C++ reaches pyfast where torch
chooses its flash attention, through torch's registry of such kernels. That writes torch's dispatch
table, which is not safe while other threads call, and is therefore done when there are none.
"""

from __future__ import annotations

import sys
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import _backend
from ._flash_attention import REGISTRY_NAME, flash_kernels, why_no_kernel
from .ops._attention_arguments import is_causal_bias
from .ops._op import _PLAIN_TYPES, Op, is_eager
from .ops.attention import attention_op, limits
from .ops.dropout import dropout as _fast_dropout
from .ops.dropout import dropout_op
from .ops.scaled_dot_product_attention import scaled_dot_product_attention as _fast_attention

_lock = threading.RLock()
_has_function_mode = torch._C._is_torch_function_mode_enabled
_is_flash_allowed = torch._C._get_flash_sdp_enabled


class _Inside(threading.local):
    """Whether a replaced function is being served: what is asked of it in there is torch's."""

    now = False


class _Override:
    """A function of torch.nn.functional, and how many handles want it replaced.

    Attributes:
        torch: torch's function.
        original: what stood under its name before: torch's function, or another library's, which
            may in turn call what it has found there.
    """

    def __init__(self, name: str, replacement: Any) -> None:
        self.name = name
        self.users = 0
        self.inside = _Inside()
        self.torch: Callable[..., Any] = getattr(F, name)
        self.original = self.torch
        self.replacement = replacement
        replacement.__name__ = replacement.__qualname__ = name
        replacement.__module__, replacement.__doc__ = F.__name__, self.torch.__doc__

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if function is self.torch:
            return function(*args, **kwargs)
        self.inside.now = True
        try:
            return function(*args, **kwargs)
        finally:
            self.inside.now = False

    def acquire(self) -> list[_Renaming]:
        """What is to be renamed."""
        self.users += 1
        if self.users == 1:
            current = getattr(F, self.name)
            # Ours, if a library has put back what it once found.
            self.original = self.torch if current is self.replacement else current
            # Dynamo and TorchScript then see torch's function in ours.
            self.replacement._torchdynamo_inline = self.original
            self.replacement.__prepare_scriptable__ = lambda: self.original
            if isinstance(self.torch, types.BuiltinFunctionType):
                name = f"aten::{self.name}"
                torch.jit._builtins._register_builtin(self.replacement, name)
            return [(self.name, current, self.replacement)]
        return []

    def release(self) -> list[_Renaming]:
        self.users -= 1
        return [] if self.users else [(self.name, self.replacement, self.original)]


_Renaming = tuple[str, object, object]  # a name, what it stands for, and what it is to stand for


def _rename(renamings: list[_Renaming]) -> list[str]:
    """In torch.nn.functional, and wherever a name was imported from there; in one pass, because
    there are thousands of modules. What there is to warn of: other things stand there."""
    left = [
        f"torch.nn.functional.{name} has become {current!r} and is left as it is"
        for name, old, _ in renamings
        if (current := getattr(F, name)) is not old
    ]
    for module in list(sys.modules.values()) if renamings else ():
        if not isinstance(module, types.ModuleType) or module is torch._C._nn:
            continue  # torch._C._nn's are known to torch by identity
        members = module.__dict__
        for name, old, new in renamings:
            if members.get(name) is old:
                members[name] = new
    return left


def _why_not_dropout(x: Any) -> str:
    if not is_eager(x):
        return "the input is no plain tensor, or is traced or transformed"
    return why_no_kernel(dropout_op, x)


def _why_not_attention(q: Any, k: Any, v: Any, mask: Any) -> str:
    if not (is_eager(q) and type(k) in _PLAIN_TYPES and type(v) in _PLAIN_TYPES):
        return "the operands are no plain tensors, or are traced or transformed"
    if mask is not None and type(mask) not in _PLAIN_TYPES and not is_causal_bias(mask):
        return "the mask is no plain tensor"
    if q.dim() < 2 or k.dim() < 2 or v.dim() < 2 or k.is_nested or v.is_nested:
        return "query, key and value are not (..., length, size)"
    if not _is_flash_allowed():
        return "sdpa_kernel or enable_flash_sdp has turned flash attention off"
    return why_no_kernel(attention_op, q) or limits(q, k, v)


def _report(op: Op, x: Any, reason: str) -> None:
    if _backend.observers and isinstance(x, Tensor):
        _backend.report(op.name, op.kernels, x, "torch", f"activate() leaves it: {reason}", "")


def _serve_dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    arguments = input, p, training, inplace
    if not _dropout.users or _dropout.inside.now:
        return _dropout.torch(*arguments)  # type: ignore[no-any-return]
    if has_torch_function_unary(input):
        # A mode sees what is under the name, a subclass torch's function. That one, called, would
        # hand on what is under its name.
        function = _serve_dropout if type(input) in _PLAIN_TYPES else _dropout.original
        return handle_torch_function(  # type: ignore[no-any-return]
            function, (input,), input, p=p, training=training, inplace=inplace
        )
    reason = _why_not_dropout(input)
    if reason:
        _report(dropout_op, input, reason)
        return _dropout.call(_dropout.original, *arguments)  # type: ignore[no-any-return]
    return _fast_dropout(*arguments)


def _serve_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    operands = query, key, value, attn_mask
    arguments: Any = (*operands, dropout_p, is_causal)
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if not _attention.users or _attention.inside.now:
        return _attention.torch(*arguments, **options)  # type: ignore[no-any-return]
    if _has_function_mode() and all(type(t) in _PLAIN_TYPES or t is None for t in operands):
        return handle_torch_function(_serve_attention, operands, *arguments, **options)
    reason = _why_not_attention(*operands)
    if reason and is_causal_bias(attn_mask):
        # It compares what it is given with the function of torch.nn.functional.
        return handle_torch_function(_serve_attention, operands, *arguments, **options)
    if reason:
        _report(attention_op, query, reason)
    function = _attention.original if reason else _fast_attention
    return _attention.call(function, *arguments, **options)  # type: ignore[no-any-return]


_attention = _Override("scaled_dot_product_attention", _serve_attention)
_dropout = _Override("dropout", _serve_dropout)


class _Surroundings:
    """What goes with the replaced attention: the registry, and the fast path of torch's
    transformer layers, which asks neither names nor registry."""

    is_registered = False
    had_fast_path = False

    def acquire(self) -> None:
        if _attention.users == 1:
            self.had_fast_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            if current_flash_attention_impl() is None and flash_kernels.can_register():
                activate_flash_attention_impl(REGISTRY_NAME)
                self.is_registered = True

    def release(self) -> None:
        if _attention.users == 0:
            if self.had_fast_path:
                torch.backends.mha.set_fastpath_enabled(True)
            if self.is_registered and current_flash_attention_impl() == REGISTRY_NAME:
                restore_flash_attention_impl()
            self.is_registered = False


_surroundings = _Surroundings()


class Activation:
    """What :func:`activate` returns: a switch that is on, and a context manager."""

    def __init__(self, attention: bool, dropout: bool) -> None:
        self.attention, self.dropout = attention, dropout
        self._is_on = True
        with _lock:
            renamings = []
            if attention:
                renamings += _attention.acquire()
                _surroundings.acquire()
            if dropout:
                renamings += _dropout.acquire()
            _rename(renamings)

    def deactivate(self) -> None:
        """Undo this activation; the first call alone does anything.

        Warns:
            RuntimeWarning: where other code has replaced torch's function since, which stays.
        """
        with _lock:
            if not self._is_on:
                return
            self._is_on = False
            renamings = []
            if self.attention:
                renamings += _attention.release()
                _surroundings.release()
            if self.dropout:
                renamings += _dropout.release()
            left = _rename(renamings)
        for text in left:
            warnings.warn(f"pyfast.activate: {text}", RuntimeWarning, stacklevel=2)

    def __enter__(self) -> Activation:
        if not self._is_on:
            raise RuntimeError("activate: this activation is over: call activate() for another")
        return self

    def __exit__(self, *_: object) -> None:
        self.deactivate()

    def __repr__(self) -> str:
        names = [name for name in ("attention", "dropout") if getattr(self, name)]
        return f"<Activation of {' and '.join(names)}: {'on' if self._is_on else 'off'}>"


def activate(*, attention: bool = True, dropout: bool = True) -> Activation:
    """Send torch's attention and dropout functions through pyfast, in the whole process: for models
    that nobody can edit.

    ::

        with pyfast.activate():          # or: handle = pyfast.activate()
            train(model)                 #     handle.deactivate()

    While it is on, a call of ``torch.nn.functional.scaled_dot_product_attention`` or
    ``torch.nn.functional.dropout`` is one of :mod:`pyfast.nn.functional`'s function of that name,
    with its differences: ``torch.nn.Dropout`` and ``MultiheadAttention``, and modules that have
    imported these names from torch.nn.functional, included. It holds for all threads; activations
    nest, may overlap, and end in any order. Torch's functions are back when the last has ended.
    Masks of dropout are other ones than torch's, of the same distribution.

    torch serves, as it would, what pyfast has no kernel for (float64 attention, heads above 256,
    other dtypes and devices), nested tensors, tensor subclasses, calls that are traced, compiled,
    or under torch.func or a dispatch mode, and attention where ``torch.nn.attention.sdpa_kernel``
    excludes flash attention. :func:`pyfast.explain` tells which calls.

    On the CPU, attention without dropout and without gradient of its mask reaches pyfast from there
    too: torch chooses flash attention for it, and pyfast takes its place as "pyfast" in torch's
    registry (:func:`torch.nn.attention.activate_flash_attention_impl`). This covers compiled
    graphs, TorchScript, torch.func, dispatch modes, C++, and functions bound by other names. The
    registry is left alone where another implementation is active in it, and where other Python
    threads are alive when this is called (the compiler of torch.compile leaves some): torch's
    dispatcher is not safe to change under them. Where they are alive at the end, its operators
    stay with pyfast, and pass calls on to torch.

    The fast path of ``torch.nn.TransformerEncoder``, its layers and ``MultiheadAttention`` in
    evaluation is turned off (``torch.backends.mha``), so that their attention is reached; outputs
    at padded positions are then those of the usual path, not zeros.

    Not reached: dropout in compiled graphs and TorchScript, ``torch.dropout``, dropout between the
    layers of ``torch.nn.LSTM`` and its like, functions bound before under names of their own
    (``from torch.nn.functional import dropout as drop``, an attribute, a default argument),
    channel and alpha dropout, attention and dropout that a model computes itself. There
    :func:`pyfast.patch` may help.

    A library that replaces these functions of torch in the meantime keeps its place: deactivating
    warns and leaves it.

    Args:
        attention: replace ``scaled_dot_product_attention``. Default: ``True``
        dropout: replace ``dropout``. Default: ``True``

    Returns:
        An :class:`Activation`: leave it alone to stay active, call its ``deactivate()``, or use it
        in a ``with`` statement.

    Raises:
        ValueError: if both are ``False``.
    """
    if not (attention or dropout):
        raise ValueError("activate: attention or dropout must be True, got False for both")
    return Activation(attention, dropout)
