"""Plans of Triton launches: a repeated call makes those of the first, with its own tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import run_python
from torch import Tensor

pytest.importorskip("triton")

from pyfast.kernels.common import launch_triton
from pyfast.kernels.common.launch_triton import Plans, kind_of, kind_of_seed, launch


class Kernel:
    """Stands for a compiled Triton kernel: remembers its launches."""

    arg_names = ("x", "seed", "size", "y")

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **named: Any) -> Kernel:
            options = {k: v for k, v in named.items() if k not in self.arg_names}
            values = arguments or tuple(named[name] for name in self.arg_names)
            self.launches.append((grid, values, options))
            return self

        return run


def make(kernel: Any, *tensors: Tensor, seed: Any = 5) -> list[launch_triton.Launch]:
    names = {"x": tensors[0], "y": tensors[1], "seed": seed, "size": 7}
    return [launch(kernel, (3, 2), names, num_warps=4)]


def test_repeats_with_other_tensors_and_seed() -> None:
    plans, kernel = Plans(), Kernel()
    x, y, other, another = (torch.zeros(4) for _ in range(4))
    assert not plans.run("key", (x, y), 5)
    plans.keep("key", (x, y), make(kernel, x, y))
    assert plans.run("key", (other, another), 6)
    assert not plans.run("another key", (other, another), 6)
    (first_grid, first, options), (grid, repeated, _) = kernel.launches
    assert first_grid == (3, 2) and grid == (3, 2, 1) and options == {"num_warps": 4}
    assert first[0] is x and first[3] is y and first[1:3] == (5, 7)
    assert repeated[0] is other and repeated[3] is another and repeated[1:3] == (6, 7)


def test_temporaries_are_new_and_shared_by_the_launches() -> None:
    plans, kernel = Plans(), Kernel()
    x, y, parts = torch.zeros(4), torch.zeros(4), torch.zeros(2, 3, dtype=torch.int32)
    made = make(kernel, x, parts) + make(kernel, parts, y)
    plans.keep("key", (x, None, y), made, [parts])
    plans.run("key", (x, None, y), 5)
    plans.run("key", (x, None, y), 5)
    found = [(arguments[0], arguments[3]) for _, arguments, _ in kernel.launches]
    for (first, new), (same, last) in (found[2:4], found[4:6]):
        assert first is x and last is y and new is same and new is not parts
        assert new.shape == parts.shape and new.dtype == parts.dtype
    assert found[2][1] is not found[4][1]


def test_refuses_a_tensor_that_nobody_named() -> None:
    x, y = torch.zeros(4), torch.zeros(4)
    with pytest.raises(KeyError):
        Plans().keep("key", (x,), make(Kernel(), x, y))


def test_seed_on_the_device() -> None:
    plans, kernel = Plans(), Kernel()
    x, y, before, after = (torch.zeros(1) for _ in range(4))
    plans.keep("key", (x, y), make(kernel, x, y, seed=before))
    plans.run("key", (x, y), after)
    assert kernel.launches[0][1][1] is before and kernel.launches[1][1][1] is after


def test_one_tensor_as_two_operands_makes_no_plan() -> None:
    """Otherwise a later call with two tensors would get the first of them twice."""
    plans, x = Plans(), torch.zeros(4)
    plans.keep("key", (x, x), make(Kernel(), x, x))
    assert not plans.run("key", (x, torch.ones(4)), 5)


def test_interpreted_launches_make_no_plan() -> None:
    plans, x, y = Plans(), torch.zeros(4), torch.zeros(4)
    made = [m._replace(compiled=None) for m in make(Kernel(), x, y)]
    plans.keep("key", (x, y), made)
    assert not plans.run("key", (x, y), 5)


def test_plans_are_forgotten_when_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_triton, "MAX_PLANS", 3)
    plans, x, y = Plans(), torch.zeros(4), torch.zeros(4)
    for key in range(10):
        plans.keep(key, (x, y), make(Kernel(), x, y))
        assert plans.run(key, (x, y), 5) and len(plans._plans) <= 3


def test_kinds_differ_where_compiled_kernels_or_arguments_do() -> None:
    x = torch.zeros(8, 8)
    kinds = [
        kind_of(t)
        for t in (x, x.t(), x[:4], x.bfloat16(), x.view(-1)[1:].view(9, 7), x.view(2, 4, 8), None)
    ]
    kinds += [kind_of(x.view(-1)[:64].view(8, 8)[:, :7]), kind_of(torch.zeros(57)[1:].view(8, 7))]
    assert len(set(kinds)) == len(kinds)
    assert kind_of(x) == kind_of(torch.ones(8, 8))


def test_kinds_of_seeds_follow_their_types() -> None:
    """int32, int64 and uint64 are other signatures of a compiled kernel."""
    groups = ((0, 1, (1 << 31) - 1), (1 << 31, (1 << 63) - 1, -(1 << 40)), (1 << 63, (1 << 64) - 1))
    kinds = [{kind_of_seed(seed) for seed in group} for group in groups]
    assert all(len(kind) == 1 for kind in kinds) and len(set.union(*kinds)) == 3


def test_every_argument_of_attention_is_in_its_key() -> None:
    attention = pytest.importorskip("pyfast.kernels.attention.attention_triton")
    q, other, rule = torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 4, 32), (0, 0.5, 0.0, -1, 0, False)
    changed = (6554, 0.25, 20.0, 7, -1, True)
    rules = [rule, *((*rule[:i], x, *rule[i + 1 :]) for i, x in enumerate(changed))]
    keys = [attention.plan_key((q, None), 1, one) for one in rules]
    keys += [attention.plan_key(t, 1, rule) for t in ((q, q), (other, None), (q.half(), None))]
    places = ([1 << 40], [1 << 40, 3], [1 << 40, 3, 8])
    keys += [attention.plan_key((q, None), torch.tensor(place), rule) for place in places]
    assert len(set(keys)) == len(keys)
    assert attention.plan_key((q, None), 2, rule) == keys[0]


def check_planned(**environment: str) -> None:
    script = Path(__file__).with_name("planned_launches.py").read_text()
    done = run_python(script, 300, TRITON_INTERPRET="0", **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    kernels = {name: case.pop("kernels") for name, case in found.items()}
    assert kernels == {
        "forward": ["forward_kernel"],
        "backward": [
            "delta_kernel",
            "query_gradient_kernel",
            "key_value_gradient_kernel",
            "mask_gradient_kernel",
        ],
        "decode": ["forward_kernel", "combine_kernel"],
        "W8A8": ["block_kernel", "product_kernel", "combine_kernel"],
        "weight-only": ["product_kernel", "combine_kernel"],
        "int8_mm": ["product_kernel"],
        "quantize": ["chunk_extremes_kernel", "chunk_values_kernel"],
    }
    for name, case in found.items():
        plans = 2 if name == "W8A8" else 1
        assert case == {
            "plans": plans,
            "plans of the repeated call": 0,
            "differences": [],
        }, name


def test_planned_launches_are_those_of_triton() -> None:
    """Compiled for sm_90, with a launcher that writes down what reaches it."""
    check_planned()


def test_planned_launches_are_those_of_an_older_triton() -> None:
    other = os.environ.get("PYFAST_TEST_TRITON")
    if not other:
        pytest.skip("PYFAST_TEST_TRITON names no folder with another Triton")
    check_planned(PYTHONPATH=other)
