"""Dropout: values, layouts, errors and gradients. test_random.py holds the masks and the seeds."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import hypothesis.strategies as st
import oracle
import pytest
import torch
import torch.nn.functional as torch_functional
from conftest import Backend
from hypothesis import given, settings
from oracle import LAYOUTS, RANKS, assert_bits_equal, drop_scale, keep_mask, normal
from torch import Tensor

import pyfast

F = pyfast.nn.functional
MODULES = ("Dropout", "AlphaDropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout")
DTYPES = tuple(oracle.BITS)


Shape = tuple[int, ...]
MASK_MUTANTS: dict[str, Callable[[Shape, float, int], Tensor]] = {
    "shifted": lambda shape, p, seed: keep_mask(shape, p, seed).roll(1),
    "inverted": lambda shape, p, seed: ~keep_mask(shape, p, seed),
    "of another p": lambda shape, p, seed: keep_mask(shape, p + 2**-6, seed),
    "of another stream": lambda shape, p, seed: keep_mask(shape, p, seed, 2),
    "of half the seed": lambda shape, p, seed: keep_mask(shape, p, seed & 0xFFFFFFFF),
} | {
    f"repeated every {1 << k}": lambda shape, p, seed, period=1 << k: keep_mask(shape, p, seed)[
        torch.arange(*shape) % period
    ]
    for k in range(3, 15)
}
WRITE_MUTANTS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "no-op": lambda x, mask, p: x,
    "zeros": lambda x, mask, p: torch.zeros_like(x),
    "no scale": lambda x, mask, p: torch.where(mask, x, 0.0),
    "scale of p as given": lambda x, mask, p: torch.where(mask, x / (1 - p), 0.0),
    "tail untouched": lambda x, mask, p: torch.cat([write(x, mask, p)[: whole(x)], x[whole(x) :]]),
    "tail never written": lambda x, mask, p: torch.cat(
        [write(x, mask, p)[: whole(x)], torch.empty_like(x[whole(x) :])]
    ),
    "multiplies": lambda x, mask, p: x * mask * drop_scale(p),
    "negative zeros": lambda x, mask, p: torch.where(mask, x * drop_scale(p), -0.0),
}


def whole(x: Tensor) -> int:
    return x.numel() // 64 * 64


def write(x: Tensor, mask: Tensor, p: float) -> Tensor:
    return torch.where(mask, x * drop_scale(p), 0.0)


def test_oracle_accepts_plain_torch() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        oracle.check_dropout(lambda x, p, seed: write(x, keep_mask(x.shape, p, seed), p), dtype)


@pytest.mark.parametrize("mutant", MASK_MUTANTS)
def test_oracle_rejects_mask(mutant: str) -> None:
    mask = MASK_MUTANTS[mutant]
    with pytest.raises(AssertionError, match="differ"):
        oracle.check_dropout(lambda x, p, seed: write(x, mask(x.shape, p, seed), p))


@pytest.mark.parametrize("mutant", WRITE_MUTANTS)
def test_oracle_rejects_write(mutant: str) -> None:
    with pytest.raises(AssertionError, match="differ"):
        oracle.check_dropout(
            lambda x, p, seed: WRITE_MUTANTS[mutant](x, keep_mask(x.shape, p, seed), p)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_oracle(backend: Backend, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not compute in {dtype}")
    sizes = oracle.SMALL_SIZES if backend.is_slow else oracle.SIZES
    oracle.check_dropout(
        lambda x, p, seed: F.dropout(x, p, seed=seed),
        dtype,
        backend.device,
        sizes,
        subnormals=dtype in backend.exact_dtypes,
    )


@pytest.mark.backends("cpu")
def test_large(backend: Backend) -> None:
    """Above 32 MiB the stores are non-temporal, and the memory of outputs is recycled."""
    x = oracle.extreme_values(8_400_011, torch.float32)
    oracle.poison_recycled_blocks(x)
    y = F.dropout(x, 0.3, seed=5)
    oracle.assert_dropped(y, x, keep_mask((x.numel(),), 0.3, 5), 0.3)
    if backend.level != "generic":  # whose 16-bit kernel is its float32 one
        half = x.bfloat16().repeat(2)
        half[: 1 << 16] = torch.arange(1 << 16, dtype=torch.int32).short().view(half.dtype)  # all
        oracle.poison_recycled_blocks(half)
        y = F.dropout(half.float(), 0.3, seed=5)
        assert_bits_equal(F.dropout(half, 0.3, seed=5), y.bfloat16())


def test_threshold_is_inclusive(backend: Backend) -> None:
    """An element whose bits equal the threshold is kept: each element gets the p that meets it."""
    bits = pyfast.kernels.common.philox_reference.element_bits(9, torch.arange(64), 1)
    x = torch.ones(64, device=backend.device)
    for i in range(0, 64, 16 if backend.is_slow else 1):
        p = int(bits[i]) / 65536
        assert F.dropout(x, p, seed=9)[i] != 0
        assert F.dropout(x, p + 2**-16, seed=9)[i] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noncontiguous(backend: Backend, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = LAYOUTS[layout]().to(backend.device)
        x = x if dtype == torch.float32 else torch.empty_like(x, dtype=dtype).copy_(x)
        before = x.clone()
        with oracle.nan_memory():
            y = F.dropout(x, 0.3, seed=11)
        oracle.assert_dropped(y, x, keep_mask(tuple(x.shape), 0.3, 11), 0.3)
        assert y.stride() == torch.empty_like(x).stride()
        assert_bits_equal(x, before)


def guarded(x: Tensor, is_view: bool) -> tuple[Tensor, Tensor]:
    """(a copy of x with x's strides inside of a larger buffer, the buffer)."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    buffer = torch.full((extent + 130,), 777.0, dtype=x.dtype, device=x.device)
    inner = torch.as_strided(buffer, x.shape, x.stride(), 65)
    if not is_view:
        inner = torch.empty(0, dtype=x.dtype, device=x.device).set_(
            buffer.untyped_storage(), 65, x.shape, x.stride()
        )
    return inner.copy_(x), buffer


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "expanded" not in name])
def test_inplace_writes_only_the_tensor(backend: Backend, layout: str) -> None:
    x = LAYOUTS[layout]().to(backend.device)
    for is_view in (True, False):
        y, buffer = guarded(x, is_view)
        expected = buffer.clone()
        torch.as_strided(expected, x.shape, x.stride(), 65).copy_(F.dropout(x, 0.3, seed=4))
        version = y._version
        assert F.dropout(y, 0.3, inplace=True, seed=4) is y
        assert_bits_equal(buffer, expected)
        assert y._version > version


