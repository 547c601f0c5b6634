"""Custom kernels that make existing PyTorch models faster without changing them.

``pyfast.patch(model)`` swaps the modules of a model in place; ``import pyfast.nn as nn`` is a
drop-in for torch.nn. ``python -m pyfast info`` shows what is usable on this machine.
"""

from __future__ import annotations

from . import nn, optim, quantization
from ._activate import Activation, activate
from ._backend import BackendStatus, backends, use_backend
from ._explain import Explanation, explain
from ._patch import PatchReport, patch
from ._patch_optimizer import patch_optimizer
from ._version import __version__
from .ops.dropout_mask import dropout_mask

__all__ = [
    "Activation",
    "BackendStatus",
    "Explanation",
    "PatchReport",
    "__version__",
    "activate",
    "backends",
    "dropout_mask",
    "explain",
    "nn",
    "optim",
    "patch",
    "patch_optimizer",
    "quantization",
    "use_backend",
]
