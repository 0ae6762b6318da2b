"""The library of a formula: compiled once, kept in a cache, shared by whatever processes ask for it."""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from .. import _C
from .._warnings import warn_once
from . import diagnostics
from .source import Source

_PACKAGE = Path(__file__).parent.parent
# In an installed package the sources lie inside it, in a checkout beside it.
SOURCES = next(f for f in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if (f / "losses").is_dir())
_OLDEST_GPU = (8, 0)

# The formula among its headers. The text itself is a file of its own, so that errors name its lines.
_HEADER = """\
#pragma once
#include "losses/derivatives.h"
using namespace dml;
#include "formula/{file_name}"
namespace dml {{
template <typename T>
using Custom = {struct}<T>;
static_assert(sizeof(WithDerivatives<float, Custom<float>>) > 0, "");  // what it lacks is told here, first
inline constexpr const char* kCustomParameters = Custom<float>::kParams;
}}  // namespace dml
#define DML_FORMULAS(X) X(own, Custom)
"""


class Target(NamedTuple):
    """What a library is compiled for."""

    cpu: str  # the instruction set
    gpu: tuple[str, ...]  # compute capabilities, "90"; empty without CUDA kernels
    cuda_home: str


def _cuda_home() -> str | None:
    found = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if found is None:
        nvcc = shutil.which("nvcc")
        found = str(Path(nvcc).parent.parent) if nvcc else "/usr/local/cuda"
    return found if os.access(Path(found, "bin", "nvcc"), os.X_OK) else None


def target() -> Target:
    """This machine: the instruction set in use, and its GPUs where the package and nvcc can serve them."""
    cpu = _C.cpu_instruction_set()
    if not _C.cuda_version or not torch.cuda.is_available():
        return Target(cpu, (), "")
    home = _cuda_home()
    if home is None:
        warn_once(
            "dml_cuda.compile_loss: found no nvcc, so custom formulas run on the CPU only; install the CUDA "
            "toolkit and set CUDA_HOME to it"
        )
        return Target(cpu, (), "")
    found = {torch.cuda.get_device_capability(k) for k in range(torch.cuda.device_count())}
    gpus = tuple(f"{major}{minor}" for major, minor in sorted(found) if (major, minor) >= _OLDEST_GPU)
    return Target(cpu, gpus, home if gpus else "")


@cache
def _of_the_package() -> str:
    """A hash of what a library is made from besides the formula and the target."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cuh", ".cu"):
            digest.update(str(path.relative_to(SOURCES)).encode() + b"\0" + path.read_bytes())
    versions = _C.version, torch.__version__, torch.version.cuda, _C.compile_flags, _HEADER
    digest.update(repr((versions, platform.machine(), os.environ.get("CXX"))).encode())
    return digest.hexdigest()


def key(source: Source, on: Target) -> str:
    """What a library is found by."""
    everything = _of_the_package(), source.text, source.struct, on
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:24]


def cache_folder() -> Path:
    """DML_CUDA_CACHE, else dml_cuda in the user's cache folder."""
    chosen = os.environ.get("DML_CUDA_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dml_cuda"


# ---- compiling ---------------------------------------------------------------------------------------------

_environment = threading.Lock()


@contextlib.contextmanager
def _tools_in_reach() -> Iterator[None]:
    """English messages, which diagnostics reads; and a ninja that pip has put beside this Python."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    changed = {"LC_ALL": "C", "PATH": path}
    with _environment:
        before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _check_tools(on: Target) -> None:
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise RuntimeError(
            f"dml_cuda.compile_loss: no C++ compiler ({compiler}) was found; install one (Debian and "
            f"Ubuntu: apt "
            "install g++), or set CXX to it"
        )
    if not cpp_extension.is_ninja_available():
        raise RuntimeError("dml_cuda.compile_loss: no ninja was found; pip install ninja")


def write_headers(source: Source, folder: Path) -> Path:
    """What the package's sources include of a formula, into a folder; returns the formula's own file."""
    formula = folder / "formula" / source.file_name
    formula.parent.mkdir()
    formula.write_text(source.text, encoding="utf-8")
    header = _HEADER.format(file_name=source.file_name, struct=source.struct)
    (folder / "custom_formula.h").write_text(header, encoding="utf-8")
    return formula


def _compile(source: Source, on: Target, folder: Path) -> Path:
    """The library of a formula, made in an empty folder. Raises ValueError for a formula that does not
    compile."""
    from torch.utils import cpp_extension  # slow to import

    formula = write_headers(source, folder)
    sources = [SOURCES / "custom" / "library.cpp", SOURCES / "cpu" / "kernels" / f"{on.cpu}.cpp"]
    macros = ["-DDML_CUSTOM_FORMULA", f"-DDML_CUSTOM_ISA={on.cpu}"]
    cuda_flags = []
    if on.gpu:
        cuda = SOURCES / "cuda"
        sources += sorted((cuda / "instantiations").glob("*.cu"))
        sources += [cuda / f"{name}.cu" for name in ("pairs/pair_loss", "ring/ring", "ring/rows")]
        macros += ["-DDML_WITH_CUDA"]
        codes = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in on.gpu]
        hidden = ["-Xcompiler", "-fvisibility=hidden"]
        cuda_flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", *codes, *hidden, *macros]
    with _tools_in_reach():
        _check_tools(on)
        if on.gpu:
            cpp_extension.CUDA_HOME = on.cuda_home
        try:
            cpp_extension.load(
                "formula",
                [str(path) for path in sources],
                extra_cflags=[*_C.compile_flags.split(), "-fvisibility=hidden", *macros],
                extra_cuda_cflags=cuda_flags,
                extra_include_paths=[str(folder), str(SOURCES), str(SOURCES / "losses")],
                build_directory=str(folder),
                with_cuda=bool(on.gpu),
                is_python_module=False,
            )
        except RuntimeError as error:
            log = folder.parent / "build.log"
            log.write_text(str(error), encoding="utf-8")
            told = diagnostics.explain(str(error), str(formula), source.shown)
            raise ValueError(
                f"source: the formula does not compile:\n{told}\nAll that the compiler said is in {log}"
            ) from None
    (made,) = folder.glob("formula*.so")
    return made


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While one process of the machine is inside, others wait. The lock of a process that ends is freed."""
    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: then several may build, each apart
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(source: Source, on: Target, place: Path) -> None:
    """Compiles apart, and puts the library in its place when it is complete."""
    for leftover in place.glob("build-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=place) as folder:
        made = _compile(source, on, Path(folder))
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        os.replace(made, place / "formula.so")


def load(source: Source) -> str:
    """Makes the library of a formula if there is none yet and loads it; returns its name in the ops."""
    on = target()
    found = key(source, on)
    name = f"{source.struct}@{found}"
    place = cache_folder() / f"{source.struct}-{found}"
    library = place / "formula.so"
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not library.exists():
            with _alone(place / "lock"):
                if not library.exists():
                    _make(source, on, place)
    except OSError as error:
        raise OSError(
            f"dml_cuda.compile_loss: cannot write its cache, {place} ({error}); set DML_CUDA_CACHE to a "
            f"folder "
            "that can be written"
        ) from error
    try:
        _C.load_formula(str(library), name)
    except RuntimeError:  # not a whole library, whatever has happened to it
        with _alone(place / "lock"):
            _make(source, on, place)
        _C.load_formula(str(library), name)
    return name
