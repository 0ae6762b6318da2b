"""The torch side of the CUDA ops for CPU tensors, with emulated kernels (torch_on_host/)."""

import torch
from torch.utils import cpp_extension

from . import library
from .build import COMMON, HERE, ROOT, cached, with_headers


def load(name, kernels=None):
    """Compiles torch_on_host/NAME.cpp around csrc/cuda_NAME.cpp and registers its ops. ``kernels``: those
    that it needs, if not all."""
    kernels = library.load()._name if kernels is None else str(library.shared(kernels))
    folder = HERE / "torch_on_host"
    source = folder / f"{name}.cpp"
    includes = [f"-I{folder}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    command = ["g++", *COMMON, "-std=c++20", "-fPIC", "-shared", *includes, str(source)]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    sources = [*with_headers(source, HERE), ROOT / "csrc" / "torch" / f"cuda_{name}.cpp"]
    program = cached(sources, [*command, kernels, *libraries, "-ltorch_cpu", "-lc10"], suffix=".torch.so")
    torch.ops.load_library(str(program))
