"""``python docs/figures/several_gpus.py``: the tables and the figure of docs/several_gpus.md.

Memory and traffic of many GPUs are calculated by the formulas below; memory on this machine is measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/several_gpus.md"
FIGURE = Path(__file__).with_suffix(".png")
MIB, GIB = 2**20, 2**30

# ---- on paper ---------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """N rows of D numbers of ``width`` bytes over P processes. Gradients have four bytes."""

    n: int
    dim: int
    processes: int
    width: int
    stages: int = 2  # of the forward pass on GPUs: two with mining, one without

    @property
    def share(self) -> float:
        """Rows of a process."""
        return self.n / self.processes

    @property
    def others(self) -> float:
        """Rows of all other processes."""
        return self.n - self.share

    # Bytes of columns on one process, beyond its own rows and their gradient.

    def gathered_bytes(self) -> float:
        """All columns, and their gradient."""
        return self.n * self.dim * (self.width + 4)

    def ring_bytes(self) -> float:
        """Two blocks, and their gradients."""
        return 2 * self.share * self.dim * (self.width + 4)

    # Bytes that a process receives per step; it sends as many.

    def gathered_traffic(self) -> float:
        """All-gather, and reduce-scatter of the gradient."""
        return self.others * self.dim * (self.width + 4)

    def ring_traffic(self) -> float:
        """The columns once per stage and once in backward, and the gradient of every block."""
        return self.others * self.dim * self.width * (self.stages + 1) + self.n * self.dim * 4

    # A step of the ring hides its transfer if the matrix products take longer.

    def hidden_from_forward(self, flops: float, bandwidth: float) -> float:
        """Rows per process at which 2 rows^2 D operations take as long as rows D width bytes."""
        return self.width * flops / (2 * bandwidth)

    def hidden_from_backward(self, flops: float, bandwidth: float) -> float:
        """The same for backward: 6 rows^2 D operations, and a block with its gradient."""
        return (self.width + 4) * flops / (6 * bandwidth)


N, DIM, PROCESSES = 1_000_000, 512, (8, 16, 32, 64, 128, 256, 512)
# Planning rates of an H100 (mma.sync at FlashAttention-2's level; float32 as three products of TF32).
RATES = {"bfloat16": (2, 350e12), "float32": (4, 70e12)}
LINKS = {"NVLink, 450 GB/s each way": 450e9, "InfiniBand, 50 GB/s a GPU": 50e9}


def paper_table() -> str:
    lines = [
        "| GPUs | rows of each | gathered: columns and gradient | ring: blocks and gradients "
        "| gathered: received | ring: received |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for processes in PROCESSES:
        cells = [str(processes), f"{N / processes:,.0f}"]
        jobs = [Job(N, DIM, processes, width) for width, _ in RATES.values()]
        for of in (Job.gathered_bytes, Job.ring_bytes, Job.gathered_traffic, Job.ring_traffic):
            cells.append(" / ".join(_bytes(of(job)) for job in jobs))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def hiding_table() -> str:
    lines = ["| | forward hides from | backward hides from |", "| --- | ---: | ---: |"]
    for dtype, (width, flops) in RATES.items():
        for link, bandwidth in LINKS.items():
            job = Job(N, DIM, 1, width)
            rows = [hides(flops, bandwidth) for hides in (job.hidden_from_forward, job.hidden_from_backward)]
            cells = " | ".join(f"{round(x, -1):,.0f} rows" for x in rows)
            lines.append(f"| {dtype}, {flops / 1e12:.0f} TFLOP/s; {link} | {cells} |")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


# ---- measured ---------------------------------------------------------------------------------------------

MEASURED = {"rows": 16_384, "dim": 1024}
MEASURED_PROCESSES = (2, 4)


def measure_one(mode: str, rank: int, size: int, folder: str) -> None:
    """Peak memory of one process during a step, beyond what it held before."""
    import torch.distributed as dist

    from benchmarks.measure import reset_high_water_mark, status_bytes
    from dml_cuda import MultiSimilarityLoss
    from dml_cuda.distributed import DistributedLoss

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    loss = DistributedLoss(MultiSimilarityLoss(epsilon=0.1), mode=mode)

    def step(rows: int) -> None:
        torch.manual_seed(rank)
        labels = torch.arange(rows) // 4 + rank * rows
        centres = torch.randn(rows, MEASURED["dim"])
        points = (
            centres[torch.arange(rows) // 4] + 0.2 * torch.randn(rows, MEASURED["dim"])
        ).requires_grad_()
        dist.barrier()
        reset_high_water_mark()
        before = status_bytes("VmHWM")
        loss(points, labels).backward()
        added[:] = [status_bytes("VmHWM") - before]

    added: list[int] = []
    step(64)  # warm-up: buffers and threads of the libraries
    step(MEASURED["rows"] // size)
    Path(folder, str(rank)).write_text(str(added[0]))
    dist.barrier()
    os._exit(0)


def measure(mode: str, size: int) -> int:
    """The largest peak of ``size`` processes, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__)), "--measure", mode]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*command, str(rank), str(size), folder], env=environment)
            for rank in range(size)
        ]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise RuntimeError(f"a process of {size} that measured {mode} failed")
        return max(int(Path(folder, str(rank)).read_text()) for rank in range(size))


