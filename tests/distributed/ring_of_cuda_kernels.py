"""``ring_of_cuda_kernels.py RANK SIZE FOLDER``: the ring as on GPUs, but for CPU tensors and gloo.

Its ops are the torch side of the CUDA kernels, and these run on the emulator. Started by
test_blocks_torch_side.py; what it checks are those of distributed_checks.py that go around the ring, in
float64 and with unequal shares: how accurate the kernels are in other types is tested where their arithmetic
is known, and what the ring makes of other shares with the ops of the CPU.
"""

import sys
from functools import partial

import torch
from distributed import checks
from emulator import torch_side

from dml_cuda._ops import registration as ops
from dml_cuda.distributed import ring

SOME = ("large", "other_columns", "short_types", "miners", "repeatable", "infinite", "partly_differentiable")


def chosen(size):
    for name in checks.checks_of(size):
        mode, _, what = name.partition(": ")
        if mode == "ring" and (what in SOME or what.endswith((", mined", ", all pairs", "similarities"))):
            yield name, checks.CHECKS[name]


if __name__ == "__main__":
    torch_side.load("ring")
    checks.as_one_process = partial(checks.as_one_process, dtypes=(torch.float64,))
    checks.trials = lambda rows: {torch.float64: 1}
    checks.layouts = lambda: (checks.UNEVEN[int(sys.argv[2])],)
    ring._OPS = torch.ops.dml_cuda_blocks_on_host
    ring.stages = lambda formula, mining, device: ops.stages(formula, mining, "cuda")
    checks.CHECKS = dict(chosen(int(sys.argv[2])))
    checks.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
