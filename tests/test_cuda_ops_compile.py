"""The torch side of the CUDA kernels compiles against this torch, also where that has no CUDA."""

import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from benchmarks import ptxas

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(ptxas.find_nvcc() is None, reason="nvcc and its headers are not installed")
def test_syntax_and_types():
    toolkit = Path(ptxas.find_nvcc()).resolve().parent.parent / "include"
    if not toolkit.is_dir():
        toolkit = Path("/usr/local/cuda/include")
    folders = [*include_paths(), sysconfig.get_paths()["include"], str(toolkit)]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    command += [f"-isystem{folder}" for folder in folders]
    done = subprocess.run([*command, str(ROOT / "csrc" / "cuda_ops.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
