"""What Triton makes of attention's kernels, for which no GPU is needed: no register spills, tensor
cores do the products, shared memory suffices, dropout moves nothing. Bounds of what is visible are
arguments of the kernels, so that causal or not is the same code."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from oracle import run_python
from pyfast.kernels.attention.attention_tiles import (
    Tiles,
    decode_tiles,
    forward_tiles,
    gradient_tiles,
)
from test_compiled_code import triton_tools

import pyfast

SIZES = (64, 96, 128, 192, 256)
CHIPS = {80: "large", 86: "small", 90: "hopper"}
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
MODULES = {
    "forward_kernel": "attention_forward_triton",
    "query_gradient_kernel": "attention_query_gradient_triton",
    "key_value_gradient_kernel": "attention_key_gradient_triton",
    "mask_gradient_kernel": "attention_mask_gradient_triton",
}

COMPILE = """
import importlib, json, os, sys
sys.path[:0] = filter(None, [os.environ.get("OTHER_TRITON")])
from concurrent.futures import ProcessPoolExecutor
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FLOATS = {"keep_scale", "scale", "softcap", "grad_scale"}
FLOAT32 = {"lse", "delta", "slopes", "sinks", "k_scale", "v_scale", "grad_mask"}
FLAGS = ("BOTTOM_RIGHT", "HAS_SOFTCAP", "HAS_ALIBI", "HAS_SINKS", "HAS_DROPOUT", "IS_VARLEN",
         "HAS_LENGTHS", "IS_INT8", "IS_PACKED", "SEED_IS_POINTER", "STORE_MASK")

def pointer(name, case):
    if name in FLOAT32:
        return "*fp32"
    if name in ("cu_q", "cu_k", "lengths"):
        return "*i64"
    if name == "mask" and case["constants"].get("MASK_TYPE") == 1:
        return "*u8"
    if name == "mask":
        return "*" + case["constants"].get("mask_dtype", case["dtype"])
    return "*i8" if name in "kv" and case["constants"].get("IS_INT8") else "*" + case["dtype"]