def measured_table(found: dict[str, int]) -> str:
    lines = [
        "| processes | gathered, measured | gathered, columns and gradient | ring, measured "
        "| ring, blocks and gradients |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for size in MEASURED_PROCESSES:
        job = Job(MEASURED["rows"], MEASURED["dim"], size, 4)
        cells = (
            found[f"gather {size}"],
            job.gathered_bytes(),
            found[f"ring {size}"],
            job.ring_bytes(),
        )
        lines.append(f"| {size} | {' | '.join(_bytes(x) for x in cells)} |")
    return "\n".join(lines)


# ---- a training -------------------------------------------------------------------------------------------


def train(processes: int, folder: Path, steps: int, *options: str) -> list[float]:
    """The loss of each step of the retrieval example."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    start = (
        [*launch, "examples.train_retrieval", "--distributed"]
        if processes > 1
        else ["-m", "examples.train_retrieval"]
    )
    fixed = ["--data", "digits", "--device", "cpu", "--no-pictures", "--steps", str(steps)]
    subprocess.run(
        [sys.executable, *start, *fixed, "--eval-every", str(steps), "--out", str(folder), *options],
        check=True, cwd=ROOT, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads((folder / "log.json").read_text())["loss"]


def draw(path: Path, curves: dict[str, list[list[float]]]) -> None:
    """The losses of one process and of two, and their relative difference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
    one, two = curves["float32"]
    steps = range(1, len(one) + 1)
    above.plot(steps, one, color="#999999", lw=4, label="one process")
    above.plot(steps, two, color="#0072B2", lw=1.2, label="two processes")
    above.set(ylabel="loss, float32", title="scikit-learn's digits, multi-similarity, mined; batches of 64")
    above.legend(frameon=False)
    for dtype, colour in (("float32", "#0072B2"), ("float64", "#D55E00")):
        apart = [abs(a - b) / a for a, b in zip(*curves[dtype], strict=True)]
        below.semilogy(steps, [max(x, 1e-17) for x in apart], color=colour, lw=1.2, label=dtype)
    below.set(ylabel="apart, as a share", xlabel="training step")
    below.legend(frameon=False)
    for axis in (above, below):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)


# ---- the page ---------------------------------------------------------------------------------------------


def insert(name: str, text: str) -> None:
    """Replaces the text between the markers of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    page = PAGE.read_text()
    head, rest = page.split(begin)
    PAGE.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--measure", nargs=4, metavar=("MODE", "RANK", "SIZE", "FOLDER"), help=argparse.SUPPRESS
    )
    parser.add_argument("--steps", type=int, default=100, help="of the trainings (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.measure:
        mode, rank, size, folder = arguments.measure
        return measure_one(mode, int(rank), int(size), folder)
    insert("paper", paper_table())
    insert("hiding", hiding_table())
    found = {
        f"{mode} {size}": measure(mode, size) for size in MEASURED_PROCESSES for mode in ("gather", "ring")
    }
    insert("measured", measured_table(found))
    with tempfile.TemporaryDirectory() as folder:
        curves = {
            dtype: [train(size, Path(folder), arguments.steps, *options) for size in (1, 2)]
            for dtype, options in (("float32", ()), ("float64", ("--float64",)))
        }
    draw(FIGURE, curves)
    apart = {dtype: max(abs(a - b) / a for a, b in zip(*two, strict=True)) for dtype, two in curves.items()}
    insert(
        "curves",
        f"Over {arguments.steps} steps the losses differ by at most {apart['float64']:.0e} of their value in "
        f"float64, and by {apart['float32']:.0e} in float32, where a training amplifies its rounding.",
    )
    return None


if __name__ == "__main__":
    main()
