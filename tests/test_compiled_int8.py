"""What Triton makes of the int8 kernels, for which no GPU is needed: no register spills, tensor
cores for int8, weights fetched 16 bytes at a time, no contraction, IEEE division."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from oracle import run_python
from pyfast.kernels.int8_linear.int8_linear_tiles import TABLE, Tiles
from pyfast.kernels.quantize_int8.quantize_int8_triton import CHUNK, MAX_CHUNKS, block_tile
from test_compiled_code import triton_tools

import pyfast

CHIPS = {80: "ampere", 90: "hopper"}
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}  # of the smallest chip that takes the row
KINDS = {"i8": "int8", "bf16": "half", "fp16": "half", "fp32": "float32"}

COMPILE = """
import importlib, json, os, sys
sys.path[:0] = filter(None, [os.environ.get("OTHER_TRITON")])
from concurrent.futures import ProcessPoolExecutor
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {"weight": "i8", "values": "i8", "bias": "bf16", "zero_point": "i32", "extremes": "i32"}

def compiled(case):
    kernel = getattr(importlib.import_module("pyfast.kernels." + case["module"]), case["kernel"])
    constants = {n: v for n, v in case["constants"].items() if n in kernel.arg_names}
    types = {**TYPES, **case["types"]}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        is_pointer = name.endswith("_pointer")
        element = types.get(name.removesuffix("_pointer"), "fp32")
        signature[name] = "*" + element if is_pointer else "i32"
        if name.endswith(("_pointer", "_stride", "_size")) or name in ("n", "k", "k_of_split"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", case["architecture"], 32)
    result = triton.compile(source, target=target, options=case["options"])
    path = os.path.join(os.environ["FOLDER"], case["id"] + ".cubin")
    open(path, "wb").write(result.asm["cubin"])
    return {"cubin": path, "shared_bytes": result.metadata.shared, "ptx": result.asm["ptx"]}

if __name__ == "__main__":
    cases = json.load(open(os.environ["FOLDER"] + "/cases.json"))
    with ProcessPoolExecutor(2) as pool:
        json.dump(list(pool.map(compiled, cases)), open(os.environ["FOLDER"] + "/out.json", "w"))
"""


class Case(NamedTuple):
    kernel: str
    architecture: int
    x: str = "i8"
    constants: tuple[tuple[str, Any], ...] = ()
    tiles: Tiles | None = None
    num_warps: int = 4
    fuses: bool = False

    def __str__(self) -> str:
        flags = "-".join(f"{name}={value}" for name, value in self.constants)
        tiles = "x".join(map(str, self.tiles or ()))
        return f"{self.kernel}-sm_{self.architecture}-{self.x}-{tiles}-{flags}-{self.fuses}"

    def to_json(self) -> dict[str, Any]:
        is_product = self.kernel in ("product_kernel", "combine_kernel")
        constants: dict[str, Any] = {
            "IS_FINISHED": True,
            "HAS_ROW_SCALE": self.x == "i8",
            "HAS_BIAS": True,
            "ACTIVATION": "none",
            "PRECISION": "tf32x3" if self.x == "fp32" else "ieee",
            "EVEN_K": True,
            "GROUP": 8,
            "SCALE_IN": 0,
            "HAS_SMOOTH": False,
            "SYMMETRIC": True,
            **dict(self.constants),
        }
        if "weight_n_stride" not in constants:
            constants["weight_k_stride"] = 1
        options: dict[str, Any] = {"num_warps": self.num_warps}
        if self.tiles is not None:
            options = {**self.tiles.sizes(), **self.tiles.options()}
            for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
                constants[name] = options.pop(name)
        y = "bf16" if constants["IS_FINISHED"] else "i32"
        partial = "i32" if self.x == "i8" else "fp32"
        folder, file = "quantize_int8", "quantize_int8_triton"
        if is_product:
            folder, file = "int8_linear", "int8_linear_kernel_triton"
        return {
            "id": re.sub(r"[^\w]", "_", str(self)),
            "module": f"{folder}.{file}",
            "kernel": self.kernel,
            "architecture": self.architecture,
            "types": {"x": self.x, "y": y, "partial": partial},
            "constants": constants,
            "options": {**options, "enable_fp_fusion": self.fuses},
        }


def tiles_of(architecture: int, x: str) -> tuple[Tiles, ...]:
    return TABLE["float32" if x == "fp32" else CHIPS[architecture]][KINDS[x]]


PRODUCTS = [
    Case("product_kernel", architecture, x, (), tiles)
    for architecture in CHIPS
    for x in KINDS
    for tiles in tiles_of(architecture, x)
]
# Sums alone, of weights whose columns are dense; the ends of k; what is 1 is a constant.
SUMS = (("IS_FINISHED", False), ("HAS_ROW_SCALE", False), ("HAS_BIAS", False))
OTHERS = [
    *(
        Case("product_kernel", architecture, "i8", (*SUMS, ("weight_n_stride", 1)), tiles)
        for architecture in CHIPS
        for tiles in tiles_of(architecture, "i8")
    ),
    *(
        Case("product_kernel", 90, x, (("EVEN_K", False), ("ACTIVATION", activation)), tiles)
        for x, activation in (("i8", "gelu"), ("bf16", "silu"), ("fp16", "gelu_tanh"))
        for tiles in tiles_of(90, x)[-1:]
    ),
    *(
        Case(
            "product_kernel",
            80,
            x,
            (("EVEN_K", False), ("m", 1), ("n", 1), ("k", 1), ("k_of_split", 1)),
            tiles_of(80, x)[0],
        )
        for x in ("i8", "bf16", "fp32")
    ),
    Case("combine_kernel", 90, "i8", (("BLOCK_N", 256), ("m", 1))),
    Case("combine_kernel", 90, "bf16", (("BLOCK_N", 256),)),
    Case("combine_kernel", 90, "i8", (*SUMS, ("BLOCK_N", 256))),
]


def quantize_cases() -> list[Case]:
    cases = []
    for architecture in CHIPS:
        for x, size, blocks in (("bf16", 4096, 1), ("fp32", 768, 1), ("bf16", 128, None)):
            together, columns, num_warps = block_tile(size)
            constants = {"BLOCKS": together, "COLUMNS": columns}
            if blocks is not None:
                constants["blocks_per_row"] = blocks
            flags = tuple(constants.items())
            cases.append(Case("block_kernel", architecture, x, flags, num_warps=num_warps))
        chunk = (("COLUMNS", CHUNK), ("SYMMETRIC", False), ("HAS_SMOOTH", True))
        cases.append(Case("chunk_extremes_kernel", architecture, "bf16", chunk, num_warps=8))
        chunk = (*chunk, ("CHUNKS", MAX_CHUNKS))
        cases.append(Case("chunk_values_kernel", architecture, "bf16", chunk, num_warps=8))
    return cases


QUANTIZE = quantize_cases()
CASES = [*PRODUCTS, *OTHERS, *QUANTIZE]
# What the checks must tell from these: spills, no int8 tensor cores, contraction.
SPILLING = Case("product_kernel", 80, "fp32", (), Tiles(64, 64, 64, 4, 3))
FUSED = PRODUCTS[0]._replace(fuses=True)
BROKEN = [SPILLING, FUSED]


class Compiled(NamedTuple):
    cubin: str
    shared_bytes: int
    ptx: str

    def __repr__(self) -> str:
        return self.cubin

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))

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
        600,
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
    return compile_all(tmp_path_factory.mktemp("int8"), [*CASES, *BROKEN])


def check_product(case: Case, compiled: Compiled) -> None:
    tiles = case.tiles
    assert tiles is not None
    s8 = compiled.count(r"(?:mma|wgmma)\S*\.s8\.s8")
    assert (s8 > 0) == (case.x == "i8")
    if case.architecture == 90 and tiles.block_n >= 64:  # the least rows of wgmma
        assert compiled.count(r"wgmma\.mma_async") > 0
    else:
        assert compiled.count(r"mma\.sync") > 0
    assert 0 < compiled.shared_bytes <= SHARED_BYTES[case.architecture]
    if not case.constants and tiles.block_m == 16:
        # Few rows are bound by the weights: these, and x, come in 16 bytes at once, ahead of time.
        copies = compiled.count(r"cp\.async\.c[ag]\.shared")
        assert copies == compiled.count(r"cp\.async\.cg\.shared\S* .*0x10") > 0
        assert compiled.count(r"ld\.global") <= 40  # scales and bias
    if not case.constants:
        # Scales and bias: multiply and add round separately.
        assert compiled.count(r"\bfma\.rn") == 0 < compiled.count(r"\bmul\.f32|\bmul\.rn\.f32")


def check_quantize(case: Case, compiled: Compiled) -> None:
    assert compiled.count(r"ld\.global\S*\.v4\.b32") > 0
    if case.kernel != "chunk_extremes_kernel":
        assert compiled.count(r"div\.rn\.f32") > 0
        assert compiled.count(r"st\.global\S*\.v[24]\.b32") > 0
    assert compiled.count(r"div\.(full|approx)") == 0
    assert compiled.count(r"\bfma\.rn") == compiled.count(r"\.ftz") == 0


def check_code(case: Case, compiled: Compiled) -> None:
    if case in QUANTIZE:
        check_quantize(case, compiled)
    elif case.kernel == "product_kernel":
        check_product(case, compiled)
    assert compiled.stack_bytes() == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_code(code: dict[Case, Compiled], case: Case) -> None:
    check_code(case, code[case])


def test_code_of_another_triton(tmp_path: Path) -> None:
    """3.6, the one of torch 2.11, in CI."""
    other = os.environ.get("PYFAST_TEST_TRITON")
    if other is None:
        pytest.skip("PYFAST_TEST_TRITON names no folder with another Triton")
    for case, compiled in compile_all(tmp_path, CASES, OTHER_TRITON=other).items():
        check_code(case, compiled)


def test_the_checks_tell_bad_code(code: dict[Case, Compiled]) -> None:
    """Spills, no tensor cores, bytes one by one, contraction, division by multiplication."""
    case = PRODUCTS[0]
    good = code[case]
    quantize = QUANTIZE[0]
    bad: list[tuple[Case, Compiled]] = [
        (case, code[SPILLING]._replace(ptx=good.ptx)),
        (case, code[FUSED]),
        (case, good._replace(ptx=good.ptx.replace(".s8.s8", ".s4.s4"))),
        (case, good._replace(ptx=good.ptx.replace("cp.async.cg", "cp.async.ca", 1))),
        (case, good._replace(shared_bytes=SHARED_BYTES[case.architecture] + 1)),
        (quantize, code[quantize]._replace(ptx=code[quantize].ptx.replace("div.rn", "div.full"))),
    ]
    check_code(case, good)
    for which, compiled in bad:
        with pytest.raises(AssertionError):
            check_code(which, compiled)
