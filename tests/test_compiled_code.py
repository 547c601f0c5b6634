"""What compilers make of the package: the machine code of the kernels, for which no GPU is needed,
and the graphs of the fused ops (those of dropout are in test_backend.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from oracle import normal, run_python
from test_bias_dropout_add import SEED, P, assert_all_equal, with_gradients
from test_fused import FUSED, run

import pyfast

ROOT = Path(__file__).resolve().parents[1]
OPS = tuple(sorted(path.parent.name for path in ROOT.glob("kernels/*/*_cuda.cu")))
ARCHITECTURES = ("80", "90a")
NVCC_FLAGS = ("-std=c++17", "-fmad=false", "-O3", "-DNDEBUG", "-DPYFAST_WITH_CUDA")
NO_SPILL = "0 bytes spill stores, 0 bytes spill loads"


def triton_tools() -> Path | None:
    """The folder of the CUDA tools that come with Triton."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "backends/nvidia/bin"


def spills(ptxas_log: str) -> list[str]:
    """The lines of ``ptxas -v`` about kernels that keep registers in memory."""
    lines = [line.strip() for line in ptxas_log.splitlines() if "spill stores" in line]
    assert lines, f"ptxas says nothing about any kernel:\n{ptxas_log[:1000]}"
    return [line for line in lines if NO_SPILL not in line]


