"""What compilers make of the GPU kernels of the optimizers' step, for which no GPU is needed. That
the CUDA C++ kernel does not spill: test_compiled_code.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from oracle import run_python
from test_compiled_code import NVCC_FLAGS, ROOT, Cubin, sass_of, spills, triton_tools

pytest.importorskip("triton")

NO_STATE = {"S0": None, "S1": None, "S2": None}
CASES: dict[str, dict[str, Any]] = {
    "AdamW float32": {"P": "fp32", "G": "fp32", "S0": "fp32", "S1": "fp32", "RULE": 1},
    "AdamW bfloat16": {"P": "bf16", "G": "bf16", "S0": "bf16", "S1": "bf16", "RULE": 1},
    "amsgrad, average, scaler": {
        **{"P": "fp16", "G": "fp16", "S0": "fp32", "S1": "fp32", "S2": "fp32", "RULE": 1},
        **{"FLAGS": 1, "EMA": True, "HAS_CLIP": True, "HAS_UNSCALE": True, "HAS_FOUND_INF": True},
    },
    "int8": {
        **{"P": "fp32", "G": "fp32", "S0": "u8", "S1": "u8", "RULE": 1, "INT8": True, "SIGNED": 1},
    },
    "master": {"P": "bf16", "G": "bf16", "S0": "fp32", "S1": "fp32", "RULE": 1, "MASTER": 1},
    "stochastic": {"P": "bf16", "G": "bf16", "S0": "bf16", "S1": "bf16", "RULE": 1, "FLAGS": 64},
    "SGD": {"P": "fp32", "G": "fp32", "S0": "fp32", "RULE": 2, "HAS_MOMENTUM": True},
    "RMSprop": {
        **{"P": "fp32", "G": "fp32", "S0": "fp32", "S1": "fp32", "S2": "fp32", "RULE": 3},
        **{"FLAGS": 4, "HAS_MOMENTUM": True, "HAS_L2": True, "HAS_L1": True},
    },
    "Adamax": {"P": "fp32", "G": "fp32", "S0": "fp32", "S1": "fp32", "RULE": 4, "FLAGS": 128},
    "misaligned": {
        **{"P": "fp32", "G": "fp32", "S0": "fp32", "S1": "fp32", "RULE": 1, "ALIGNED": False}
    },
}

COMPILE = """
import json, os, sys
sys.path[:0] = filter(None, [os.environ.get("OTHER_TRITON")])
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pyfast.kernels.optimizer_step.optimizer_kernel_triton import optimizer_step_kernel as kernel

TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "u8": tl.uint8}
DEFAULTS = dict(P=None, G=None, S0=None, S1=None, S2=None, SIGNED=0, INT8=False, EMA=False,
                MASTER=0, FLAGS=0, FROM_END=0, HAS_MOMENTUM=False, HAS_L2=False, HAS_L1=False,
                HAS_THRESHOLD=False, ALIGNED=True, HAS_FOUND_INF=False, HAS_CLIP=False,
                HAS_UNSCALE=False, N=1024)
POINTERS = {"table": "*i64", "numbers": "*fp32", "programs": "*i64"}
SCALARS = {"found_inf": "*fp32", "clip_scale": "*fp64", "unscale": "*fp32"}

def compiled(name, case, architecture):
    constants = {**DEFAULTS, **case}
    constants = {k: TYPES.get(v, v) if isinstance(v, str) else v for k, v in constants.items()}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in SCALARS and constants["HAS_" + argument.upper().removesuffix("_SCALE")]:
            signature[argument] = SCALARS[argument]
        elif argument in SCALARS:
            constants[argument], signature[argument] = None, "constexpr"
        elif argument in POINTERS:
            signature[argument] = POINTERS[argument]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "constexpr"
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return result.asm["ptx"]

folder = os.environ["FOLDER"]
cases = json.load(open(folder + "/cases.json"))
found = {f"{name} {a}": compiled(name, case, a) for name, case in cases.items() for a in (80, 90)}
json.dump(found, open(folder + "/out.json", "w"))
"""


def compile_all(folder: Path, **environment: str) -> dict[str, str]:
    """PTX of every case for sm_80 and sm_90, by a process in which Triton compiles."""
    (folder / "cases.json").write_text(json.dumps(CASES))
    script = folder / "compile.py"  # a file: Triton reads sources
    script.write_text(COMPILE)
    done = run_python(
        f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')",
        timeout_s=280,
        TRITON_INTERPRET="0",
        TRITON_CACHE_DIR=str(folder / "cache"),
        FOLDER=str(folder),
        **environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads((folder / "out.json").read_text())
    return found


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return compile_all(tmp_path_factory.mktemp("optimizer"))


def check_ptx(name: str, text: str) -> None:
    """IEEE division and root, no contraction, 16 bytes at once where addresses allow it."""
    assert "fma.rn.f32" not in text and "div.full" not in text and "sqrt.approx" not in text
    vector = re.search(r"(ld|st)\.global\S*\.(v4\.b32|v2\.b64)", text) is not None
    assert vector != name.startswith("misaligned")


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_code(ptx: dict[str, str], name: str, architecture: int, tmp_path: Path) -> None:
    text = ptx[f"{name} {architecture}"]
    check_ptx(name, text)
    ptxas = shutil.which("ptxas", path=triton_tools()) or shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("ptxas comes with the CUDA toolkit or with triton; neither is here")
    source = tmp_path / "kernel.ptx"
    source.write_text(text)
    suffix = "a" if f"sm_{architecture}a" in text else ""
    command = [ptxas, "-v", f"-arch=sm_{architecture}{suffix}", source, "-o", tmp_path / "kernel"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not spills(done.stderr)


def test_code_of_another_triton(tmp_path: Path) -> None:
    """3.6, the one of torch 2.11, in CI."""
    other = os.environ.get("PYFAST_TEST_TRITON")
    if other is None:
        pytest.skip("PYFAST_TEST_TRITON names no folder with another Triton")
    for name, text in compile_all(tmp_path, OTHER_TRITON=other).items():
        check_ptx(name, text)


def test_the_check_tells_bad_code(ptx: dict[str, str]) -> None:
    good = ptx["AdamW float32 90"]
    for bad in (good + "fma.rn.f32", good + "div.full", good.replace("v4.b32", "b32")):
        with pytest.raises(AssertionError):
            check_ptx("AdamW float32", bad)


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_cuda_moves_16_bytes(architecture: str, tmp_path: Path) -> None:
    """Each operand in float32 (two accesses) and in both half types, loads and stores alike: of
    addresses from a table, compilers split what is not said to be global and whole."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    target = tmp_path / "optimizer.cubin"
    source = ROOT / "kernels/optimizer_step/optimizer_step_cuda.cu"
    command = [nvcc, *NVCC_FLAGS, f"-arch=sm_{architecture}", "-cubin", source, "-o", target]
    subprocess.run(command, check=True, capture_output=True)
    code = next(c for name, c in sass_of(Cubin(target, "")).items() if "step_kernelIf" in name)
    num_operands = 8  # gradient, parameter (and once more for its average), states, average, master
    assert code.count("LDG.E.128") >= 4 * num_operands
    assert code.count("STG.E.128") >= 4 * (num_operands - 1)
