"""The GPU time of a call, kernel by kernel: ``python -m tools.kernel_times``.

The benchmarks' batches, forward and backward, by torch.profiler: the mean of ten calls, the L2 cache emptied
before each. Prints a table in Markdown; ``--out FILE`` also writes it as JSON.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.autograd import DeviceType

from benchmarks.cases import Case, make_batch
from benchmarks.markdown import markdown_table
from benchmarks.peers import fused
from dml_cuda.functional import multi_similarity_loss

CALLS = 10
NOT_OURS = re.compile(r"mem(set|cpy)|elementwise|fill", re.IGNORECASE)
EPSILON = 0.1


def case(loss: str, n: int, d: int, **options) -> Case:
    return Case("kernels", loss, n, d, **{"epsilon": EPSILON, **options})


CASES = [
    *(case("multi_similarity", n, d) for n, d in ((128, 128), (512, 128), (512, 512), (2048, 512))),
    *(case("multi_similarity", n, 512) for n in (4096, 8192)),
    *(case("multi_similarity", n, 512, precision="high") for n in (2048, 4096, 8192)),
    *(case("multi_similarity", n, 512, dtype="bfloat16") for n in (2048, 4096, 8192)),
    case("multi_similarity", 4096, 512, batch="separated"),
    case("multi_similarity", 4096, 512, epsilon=None),
    case("contrastive", 2048, 512, epsilon=None),
]
BANK = 65_536  # references


def short_name(kernel: str) -> str:
    """``void dml::cuda::find_extremes<..>(..)`` to ``find_extremes``."""
    return re.sub(r"[<(].*", "", re.sub(r"^void |\(anonymous namespace\)::", "", kernel)).split("::")[-1]


def total_times(events: Iterable[tuple[str, float]], calls: int) -> dict[str, float]:
    """Microseconds a call takes in each kernel, the longest first, from (kernel's name, microseconds) of
    several calls. PyTorch's fills and copies around a call are left out."""
    total = Counter()
    for kernel, microseconds in events:
        if not NOT_OURS.search(kernel):
            total[short_name(kernel)] += microseconds / calls
    return dict(total.most_common())


def measure(step: Callable[[], object]) -> dict[str, float]:
    flush = torch.empty(
        4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda"
    )
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(CALLS):
            flush.zero_()
            step()
        torch.cuda.synchronize()
    ran = (e for e in profiled.events() if e.device_type == DeviceType.CUDA)
    return total_times(((e.name, e.time_range.elapsed_us()) for e in ran), CALLS)


def memory_bank() -> Callable[[], object]:
    """512 rows against 65,536 references without gradient."""
    of_bank = case("multi_similarity", BANK, 128, precision="high")
    references, labels = make_batch(of_bank, "cuda")
    references = references.detach()
    rows = references[:512].clone().requires_grad_()

    def step():
        options = {"ref_emb": references, "ref_labels": labels, "epsilon": EPSILON}
        return torch.autograd.grad(multi_similarity_loss(rows, labels[:512], **options), rows)

    return step


def all_times() -> dict[str, dict[str, float]]:
    steps = {
        c.name.removeprefix("kernels/"): (c.precision, lambda c=c: fused(c, *make_batch(c, "cuda")))
        for c in CASES
    }
    steps[f"MS-mined/512x{BANK}x128, no gradient to the references/float32-(high)"] = ("high", memory_bank)
    found, before = {}, torch.get_float32_matmul_precision()
    for name, (precision, make) in steps.items():
        torch.set_float32_matmul_precision(precision)
        found[name] = measure(make())
    torch.set_float32_matmul_precision(before)
    return found


def table(times: dict[str, dict[str, float]]) -> str:
    """Microseconds: of a call in all, and of its five longest kernels."""
    rows = [
        [name, f"{sum(of.values()):.0f}", ", ".join(f"{k} {t:.0f}" for k, t in list(of.items())[:5])]
        for name, of in times.items()
    ]
    return markdown_table(["case", "all kernels", "of which"], rows, left=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    times = all_times()
    print(table(times))
    if arguments.out:
        report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "microseconds": times}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
