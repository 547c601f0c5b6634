"""Kernels in forked processes, where the threads of the parent's OpenMP pool do not exist.

Every case runs in a process of its own with a time limit, so that a deadlock is a failure.
"""

from __future__ import annotations

import os

import pytest
from oracle import run_python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

PARENT = """
import os, sys, threading, torch, pyfast
F = pyfast.nn.functional
torch.set_num_threads(2)
x = torch.randn(3_000_000)
expected = F.dropout(x, 0.3, seed=1)
x.exp(), torch.randn(600, 600) @ torch.randn(600, 600)

def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 3)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

def same(y, expected):
    torch.set_num_threads(1)  # torch's own parallel regions would hang here
    return torch.equal(y, expected)
"""


def run_forked(code: str) -> None:
    result = run_python(PARENT + code, timeout_s=60, OMP_NUM_THREADS="2")
    assert result.returncode == 0, result.stderr


def test_child_after_parallel_work() -> None:
    run_forked("""
assert torch.get_num_threads() == 2
in_child(lambda: same(F.dropout(x, 0.3, seed=1), expected))
assert torch.equal(F.dropout(x, 0.3, seed=1), expected)  # the parent goes on
copy = x.clone()
in_child(lambda: same(F.dropout(copy, 0.3, inplace=True, seed=1), expected))
""")


def test_child_of_a_child() -> None:
    run_forked("""
def grandchild():
    in_child(lambda: same(F.dropout(x, 0.3, seed=1), expected))
    return True
in_child(grandchild)
""")


def test_backward_in_a_child() -> None:
    run_forked("""
def backward():
    torch.set_num_threads(1)
    w = torch.ones(x.shape, requires_grad=True)
    torch.set_num_threads(2)
    y = F.dropout(w, 0.3, seed=1)
    y.backward(torch.ones(()).expand(x.shape))
    return same(w.grad, y.detach())
in_child(backward)
""")


def test_fork_while_a_kernel_runs() -> None:
    """The child may get the lock of the memory pool as another thread of the parent held it."""
    run_forked("""
stop = threading.Event()
def busy():
    while not stop.is_set():
        F.dropout(x, 0.3)
thread = threading.Thread(target=busy)
thread.start()
try:
    for _ in range(8):
        in_child(lambda: same(F.dropout(x, 0.3, seed=1), expected))
finally:
    stop.set()
    thread.join()
""")


def test_data_loader_workers() -> None:
    run_forked("""
class Noisy(torch.utils.data.Dataset):
    def __init__(self, seeded):
        self.seeded = seeded
    def __len__(self):
        return 6
    def __getitem__(self, i):
        torch.set_num_threads(2)
        y = F.dropout(x[:400_000], 0.3, seed=i if self.seeded else None)
        torch.set_num_threads(1)  # as the loader had it: torch copies y
        return y

def load(seeded):
    torch.manual_seed(3)
    loader = torch.utils.data.DataLoader(
        Noisy(seeded), num_workers=2, multiprocessing_context="fork", timeout=30
    )
    return [batch[0] for batch in loader]

for i, y in enumerate(load(True)):
    assert torch.equal(y, F.dropout(x[:400_000], 0.3, seed=i))
first, again = load(False), load(False)
assert all(torch.equal(a, b) for a, b in zip(first, again))
assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
""")
