"""Faults that the comparison with the CPU kernels must find."""

from __future__ import annotations

# op: {mutant: (text that stands once in its .cu file or the .cuh files beside it, what it becomes)}
MUTANTS: dict[str, dict[str, tuple[str, str]]] = {
    "dropout": {
        "no tail of threads": ("if (group >= num_groups) return;", ""),
        "a group too few": ("if (group >= num_groups)", "if (group >= num_groups - 1)"),
        "no tail of elements": ("= count8(first, p.sizes[inner]);", "= 8;"),
        "a block too few": ("(num_groups + kBlockThreads - 1)", "(num_groups - 1)"),
        "pointers taken as aligned": ("!is_aligned16(p.x) || !is_aligned16(p.y)", "false"),
        "rows taken as aligned": ("for (int d = 0; d < inner; ++d)", "for (int d = 0; d < 0; ++d)"),
        "strides taken as one": ("p.x_strides[inner] != 1 || p.y_strides[inner] != 1", "false"),
        "shifted mask": ("static_cast<uint64_t>(mask)", "static_cast<uint64_t>(mask + 1)"),
        "mask of the whole block": ("first + first *", "first + 0 * first *"),
    },
    "bias_dropout_add": {
        "no tail of threads": ("if (group >= num_groups) return;", ""),
        "no tail of columns": ("if (column >= p.num_columns) return;", ""),
        "a block too few": ("dim3(num_blocks(num_groups))", "dim3(num_blocks(num_groups) - 1)"),
        "no tail of elements": ("p.num_columns % 8 == 0 && is_aligned16(p.x)", "is_aligned16(p.x)"),
        "pointers taken as aligned": ("is_aligned16(p.x) && is_aligned16(p.residual)", "true"),
        "gradients taken as aligned": ("is_aligned16(p.grad) && is_aligned16(p.grad_x)", "true"),
        "reversed mask": ("residual[e] + ((bits >> e) & 1", "residual[e] + ((bits >> (7 - e)) & 1"),
        "a chunk too few": ("if (first_row >= p.num_rows) return;", "if (chunk == 1) return;"),
        "a row too few": ("row < row_end; ++row", "row < row_end - 1; ++row"),
    },
    "dropout_add_norm": {
        "no first barrier": ("= v[s][e];\n    }\n    __syncthreads();", "= v[s][e];\n    }"),
        "no second barrier": (
            "elements[s][e] = sum;\n      }\n    }\n    __syncthreads();",
            "elements[s][e] = sum;\n      }\n    }",
        ),
        "a wrong lane": ("(kAllLanes, sum, 16)", "(kAllLanes, sum, 2)"),
        "a wrong lane of a block": ("(kAllLanes, sum, offset)", "(kAllLanes, sum, 16)"),
        "a wrong element": (
            "upper ? v[e] : v[e + half];",
            "upper ? v[half - 1 - e] : v[e + half];",
        ),
        "a wrong virtual warp": ("kFirst + kStride, kStride * 2", "kFirst, kStride * 2"),
        "tail in the variance": ("kAligned || e < count ? d * d : C{0}", "d * d"),
        "mean not subtracted": ("raw.get(e) - mean;", "raw.get(e);"),
        "pointers taken as aligned": ("is_aligned16(p.x) && is_aligned16(p.residual)", "true"),
        "a row too few": ("(p.num_rows + S::kRows - 1)", "(p.num_rows - 1)"),
        "no tail of rows": ("if (row >= p.num_rows) return;\n  const bool", "const bool"),
        "reversed mask": ("(bits >> e) & 1 ? out[e]", "(bits >> (7 - e)) & 1 ? out[e]"),
        "a row of a chunk too few": ("row < row_end; ++row", "row < row_end - 1; ++row"),
        "rows in flight past the end": ("row + kInFlight <= row_end", "row < row_end"),
        "a block of rows too few": ("column_blocks + kChunkRows / S::kRows)", "column_blocks)"),
        "no barrier before a tile": (
            "= values[i];\n    }\n    __syncthreads();",
            "= values[i];\n    }",
        ),
        "a lane skips": ("C sum = v[0];", "C sum = v[0]; if (threadIdx.x == 5) return sum;"),
    },
}
