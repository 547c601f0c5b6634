"""Which kernels serve a call, and why: found by making it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _backend
from ._backend import Served


class Explanation(tuple[Served, ...]):
    """What served a call, op by op in the order of their calls; ``str()`` gives a line for each."""

    __slots__ = ()

    def __str__(self) -> str:
        lines = []
        for served in self:
            lines.append(f"{served.op}: {served.backend}, because {served.reason}")
            lines += [f"    not {name}: {reason}" for name, reason in served.others.items()]
        return "\n".join(lines) or "no pyfast op was called"


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Call ``op`` once, and tell which backend served each pyfast op in it and why no other did.

    The call is a real one: a seed is drawn, a cache is written, and the result is thrown away. In
    compiled code only the first call, which compiles, and calls that reach an op are seen.

    Args:
        op: a function of :mod:`pyfast.nn.functional`, its name, or anything that can be called, a
            module for example.
        args, kwargs: what it is called with.

    Returns:
        A tuple of ``Served(op, backend, reason, others)``; ``backend`` is "cpu", "cuda", "triton",
        "reference", or "torch" where torch's own function serves a call of the same meaning, and
        ``others`` the reason of every other backend. Printed, a line for each. Calls that other
        threads make in the meantime are in it as well.

    Raises:
        AttributeError: for a name that is none of pyfast.nn.functional's, and whatever the call
            raises.
    """
    if isinstance(op, str):
        from .nn import functional

        op = getattr(functional, op)
    record: list[Served] = []
    _backend.observers.append(record)
    try:
        op(*args, **kwargs)  # type: ignore[operator]
    finally:
        # By identity: an equal record of another call must stay.
        index = next(i for i, other in enumerate(_backend.observers) if other is record)
        del _backend.observers[index]
    return Explanation(record)
