"""pyfast's ops on DTensors: registration of the rules, and the numbering of what is dropped.

An op on DTensors means what it means on the whole tensors, dropout included: the mask is that of
the whole. What a rank needs to know for it, where its shard lies, goes to the kernel behind the
seed, once DTensor has decided how the call is cut.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from ..ops._op import Op, registered
from ._rules import RULES, Rule


def _first(spec: Any) -> tuple[int, ...]:
    """The place in the whole tensor of the first element of this rank's shard."""
    first, sizes = [0] * spec.ndim, list(spec.shape)
    for place, parts, rank in zip(
        spec.placements, spec.mesh.shape, spec.mesh.get_coordinate(), strict=True
    ):
        if place.is_shard():
            part = -(-sizes[place.dim] // parts)  # as torch.chunk cuts
            start = min(rank * part, sizes[place.dim])
            first[place.dim] += start
            sizes[place.dim] = min(part, sizes[place.dim] - start)
    return tuple(first)


def _element_numbers(spec: Any, mask_ndim: int) -> tuple[int, ...]:
    """(number of the first element of a shard, strides) of a mask over leading dimensions."""
    shape, first = spec.shape[:mask_ndim], _first(spec)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    offset = sum(start * stride for start, stride in zip(first, strides, strict=False))
    return offset, *strides


def _row_numbers(spec: Any) -> tuple[int, ...]:
    """The number of the first element of a shard that is cut along the first dimension."""
    return (_first(spec)[0] * math.prod(spec.shape[1:]),)


def _head_numbers(spec: Any) -> tuple[int, ...]:
    """(number of the first head of a shard, heads of a batch) of queries (batch, heads, ...)."""
    batch, head = _first(spec)[:2]
    return batch * spec.shape[1] + head, spec.shape[1]


_NUMBERS: dict[str, Callable[..., tuple[int, ...]]] = {
    "attention": lambda q, *_: _head_numbers(q),
    "attention_backward": lambda grad_out, grad_lse, q, *_: _head_numbers(q),
    "attention_weights": lambda q, *_: _head_numbers(q),
    "attention_weights_backward": lambda grad, q, *_: _head_numbers(q),
    "bias_dropout_add": lambda x, *_: _row_numbers(x),
    "bias_dropout_add_backward": lambda grad, *_: _row_numbers(grad),
    "dropconnect_linear": lambda input, weight, *_: _element_numbers(weight, 2),
    "dropout": lambda x, *rest: _element_numbers(x, rest[-1]),
    "dropout_add_norm": lambda x, *_: _row_numbers(x),
    "dropout_add_norm_backward": lambda grad_y, grad_z, z, *_: _row_numbers(z),
    "dropout_add_norm_int8": lambda x, *_: _row_numbers(x),
}


def _tensor_of(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


_kept_tensor_of = functools.lru_cache(maxsize=256)(_tensor_of)


def _with_numbers(seed: Tensor, numbers: tuple[int, ...]) -> Tensor:
    traced = torch._C._len_torch_dispatch_stack() > 0
    tensor = (_tensor_of if traced else _kept_tensor_of)(numbers, seed.device)
    return torch.cat((seed.reshape(1), tensor))


def _dispatch(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What DTensor does of itself, and the numbers of the shard added to the seed."""
    dispatcher: Any = DTensor._op_dispatcher
    name = op._schema.name.split("::")[1]
    names = [argument.name for argument in op._schema.arguments]
    args = (*args, *(kwargs[name] for name in names[len(args) :]))
    info = dispatcher.unwrap_to_op_info(op, args, {})
    if info.compute_mesh.get_coordinate() is None:
        raise RuntimeError(f"{op}: this rank is no part of {info.compute_mesh}")
    dispatcher.sharding_propagator.propagate(info)
    decided, schema = info.output_sharding, info.schema
    if decided.needs_redistribute:
        schema = decided.redistribute_schema
        dispatcher.redistribute_local_args(info, schema, decided.use_val_from_redistribute_schema)
    local = list(info.local_args)
    seed, specs = names.index("seed"), schema.args_schema
    if args[seed + 1] > 0 and any(
        place.is_shard() for spec in specs[:seed] if spec is not None for place in spec.placements
    ):
        numbers = _NUMBERS[name](*specs)
        local[seed] = _with_numbers(local[seed], numbers)
    if name == "attention_weights_backward" and local[names.index("average")]:
        # The kernel divides by the heads it sees.
        local[0] = local[0] * (local[1].shape[1] / specs[1].shape[1])
    return dispatcher.wrap(op(*local), decided.output_spec)


def _as_torch_takes_it(rule: Rule, num_outputs: int) -> Callable[..., list[Any]]:
    """The pairs of a rule filled up: replicated what they do not mention, None for no tensor."""

    def sharding(*arguments: Any) -> list[Any]:
        tensors = [isinstance(argument, DTensorSpec) for argument in arguments]
        filled = []
        for outputs, inputs in (([Replicate()] * num_outputs, []), *rule(*arguments)):
            places = [*inputs, *[Replicate()] * (len(arguments) - len(inputs))]
            pairs = zip(places, tensors, strict=True)
            filled.append((list(outputs), [place if is_one else None for place, is_one in pairs]))
        return filled

    return sharding


@functools.cache
def _handlers() -> dict[Any, Callable[..., Any]]:
    """Registers the rules, once; what DTensor shall call for ops that drop."""
    propagator, handlers = DTensor._op_dispatcher.sharding_propagator, {}
    for name, rule in RULES.items():
        op = registered()[name]
        assert isinstance(op, Op)
        overload: Any = op.dispatched
        arguments, returns = overload._schema.arguments, overload._schema.returns
        register_sharding(overload)(_as_torch_takes_it(rule, len(returns)))
        # torch keeps decisions apart from the first int on, and a bool, str or dtype may come
        # before it.
        plain = [i for i, a in enumerate(arguments) if "Tensor" not in str(a.type)]
        if plain:
            info = RuntimeSchemaInfo(plain[0], needs_pytree=True)
            propagator.op_to_schema_info[overload] = info
        if name in _NUMBERS:
            handlers[overload] = _dispatch
    return handlers


def register_sharding_rules() -> None:
    """Tell DTensor how pyfast's ops may be cut.

    The first op that meets a DTensor calls it, so that nobody needs to; further calls do nothing.
    An op on DTensors means what it means on the whole tensors: operands are redistributed where
    they must be, and dropout drops what it would drop on one process with the same seed, whichever
    way its input is cut. Seeds are drawn on every rank from torch's CPU generator: all ranks of a
    mesh must have called ``torch.manual_seed`` with one number, and drawn alike since, or pass one
    ``seed``. Nothing checks that.

    Attention is cut along batch and heads, norms along the first dimension, dropout anywhere,
    linear layers along rows, columns or both. Other operands are redistributed: a sequence that is
    cut becomes heads that are cut (an all-to-all), with any mask, causality or dropout. Dropout
    that is fused with a residual or a norm wants its rows to follow one another, and with them the
    first dimension cut. Second derivatives of attention are not supported on DTensors.
    """
    handlers = _handlers()
    known = DTensor._op_dispatcher._custom_op_handlers
    if not known.keys() >= handlers.keys():  # torch's context_parallel exchanges the table
        known.update(handlers)
