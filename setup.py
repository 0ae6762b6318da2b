"""Builds dml_cuda._C: the CPU kernels always, the CUDA kernels where torch and nvcc allow.

DML_CUDA_BUILD=cpu or =cuda forces either; TORCH_CUDA_ARCH_LIST chooses the architectures.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = "0.1.0"


def fail(problem: str, cure: str) -> None:
    sys.exit(f"\ndml_cuda cannot be built: {problem}\n  {cure}\n")


try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    fail(
        "PyTorch is not importable in the environment that builds it.",
        "Install torch first, then: pip install --no-build-isolation .",
    )


def wants_cuda() -> bool:
    """Whether to build the CUDA kernels: forced by DML_CUDA_BUILD, else where everything is there."""
    choice = os.environ.get("DML_CUDA_BUILD", "auto").lower()
    if choice not in ("auto", "cpu", "cuda"):
        fail(f"DML_CUDA_BUILD={choice!r} is not known.", "Use auto, cpu or cuda.")
    if choice == "cpu":
        return False
    torch_has_cuda = torch.version.cuda is not None
    home = cpp_extension.CUDA_HOME
    if home and "CUDA_HOME" not in os.environ and not has_cuda_headers():
        home = cpp_extension.CUDA_HOME = "/usr/local/cuda"  # where the toolkit's own installer puts it
    has_nvcc = home is not None and shutil.which("nvcc", path=os.path.join(home, "bin")) is not None
    if choice == "cuda" and not torch_has_cuda:
        fail(
            f"DML_CUDA_BUILD=cuda, but this torch ({torch.__version__}) was built without CUDA.",
            "Install a CUDA build of torch (see pytorch.org), or set DML_CUDA_BUILD=cpu.",
        )
    if choice == "cuda" and not has_nvcc:
        fail(
            "DML_CUDA_BUILD=cuda, but no nvcc was found.",
            "Install the CUDA toolkit and set CUDA_HOME to it, or set DML_CUDA_BUILD=cpu.",
        )
    if torch_has_cuda and has_nvcc and not has_cuda_headers():
        fail(
            f"there is an nvcc in {home}/bin, but no cuda_runtime.h where torch looks for it from there.",
            "Set CUDA_HOME to the CUDA toolkit (often /usr/local/cuda), or set DML_CUDA_BUILD=cpu.",
        )
    return torch_has_cuda and has_nvcc


def has_cuda_headers() -> bool:
    """False where nvcc on the PATH is a link or a script, whose folder is not the toolkit's."""
    folders = [*cpp_extension.include_paths("cuda"), "/usr/include", *os.environ.get("CPATH", "").split(":")]
    return any(Path(folder, "cuda_runtime.h").exists() for folder in folders)


def cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST if set, else this machine's GPU, else every one that is supported."""
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            archs = f"{major}.{minor}"
        else:  # compilers before 12.8 do not know 10.0 and 12.0
            version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
            archs = "8.0;8.6;9.0;10.0;12.0+PTX" if version >= (12, 8) else "8.0;8.6;9.0+PTX"
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    return os.environ["TORCH_CUDA_ARCH_LIST"]


def extension(cuda: bool):
    sources = ["csrc/ops.cpp", "csrc/autograd.cpp"]
    sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))
    macros = [("DML_VERSION", f'"{VERSION}"'), ("DML_TORCH_VERSION", f'"{torch.__version__}"')]
    flags = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall"]
    compile_args = {"cxx": flags}
    build = cpp_extension.CppExtension
    if cuda:
        build = cpp_extension.CUDAExtension
        sources += ["csrc/cuda_ops.cpp"]
        sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.cu"))
        macros += [
            ("DML_CUDA_VERSION", f'"{torch.version.cuda}"'),
            ("DML_CUDA_ARCHS", f'"{cuda_architectures()}"'),
        ]
        compile_args["nvcc"] = ["-O3", "-std=c++17", "--expt-relaxed-constexpr"]
    return build("dml_cuda._C", sources, define_macros=macros, extra_compile_args=compile_args)


class BuildExtension(cpp_extension.BuildExtension):
    """torch's builder, with a missing compiler explained and one line said about the outcome."""

    def build_extensions(self) -> None:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler.split()[0]) is None:
            fail(
                f"no C++ compiler ({compiler}) was found.",
                "Install one (Debian and Ubuntu: apt install g++), or set CXX to it.",
            )
        super().build_extensions()
        kernels = f"CPU and CUDA {torch.version.cuda} ({cuda_architectures()})" if CUDA else "CPU"
        print(
            f"dml_cuda {VERSION}: built the {kernels} kernels for torch {torch.__version__}", file=sys.stderr
        )


CUDA = wants_cuda()
setup(version=VERSION, ext_modules=[extension(CUDA)], cmdclass={"build_ext": BuildExtension})
