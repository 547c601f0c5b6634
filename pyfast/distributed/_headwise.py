"""Tensor parallelism of multi-head attention: each rank computes its heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..nn.attention import MultiheadAttention
from ._sharding import register_sharding_rules


def split_projections(module: nn.MultiheadAttention) -> None:
    """Replace ``in_proj_weight`` (3 E, E) by torch's ``q_proj_weight``, ``k_proj_weight`` and
    ``v_proj_weight`` (E, E), in place; nothing to do where the layer has them.

    The packed matrix cannot be cut by heads and still be one tensor to checkpoints, so
    :class:`HeadwiseParallel` does this. Call it on a layer that is not parallelized to load what a
    parallelized one has saved. ``in_proj_bias`` stays packed, as torch has it. An optimizer must be
    made afterwards.

    Args:
        module: a ``torch.nn.MultiheadAttention`` or ``pyfast.nn.MultiheadAttention``.

    Raises:
        TypeError: if ``module`` is none of these.
    """
    if not isinstance(module, nn.MultiheadAttention):
        raise TypeError(
            "split_projections: module must be a torch.nn.MultiheadAttention, "
            f"got {type(module).__name__}"
        )
    packed = module.in_proj_weight
    if packed is None:
        return
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    for name, part in zip(names, packed.detach().chunk(3), strict=True):
        setattr(module, name, nn.Parameter(part.clone(), packed.requires_grad))
    module.register_parameter("in_proj_weight", None)
    module._qkv_same_embed_dim = False


class HeadwiseParallel(ParallelStyle):
    """The style of :func:`torch.distributed.tensor.parallel.parallelize_module` for
    :class:`pyfast.nn.MultiheadAttention`: projections of query, key and value are cut by heads, the
    output projection by columns, as ``ColwiseParallel`` and ``RowwiseParallel`` cut an MLP.

    torch has none: its ``ColwiseParallel`` takes Linear and Embedding, and would cut the packed
    ``in_proj_weight`` across query, key and value. One all-reduce forward and one backward. The
    weights dropped are those that one process with the same seed would drop. Masks, biases,
    ``add_bias_kv``, ``kdim``, ``vdim`` and ``need_weights`` work as on one process.

    The packed weight becomes three (:func:`split_projections`), so that ``state_dict`` has torch's
    names of separate projections, and checkpoints of any number of processes fit. Load what has
    packed weights before, and make optimizers after.

    Args:
        input_layouts: of query, key and value where they are no DTensors. Masks are replicated, or
            DTensors. Default: ``Replicate()``
        output_layouts: of the result. Default: ``Replicate()``
        use_local_output: return local tensors instead of DTensors. Default: ``True``

    Raises:
        TypeError: when applied to another module; patch a model with :func:`pyfast.patch` first.
        ValueError: if the number of heads is not a multiple of the number of ranks, or the mesh
            has more than one dimension.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = (input_layouts or Replicate(),)
        self.output_layouts = (output_layouts or Replicate(),)
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is not MultiheadAttention:
            raise TypeError(
                "HeadwiseParallel: module must be a pyfast.nn.MultiheadAttention (see "
                f"pyfast.patch), got {type(module).__module__}.{type(module).__qualname__}"
            )
        if device_mesh.ndim != 1 or module.num_heads % device_mesh.size():
            raise ValueError(
                "HeadwiseParallel: the mesh must have one dimension whose size divides the "
                f"{module.num_heads} heads, got {tuple(device_mesh.shape)}"
            )
        register_sharding_rules()
        split_projections(module)
        for owner, name, place in (
            (module, "q_proj_weight", Shard(0)),
            (module, "k_proj_weight", Shard(0)),
            (module, "v_proj_weight", Shard(0)),
            (module, "in_proj_bias", Replicate()),
            (module, "bias_k", Shard(2)),
            (module, "bias_v", Shard(2)),
            (module.out_proj, "weight", Shard(1)),
            (module.out_proj, "bias", Replicate()),
        ):
            value = getattr(owner, name)
            if value is not None:
                whole = distribute_tensor(
                    value, device_mesh, [place], src_data_rank=self.src_data_rank
                )
                setattr(owner, name, nn.Parameter(whole, value.requires_grad))
        module.register_forward_pre_hook(_Inputs(self.input_layouts, device_mesh), with_kwargs=True)
        module.register_forward_hook(_Output(self.output_layouts, self.use_local_output))
        return module

    def __repr__(self) -> str:
        return (
            f"HeadwiseParallel(input_layouts={self.input_layouts}, "
            f"output_layouts={self.output_layouts}, use_local_output={self.use_local_output})"
        )


class _Inputs:
    """The hook that makes replicated DTensors of what comes."""

    def __init__(self, layouts: tuple[Placement, ...], mesh: DeviceMesh) -> None:
        self.layouts, self.mesh = layouts, mesh

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        done: dict[int, Tensor] = {}  # query, key and value may be one tensor, and must stay one

        def distributed(value: Any, layouts: tuple[Placement, ...]) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in done:
                whole = value
                if not isinstance(whole, DTensor):
                    whole = DTensor.from_local(whole, self.mesh, layouts, run_check=False)
                done[id(value)] = whole.redistribute(self.mesh, [Replicate()])
            return done[id(value)]

        operands = ("query", "key", "value")
        args = tuple(
            distributed(value, self.layouts if i < 3 else (Replicate(),))
            for i, value in enumerate(args)
        )
        kwargs = {
            name: distributed(value, self.layouts if name in operands else (Replicate(),))
            for name, value in kwargs.items()
        }
        return args, kwargs


class _Output:
    """The hook that gives the result, and the weights, the layout that was asked for."""

    def __init__(self, layouts: tuple[Placement, ...], use_local: bool) -> None:
        self.layouts, self.use_local = layouts, use_local

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], result: tuple[Any, Any]
    ) -> tuple[Tensor, Tensor | None]:
        out, weights = result
        out = out.redistribute(placements=self.layouts)
        if weights is not None:
            weights = weights.redistribute(placements=[Replicate()])
        if self.use_local:
            return out.to_local(), None if weights is None else weights.to_local()
        return out, weights