def compiled(case):
    module = importlib.import_module("pyfast.kernels.attention." + case["module"])
    kernel = getattr(module, case["kernel"])
    constants = {**dict.fromkeys(FLAGS, False), "MASK_TYPE": 0, **case["constants"]}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature, attributes = {}, {}
    seed = "*i64" if constants.get("SEED_IS_POINTER") else "i64"
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_pointer"):
            signature[name] = pointer(name.removesuffix("_pointer"), case)
        else:
            signature[name] = seed if name == "seed" else "fp32" if name in FLOATS else "i32"
        if name.endswith(("_pointer", "_stride")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", case["architecture"], 32)
    options = {"num_warps": case["num_warps"], "num_stages": case["num_stages"]}
    result = triton.compile(source, target=target, options=options)
    ptx, ttgir = result.asm["ptx"], result.asm["ttgir"]
    path = os.path.join(os.environ["FOLDER"], case["id"] + ".cubin")
    open(path, "wb").write(result.asm["cubin"])
    return {
        "cubin": path,
        "shared_bytes": result.metadata.shared,
        "num_wgmma": ptx.count("wgmma.mma_async"),
        "num_mma": ptx.count("mma.sync"),
        "num_conversions": ttgir.count("convert_layout"),
        "num_shared_accesses": sum(ptx.count(name) for name in (
            "ld.shared", "st.shared", "ldmatrix", "stmatrix")),
        "num_shuffles": ptx.count("shfl.sync"),
        "num_philox_products": ptx.count("mul.hi"),
    }

if __name__ == "__main__":
    cases = json.load(open(os.environ["FOLDER"] + "/cases.json"))
    with ProcessPoolExecutor(2) as pool:
        json.dump(list(pool.map(compiled, cases)), open(os.environ["FOLDER"] + "/out.json", "w"))
"""


class Case(NamedTuple):
    kernel: str
    architecture: int
    size: int
    flags: tuple[tuple[str, Any], ...] = ()
    dtype: str = "bf16"
    tiles: Tiles | None = None  # None: those of the table

    def __str__(self) -> str:
        flags = "-".join(f"{name}={value}" for name, value in self.flags)
        tiles = "" if self.tiles is None else "-" + "x".join(map(str, self.tiles))
        where = f"sm_{self.architecture}-{self.size}-{self.dtype}"
        return f"{self.kernel}-{where}-{flags or 'plain'}{tiles}"

    def chosen_tiles(self) -> Tiles:
        if self.tiles is not None:
            return self.tiles
        row = CHIPS[self.architecture] if self.dtype != "fp32" else "float32"
        width = 64 if self.size <= 64 else 128 if self.size <= 128 else 256
        if ("IS_PACKED", True) in self.flags:
            return decode_tiles(row, width, dict(self.flags)["rows"])
        if self.kernel == "forward_kernel":
            return forward_tiles(row, width, ("mask_dtype", "fp32") in self.flags)
        both = gradient_tiles(row, width)
        return both.keys if self.kernel == "key_value_gradient_kernel" else both.queries

    def to_json(self) -> dict[str, Any]:
        tiles = self.chosen_tiles()
        block = 1 << (self.size - 1).bit_length()
        constants = {
            **dict(self.flags),
            "PRECISION": "tf32x3" if self.dtype == "fp32" else "ieee",
            "HEAD_SIZE": self.size,
            "VALUE_SIZE": self.size,
            "BLOCK_D": block,
            "BLOCK_DV": block,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "CHUNK": tiles.chunk,
        }
        return {
            "id": re.sub(r"[^\w]", "_", str(self)),
            "module": MODULES[self.kernel],
            "kernel": self.kernel,
            "architecture": self.architecture,
            "dtype": self.dtype,
            "constants": constants,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }


DROPOUT = (("HAS_DROPOUT", True),)
MAIN = tuple(MODULES)[:3]
GRID = [
    Case(kernel, architecture, size, flags)
    for kernel in MAIN
    for architecture in (80, 90)
    for size in SIZES
    for flags in ((), DROPOUT)
] + [Case(kernel, 86, size, DROPOUT) for kernel in MAIN for size in (64, 128, 256)]
DECODE = (("IS_PACKED", True), ("HAS_LENGTHS", True), ("BOTTOM_RIGHT", True))
EVERYTHING = (
    ("BOTTOM_RIGHT", True),
    ("HAS_SOFTCAP", True),
    ("HAS_ALIBI", True),
    ("HAS_SINKS", True),
    ("HAS_DROPOUT", True),
    ("SEED_IS_POINTER", True),
)
# What is 1 at a launch is a constant there, with other types in Triton's eyes.
ONES = tuple((name, 1) for name in ("group", "heads", "batch", "num_queries", "num_keys"))
# Compiled with every feature; spills are allowed there.
FEATURES = [
    *(Case(kernel, 90, 128, (*EVERYTHING, ("MASK_TYPE", 2))) for kernel in MODULES),
    *(Case(kernel, 90, 64, (*EVERYTHING, ("MASK_TYPE", 1)), "fp16") for kernel in MAIN),
    *(Case(kernel, 80, 64, (*EVERYTHING, ("IS_VARLEN", True))) for kernel in MAIN),
    *(Case(kernel, 90, 64, DROPOUT, "fp32") for kernel in MAIN),
    Case("query_gradient_kernel", 90, 128, (("MASK_TYPE", 2), ("STORE_MASK", True))),
    *(Case(kernel, 90, 64, (*DROPOUT, ("MASK_TYPE", 2), *ONES)) for kernel in MODULES),
    *(
        Case(kernel, 90, size, (("MASK_TYPE", 2), ("mask_dtype", "fp32")))
        for kernel in MODULES
        for size in (64, 128)
    ),
    *(
        Case("forward_kernel", chip, size, (*DECODE, ("IS_INT8", is_int8), ("rows", rows)), dtype)
        for chip, rows in ((80, 16), (86, 64), (90, 64))
        for size in (128, 256)
        for is_int8 in (False, True)
        for dtype in ("bf16", "fp32")
    ),
]
BROKEN = Case("query_gradient_kernel", 90, 256, DROPOUT, "bf16", Tiles(64, 32, 4, 1))


class Compiled(NamedTuple):
    cubin: str
    shared_bytes: int
    num_wgmma: int
    num_mma: int
    num_conversions: int
    num_shared_accesses: int
    num_shuffles: int
    num_philox_products: int

    def stack_bytes(self) -> int:
        """What does not fit in registers, by the binary's own account."""
        folder = triton_tools()
        assert folder is not None
        command = [str(folder / "cuobjdump"), "-res-usage", self.cubin]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", text)
        assert found, text
        return int(found[1]) + int(found[2])


def compile_all(folder: Path, cases: list[Case], **environment: str) -> dict[Case, Compiled]:
    """In processes where Triton does not interpret."""
    (folder / "cases.json").write_text(json.dumps([case.to_json() for case in cases]))
    (folder / "compile_cases.py").write_text(COMPILE)
    done = run_python(
        f"import runpy; runpy.run_path({str(folder / 'compile_cases.py')!r}, run_name='__main__')",
        900,
        FOLDER=str(folder),
        TRITON_CACHE_DIR=str(folder / "cache"),
        TRITON_INTERPRET="0",
        **environment,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "out.json").read_text())
    return {case: Compiled(**result) for case, result in zip(cases, results, strict=True)}


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Compiled]:
    if not pyfast._backend.has_triton():
        pytest.skip("triton is not installed")
    return compile_all(tmp_path_factory.mktemp("attention"), [*GRID, *FEATURES, BROKEN])