class Cubin(NamedTuple):
    path: Path
    log: str


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Cubin]:
    """Every CUDA source, compiled for every architecture with the flags of the build."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    folder = tmp_path_factory.mktemp("cubins")

    def compiled(key: tuple[str, str]) -> Cubin:
        op, architecture = key
        target = folder / f"{op}_{architecture}.cubin"
        source = ROOT / f"kernels/{op}/{op}_cuda.cu"
        command = [nvcc, *NVCC_FLAGS, f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
        done = subprocess.run([*command, source, "-o", target], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Cubin(target, done.stderr)

    # The slowest first: two cores are then busy to the end.
    keys = [(op, architecture) for op in reversed(OPS) for architecture in ARCHITECTURES]
    keys.sort(key=lambda key: -(ROOT / f"kernels/{key[0]}/{key[0]}_cuda.cu").stat().st_size)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(keys, pool.map(compiled, keys), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", OPS)
def test_cuda_does_not_spill(
    cubins: dict[tuple[str, str], Cubin], op: str, architecture: str
) -> None:
    log = cubins[op, architecture].log
    assert not spills(log)
    # Nor do arrays that were meant for registers live on the stack.
    frames = set(re.findall(r"(\d+) bytes stack frame", log))
    assert frames == {"0"}, log


def sass_of(cubin: Cubin) -> dict[str, str]:
    """The instructions of every kernel, by its mangled name."""
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=triton_tools())
    if cuobjdump is None:
        pytest.skip("cuobjdump comes with the CUDA toolkit or with triton; neither is here")
    command = [cuobjdump, "-sass", str(cubin.path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"Function : (\S+)", text)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_dropout_moves_16_bytes(
    cubins: dict[tuple[str, str], Cubin], architecture: str
) -> None:
    kernels = sass_of(cubins["dropout", architecture])
    # dropout_kernel<T, bool kVectorized>: Lb1E is true in the mangled name.
    vectorized = [code for name, code in kernels.items() if "Lb1E" in name]
    plain = [code for name, code in kernels.items() if "Lb0E" in name]
    assert len(vectorized) == len(plain) == 4
    for code in vectorized:
        assert "LDG.E.128" in code and "STG.E.128" in code
    for code in plain:
        assert "LDG.E.128" not in code and "STG.E.128" not in code


def test_flags_are_those_of_the_build() -> None:
    """Contraction is off in the build: with it, CUDA and the CPU differ in the last bit."""
    text = (ROOT / "csrc/CMakeLists.txt").read_text()
    cuda = re.search(r"target_compile_options\(kernels_cuda PRIVATE ([^)]*)\)", text)
    cpu = re.search(r"target_compile_options\(kernels_\$\{level\} PRIVATE ([^)]*)\)", text)
    assert cuda and "-fmad=false" in cuda[1].split()
    assert cpu and "-ffp-contract=off" in cpu[1].split()
    architectures = re.search(r'PYFAST_CUDA_ARCHS "([^"]*)"', text)
    assert architectures
    assert {f"{name}-real" for name in ARCHITECTURES} <= set(architectures[1].split(";"))


@pytest.mark.parametrize("op", OPS)
def test_isa_levels_share_no_function(op: str, tmp_path: Path) -> None:
    """Every function of a CPU kernel's object has its level in its name. Of one that has not, the
    linker keeps a single copy, maybe the one with AVX-512, for all levels. Compiled without
    optimisation, so that inlining hides none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    nm = shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("needs g++ or clang++, and nm")
    target = tmp_path / "kernel.o"
    flags = ["-std=c++17", "-O0", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-DPYFAST_ISA=level"]
    source = ROOT / f"kernels/{op}/{op}_cpu.cpp"
    subprocess.run([compiler, *flags, "-c", source, "-o", target], check=True)
    command = [nm, "-C", "--defined-only", "-g", str(target)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.findall(r"^\S+ [TWiu] (.*)$", text, flags=re.MULTILINE)
    assert any("pyfast::level::" in name for name in functions), text
    assert not [name for name in functions if "pyfast::level::" not in name]


COMPILE_TRITON = """
import importlib, json, os
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {"seed": "i64", "scale": "fp32", "shift": "fp32", "fill": "fp32", "eps": "fp32"}
COMPUTED = ("weight_pointer", "bias_pointer", "mean_pointer", "rstd_pointer", "partial_pointer")

def compiled(case):
    kernel = getattr(importlib.import_module(case["module"]), case["kernel"])
    constants = case["constants"]
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        is_pointer = name.endswith("_pointer")
        if name in constants:
            signature[name] = "constexpr"
        elif is_pointer:
            signature[name] = "*" + ("fp32" if name in COMPUTED else case["dtype"])
        else:
            signature[name] = TYPES.get(name, "i32")
        if is_pointer or name in case["divisible"]:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", case["architecture"], 32)
    result = triton.compile(source, target=target, options={"num_warps": case["num_warps"]})
    return result.asm["ptx"], result.metadata.shared

folder = os.environ["FOLDER"]
cases = json.load(open(folder + "/cases.json"))
json.dump([compiled(case) for case in cases], open(folder + "/compiled.json", "w"))
"""


class Kernel(NamedTuple):
    """A specialisation of a Triton kernel as its launcher makes it."""

    op: str
    kernel: str
    constants: dict[str, Any]
    num_warps: int = 4

    @property
    def philox_calls(self) -> int:
        """Of each thread: one for eight elements."""
        width = self.constants.get("BLOCK", self.constants.get("COLUMNS"))
        return width // (8 * 32 * self.num_warps)


_SEED = {"SEED_IS_POINTER": False}
_ROWS = {**_SEED, "RMS": False, "HAS_WEIGHT": True, "ALIGNED": True}
_PARTS = ("HAS_RESIDUAL", "HAS_BIAS", "KEEP_Y", "KEEP_Z")
_NORM = {**_ROWS, **dict.fromkeys(_PARTS, True), "QUANTIZE": False}
_NORM_BACKWARD = {**_ROWS, "HAS_GRAD_Z": True, "CHUNK_ROWS": 32}
_BIAS_BACKWARD = {**_SEED, "ALIGNED": True, "CHUNK_ROWS": 32, "COLUMNS": 512}
KERNELS = {
    "dropout": Kernel(
        "dropout",
        "dropout_kernel",
        {**_SEED, "HAS_SHIFT": False, "PER_ELEMENT": True, "BLOCK": 2048},
    ),
    "bias_dropout_add": Kernel(
        "bias_dropout_add",
        "forward_kernel",
        {**_SEED, "HAS_BIAS": True, "ALIGNED": True, "BLOCK": 2048},
    ),
    "bias_dropout_add_backward": Kernel(
        "bias_dropout_add", "backward_kernel", _BIAS_BACKWARD, num_warps=2
    ),
    "dropout_add_norm": Kernel("dropout_add_norm", "forward_kernel", {**_NORM, "COLUMNS": 1024}),
    "dropout_add_norm_backward": Kernel(
        "dropout_add_norm", "backward_kernel", {**_NORM_BACKWARD, "COLUMNS": 1024}
    ),
    "dropout_add_norm 8192": Kernel(
        "dropout_add_norm", "forward_kernel", {**_NORM, "COLUMNS": 8192}, num_warps=16
    ),
    "dropout_add_norm_backward 8192": Kernel(
        "dropout_add_norm", "backward_kernel", {**_NORM_BACKWARD, "COLUMNS": 8192}, num_warps=16
    ),
    # What the checks below must tell from the kernels above.
    "a call for every element": Kernel(
        "dropout",
        "dropout_kernel",
        {**_SEED, "HAS_SHIFT": False, "PER_ELEMENT": False, "BLOCK": 2048},
    ),
}
GOOD = tuple(KERNELS)[:-1]
DTYPES = ("bf16", "fp32")
# kernel, architecture, dtype, whether sizes are multiples of 16
Case = tuple[str, int, str, bool]
CASES: list[Case] = [
    (name, architecture, dtype, True)
    for name in GOOD
    for architecture in (80, 90)
    for dtype in DTYPES
]
BROKEN: list[Case] = [
    ("a call for every element", 80, "bf16", True),
    ("dropout", 80, "bf16", False),
]


class Compiled(NamedTuple):
    ptx: str
    shared_bytes: int

    def __repr__(self) -> str:
        return f"{self.shared_bytes} bytes of shared memory"

    def has_vector(self, access: str) -> bool:
        """Whether 16 bytes are moved at once."""
        return re.search(access + r"\.global\S*\.(v4\.b32|v2\.b64)", self.ptx) is not None

    def num_philox_calls(self) -> float:
        """Two wide products a round and seven rounds, less those whose factor is known."""
        return self.ptx.count("mul.hi") / 12


@pytest.fixture(scope="module")
def triton_code(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Compiled]:
    """Every case, compiled in a process where Triton does not interpret. No GPU is needed."""
    if not pyfast._backend.has_triton():
        pytest.skip("triton is not installed")
    folder = tmp_path_factory.mktemp("triton")
    cases = []
    for name, architecture, dtype, divisible in (*CASES, *BROKEN):
        kernel = KERNELS[name]
        case = {
            "module": f"pyfast.kernels.{kernel.op}.{kernel.op}_triton",
            "kernel": kernel.kernel,
            "constants": kernel.constants,
            "num_warps": kernel.num_warps,
            "architecture": architecture,
            "dtype": dtype,
            "divisible": ["num_elements", "num_columns"] if divisible else [],
        }
        cases.append(case)
    (folder / "cases.json").write_text(json.dumps(cases))
    done = run_python(
        COMPILE_TRITON,
        300,
        FOLDER=str(folder),
        TRITON_CACHE_DIR=str(folder / "cache"),
        TRITON_INTERPRET="0",
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads((folder / "compiled.json").read_text())
    keys = (*CASES, *BROKEN)
    return {key: Compiled(*code) for key, code in zip(keys, compiled, strict=True)}


def case_id(case: Case) -> str:
    return f"{case[0]}-sm_{case[1]}-{case[2]}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_triton_calls_philox_once_for_eight_elements(
    triton_code: dict[Case, Compiled], case: Case
) -> None:
    calls = KERNELS[case[0]].philox_calls
    assert 0.8 * calls <= triton_code[case].num_philox_calls() <= 14 / 12 * calls


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_triton_moves_16_bytes(triton_code: dict[Case, Compiled], case: Case) -> None:
    assert triton_code[case].has_vector("ld") and triton_code[case].has_vector("st")


ELEMENTWISE = [case for case in CASES if case[0] in ("dropout", "bias_dropout_add")]


@pytest.mark.parametrize("case", ELEMENTWISE, ids=case_id)
def test_triton_bits_stay_in_registers(triton_code: dict[Case, Compiled], case: Case) -> None:
    """The thread that draws eight words applies them: nothing goes through shared memory. A thread
    loads four float32 at once (16 bytes), so there each element's fate is passed on."""
    allowed = 2048 if "fp32" in case_id(case) else 0  # a byte an element of the block
    assert triton_code[case].shared_bytes <= allowed


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_triton_does_not_spill(
    triton_code: dict[Case, Compiled], case: Case, tmp_path: Path
) -> None:
    source = tmp_path / "kernel.ptx"
    source.write_text(triton_code[case].ptx)
    name = {80: "sm_80", 90: "sm_90a"}[case[1]]
    folder = triton_tools()
    assert folder is not None
    logs = []
    for ptxas in sorted(folder.glob("ptxas*")):  # one for each age of GPU: the first that can
        command = [str(ptxas), "-v", f"--gpu-name={name}", str(source), "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True)
        logs.append(done.stderr)
        if done.returncode == 0:
            assert not spills(done.stderr)
            return
    pytest.fail(f"no ptxas of Triton accepts its code: {logs}")


def test_the_checks_tell_bad_code(triton_code: dict[Case, Compiled]) -> None:
    per_element, not_divisible = (triton_code[case] for case in BROKEN)
    assert per_element.num_philox_calls() > 7 * KERNELS["dropout"].philox_calls
    assert not not_divisible.has_vector("ld") and not not_divisible.has_vector("st")
    line = "    0 bytes stack frame, {} bytes spill stores, {} bytes spill loads"
    assert spills(line.format(8, 0)) and spills(line.format(0, 8)) and not spills(line.format(0, 0))
    with pytest.raises(AssertionError, match="nothing about any kernel"):
        spills("")


@pytest.mark.parametrize("name", FUSED)
def test_compiles_fullgraph(name: str) -> None:
    """One graph forward and one backward; for a seed, and for a seed drawn in the graph."""
    inputs = [*normal(2, 5, 37), normal(37)]
    grad = (inputs[0] + inputs[1]).cos()
    torch._dynamo.reset()
    compiled = torch.compile(FUSED[name], fullgraph=True)
    results = with_gradients(lambda *t: compiled(*t, seed=SEED - 2**64), grad, *inputs)
    assert_all_equal(results, run(name, inputs))
    calls = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        calls.append(with_gradients(compiled, grad, *inputs))
    assert_all_equal(calls[0], calls[1])
    assert not torch.equal(calls[0][0], calls[2][0])
    # The gradient is dropped where the value is.
    assert ((calls[0][1] == 0).sum() - P * 5 * 37).abs() < 40


def opcheck_cases() -> list[tuple[str, str, tuple[Any, ...]]]:
    rule = (19661, 1, 65536 / (65536 - 19661))
    cases: list[tuple[str, str, tuple[Any, ...]]] = []
    for shape in ((3, 9), (0, 9), (3, 0)):
        plain_x, other = normal(2, *shape)
        row, seed = normal(shape[0]).abs(), torch.tensor(7)
        for is_full in (True, False):  # with gradients and every operand, or without
            x = plain_x.clone().requires_grad_(is_full)
            vector = normal(shape[-1]).requires_grad_() if is_full else None
            residual, mean = (other, row) if is_full else (None, row[:0])  # RMSNorm has no mean
            norm = (*rule, 1e-5, not is_full)
            fixed = None if vector is None else vector.detach()
            given = (other, residual, plain_x, fixed, mean, row)
            arguments = {
                "bias_dropout_add": (x, vector, other, seed, *rule),
                "bias_dropout_add_backward": (x, seed, *rule),
                "dropout_add_norm": (x, residual, vector, vector, seed, *norm, is_full),
                "dropout_add_norm_backward": (*given, seed, *norm),
            }
            label = "every operand" if is_full else "none"
            cases += [(op, f"{shape} {label}", a) for op, a in arguments.items()]
    return cases


@pytest.mark.parametrize("case", opcheck_cases(), ids=lambda case: " ".join(case[:2]))
def test_opcheck(case: tuple[str, str, tuple[Any, ...]]) -> None:
    op, _, arguments = case
    torch.library.opcheck(getattr(torch.ops.pyfast, op).default, arguments)
