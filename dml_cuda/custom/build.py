"""Compiles the library of a formula, once, into a cache that all processes share."""

import contextlib
import fcntl
import hashlib
import os
import platform
import re
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
# The sources are inside an installed package, and beside the package in a checkout.
SOURCES = next(f for f in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if (f / "losses").is_dir())
_OLDEST_GPU = (8, 0)
_PLAIN_PATH = re.compile(r"[\w/.,@+=-]+", re.ASCII)

# Includes the formula. Its text is a separate file, so that compiler errors have its line numbers.
_HEADER = """\
#pragma once
#include "losses/derivatives.h"
using namespace dml;
#include "formula/{file_name}"
namespace dml {{
template <typename T>
using Custom = {struct}<T>;
static_assert(sizeof(WithDerivatives<float, Custom<float>>) > 0, "");  // reports missing members first
inline constexpr const char* kCustomParameters = Custom<float>::kParams;
}}  // namespace dml
#define DML_FORMULAS(X) X(own, Custom)
"""


class Target(NamedTuple):
    """The hardware that a library is compiled for."""

    cpu: str  # the instruction set
    gpu: tuple[str, ...]  # compute capabilities such as "90"; empty without CUDA kernels
    cuda_home: str


def _cuda_home() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None:
        nvcc = shutil.which("nvcc")
        home = str(Path(nvcc).parent.parent) if nvcc else "/usr/local/cuda"
    return home if os.access(Path(home, "bin", "nvcc"), os.X_OK) else None


def this_machine() -> Target:
    """The instruction set in use, and the GPUs if the package has CUDA kernels and nvcc is installed."""
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
    capabilities = {torch.cuda.get_device_capability(k) for k in range(torch.cuda.device_count())}
    gpus = tuple(f"{major}{minor}" for major, minor in sorted(capabilities) if (major, minor) >= _OLDEST_GPU)
    return Target(cpu, gpus, home if gpus else "")


