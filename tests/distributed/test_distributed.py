"""Several processes make of a batch what one makes (checks.py); how a job ends."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from cases.data import make_batch
from distributed.checks import SIZES, checks_of, close, evaluate
from distributed.processes import finish, start

import dml_cuda
from dml_cuda.distributed import DistributedLoss

pytestmark = [
    pytest.mark.slow(200),
    pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without torch.distributed"),
]

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every process found, by their number: each number's processes are started once."""
    found = {}

    def of(size):
        if size not in found:
            folder = tmp_path_factory.mktemp(f"processes{size}")
            ends = finish(start([str(HERE / "checks.py")], size, folder))
            assert [code for code, _ in ends] == [0] * size, ends
            found[size] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
        return found[size]

    return of


# Two processes show every check; more of them are a job of minutes.
@pytest.mark.parametrize(
    ("size", "check"),
    [
        pytest.param(size, check, marks=[pytest.mark.whole] if size > 2 else [])
        for size in SIZES
        for check in checks_of(size)
    ],
)
def test_several_processes_are_as_one(size, check, results):
    for rank, found in enumerate(results(size)):
        failed = next((text for text in found.values() if text), "")
        assert found.get(check, f"not reached by process {rank}: {failed}") == ""


@pytest.mark.check
@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_one_process_alone(mode):
    """Without torch.distributed, or alone in it."""
    assert not dist.is_initialized()
    batch = make_batch(20, 5)
    loss = dml_cuda.MultiSimilarityLoss(epsilon=0.1)
    for found, expected in zip(
        evaluate(DistributedLoss(loss, mode=mode), *batch), evaluate(loss, *batch), strict=True
    ):
        close(found, expected, "alone", 1e-5)
    assert repr(DistributedLoss(loss, mode=mode)).startswith("DistributedLoss")


JOB = """
import datetime, sys, torch, torch.distributed as dist
from dml_cuda import MultiSimilarityLoss
from dml_cuda.distributed import DistributedLoss
rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
timeout = datetime.timedelta(seconds=20)
store = f"file://{folder}/store"
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
loss, x, y = DistributedLoss(MultiSimilarityLoss(), mode="MODE"), torch.randn(8, 4), torch.arange(8) // 2
loss(x, y)
"""
ENDS = {
    "bad input": ("loss(x, y.float() if rank == 1 else y)", "labels: expected an integer tensor"),
    "an exception elsewhere": ("assert rank != 1\nloss(x, y)", ""),
}


# What fails elsewhere does so between two calls, whatever their mode.
@pytest.mark.long
@pytest.mark.parametrize(
    ("end", "mode"), [("bad input", "gather"), ("bad input", "ring"), ("an exception elsewhere", "ring")]
)
def test_a_process_that_raises_ends_all(end, mode, tmp_path):
    wrong, message = ENDS[end]
    job = JOB.replace("MODE", mode) + wrong + "\nprint('went on', flush=True)"
    processes = start(["-c", job], 2, tmp_path)
    for code, text in finish(processes, 60):
        assert code != 0
        assert message in text, text
