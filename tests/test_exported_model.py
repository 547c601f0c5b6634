"""torch.export and AOTInductor of the demo's model, patched, and of its int8 versions."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import run_python
from test_compiled_model import CONTEXT, make_int8_model, make_model, tokens
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import pyfast

MODELS = ("float32", "weight-only", "dynamic")
SHAPES = ((3, 16), (5, CONTEXT - 1), (2, 2), (1, 5), (2, 1))
TOO_LONG = "Not all values of length = .* satisfy the generated guard"


def make(name: str) -> nn.Module:
    return make_model(layers=1).eval() if name == "float32" else make_int8_model(name)


def exported(model: nn.Module, longest: int = CONTEXT - 1) -> ExportedProgram:
    """With any batch and length. Without gradients: for them, sums of norms would be kept."""
    dynamic = ({0: Dim("batch", min=1, max=64), 1: Dim("length", min=1, max=longest)},)
    with torch.no_grad():
        return torch.export.export(model, (inputs(3, 16),), dynamic_shapes=dynamic)


def inputs(batch: int, length: int) -> Tensor:
    return tokens(batch, length - 1, seed=batch)


def ops_in(program: ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def attention_nodes(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    target = torch.ops.pyfast.attention.default
    return [node for node in graph.nodes if node.target is target]


@torch.no_grad()
def assert_equal_model(run: Any, model: nn.Module) -> None:
    """To the bit: the same kernels are called."""
    for shape in SHAPES:
        x = inputs(*shape)
        assert torch.equal(run(x), model(x)), shape


@pytest.mark.parametrize("name", MODELS)
def test_exports_with_any_batch_and_length(name: str) -> None:
    model = make(name)
    program = exported(model)
    ops = ops_in(program)
    assert {f"pyfast.{op}.default" for op in ("attention", "dropout_add_norm")} <= ops
    assert not any("softmax" in op or "draw_seed" in op for op in ops)
    assert ("pyfast.int8_linear.default" in ops) == (name != "float32")
    assert_equal_model(program.module(), model)

    decomposed = program.run_decompositions()
    assert {op for op in ops if "pyfast" in op} <= ops_in(decomposed)
    assert_equal_model(decomposed.module(), model)

    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_equal_model(torch.export.load(file).module(), model)


def test_the_comparison_tells_a_lost_mask() -> None:
    model = make("float32")
    broken = exported(model).module()
    (node,) = attention_nodes(broken.graph)
    right = [a.name for a in node.target._schema.arguments].index("right")
    assert node.args[right] == 0  # causal
    node.args = (*node.args[:right], -1, *node.args[right + 1 :])
    broken.recompile()
    with pytest.raises(AssertionError):
        assert_equal_model(broken, model)


def test_the_whole_context_is_another_graph() -> None:
    """A slice of the whole mask is contiguous, a part of it is not: torch's own model has the same
    limit."""
    for patched in (True, False):
        model = make_model(patched=patched, layers=1).eval()
        with pytest.raises(torch._dynamo.exc.UserError, match=TOO_LONG):
            exported(model, longest=CONTEXT)


def test_training_draws_in_the_graph() -> None:
    model = make_model(layers=1).train()
    run = torch.export.export(model, (inputs(3, 16),)).module()
    x = inputs(3, 16)
    for call in (run, model):
        torch.manual_seed(3)
        first, second = call(x), call(x)
        assert not torch.allclose(first, second)
        if call is run:
            expected = first
    torch.testing.assert_close(first, expected)


class Attention(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return pyfast.nn.functional.scaled_dot_product_attention(x, x, x, mask)


def test_leading_dimensions_stay_symbols() -> None:
    """``torch.Size.numel`` would make constants of them."""
    batch, length = Dim("batch", min=2, max=64), Dim("length", min=2, max=64)

    def arguments(b: int, n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(b, 3, 2, n, 8), torch.randn(b, 3, 1, n, n)

    dynamic = ({0: batch, 3: length}, {0: batch, 3: length, 4: length})
    run = torch.export.export(Attention(), arguments(2, 7), dynamic_shapes=dynamic).module()
    x = arguments(5, 9)
    torch.testing.assert_close(run(*x), Attention()(*x))


# A package knows the ops by name. pyfast registers them from Python, when it is imported: a process
# without Python, or before the import, cannot load it.
LOAD = """
import os, torch
path = os.environ["PACKAGE"]
x = torch.load(os.environ["INPUTS"])
try:
    torch._inductor.aoti_load_package(path)
    print("loaded without pyfast")
except RuntimeError as error:
    print(error)
import pyfast
print(torch.equal(torch._inductor.aoti_load_package(path)(x["x"]), x["y"]))
"""


def test_aot_inductor(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True).eval()
    pyfast.patch(layer)
    pyfast.quantization.quantize_(layer, pyfast.quantization.Int8WeightOnly())
    dynamic = ({0: Dim("batch", min=1, max=64), 1: Dim("length", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(3, 7, 16),), dynamic_shapes=dynamic)
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "layer.pt2"),
            # Without the probe that compiles a program for each instruction set.
            inductor_configs={
                "aot_inductor.compile_wrapper_opt_level": "O0",
                "cpp.vec_isa_ok": True,
            },
        )
        run = torch._inductor.aoti_load_package(package)
        for shape in ((3, 7), (5, 31), (1, 2)):
            x = torch.randn(*shape, 16)
            y = run(x)
            torch.testing.assert_close(y, layer(x))
            assert not torch.allclose(y, layer(x.roll(1, 1)), atol=1e-3)
    torch.save({"x": x, "y": y}, tmp_path / "inputs.pt")
    environment = {"PACKAGE": package, "INPUTS": str(tmp_path / "inputs.pt")}
    path = os.environ.get("PYTHONPATH", "")
    done = run_python(LOAD, 120, PYTHONPATH=path, **environment)
    assert done.returncode == 0, done.stderr
    refused, same = done.stdout.strip().splitlines()
    assert refused.startswith("Could not find schema for pyfast::")
    assert same == "True"
