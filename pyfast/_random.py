"""Seeds: one 64-bit draw from torch's generator for each call of a random op.

An eager call draws from the default CPU generator, also for CUDA tensors: the seed is then a plain
int that travels as a kernel argument, nothing waits for the device, and ``torch.manual_seed`` gives
the same masks on CPU and GPU. Under CUDA-graph capture and in compiled graphs the seed is a tensor
on the device of the input, drawn from that device's generator, so that every replay gets a new one.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

ATTENTION_STREAM = 0
DROPOUT_STREAM = 1
DROPCONNECT_STREAM = 2
STOCHASTIC_ROUNDING_STREAM = 3

_library = torch.library.Library("pyfast", "FRAGMENT")
_library.define(
    "draw_seed(Tensor token, Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)


@torch.library.impl(_library, "draw_seed", "CompositeExplicitAutograd")
def _draw_seed(token: Tensor, like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=like.device).random_()


@torch.library.register_fake("pyfast::draw_seed", lib=_library)  # type: ignore[untyped-decorator]
def _draw_seed_fake(token: Tensor, like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=like.device)


@torch.library.register_vmap("pyfast::draw_seed", lib=_library)
def _draw_seed_vmap(info, in_dims, token, like):  # type: ignore[no-untyped-def]
    if info.randomness == "error":
        raise RuntimeError(
            "vmap: called random operation while in randomness error mode. Please either use the "
            "'same' or 'different' randomness flags on vmap or perform the randomness operation "
            "out of vmap"
        )
    # vmap would refuse the plain draw inside of the op.
    random_mode = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchVmapMode)
    with torch._C._ExcludeDispatchKeyGuard(random_mode):
        if info.randomness == "same":
            return torch.ops.pyfast.draw_seed(token, like), None
        return torch.empty(info.batch_size, dtype=torch.int64, device=like.device).random_(), 0


class _Buffer(threading.local):
    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.tensor = torch.empty((), dtype=torch.int64, device="cpu")


buffer = _Buffer()


def draw_eager(like: Tensor, generator: torch.Generator | None) -> int | Tensor:
    """Draw a seed outside of any transform: an int, or a tensor that only the device knows."""
    if generator is None:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            return torch.empty((), dtype=torch.int64, device=like.device).random_()
        return int(buffer.tensor.random_().item())
    if generator.device.type != "cpu":
        return torch.empty((), dtype=torch.int64, device=generator.device).random_(
            generator=generator
        )
    return int(buffer.tensor.random_(generator=generator).item())


def draw_traced(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a seed as a node of a graph. The fresh ``token`` keeps two draws from being merged."""
    if generator is not None:
        raise NotImplementedError(
            "generator= is not supported in compiled or transformed code: pass seed= instead"
        )
    token: Tensor = torch.empty((), dtype=torch.int64, device=like.device)
    drawn: Tensor = torch.ops.pyfast.draw_seed(token, like)
    return drawn


def as_seed_tensor(seed: int | Tensor, like: Tensor) -> Tensor:
    """A seed as an op argument: int64, two's complement of an unsigned 64-bit int."""
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), to_signed(seed), dtype=torch.int64, device=like.device)


def to_signed(seed: int) -> int:
    return (seed & 0xFFFFFFFFFFFFFFFF) - (1 << 64) * ((seed >> 63) & 1)


def checked_seed(op: str, seed: int | Tensor) -> int | Tensor:
    """A seed that a caller gave, as int64: a signed int, or a tensor without dimensions."""
    if isinstance(seed, Tensor):
        if seed.dtype == torch.int64 and seed.numel() == 1:
            return seed.reshape(()).resolve_neg()
        got = f"{tuple(seed.shape)} {seed.dtype}"
    elif isinstance(seed, int) and not isinstance(seed, bool):
        return to_signed(seed)
    else:
        got = type(seed).__name__
    raise TypeError(f"{op}: seed must be an int or a tensor of one int64, got {got}")
