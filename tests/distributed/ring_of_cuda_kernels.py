"""``ring_of_cuda_kernels.py RANK SIZE FOLDER``: the ring as on GPUs, but for CPU tensors and gloo.

Its ops are the torch side of the CUDA kernels, which run on the emulator. Started by
tests/cuda/test_ring_torch_side.py. It runs the checks of checks.py that go around the ring, in float64 and
with unequal shares: other types are tested with the kernels alone, other shares with the ops of the CPU.
"""

import sys
from functools import partial

import torch
from cases.losses import LOSSES, ON_CUDA
from distributed import checks
from emulator import torch_side

from dml_cuda import _C
from dml_cuda.distributed import ring

SOME = ("large", "other_columns", "short_types", "miners", "repeatable", "infinite", "partly_differentiable",
        "learned_parameters")  # fmt: skip


def chosen(size):
    for name in checks.checks_of(size):
        mode, _, what = name.partition(": ")
        if what.partition(",")[0] in LOSSES.keys() - ON_CUDA.keys():
            continue
        if mode == "ring" and (what in SOME or what.endswith((", mined", ", all pairs", "similarities"))):
            yield name, checks.CHECKS[name]


if __name__ == "__main__":
    torch_side.load("ring")
    checks.LOSSES = ON_CUDA
    checks.as_one_process = partial(checks.as_one_process, dtypes=(torch.float64,))
    checks.trials = lambda rows: {torch.float64: 1}
    checks.layouts = lambda: (checks.UNEVEN[int(sys.argv[2])],)
    ring._OPS = torch.ops.dml_cuda_blocks_on_host
    ring._stages = lambda _, formula, mining: _C.ring_stages("cuda", formula, mining)
    checks.CHECKS = dict(chosen(int(sys.argv[2])))
    checks.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
