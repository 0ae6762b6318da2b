"""The torch side of the CUDA kernels compiles against this torch, also where that has no CUDA."""

import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import CUDA_HOME, include_paths

from tools import machine_code

ROOT = Path(__file__).parent.parent


def toolkit_headers() -> Path | None:
    nvcc = machine_code.find_nvcc()
    homes = [CUDA_HOME, nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_runtime.h").exists()), None)


@pytest.mark.skipif(toolkit_headers() is None, reason="the headers of the CUDA toolkit are not installed")
def test_syntax_and_types():
    folders = [*include_paths(), sysconfig.get_paths()["include"], str(toolkit_headers())]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    command += [f"-isystem{folder}" for folder in folders]
    done = subprocess.run([*command, str(ROOT / "csrc" / "cuda_ops.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
