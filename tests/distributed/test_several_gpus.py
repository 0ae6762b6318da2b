"""docs/several_gpus.md shows what its formulas give; the example trains over processes as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from docs.figures.several_gpus import PAGE, Job, hiding_table, paper_table

pytestmark = [pytest.mark.slow(35), pytest.mark.long]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("table", [paper_table, hiding_table])
def test_the_page_shows_the_formulas(table):
    assert f"\n{table()}\n" in PAGE.read_text()


def test_what_the_page_says():
    """The ring holds less and receives more; with twice the processes it holds half."""
    job, twice = Job(1_000_000, 512, 8, 2), Job(1_000_000, 512, 16, 2)
    assert job.ring_bytes() == 2 * twice.ring_bytes() < job.gathered_bytes() == twice.gathered_bytes()
    assert job.ring_traffic() > job.gathered_traffic()
    # Where rows are as many as said, the product takes as long as the transfer.
    rows = job.hidden_from_forward(100e12, 50e9)
    assert 2 * rows**2 * 512 / 100e12 == pytest.approx(rows * 512 * 2 / 50e9)
    rows = job.hidden_from_backward(100e12, 50e9)
    assert 6 * rows**2 * 512 / 100e12 == pytest.approx(rows * 512 * (2 + 4) / 50e9)
    for name in ("measured", "curves"):
        shown = PAGE.read_text().split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]
        assert shown.strip()
    assert (PAGE.parent / "figures" / PAGE.with_suffix(".png").name).stat().st_size > 10_000


# Runs the example, and looks for what a group of processes leaves behind: a thread that is at work when the
# interpreter ends may abort it, once in some hundred times.
TRAINING = """
from pathlib import Path
from examples.train_retrieval import main
main()
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in thread for thread in threads), threads
"""


def test_the_example_over_two_processes(tmp_path):
    """In float64 the losses of two processes are those of one, with the memory of earlier batches too."""
    for needed in ("faiss", "matplotlib", "pytorch_metric_learning", "rich", "tqdm"):
        pytest.importorskip(needed)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [
        "--data",
        "digits",
        "--device",
        "cpu",
        "--float64",
        "--memory",
        "128",
        "--steps",
        "4",
        "--no-pictures",
    ]
    training = tmp_path / "training.py"
    training.write_text(TRAINING)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    logs = []
    for start, more in ((launch, ["--distributed"]), ([], [])):
        out = tmp_path / str(len(logs))
        command = [*start, str(training), *options, *more, "--out", str(out)]
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        logs.append(json.loads((out / "log.json").read_text()))
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-10)
    assert len(logs[0]["evaluations"]) == 2
