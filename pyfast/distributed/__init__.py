"""More than one process: what pyfast adds to torch.distributed.

DistributedDataParallel, ``fully_shard``, pipelining and checkpoints are torch's, and need nothing
from here. This is what DTensors and tensor parallelism need.
"""

from __future__ import annotations

from ._headwise import HeadwiseParallel, split_projections
from ._sharding import register_sharding_rules

__all__ = ["HeadwiseParallel", "register_sharding_rules", "split_projections"]
