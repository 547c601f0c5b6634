"""``rms_norm`` against the formula in float64, torch for the rest, and the norms of models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import test_quantization_calibration as calibration
import torch
import torch.nn.functional as torch_F
from conftest import Backend
from oracle import LAYOUTS, assert_bits_equal, nan_memory, normal
from test_bias_dropout_add import DTYPES, assert_as_accurate_as_torch, ulps_of, with_gradients
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import pyfast

F = pyfast.nn.functional
Function = Callable[..., Any]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SLOW_SHAPES = ((1, 1), (5, 7), (9,), (2, 3, 33), (35, 64), (3, 1027))
SHAPES = (*SLOW_SHAPES, (7, 1), (300, 5), (40, 256), (2, 4500))
pytestmark = pytest.mark.filterwarnings("ignore:.*(Mismatch dtype|torch.jit.script|invalid value)")


def formula(x: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> Tensor:
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return y if weight is None else y * weight


def ours(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def torchs(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return torch_F.rms_norm(x, x.shape[-1:], weight, eps)


def check(
    function: Function, dtype: Any, shapes: Any = SHAPES, every: int = 1, backend: Any = None
) -> None:
    """Asserts that a function and its gradients are right; x is so small that eps counts."""
    device, ulps = (backend.device, ulps_of(backend, dtype)) if backend else ("cpu", 1.0)
    finfo, wide = torch.finfo(dtype), torch.promote_types(dtype, torch.float32)
    narrow = torch.bfloat16 if dtype == torch.float32 else torch.float32
    cases = [(s, w, e) for s in shapes for w in (None, dtype, wide, narrow) for e in (None, 0.1)]
    for shape, weight_dtype, eps in cases[::every]:
        used_eps = torch.finfo(wide).eps if eps is None else eps
        grad, x = normal(2, *shape).to(dtype)
        inputs = [((x + 0.5) * used_eps**0.5).to(dtype)]
        inputs += [] if weight_dtype is None else [normal(shape[-1]).to(weight_dtype)]
        doubles = (t.double() for t in (grad, *inputs))
        exact = with_gradients(partial(formula, eps=used_eps), *doubles)
        theirs = with_gradients(partial(torchs, eps=eps), grad, *inputs)
        with nan_memory():
            moved = (t.to(device) for t in inputs)
            actual = with_gradients(partial(function, eps=eps), grad.to(device), *moved)
        # Of one column, gradients are small differences of terms of these sizes.
        largest = grad.abs().max() * inputs[-1].abs().max().clamp(min=1) * used_eps**-0.5
        terms = [0.0, largest.item(), grad.abs().sum().item()]
        text = f"{shape} {dtype}, weight {weight_dtype}, eps {eps}"
        for i, tensors in enumerate(zip(actual, theirs, exact, strict=True)):
            size = terms[i] if shape[-1] == 1 else 0.0
            assert_as_accurate_as_torch(*tensors, f"{text}, output {i}", ulps, size)
        # Every element of y is rounded to 16 bits once.
        share = 0.51 * ulps if finfo.bits == 16 else 4 + shape[-1] ** 0.5 / 8
        allowed = share * finfo.eps * exact[0].abs() + finfo.tiny
        assert ((actual[0].double() - exact[0]).abs() <= allowed).all(), f"{text}: not allowed"


@each_dtype
def test_matches_the_formula(backend: Backend, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not compute in {dtype}")
    shapes, every = (SLOW_SHAPES, 5) if backend.is_slow else (SHAPES, 1)
    check(ours, dtype, shapes, every, backend)


@each_dtype
def test_without_a_forced_backend(dtype: torch.dtype) -> None:
    """Calls without gradients go another way: the bits are the same."""
    check(ours, dtype, every=3)
    for shape in SHAPES:
        x, weight = normal(*shape).to(dtype), normal(shape[-1]).to(dtype)
        for w in (weight, weight.float(), None):
            with nan_memory(), torch.inference_mode():
                y = ours(x, w)
            assert_bits_equal(y, ours(x.clone().requires_grad_(), w).detach())


MUTANTS: dict[str, Function] = {
    "eps forgotten": lambda x, w, e: formula(x, w, 0.0),
    "eps outside of the root": lambda x, w, e: x / (formula(x, None, 0.0) / x).pow(-1).add(e) * w,
    "mean of values": lambda x, w, e: x * (x.mean(-1, keepdim=True) ** 2 + e).rsqrt() * w,
    "sum of squares": lambda x, w, e: formula(x * x.shape[-1] ** 0.5, w, e) / x.shape[-1] ** 0.5,
    "mean subtracted": lambda x, w, e: formula(x - x.mean(-1, keepdim=True), w, e),
    "weight forgotten": lambda x, w, e: formula(x, 1 + 0 * w, e),
    "one plus weight": lambda x, w, e: formula(x, 1 + w, e),
    "constant rms": lambda x, w, e: formula(x.detach(), w, e) * (1 + (x - x.detach()) / x.detach()),
    "last column": lambda x, w, e: formula(torch.cat([x[:, :-1], 0 * x[:, -1:]], -1), w, e),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["none", *MUTANTS])
def test_the_check_rejects(name: str, dtype: torch.dtype) -> None:
    def mutant(x: Tensor, w: Tensor | None = None, eps: float | None = None) -> Tensor:
        weight = torch.ones(x.shape[-1]) if w is None else w.float()
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        return MUTANTS.get(name, formula)(x.float(), weight, eps).to(dtype)  # type: ignore[no-any-return]

    rejected = pytest.raises(AssertionError, match="allowed")
    with rejected if name in MUTANTS else nullcontext():
        check(mutant, dtype, ((7, 7),))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (0,), (2, 0, 3)])
def test_empty(backend: Backend, shape: tuple[int, ...]) -> None:
    x, weight = torch.zeros(shape, device=backend.device), normal(shape[-1]).to(backend.device)
    for a, b in zip(*(with_gradients(f, x, x, weight) for f in (ours, torchs)), strict=True):
        assert_bits_equal(a, b)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if LAYOUTS[name]().dim()])
def test_layouts(backend: Backend, layout: str) -> None:
    if backend.is_slow and layout not in ("misaligned", "transposed", "rows with gaps"):
        pytest.skip("slow")
    x = LAYOUTS[layout]().to(backend.device)[: 3 if backend.is_slow else None]
    weight = normal(x.shape[-1], 3).to(backend.device)[:, 1]
    before = x.clone()
    expected, grad = with_gradients(lambda t: ours(t, weight.clone()), before, x.contiguous())
    y = ours(leaf := x.detach().requires_grad_(), weight)
    y.backward(before)
    assert y.is_contiguous() and y.data_ptr() != x.data_ptr() and torch.equal(x, before)
    # torch's sums, of the reference, depend on the strides.
    same = torch.testing.assert_close if backend.name == "reference" else assert_bits_equal
    same(y.detach().cpu(), expected)
    same(leaf.grad.cpu(), grad)  # type: ignore[union-attr]
    torch.testing.assert_close(ours(torch._neg_view(-x), weight).cpu(), expected)


def test_negative_weight(backend: Backend) -> None:
    x, weight = normal(2, 7).to(backend.device), normal(7).to(backend.device)
    assert_bits_equal(ours(x, torch._neg_view(-weight)), ours(x, weight))


def test_not_finite(backend: Backend) -> None:
    """NaN and Inf spoil their own row alone, in y and in the gradient of x."""
    for n in (7, 130):
        clean = normal(9, n).to(backend.device)
        weight, x = clean[0] + 2, clean.clone()
        x[1, n - 1], x[4, 0], x[6, n // 2] = float("nan"), float("inf"), -float("inf")
        bad = torch.isin(torch.arange(9), torch.tensor([1, 4, 6]))
        good, spoilt = (with_gradients(ours, clean, t, weight)[:2] for t in (clean, x))
        for a, b in zip(good, spoilt, strict=True):
            assert_bits_equal(b[~bad], a[~bad])
            assert b[bad].isnan().any(-1).all()
        # torch's own GPU kernel makes all of a row of Inf NaN.
        assert torch.equal(spoilt[0].isnan(), torchs(x.cpu(), weight.cpu()).isnan())


@pytest.mark.backends("cpu", "reference", "cuda")
def test_derivatives(backend: Backend) -> None:
    x, weight = (normal(4, 5).double() + 0.3).to(backend.device), normal(5).double()
    leaves = (x.requires_grad_(), weight.to(backend.device).requires_grad_())
    for function, inputs in ((partial(ours, eps=0.01), leaves), (ours, leaves[:1])):
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, inputs)


Subclass = type("Subclass", (Tensor,), {})
TORCHS: dict[str, Function] = {  # of the function, a (4, 7) and a (7,)
    "two dimensions": lambda f, x, w: f(x, x.shape, normal(4, 7), 0.1),
    "complex": lambda f, x, w: torch.view_as_real(f(x.cfloat(), (7,))),
    "integer weight": lambda f, x, w: f(x, (7,), torch.arange(7)),
    "vmap": lambda f, x, w: torch.func.vmap(lambda row: f(row, (7,), w))(x),
    "vmap of weights": lambda f, x, w: torch.func.vmap(lambda v: f(x, (7,), v))(x),
    "func.grad": lambda f, x, w: torch.func.grad(lambda t: f(t, (7,), w).square().sum())(x),
    "func.jvp": lambda f, x, w: torch.func.jvp(lambda t: f(t, (7,), w), (x,), (x + 1,))[1],
    "subclass": lambda f, x, w: f(x.as_subclass(Subclass), (7,), w).as_subclass(Tensor),
    "subclass as weight": lambda f, x, w: f(x, (7,), w.as_subclass(Subclass)).as_subclass(Tensor),
    "compiled": lambda f, x, w: torch.compile(f, backend="eager", fullgraph=True)(x, (7,), w),
    "jagged": lambda f, x, w: f(
        torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged), (7,), w
    ).values(),
}


@pytest.mark.parametrize("name", TORCHS)
def test_the_rest_is_torchs(name: str) -> None:
    x, weight, call = normal(4, 7), normal(2, 7)[1], TORCHS[name]
    assert_bits_equal(call(F.rms_norm, x, weight), call(torch_F.rms_norm, x, weight))
    assert not pyfast.explain(call, F.rms_norm, x, weight)
    assert len(pyfast.explain("rms_norm", x, (7,), weight)) == 1


def test_other_tensors() -> None:
    x, weight = normal(4, 7), normal(7)
    assert type(F.rms_norm(x.as_subclass(Subclass), (7,))) is Subclass
    with torch.device("cpu"):  # a mode for functions
        assert not pyfast.explain("rms_norm", x, (7,))
    y = F.rms_norm(x.bfloat16().to("meta"), [7], weight.to("meta"))
    assert y.is_meta and y.shape == x.shape and y.dtype == torch.bfloat16
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x + 1)
        mine, theirs = (forward_ad.unpack_dual(f(dual, weight)) for f in (ours, torchs))
        torch.testing.assert_close(tuple(mine), tuple(theirs))


@pytest.mark.backends("cpu", "cuda")
def test_dtypes_are_torchs(backend: Backend) -> None:
    """With a weight of another dtype, and under autocast."""
    x, weight = normal(4, 7).to(backend.device), normal(7).to(backend.device)
    for enabled in (False, True):
        for dtype, weight_dtype in torch.cartesian_prod(*[torch.arange(4)] * 2).tolist():
            operands = x.to(DTYPES[dtype]), weight.to(DTYPES[weight_dtype])
            with torch.autocast(backend.device.type, torch.bfloat16, enabled=enabled):
                assert ours(*operands).dtype == torchs(*operands).dtype


X, W = normal(4, 7), normal(7)
ERRORS: list[tuple[Any, ...]] = [
    *((X.int(), (7,)), (X, (6,)), (X, ()), (X, 7), (X, (7.0,)), (X, (4, 6)), (X, (7,), W[1:])),
    *((X, (7,), W[None]), (X, (7,), [1.0] * 7), (X, (7,), W.to("meta")), (X, (7,), W, "small")),
    *((W[0], (1,)), ([1.0, 2.0], (2,))),
]


@pytest.mark.parametrize("arguments", ERRORS)
def test_errors_are_torchs(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(Exception) as theirs:
        torch_F.rms_norm(*arguments)
    with pytest.raises(type(theirs.value)) as mine:
        F.rms_norm(*arguments)
    assert str(mine.value) == str(theirs.value)


@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"elementwise_affine": False}])
def test_module_and_patch(options: dict[str, Any]) -> None:
    theirs, mine, x = nn.RMSNorm(7, **options), pyfast.nn.RMSNorm(7, **options), normal(4, 7)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    mine.load_state_dict(theirs.state_dict())
    assert repr(mine) == repr(theirs) and mine.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        expected, y = theirs(x), mine(x)
        torch.testing.assert_close(y, expected)
        assert_bits_equal(torch.compile(mine, fullgraph=True, backend="eager")(x), expected)
        report = pyfast.patch(theirs)
        assert [(e.path, e.target) for e in report.swapped] == [("(root)", pyfast.nn.RMSNorm)]
        for module in (theirs, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
            assert type(module) is pyfast.nn.RMSNorm
            assert_bits_equal(module(x), y)
    report.undo()
    assert type(theirs) is nn.RMSNorm


def test_folds_of_smoothquant_take_it() -> None:
    calibration.test_smoothing_helps_where_channels_stand_out(pyfast.nn.RMSNorm)


MODELS = ("llama", "gemma2", "t5", "olmo2")


def norm_class(name: str) -> Any:
    module = getattr(pytest.importorskip("transformers").models, name)
    kind = "T5LayerNorm" if name == "t5" else f"{name.capitalize()}RMSNorm"
    return getattr(getattr(module, f"modeling_{name}"), kind)


def model_of(name: str) -> Any:
    small = pytest.importorskip("transformers_models")
    olmo2 = name == "olmo2"
    config = small.transformers.Olmo2Config(**small.grouped()) if olmo2 else small.config_of(name)
    factory = "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModelForCausalLM"
    torch.manual_seed(0)
    model = getattr(small.transformers, factory).from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            random = torch.randn_like(parameter)
            parameter.copy_(random * 0.12 if parameter.dim() > 1 else parameter + random * 0.3)
    return model.eval()


def norms_of(model: nn.Module) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if type(m).__name__.endswith("Norm")}


def outputs_of(model: Any, name: str) -> list[Tensor]:
    """The logits and the gradients of the parameters."""
    from transformers_models import inputs_of

    model.zero_grad()
    logits = model(**inputs_of(name, "none")[0]).logits
    (logits * normal(*logits.shape)).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


def exact_outputs(model: Any, name: str) -> list[Tensor]:
    """In float64, which the norms of transformers are not computed in."""
    model = copy.deepcopy(model).double()
    for m in norms_of(model).values():
        plus, eps = (1, m.eps) if name == "gemma2" else (0, m.variance_epsilon)
        m.forward = lambda x, m=m, plus=plus, eps=eps: formula(x, m.weight + plus, eps)
    return outputs_of(model, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, dtype: torch.dtype) -> None:
    kind, model = norm_class(name), model_of(name).to(dtype)
    norms, keys = norms_of(model), list(model.state_dict())
    assert norms and {type(m) for m in norms.values()} == {kind}
    exact, theirs = exact_outputs(model, name), outputs_of(model, name)
    report = pyfast.patch(model)
    swapped = {e.path: e.target for e in report.swapped if e.source is kind}
    assert swapped == {path: type(m) for path, m in norms.items()} and kind not in swapped.values()
    assert all(isinstance(m, kind) for m in norms.values()) and list(model.state_dict()) == keys
    mine, served = outputs_of(model, name), pyfast.explain(outputs_of, model, name)
    assert [s.op for s in served].count("dropout_add_norm") == len(norms)
    errors = [
        [float((a.double() - e).norm() / e.norm()) for a, e in zip(outputs, exact, strict=True)]
        for outputs in (mine, theirs)
    ]
    eps = torch.finfo(dtype).eps
    assert mine[0].dtype == dtype and errors[0][0] <= 1.5 * errors[1][0] + eps
    assert sum(errors[0][1:]) <= 1.5 * sum(errors[1][1:]) + eps * len(keys)
    clones = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    again = pyfast.patch(model).skipped
    assert {e.path for e in again if e.reason == "already pyfast's"} >= norms.keys()
    report.undo()
    assert {type(m) for m in norms.values()} == {kind}
    assert_bits_equal(outputs_of(model, name)[0], theirs[0])
    for clone in clones:
        assert {path: type(m) for path, m in norms_of(clone).items()} == swapped
        assert_bits_equal(outputs_of(clone, name)[0], mine[0])


@pytest.mark.parametrize("name", MODELS)
def test_norms_of_models_that_stay_transformers(name: str) -> None:
    """Compiled ones, those of mixed dtypes, and those that a model calls in a transform."""
    stock, x = norm_class(name)(7), normal(4, 7)
    nn.init.normal_(stock.weight)
    patched = copy.deepcopy(stock)
    pyfast.patch(patched)
    calls: list[Function] = [
        lambda m: torch.compile(m, fullgraph=True, backend="eager")(x),
        lambda m: torch.func.vmap(m)(x),
        lambda m: m(x.int()).float(),
    ]
    if name != "gemma2":
        calls += [lambda m: m(x.bfloat16()), lambda m: m(x.double())]
    for call in calls:
        assert_bits_equal(call(patched), call(stock))
        assert not pyfast.explain(call, patched)
    assert repr(patched) == repr(stock)


def test_mixed_model() -> None:
    """bfloat16 with norms in float32, which OLMo 2 rounds last."""
    model = model_of("olmo2").bfloat16()
    for norm in norms_of(model).values():
        norm.float()
    theirs = outputs_of(model, "olmo2")
    assert len(pyfast.patch(model).swapped) == len(norms_of(model))
    for a, b in zip(outputs_of(model, "olmo2"), theirs, strict=True):
        assert_bits_equal(a, b)


def test_other_norms_are_left_alone() -> None:
    llama, gemma = norm_class("llama"), norm_class("gemma2")

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states  # type: ignore[no-any-return]

    Other, Named = (type(n, (llama,), {"forward": forward}) for n in ("OtherNorm", llama.__name__))
    Inner = type("InnerNorm", (gemma,), {"_norm": lambda self, x: x * (x.pow(3).mean() + self.eps)})
    Same = type("SameNorm", (llama,), {})
    model = nn.Sequential(*(k(7) for k in (llama, gemma, Other, Inner, Named, Same)))
    report = pyfast.patch(model)
    assert [e.path for e in report.swapped] == ["0", "1", "5"]
    assert all("its forward may differ" in e.reason for e in report.skipped)
    assert [type(m) for m in model][2:5] == [Other, Inner, Named]


def test_parametrized_before_the_patch() -> None:
    norm, x = norm_class("llama")(7), normal(4, 7)
    parametrize.register_parametrization(norm, "weight", nn.Tanh())
    expected = norm(x)
    pyfast.patch(norm)
    parametrize.remove_parametrizations(norm, "weight")
    torch.testing.assert_close(norm(x), expected)
