"""Builds kernel sources for the emulator with g++, and runs the programs.

Objects and programs are cached under build/emulator by the hash of everything that goes in.
"""

import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

from tools.machine_code import with_headers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "emulator"

# The machine itself is not instrumented: the sanitizers watch the kernels, not the emulator.
RUNTIME = [HERE / f"{name}.cpp" for name in ("fiber", "machine", "warp_math", "mbarrier", "wgmma")]
INCLUDES = [f"-I{folder}" for folder in (HERE, ROOT / "csrc")]
COMMON = ["-std=c++17", "-g1", "-DDML_CUDA_ON_HOST", *INCLUDES]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]

SANITIZERS = {
    # Local variables start as garbage, as registers do on a GPU.
    "address": [
        "-fsanitize=address,alignment,signed-integer-overflow,shift",
        "-fno-sanitize-recover=all",
        "-ftrivial-auto-var-init=pattern",
    ],
    # Expanded in place, a memcpy is invisible to ThreadSanitizer; as a call it is seen.
    "thread": ["-fsanitize=thread", "-fno-builtin-memcpy", "-fno-builtin-memset"],
    # The same calls at each access; between_blocks.cpp answers them.
    "blocks": ["-fsanitize=thread", "-fno-builtin-memcpy", "-fno-builtin-memset"],
    "none": [],
}
LINKED = {**SANITIZERS, "blocks": ["-Wl,--wrap=memcpy"]}


def kernel_flags(sanitizer):
    """Of the compiler, for kernels that a sanitizer watches."""
    # With AddressSanitizer's checks in it, code is optimised for twice as long as it then runs.
    return ["-Og" if sanitizer == "address" else "-O1", *SANITIZERS[sanitizer]]


def with_change(header, old, new):
    """A folder with a copy of a header of csrc in which `old`, which stands there once, is `new`: with a bug
    planted. Among the folders given to ``build`` it hides the original."""
    text = (ROOT / "csrc" / header).read_text()
    assert text.count(old) == 1, f"{header} has {old!r} {text.count(old)} times"
    text = text.replace(old, new)
    folder = CACHE / f"overlay-{hashlib.sha256((header + text).encode()).hexdigest()[:20]}"
    target = folder / header
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return folder


def build(sources, *, sanitizer="address", defines=(), folders=()):
    """Compiles .cu and .cpp sources, links them with the emulator and returns the program's path."""
    common = [*COMMON, *WARNINGS, *(f"-D{name}" for name in defines)]
    flags = [*(f"-I{folder}" for folder in folders), *common, *kernel_flags(sanitizer)]
    runtime = [*RUNTIME, *([HERE / "between_blocks.cpp"] if sanitizer == "blocks" else [])]
    objects = [_compile(source, [*common, "-O3"]) for source in runtime]
    objects += [_compile(Path(source).resolve(), flags) for source in sources]
    return cached([*reversed(objects)], ["g++", *LINKED[sanitizer], *map(str, objects)], suffix="")


def build_for_gpu(source, target="-arch=native"):
    """Compiles a .cu source as CUDA, for the GPU that is there; returns the program's path."""
    source = Path(source).resolve()
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        "-DDML_BUILDS_SM90A",
        target,
        *INCLUDES,
        str(source),
    ]
    return cached(with_headers(source, HERE), command, suffix=".gpu")


# The programs and schedules under which sanitizers look at kernels.
SANITIZED = [("address", "round_robin"), ("address", "warp_first"), ("thread", "warp_first")]


def is_seen(sources, bug, right):
    """Whether a program of the sources with a planted bug, the arguments of ``with_change``, fails or prints
    something else than ``right`` under one of the schedules."""
    program = build(sources, sanitizer="none", folders=[with_change(*bug)])
    for schedule in ("warp_first", "round_robin"):
        done = run(program, schedule=schedule, seed=1)
        if done.returncode != 0 or done.stdout != right:
            return True
    return False


def plain_environment():
    """Without the runtime of a sanitizer, which is for kernels in this process (library.py)."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def run(program, *arguments, schedule="round_robin", seed=0, stdin=b"", timeout=300):
    """Runs a program under one schedule and seed; returns the CompletedProcess, with bytes."""
    environment = {
        **plain_environment(),
        "DML_EMULATOR_SCHEDULE": schedule,
        "DML_EMULATOR_SEED": str(seed),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "exitcode=66 report_bugs=1 atexit_sleep_ms=0",
    }
    command = [str(program), *map(str, arguments)]
    return subprocess.run(
        command, env=environment, input=stdin, capture_output=True, timeout=timeout, check=False
    )


def _compile(source, flags):
    return cached(with_headers(source, HERE), ["g++", *flags, "-x", "c++", "-c", str(source)], suffix=".o")


def cached(inputs, command, suffix):
    digest = hashlib.sha256(" ".join(command).encode())
    for path in inputs:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = CACHE / (inputs[0].stem + "-" + digest.hexdigest()[:20] + suffix)
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several test processes builds, the others wait for it
        if not target.exists():
            fresh = target.with_name(f"{target.name}.{os.getpid()}")
            done = subprocess.run(
                [*command, "-o", str(fresh)],
                env=plain_environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            os.replace(fresh, target)  # whole or not at all, whatever interrupts
    return target
