"""ThreadSanitizer on the CPU engine: tasks share no data."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from emulator.build import ROOT, SANITIZERS, cached, run, with_headers
from torch.utils import cpp_extension

pytestmark = [pytest.mark.slow(120), pytest.mark.long]

HERE = Path(__file__).resolve().parent / "threads"
SOURCES = [
    HERE / "cpu_engine.cpp",
    *(
        (ROOT / "csrc" / f"{name}.cpp")
        for name in ("custom/registry", "cpu/kernels/dispatch", "cpu/kernels/baseline")
    ),
]


def compiled(flags, source):
    return cached(with_headers(source, HERE), ["g++", *flags, "-c", str(source)], suffix=".o")


@pytest.fixture(scope="module")
def program():
    includes = [HERE, ROOT / "csrc", *cpp_extension.include_paths()]
    flags = [
        "-std=c++20",
        "-O1",
        "-g1",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-DDML_BASELINE_ONLY",
        *SANITIZERS["thread"],
    ]
    flags += [
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{folder}" for folder in includes),
    ]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(partial(compiled, flags), SOURCES))
    libraries = [
        option
        for folder in cpp_extension.library_paths()
        for option in (f"-L{folder}", f"-Wl,-rpath,{folder}")
    ]
    libraries += ["-ltorch_cpu", "-lc10"]
    return cached(objects, ["g++", "-fsanitize=thread", *map(str, objects), *libraries], suffix="")


def test_no_races(program):
    done = run(program, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()[-6000:]


def test_a_planted_race_is_reported(program):
    done = run(program, "race")
    assert done.returncode == 66
    assert b"data race" in done.stderr
