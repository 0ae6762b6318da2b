"""Builds dml_cuda._C: the CPU kernels always, the CUDA kernels where torch and nvcc allow.

DML_CUDA_BUILD=cpu or =cuda forces either; TORCH_CUDA_ARCH_LIST chooses the architectures.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = "0.2.0"


def fail(problem: str, cure: str) -> None:
    sys.exit(f"\ndml_cuda cannot be built: {problem}\n  {cure}\n")


try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    fail(
        "PyTorch is not importable in the environment that builds it.",
        "The kernels must be built against the torch that will load them, but pip builds in an environment\n"
        "  of its own, without torch. Install torch first, and switch build isolation off:\n"
        "  pip install ninja pybind11 'setuptools>=77' && pip install --no-build-isolation .",
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


OLDEST = (8, 0)  # what the kernels are written for: cp.async, bfloat16 and tf32
# Names that TORCH_CUDA_ARCH_LIST may hold, of what is older.
OLD_NAMES = ("Kepler", "Kepler+Tesla", "Maxwell", "Maxwell+Tegra", "Pascal", "Volta", "Turing")


def is_supported(architecture: str) -> bool:
    number = re.match(r"(\d+)\.(\d+)", architecture)
    return tuple(map(int, number.groups())) >= OLDEST if number else architecture not in OLD_NAMES


def nvcc_version() -> tuple[int, int]:
    nvcc = os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


def default_architectures() -> str:
    """Those of this machine's GPUs, else all that need code of their own (8.6 and 8.9 run that of 8.0)."""
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        if any(capability >= OLDEST for capability in found):
            return ";".join(f"{major}.{minor}" for major, minor in sorted(found))
    # Compilers before 12.8 do not know 10.0 and 12.0.
    return "8.0;9.0;10.0;12.0+PTX" if nvcc_version() >= (12, 8) else "8.0;9.0+PTX"


@cache
def cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST without what is too old, or the default; torch's builder reads it from there."""
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    asked = [a for a in asked if a] or default_architectures().split(";")
    kept = [architecture for architecture in asked if is_supported(architecture)]
    left_out = [architecture for architecture in asked if architecture not in kept]
    if not kept:
        fail(
            f"TORCH_CUDA_ARCH_LIST names no architecture from 8.0 on: {' '.join(asked)}.",
            "Add one (8.0 and newer GPUs are supported), or set DML_CUDA_BUILD=cpu.",
        )
    if left_out:
        print(f"dml_cuda: no kernels for {', '.join(left_out)}: older than 8.0", file=sys.stderr)
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(kept)
    return os.environ["TORCH_CUDA_ARCH_LIST"]


def openmp_flags() -> list[str]:
    """What gives the CPU kernels PyTorch's threads, if those are OpenMP's: at::parallel_for is a template,
    and on one thread where it is compiled without. Nothing is linked, so that the OpenMP which torch's own
    library has loaded is the only one, and torch.set_num_threads holds for it; clang would need another."""
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return []
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        return []  # which the builder complains of
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    if "Free Software Foundation" in version:
        return ["-fopenmp"]
    print("dml_cuda: not compiled by GCC, so the loops of the CPU kernels have one thread", file=sys.stderr)
    return []


def link_flags() -> list[str]:
    """Some g++ link their own libstdc++ statically. Torch has brought the shared one, and two of them in one
    process do not get on: messages that print numbers crash. Then the shared one, by its name."""
    compiler = os.environ.get("CXX", "c++").split()
    if sys.platform != "linux" or shutil.which(compiler[0]) is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "library.so")
        link = [*compiler, "-shared", "-fPIC", "-x", "c++", "-", "-x", "none", "-o", str(library)]

        def links(*flags: str) -> bool:
            source = b"#include <iostream>\nvoid print(int x) { std::cout << x; }\n"
            found = subprocess.run([*link, *flags], input=source, capture_output=True, check=False)
            return found.returncode == 0

        if not links() or re.search(rb"lib(std)?c\+\+\.so", library.read_bytes()):
            return []
        by_name = "-l:libstdc++.so.6"
        if links(by_name):
            return [by_name]
    print(f"dml_cuda: {compiler[0]} links libstdc++ statically, and finds no shared one", file=sys.stderr)
    return []