@pytest.mark.backends("cpu", "cuda")
def test_writes_only_the_output(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = []

    def guarded_empty(x: Tensor) -> Tensor:
        y, buffer = guarded(torch.zeros_like(x), is_view=False)
        buffers.append(buffer)
        return y

    monkeypatch.setattr("pyfast.ops.dropout._torch_empty_like", guarded_empty)
    for n in oracle.SIZES[1:]:
        for dtype in DTYPES:
            F.dropout(torch.ones(n, dtype=dtype, device=backend.device), 0.3)
            buffer = buffers.pop()
            assert (buffer[:65] == 777).all() and (buffer[65 + n :] == 777).all(), (n, dtype)


@pytest.mark.backends("cpu")
def test_reads_only_the_input(backend: Backend) -> None:
    """The input ends where the next page is forbidden: a load past its end is a fault."""
    code = f"""
import ctypes, mmap, torch, pyfast
pyfast._backend.native.set_selected_isa({backend.level!r})
pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + mmap.PAGESIZE), mmap.PAGESIZE, 0)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    page = torch.frombuffer(pages, dtype=dtype, count=mmap.PAGESIZE // dtype.itemsize)
    for n in range(1, 140):
        pyfast.nn.functional.dropout(page[-n:], 0.5)
        pyfast.nn.functional.dropout2d(page[-2 * n:].view(1, 2, 1, n), 0.5)
"""
    assert oracle.run_python(code).returncode == 0


@settings(max_examples=40)
@given(data=st.data())
def test_any_layout_matches_reference(backend: Backend, data: st.DataObject) -> None:
    """Slices with steps and offsets, expanded and permuted; a step of 0 expands a dimension."""
    sizes = [*data.draw(st.lists(st.integers(1, 4), max_size=3)), data.draw(st.integers(1, 150))]
    steps = [data.draw(st.integers(0, 2)) for _ in sizes]
    offset = data.draw(st.integers(0, 9))
    extents = (size * max(step, 1) for size, step in zip(sizes, steps, strict=True))
    x = normal(offset + 1, *extents).to(data.draw(st.sampled_from(backend.exact_dtypes)))[offset]
    for d, step in enumerate(steps):
        x = x.narrow(d, 0, 1) if step == 0 else x.unflatten(d, (-1, step)).select(d + 1, 0)
        x = x.expand(*x.shape[:d], sizes[d], *x.shape[d + 1 :])
    x = x.permute(data.draw(st.permutations(range(x.dim())))).to(backend.device)
    p, seed = data.draw(st.floats(0, 1)), data.draw(st.integers(-(2**63), 2**64 - 1))
    names = [name for name, rank in RANKS.items() if rank <= x.dim() and name != "dropout1d"]
    name = data.draw(st.sampled_from(names or ["dropout"]))
    y = getattr(F, name)(x, p, True, seed=seed)
    with pyfast.use_backend("reference"):
        assert_bits_equal(y, getattr(F, name)(x, p, True, seed=seed), f"{x.shape} {x.stride()}")
    if name == "dropout":
        oracle.assert_dropped(y, x, pyfast.dropout_mask(x.shape, p, seed), p)


@pytest.mark.parametrize("name", RANKS)
def test_identity_returns_the_input(name: str) -> None:
    before = torch.get_rng_state()
    function = getattr(F, name)
    x, empty = (normal(*shape[: RANKS[name]]) for shape in ((2, 3, 4, 5, 2), (2, 0, 4, 5, 2)))
    for inplace in (False, True):
        assert function(x, 0.5, False, inplace) is x
        assert function(x, 0.0, True, inplace) is x
        assert function(empty, 0.5, True, inplace) is empty
    assert torch.equal(torch.get_rng_state(), before)
    assert (function(x) is x) == ("alpha" in name)  # which are off by default


@pytest.mark.parametrize("name", RANKS)
def test_extreme_probabilities(backend: Backend, name: str) -> None:
    x = oracle.extreme_values(42, torch.float32, backend.device).view(
        (6, 7, 1, 1, 1)[: RANKS[name]]
    )
    for inplace in (False, True):
        assert_bits_equal(getattr(F, name)(x.clone(), 1.0, True, inplace), torch.zeros_like(x))
        assert_bits_equal(getattr(F, name)(x.clone(), 1e-10, True, inplace), x)


def outcome(function: Callable[..., object], *arguments: object) -> tuple[object, ...]:
    """What a call raises, or the shape of what it returns and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            shape = tuple(function(*arguments).shape)
        except Exception as error:
            return type(error), str(error)
    return shape, [(w.category, str(w.message)) for w in caught]


@pytest.mark.parametrize("name", RANKS)
def test_errors_and_warnings_are_those_of_torch(name: str) -> None:
    shapes = [(5,) * rank for rank in range(7)]
    cases = [(torch.ones(shape), p) for shape in shapes for p in (0.5, 1.0)]
    cases += [(torch.ones(3, 4, 5), p) for p in (-0.1, 1.1, float("inf"), float("nan"))]
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        cases += [(torch.ones(shape, dtype=dtype), 0.5) for shape in ((3, 4), (3, 4, 5))]
    others = [None, [1.0], torch.eye(3).to_sparse()]
    cases += [(x, 0.5) for x in others[: 2 if name[-2:] in ("1d", "3d") else 3]]
    for x, p in cases:
        for inplace in (False, True):
            ours = outcome(getattr(F, name), copy.deepcopy(x), p, True, inplace)
            theirs = outcome(getattr(torch_functional, name), copy.deepcopy(x), p, True, inplace)
            assert ours == theirs, f"{x} p={p} inplace={inplace}"


def test_accepts_a_tensor_as_probability() -> None:
    p = torch.tensor(0.5)
    assert torch_functional.dropout(torch.ones(64), p).max() == 2
    assert torch.equal(F.dropout(torch.ones(64), p, seed=1), F.dropout(torch.ones(64), seed=1))


@pytest.mark.parametrize("name", MODULES)
def test_module_rejects_probability(name: str) -> None:
    for p in (-0.1, 1.1):
        assert outcome(getattr(pyfast.nn, name), p) == outcome(getattr(torch.nn, name), p)


@pytest.mark.parametrize(
    "seed", [1.0, "1", True, torch.ones(2, dtype=torch.int64), torch.tensor(1, dtype=torch.int32)]
)
def test_rejects_seed(seed: object) -> None:
    for function in (F.dropout, pyfast.dropout_mask):
        with pytest.raises(TypeError, match="seed must be an int or a tensor of one int64"):
            function(torch.ones(3) if function is F.dropout else (3,), 0.5, seed=seed)


@pytest.mark.parametrize("name", ["dropout1d", "dropout2d", "dropout3d"])
def test_channels_share_a_fate(backend: Backend, name: str) -> None:
    x = normal(*(16, 24, 5, 3, 2)[: RANKS[name]]).to(backend.device)
    for layout in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x[:, :, 1:]):
        mask = keep_mask((16, 24), 0.3, 2).view(16, 24, *[1] * (x.dim() - 2))
        y = getattr(F, name)(layout, 0.3, seed=2)
        oracle.assert_dropped(y, layout, mask, 0.3)
        assert_bits_equal(getattr(F, name)(layout.clone(), 0.3, inplace=True, seed=2), y)


@pytest.mark.backends("reference", "cpu")
@pytest.mark.parametrize("name", ["dropout1d", "dropout3d"])
def test_channels_without_a_batch(backend: Backend, name: str) -> None:
    x = normal(*(24, 5, 3, 2)[: RANKS[name] - 1])
    y = getattr(F, name)(x, 0.3, seed=2)
    oracle.assert_dropped(y, x, keep_mask((24,), 0.3, 2).view(24, *[1] * (x.dim() - 1)), 0.3)


@pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout"])
def test_alpha_dropout_values(backend: Backend, name: str) -> None:
    """a * (keep ? x : alpha') + b of Klambauer et al. 2017, section 3, with the true drop rate."""
    x = normal(16, 24, 3, 5).to(backend.device)
    for p in (0.1, 0.5, 0.999):
        rate, alpha = round(p * 65536) / 65536, -1.7580993408473766
        a = ((1 - rate) * (1 + rate * alpha**2)) ** -0.5
        b = -a * rate * alpha
        mask = keep_mask(tuple(x.shape), p, 2)
        if name == "feature_alpha_dropout":
            mask = keep_mask((16, 24), p, 2)[:, :, None, None].expand(x.shape)
        y = getattr(F, name)(x, p, True, seed=2).cpu()
        # Scale, product, shift and sum round once each: 4 * 2**-24 of the largest term.
        bound = 2**-22 * (a * x.cpu().abs() + abs(b))
        assert ((y - (a * x.cpu().double() + b)).abs() <= bound)[mask].all()
        assert (y[~mask] == torch.tensor(a * alpha + b, dtype=torch.float32)).all()


def test_alpha_dropout_keeps_mean_and_variance() -> None:
    x = normal(1 << 20)
    for p in (0.1, 0.5, 0.8):
        y = F.alpha_dropout(x, p, True, seed=3)
        # Five standard errors: sigma / sqrt(n) of the mean; the fourth moment of y is below 12.
        assert abs(y.mean()) < 5 * 2**-10 and abs(y.var() - 1) < 5 * 12**0.5 * 2**-10


@pytest.mark.parametrize("name", RANKS)
def test_gradients_are_the_mask(backend: Backend, name: str) -> None:
    x = normal(*(16, 25, 5, 3, 2)[: RANKS[name]]).to(backend.device).requires_grad_()
    function = getattr(F, name)
    y = function(x, 0.3, True, seed=8)
    shift = function(torch.zeros_like(x), 0.3, True, seed=8)
    kept = (function(torch.ones_like(x), 0.3, True, seed=8) != shift).cpu()
    scale = torch.tensor(drop_scale(0.3))
    if "alpha" in name:
        rate = round(0.3 * 65536) / 65536
        scale = torch.tensor(((1 - rate) * (1 + rate * 1.7580993408473766**2)) ** -0.5)
    grad = torch.randn_like(x)
    other_layout = grad.transpose(0, 1).contiguous().transpose(0, 1)
    expanded = torch.tensor(2.0, device=x.device).expand(x.shape)  # as sum() gives it
    for incoming in (grad, other_layout, expanded):
        (x_grad,) = torch.autograd.grad(y, x, incoming, retain_graph=True)
        assert_bits_equal(x_grad, torch.where(kept, incoming.cpu() * scale, 0.0))


def test_inplace_gradients(backend: Backend) -> None:
    """A tensor that is no leaf, a part of one, and a value that another op had saved."""
    for part in (lambda t: t, lambda t: t[1:, ::2], lambda t: t.view(-1)[5:]):
        x = normal(4, 9).to(backend.device).requires_grad_()
        y = x * 3
        assert F.dropout(part(y), 0.4, inplace=True, seed=1).requires_grad
        y.sum().backward()
        expected = torch.full((4, 9), 3.0, device=backend.device)
        part(expected).copy_(F.dropout(part(expected), 0.4, seed=1))
        assert_bits_equal(x.grad, expected)
    x = normal(4, 9).to(backend.device).requires_grad_()
    y = x.exp()
    F.dropout(y, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_rejects_inplace(backend: Backend) -> None:
    """Of a leaf, of a part of a leaf, of overlapping memory: and nothing is written."""
    leaf = normal(8, 8).to(backend.device).requires_grad_()
    expanded = normal(8, 1).to(backend.device).expand(8, 8)
    for x in (leaf, leaf[:3], expanded, torch.nn.Parameter(leaf.detach().clone())):
        before = x.detach().clone()
        with pytest.raises(RuntimeError, match=r"leaf|single memory location"):
            F.dropout(x, inplace=True)
        assert torch.equal(x.detach(), before)
    with torch.no_grad():
        assert F.dropout(leaf, inplace=True) is leaf
    with torch.inference_mode():
        y = leaf * 1
        assert F.dropout(y, inplace=True) is y and F.dropout(y).is_inference()


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_those_of_torch(name: str) -> None:
    ours, theirs = getattr(pyfast.nn, name), getattr(torch.nn, name)
    module, twin = ours(0.25, True, seed=7), theirs(0.25, True)
    assert isinstance(module, theirs)
    assert repr(module) == repr(twin) and module.extra_repr() == twin.extra_repr()
    assert module.state_dict() == twin.state_dict() == {} and not [*module.buffers()]
    assert ours.__constants__ == theirs.__constants__
    x = normal(4, 5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = module(x.clone())
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x.clone()), y)
    assert module.eval()(x) is x
    assert copy.deepcopy(ours(generator=torch.Generator())).generator is not None
