"""The torch side of the CUDA kernels compiles against this torch, also where that has no CUDA."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import CUDA_HOME, include_paths

from tools import machine_code

ROOT = Path(__file__).parents[2]


def toolkit_headers() -> Path | None:
    nvcc = machine_code.find_nvcc()
    homes = [CUDA_HOME, nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_runtime.h").exists()), None)


@pytest.mark.long
@pytest.mark.skipif(toolkit_headers() is None, reason="the headers of the CUDA toolkit are not installed")
def test_syntax_and_types():
    folders = [*include_paths(), sysconfig.get_paths()["include"], str(toolkit_headers())]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    command += [f"-I{ROOT / 'csrc'}", *(f"-isystem{folder}" for folder in folders)]
    done = subprocess.run(
        [*command, str(ROOT / "csrc" / "torch" / "unity" / "on_cuda.cpp")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr


PRECISIONS = """
import torch
from dml_cuda._C import cuda_precision as precision

def is_(expected, what):
    assert precision() == expected, (what, precision())

is_("ieee", "default")
for expected, name in (("ieee", "highest"), ("tf32", "high"), ("tf32", "medium")):
    torch.set_float32_matmul_precision(name)
    is_(expected, name)
torch.set_float32_matmul_precision("highest")
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # the older getter raises from here on
    is_("tf32", "tf32 for CUDA matmul")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    is_("ieee", "ieee")
    torch.backends.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "none"
    is_("tf32", "tf32 for all")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    is_("ieee", "ieee for CUDA matmul")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    is_("tf32", "bfloat16, but for another backend")
"""


def test_precision_is_known_however_it_was_set():
    """In a process of its own: it would change the others'."""
    done = subprocess.run([sys.executable, "-c", PRECISIONS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
