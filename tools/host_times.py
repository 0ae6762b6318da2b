"""The CPU's time of a call on a GPU: ``python -m tools.host_times``.

Microseconds in which eager forward and backward of small batches are issued, with and without autograd's
threads. Prints one JSON object a line.
"""

import json
import time

import torch

from dml_cuda.functional import multi_similarity_loss

CALLS = 200
SHAPES = ((128, 128), (512, 128), (1024, 128))


def microseconds(step) -> float:
    for _ in range(20):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        step()
    issued = time.perf_counter()
    torch.cuda.synchronize()
    return 1e6 * (issued - start) / CALLS


def main() -> None:
    for n, d in SHAPES:
        x = torch.randn(n, d, device="cuda", requires_grad=True)
        labels = torch.arange(n, device="cuda") // 4

        def forward(x=x, labels=labels):
            return multi_similarity_loss(x, labels, epsilon=0.1)

        def both(x=x, forward=forward):
            return torch.autograd.grad(forward(), x)

        for threads in (True, False):
            with torch.autograd.set_multithreading_enabled(threads):
                found = {"forward_us": microseconds(forward), "both_us": microseconds(both)}
            print(json.dumps({"host": f"{n} x {d}", "autograd_threads": threads, **found}), flush=True)


if __name__ == "__main__":
    main()
