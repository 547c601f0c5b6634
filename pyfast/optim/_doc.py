"""The docstring that pyfast's optimizers share."""

from __future__ import annotations

from typing import TypeVar

_CENTERED = """        * a centered variance that rounding makes negative is zero; torch gives NaN.
"""

_TEXT = """{name} as ``torch.optim.{name}``, whose arguments, defaults, errors, groups, states and
    ``state_dict`` it has: all tensors of all groups are stepped in one pass over memory.

    Replaces ``torch.optim.{name}``, its loop, ``foreach`` and ``fused`` alike: ``foreach`` and
    ``fused`` are accepted, and do not choose the kernel. Differences:

        * float16 and bfloat16 tensors are computed in float32 and rounded once a value; float32
          results differ from torch's in the last places.
        * any strides, also where ``fused=True`` of torch on the CPU is wrong: transposed and
          expanded gradients, strided parameters.
        * after an error no parameter, state or step count has changed, but for parameters of
          another kind (complex, another device), which are stepped apart.
{difference}
    Complex parameters, ``differentiable=True``, parameters given twice and, of SGD, sparse
    gradients are stepped by torch's own code. CPU results do not depend on the number of threads.

    Args (in addition to torch's, keyword-only; all but ``max_grad_norm`` also in a group):
        max_grad_norm: clip the gradients of all groups to this 2-norm in the step, with the
            coefficient of ``torch.nn.utils.clip_grad_norm_``. ``.grad`` stays as it is;
            ``grad_norm`` tells the norm. Default: None
        ema_decay: keep an average of each parameter, in float32 at least:
            ``ema += (1 - ema_decay) (parameter - ema)`` after each step, from the value before the
            first. :meth:`ema_parameters` swaps it in. Default: None
        l1: weight of an L1 penalty. Default: 0
        l1_mode: ``"coupled"`` adds ``l1 sign(parameter)`` to the gradient, ``"decoupled"`` shrinks
            the parameter by ``lr l1`` towards zero after the update (the proximal operator).
            Default: ``"coupled"``
        state_dtype: of the states: ``"float32"``, ``"bfloat16"``, ``"int8"`` (codes, with a float32
            scale for 256 elements: 1.02 bytes an element), or None for that of the parameter;
            float64 parameters have float64 states. Default: None
        master_weights: keep what rounding cuts off: the state ``remainder``, int16, makes a
            bfloat16 parameter an exact float32; ``master`` is that of a float16 one. Default: False
        stochastic_rounding: round bfloat16 parameters up with the probability of what is cut off.
            Random bits are a function of ``seed``, the step, and the positions of the parameter
            and of the element. Default: False
        seed: of ``stochastic_rounding``, and of the dither of int8 states. Default: drawn from
            torch's generator with ``stochastic_rounding``, else 0
        zero_grads: set gradients to zero once they are read. Default: False

    Raises:
        ValueError, TypeError, RuntimeError: torch's, with its texts; ValueError for a wrong extra.
        NotImplementedError: for an extra with what torch's own code steps.
    """

T = TypeVar("T", bound=type)


def documented(optimizer: T) -> T:
    """Gives an optimizer class its docstring."""
    name = optimizer.__name__
    optimizer.__doc__ = _TEXT.format(name=name, difference=_CENTERED if name == "RMSprop" else "")
    return optimizer
