"""The shapes that torch.compile is told beforehand are those that the CUDA kernels ask for."""

import pytest
import torch
from emulator import library

from dml_cuda.ops import saved_sizes


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("m", [None, 0, 900, 200_000], ids="m={}".format)
@pytest.mark.parametrize("n", [0, 1, 512, 513, 1024, 1025, 4096, 5000, 1_000_000])
def test_cuda(n, m, save, dtype):
    def points(count):
        return torch.zeros(count, 1, dtype=dtype), torch.zeros(count, dtype=torch.int64)

    refs = (None, None) if m is None else points(m)
    engine = library.Engine(*points(n), *refs, save_for_backward=save)
    told = saved_sizes("cuda", n, n if m is None else m, m is None, engine.acc.itemsize, save)
    assert list(told) == engine.sizes[:4]