IS_BUILT = "sdist" not in sys.argv  # sources fit every torch
MINOR = ".".join(torch.__version__.split(".")[:2])


def full_version() -> str:
    """The version with what the kernels are built for, as in 0.2.0+torch2.13cpu or 0.2.0+torch2.13cu130."""
    kernels = "cu" + torch.version.cuda.replace(".", "") if CUDA else "cpu"
    return f"{VERSION}+torch{MINOR}{kernels}" if IS_BUILT else VERSION


def dependencies() -> list[str]:
    return [f"torch=={MINOR}.*" if IS_BUILT else "torch>=2.11", "numpy"]


# What nvcc's front end compiles for. Its output (PTX) serves every newer architecture: only the assembler
# must run for each. From 9.0 on a kernel can wait for the one before it, and 9.0 alone, as 9.0a, has wgmma;
# from 10.0 and 12.0 on some ask for fewer blocks on a multiprocessor.
FRONT_ENDS = (80, 90, 100, 120)
WGMMA = "-DDML_BUILDS_SM90A"  # in csrc/cuda/hopper/wgmma_choice.h


def nvcc_targets(architectures: str) -> list[str]:
    """nvcc's flags for a list like TORCH_CUDA_ARCH_LIST's; none where torch's builder must make them."""
    flags = []
    for architecture in architectures.split(";"):
        number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture)
        if not number:  # a name, like Ampere
            return []
        code = int(number[1] + number[2])
        front_end = max(f for f in FRONT_ENDS if f <= code)
        if code == 90:  # all GPUs of 9.0 have what 9.0a stands for
            flags += ["-gencode=arch=compute_90a,code=sm_90a", WGMMA]
        else:
            flags.append(f"-gencode=arch=compute_{front_end},code=sm_{code}{number[3]}")
        if number[4]:
            flags.append(f"-gencode=arch=compute_{front_end},code=compute_{front_end}")
    return list(dict.fromkeys(flags))


def extension(cuda: bool):
    # The longest first. The other files are read in units, which include them.
    sources = [f"csrc/cpu/kernels/{name}.cpp" for name in ("avx512", "avx2", "baseline")]
    sources += [f"csrc/torch/unity/{name}.cpp" for name in ("pairs", "module", "lists_and_triplets")]
    sources += ["csrc/cpu/kernels/dispatch.cpp", "csrc/custom/registry.cpp"]
    # -g0: many a Python was built with -g and passes that on, which doubles what the compiler takes.
    flags = [
        "-O3",
        "-g0",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
        "-Wall",
    ]
    macros = [
        ("DML_VERSION", f'"{full_version()}"'),
        ("DML_TORCH_VERSION", f'"{torch.__version__}"'),
        ("DML_COMPILE_FLAGS", f'"{" ".join(flags)}"'),  # for formulas that are compiled on demand
    ]
    compile_args = {"cxx": [*flags, *openmp_flags()]}
    build = cpp_extension.CppExtension
    if cuda:
        build = cpp_extension.CUDAExtension
        sources += ["csrc/torch/unity/on_cuda.cpp"]
        sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").rglob("*.cu"))
        macros += [
            ("DML_CUDA_VERSION", f'"{torch.version.cuda}"'),
            ("DML_CUDA_ARCHS", f'"{cuda_architectures()}"'),
        ]
        targets = nvcc_targets(cuda_architectures())
        compile_args["nvcc"] = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", *targets]
    arguments = {
        "include_dirs": [str(ROOT / "csrc")],
        "extra_compile_args": compile_args,
        "extra_link_args": link_flags(),
    }
    return build("dml_cuda._C", sources, define_macros=macros, **arguments)


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


class BuildPy(build_py):
    """Puts the sources into the package too, where dml_cuda.compile_loss compiles formulas with them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", Path(self.build_lib, "dml_cuda", "csrc"), dirs_exist_ok=True)


CUDA = wants_cuda()
COMMANDS = {"build_ext": BuildExtension, "build_py": BuildPy}
setup(
    version=full_version(),
    install_requires=dependencies(),
    ext_modules=[extension(CUDA)],
    cmdclass=COMMANDS,
)
