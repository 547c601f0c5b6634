"""Products with int8 weights in Triton: what the kernels are called with.

x is quantized by the Triton kernel of ``quantize_int8``; whoever has quantized it otherwise passes
int8 with its scale. float32 products are three passes of TF32 (about 22 bits; weights are exact in
it), or one where torch allows TF32.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..common.launch_triton import Launch, Plans, kind_of, launch
from ..quantize_int8.quantize_int8_triton import quantize_int8_triton
from .int8_linear_kernel_triton import combine_kernel, product_kernel
from .int8_linear_tiles import choose

COMBINE_BLOCK = 256
ALIGNMENT = 16  # elements and bytes: what Triton knows of sizes and addresses
FEW_ROWS = 16
_plans = Plans()


def _precision(x: Tensor) -> str:
    if x.dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _is_aligned(rows: Tensor) -> bool:
    """Whether whole rows are read 16 bytes at a time."""
    size = rows.element_size()
    return (
        rows.stride(1) == 1
        and rows.shape[1] % ALIGNMENT == 0
        and rows.stride(0) * size % ALIGNMENT == 0
        and rows.data_ptr() % ALIGNMENT == 0
    )


def _aligned(rows: Tensor) -> Tensor:
    if _is_aligned(rows):
        return rows
    size = triton.cdiv(rows.shape[1], ALIGNMENT) * ALIGNMENT
    copy = rows.new_zeros((rows.shape[0], size))
    copy[:, : rows.shape[1]] = rows
    return copy


def _loadable(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As they are, or copies, which cost less than large tiles that are read byte by byte; zeros at
    the end of rows add nothing. Few rows take as long as reading the weights, which stay where they
    are if their rows or columns are dense."""
    if len(x) <= FEW_ROWS:
        x = x if x.stride(1) == 1 else x.contiguous()
        return x, weight if 1 in weight.stride() else weight.contiguous()
    if _is_aligned(x) and _is_aligned(weight.t()):
        return x, weight
    return _aligned(x), _aligned(weight)


def _product(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    row_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
) -> None:
    """Fills y (m, n), contiguous, from x (m, k) and weight (n, k) of any strides. Without
    ``weight_scale`` with the sums alone."""
    if y.numel() == 0:
        return
    x, weight = _loadable(x, weight)
    tensors = x, weight, y, row_scale, weight_scale, bias
    key = (*map(kind_of, tensors), activation, _precision(x))
    if not _plans.run(key, tensors):
        _plans.keep(key, tensors, *_launch_product(*tensors, activation))


def _launch_product(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    row_scale: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
) -> tuple[list[Launch], list[Tensor]]:
    """What is launched, and its temporaries."""
    m, k = x.shape
    n = weight.shape[0]
    tiles, k_of_split = choose(x.device, x.dtype, m, n, k)
    splits = max(1, triton.cdiv(k, k_of_split))
    sum_type = torch.int32 if x.dtype == torch.int8 else torch.float32
    sums = y if splits == 1 else torch.empty((splits, m, n), dtype=sum_type, device=x.device)
    unused = y
    operands = {
        "row_scale_pointer": unused if row_scale is None else row_scale,
        "weight_scale_pointer": unused if weight_scale is None else weight_scale,
        "bias_pointer": unused if bias is None else bias,
        "m": m,
        "n": n,
        "HAS_ROW_SCALE": row_scale is not None,
        "HAS_BIAS": bias is not None,
        "ACTIVATION": activation,
    }
    product = launch(
        product_kernel,
        (triton.cdiv(m, tiles.block_m) * triton.cdiv(n, tiles.block_n), splits),
        {
            "x_pointer": x,
            "weight_pointer": weight,
            "y_pointer": sums,
            "k": k,
            "k_of_split": k_of_split,
            "x_m_stride": x.stride(0),
            "weight_n_stride": weight.stride(0),
            "weight_k_stride": weight.stride(1),
            "IS_FINISHED": weight_scale is not None and splits == 1,
            "PRECISION": _precision(x),
            "EVEN_K": k % tiles.block_k == 0,
            "GROUP": 8,
            **operands,
            **tiles.sizes(),
        },
        **tiles.options(),
        enable_fp_fusion=False,  # multiply and add round separately
    )
    if splits == 1:
        return [product], []
    combined = launch(
        combine_kernel,
        (triton.cdiv(n, COMBINE_BLOCK), m),
        {
            "partial_pointer": sums,
            "y_pointer": y,
            "splits": splits,
            "IS_FINISHED": weight_scale is not None,
            "BLOCK_N": COMBINE_BLOCK,
            **operands,
        },
        enable_fp_fusion=False,
    )
    return [product, combined], [sums]


def int8_mm_triton(a: Tensor, b: Tensor) -> Tensor:
    """See ``int8_mm_reference``."""
    y = torch.empty((a.shape[0], b.shape[1]), dtype=torch.int32, device=a.device)
    _product(a, b.t(), y)
    return y


def int8_linear_triton(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    smooth: Tensor | None,
    weight_only: bool,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """See ``int8_linear_reference``."""
    m, k = x.shape[:-1].numel(), x.shape[-1]
    rows = x.reshape(m, k)
    row_scale = None
    if weight_only:
        if smooth is not None:  # in float32: rounded to x's dtype, it would be another x
            rows = rows.to(torch.float32) * smooth
    elif k == 0:
        rows, row_scale = rows.to(torch.int8), torch.ones(m, device=x.device)
    elif x.dtype == torch.int8:
        row_scale = input_scale
    else:
        rows, row_scale, _ = quantize_int8_triton(rows, input_scale, smooth, k, True)
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=dtype, device=x.device)
    _product(
        rows,
        weight,
        y.view(m, weight.shape[0]),
        None if row_scale is None else row_scale.reshape(m).contiguous(),
        weight_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        activation,
    )
    return y