@cache
def _package_hash() -> str:
    """A hash of everything that a library depends on besides the formula and the target."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cuh", ".cu"):
            digest.update(str(path.relative_to(SOURCES)).encode() + b"\0" + path.read_bytes())
    versions = _C.version, torch.__version__, torch.version.cuda, _C.compile_flags, _HEADER
    digest.update(repr((versions, platform.machine(), os.environ.get("CXX"))).encode())
    return digest.hexdigest()


def cache_key(source: Source, target: Target) -> str:
    """A hash of everything that a library depends on."""
    everything = _package_hash(), source.text, source.struct, target
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:24]


def cache_folder() -> Path:
    """``DML_CUDA_CACHE``, by default ``dml_cuda`` in the user's cache folder."""
    chosen = os.environ.get("DML_CUDA_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dml_cuda"


# ---- compiling ---------------------------------------------------------------------------------------------

_environment = threading.Lock()


@contextlib.contextmanager
def _build_environment() -> Iterator[None]:
    """Sets English compiler messages, which diagnostics parses, and adds the ninja that pip installed."""
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


def _check_tools() -> None:
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise RuntimeError(
            f"dml_cuda.compile_loss: no C++ compiler ({compiler}) was found; install one (Debian and Ubuntu: "
            "apt install g++) or set CXX to it"
        )
    if not cpp_extension.is_ninja_available():
        raise RuntimeError("dml_cuda.compile_loss: no ninja was found; pip install ninja")


def write_headers(source: Source, folder: Path) -> Path:
    """Writes the headers by which the package's sources include a formula; returns the formula's file."""
    formula = folder / "formula" / source.file_name
    formula.parent.mkdir()
    formula.write_text(source.text, encoding="utf-8")
    header = _HEADER.format(file_name=source.file_name, struct=source.struct)
    (folder / "custom_formula.h").write_text(header, encoding="utf-8")
    return formula


def _compile(source: Source, target: Target, folder: Path, log: Path) -> Path:
    """Compiles a library in an empty folder. Raises ValueError for a formula that does not compile; what the
    compiler said is then in ``log``."""
    from torch.utils import cpp_extension  # slow to import

    formula = write_headers(source, folder)
    sources = [SOURCES / "custom" / "library.cpp", SOURCES / "cpu" / "kernels" / f"{target.cpu}.cpp"]
    macros = ["-DDML_CUSTOM_FORMULA", f"-DDML_CUSTOM_ISA={target.cpu}"]
    cuda_flags = []
    if target.gpu:
        cuda = SOURCES / "cuda"
        sources += sorted((cuda / "instantiations").glob("*.cu"))
        sources += [cuda / f"{name}.cu" for name in ("pairs/pair_loss", "ring/ring", "ring/rows")]
        macros += ["-DDML_WITH_CUDA"]
        codes = []
        for gpu in target.gpu:
            if gpu == "90":  # as in setup.py
                gpu = "90a"
                macros += ["-DDML_BUILDS_SM90A"]
            codes += [f"-gencode=arch=compute_{gpu},code=sm_{gpu}"]
        hidden = ["-Xcompiler", "-fvisibility=hidden"]
        cuda_flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", *codes, *hidden, *macros]
    with _build_environment():
        _check_tools()
        if target.gpu:
            cpp_extension.CUDA_HOME = target.cuda_home
        try:
            cpp_extension.load(
                "formula",
                [str(path) for path in sources],
                extra_cflags=[*_C.compile_flags.split(), "-fvisibility=hidden", *macros],
                extra_cuda_cflags=cuda_flags,
                extra_include_paths=[str(folder), str(SOURCES), str(SOURCES / "losses")],
                build_directory=str(folder),
                with_cuda=bool(target.gpu),
                is_python_module=False,
            )
        except RuntimeError as error:
            log.write_text(str(error), encoding="utf-8")
            errors = diagnostics.explain(str(error), str(formula), source.title)
            raise ValueError(
                f"source: the formula does not compile:\n{errors}\nThe compiler's whole output is in {log}"
            ) from None
    (library,) = folder.glob("formula*.so")
    return library


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Holds a lock between the processes of this machine. It is released if the process ends."""
    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # without locks several processes may build, in separate folders
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(library: bytes) -> str:
    return hashlib.sha256(library).hexdigest()[:16]


def _find_library(entry: Path) -> Path | None:
    """The whole library of a cache entry. Its name has the hash of its content: a library that was cut short
    must not be loaded, as the process would crash where the rest is missing."""
    for library in entry.glob("formula-*.so"):
        if library.stem == f"formula-{_digest(library.read_bytes())}":
            return library
    return None


def _build(source: Source, target: Target, entry: Path) -> Path:
    """Compiles in a temporary folder; the complete library is renamed into the cache entry."""
    for leftover in entry.glob("build-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    for damaged in entry.glob("formula-*.so"):
        damaged.unlink()
    # Compilers and ninja do not take every path: where the cache has another, they work beside it.
    place = entry if _PLAIN_PATH.fullmatch(str(entry)) else None
    with tempfile.TemporaryDirectory(prefix="build-", dir=place) as folder:
        content = _compile(source, target, Path(folder), entry / "build.log").read_bytes()
    library = entry / f"formula-{_digest(content)}.so"
    written = library.with_suffix(".new")
    with open(written, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    return written.replace(library)


def load(source: Source) -> str:
    """Loads the library of a formula, built first if it is not cached; returns its name in the ops."""
    target = this_machine()
    key = cache_key(source, target)
    name = f"{source.struct}@{key}"
    entry = cache_folder() / f"{source.struct}-{key}"
    try:
        entry.mkdir(parents=True, exist_ok=True)
        library = _find_library(entry)
        if library is None:
            with _exclusive(entry / "lock"):
                library = _find_library(entry) or _build(source, target, entry)
    except OSError as error:
        raise OSError(
            f"dml_cuda.compile_loss: cannot write its cache, {entry} ({error}); set DML_CUDA_CACHE to a "
            "writable folder"
        ) from error
    _C.load_formula(str(library), name)
    return name
