"""What every test file may rely on."""

import os

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

import dml_cuda

# Files that take long, the longest first: so that no process begins one when the others are done.
LONG = (
    "test_cuda_emulated.py",
    "test_distributed.py",
    "test_nvcc.py",
    "test_blocks_emulated.py",
    "test_custom.py",
    "test_blocks_torch_side.py",
    "test_train_retrieval.py",
    "test_benchmarks.py",
    "test_triplets_emulated.py",
    "test_threads.py",
    "test_fused.py",
    "test_memory.py",
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


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
