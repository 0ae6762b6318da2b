"""Threads, interrupts, the order of the tests and the fixtures of every test file."""

import os
import signal
from collections import defaultdict

# Before torch is loaded. Threads that spin while they wait make a busy machine crawl; these sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Test processes side by side share the cores; tests of threads say how many. NumPy's spin too, so one.
os.environ.setdefault(
    "OMP_NUM_THREADS",
    str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))),
)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch
from covering import covering

import dml_cuda

# A shell without job control starts a background command with SIGINT ignored, and its children inherit that:
# a program under test could not be interrupted. A signal that is handled is reset to its default in a child.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--brief",
        action="store_true",
        help="of each test only the cases that show every value of every parameter, and no test marked whole",
    )


def stand_for_all(items):
    """The items of ``--brief``."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("whole") is None:
            cases[item.nodeid.partition("[")[0]].append(item)
    for same in cases.values():
        values = [item.callspec._idlist if hasattr(item, "callspec") else () for item in same]
        yield from (same[k] for k in covering([tuple(ids) for ids in values]) or range(len(same)))


def pytest_collection_modifyitems(config, items):
    """The files that take longest first, so that no process begins one when the others are done."""

    def seconds(item):
        marker = item.get_closest_marker("slow")
        return marker.args[0] if marker else 0

    if config.getoption("--brief"):
        chosen = set(stand_for_all(items))
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    items.sort(key=seconds, reverse=True)


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from the same random numbers, threads and instruction set."""
    torch.manual_seed(0)
    threads, instruction_set = torch.get_num_threads(), dml_cuda._C.cpu_instruction_set()
    yield
    torch.set_num_threads(threads)
    dml_cuda._C.set_cpu_instruction_set(instruction_set)


@pytest.fixture(params=dml_cuda._C.cpu_instruction_sets())
def instruction_set(request):
    """Runs a test once for every instruction set that this machine has."""
    dml_cuda._C.set_cpu_instruction_set(request.param)
    return request.param