# A few bytes outside of the loops over tiles; no other tile sizes were found that do without.
SPILLS = {Case("query_gradient_kernel", 90, 192, DROPOUT): 16}


def check_code(case: Case, compiled: Compiled) -> None:
    """wgmma where there is one; tiles of less than 64 rows are too small for it."""
    tiles = case.chosen_tiles()
    if case.architecture == 90 and min(tiles.block_m, 64) == 64 and case.dtype != "fp32":
        assert compiled.num_wgmma > 0
    else:
        assert compiled.num_mma + compiled.num_wgmma > 0
    assert 0 < compiled.shared_bytes <= SHARED_BYTES[case.architecture]
    if case in GRID:
        assert compiled.stack_bytes() <= SPILLS.get(case, 0)


@pytest.mark.parametrize("case", [*GRID, *FEATURES], ids=str)
def test_code(code: dict[Case, Compiled], case: Case) -> None:
    check_code(case, code[case])


def test_code_of_another_triton(tmp_path: Path) -> None:
    """3.6, the one of torch 2.11, in CI. Dropout is the harder half of the grid."""
    other = os.environ.get("PYFAST_TEST_TRITON")
    if other is None:
        pytest.skip("PYFAST_TEST_TRITON names no folder with another Triton")
    cases = [*(case for case in GRID if case.flags), *FEATURES]
    for case, compiled in compile_all(tmp_path, cases, OTHER_TRITON=other).items():
        check_code(case, compiled)


def moves_nothing(case: Case) -> bool:
    """Where a warp owns whole rows of 32 scores: with wgmma but for the smallest tiles."""
    if case.flags != DROPOUT or case.architecture == 86:
        return False
    if case.architecture == 90:
        return case.kernel != "key_value_gradient_kernel" or case.size <= 128
    return case.kernel == "forward_kernel" and case.size <= 128


@pytest.mark.parametrize("case", [case for case in GRID if moves_nothing(case)], ids=str)
def test_dropout_moves_nothing(code: dict[Case, Compiled], case: Case) -> None:
    """The registers that hold the scores of a thread are those in which its random bits arise; on
    sm_80 Triton passes them through shuffles of a warp."""
    dropped, plain = code[case], code[case._replace(flags=())]
    assert plain.num_philox_products == 0 < dropped.num_philox_products
    assert dropped.num_conversions <= plain.num_conversions
    assert dropped.num_shared_accesses <= plain.num_shared_accesses
    assert dropped.shared_bytes <= plain.shared_bytes
    if case.architecture == 90:
        assert dropped.num_shuffles <= plain.num_shuffles


def test_the_checks_tell_bad_code(code: dict[Case, Compiled]) -> None:
    """Spills, no tensor cores, too much memory."""
    case = Case("forward_kernel", 90, 64)
    good = code[case]
    check_code(case, good)
    for bad in (
        good._replace(cubin=code[BROKEN].cubin),
        good._replace(num_wgmma=0, num_mma=8),
        good._replace(shared_bytes=SHARED_BYTES[90] + 1),
    ):
        with pytest.raises(AssertionError):
            check_code(case, bad)
