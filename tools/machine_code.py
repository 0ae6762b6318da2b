"""What nvcc makes of the kernels: `python -m tools.machine_code` (`make ptxas`), no GPU needed.

Compiles every .cu file under csrc/cuda once, for all architectures, and tabulates registers, spills,
occupancy, code size and tensor-core instructions of each kernel; cached by content under build/machine_code.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "machine_code"
ARCHITECTURES = ("80", "90a", "100", "120")
# The virtual architecture that nvcc's front end compiles each for, as in setup.py.
FRONT_ENDS = {"80": "80", "90a": "90a", "100": "100", "120": "120"}
FLAGS = ("-O3", "-std=c++17", "-DDML_BUILDS_SM90A", *COMMON_NVCC_FLAGS)  # as in setup.py
MATRIX_INSTRUCTIONS = ("HMMA", "IMMA", "DMMA", "HGMMA")


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    name: str
    source: str
    architecture: str
    registers: int = 0
    spill_bytes: int = 0  # stored and loaded
    stack_bytes: int = 0
    static_shared_bytes: int = 0
    code_bytes: int = 0
    max_threads: int = 0  # of a block, as __launch_bounds__ says; 0 without
    instructions: dict = field(default_factory=dict)  # {mnemonic: count}
    blocks_per_multiprocessor: int = 0
    occupancy: float = 0.0
    shared_bytes_left: int = 0  # dynamic shared memory per block that keeps this occupancy


class CompileError(RuntimeError):
    """nvcc's command and messages."""


# ---- compiling ---------------------------------------------------------------------------------------


def find_nvcc():
    """The path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else None) or shutil.which("nvcc")


def find_nvdisasm():
    """The path of nvdisasm, from a toolkit or from the package nvidia-cuda-nvdisasm, or None."""
    packaged = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/nvdisasm"))
    return shutil.which("nvdisasm") or (str(packaged[-1]) if packaged else None)


@cache
def _nvcc_version():
    return subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def nvcc_build():
    """The compiler's release and build, as `nvcc --version` ends."""
    return " ".join(_nvcc_version().split("\n")[-3:]).strip()


def with_headers(source, *folders):
    """A source and every header that it may include: the inputs of a cached object."""
    folders = {ROOT / "csrc", source.parent, *folders}
    headers = {header for folder in folders for kind in ("*.h", "*.cuh") for header in folder.rglob(kind)}
    return [source, *sorted(headers)]


def _cubin(folder, architecture):
    return folder / f"sm_{architecture}.cubin"


def compile_source(source, architectures=ARCHITECTURES, flags=FLAGS):
    """The folder of a source's cubins and ptxas report, compiled unless cached: one nvcc command, without the
    host side."""
    source = Path(source).resolve()
    targets = [f"-gencode=arch=compute_{FRONT_ENDS[a]},code=sm_{a}" for a in architectures]
    digest = hashlib.sha256(" ".join([_nvcc_version(), *targets, *flags]).encode())
    for path in with_headers(source):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    made = CACHE / f"{source.stem}-{digest.hexdigest()[:20]}"
    if made.exists():
        return made
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        kept, fresh = Path(scratch, "kept"), Path(scratch, "fresh")
        kept.mkdir()
        fresh.mkdir()
        command = [find_nvcc(), *flags, f"-I{ROOT / 'csrc'}", *targets, "-fatbin", str(source)]
        command += ["-Xptxas", "-v", "--keep", f"--keep-dir={kept}", "-o", str(kept / "made.fatbin")]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        for architecture in architectures:
            # nvcc names a cubin after its front end, or not at all, where that suffices.
            names = f"*.sm_{architecture}.cubin", f"*.compute_{FRONT_ENDS[architecture]}.cubin", "*.cubin"
            os.replace(next(path for name in names for path in kept.glob(name)), _cubin(fresh, architecture))
        (fresh / "ptxas.txt").write_text(done.stderr)
        (fresh / "seconds.txt").write_text(f"{time.perf_counter() - start:.1f}")
        if not made.exists():
            os.replace(fresh, made)
    return made


# ---- reading cubins and reports ------------------------------------------------------------------------


def demangle(names):
    text = "\n".join(names)
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split("\n"), strict=False))


def shorten(demangled):
    """`void dml::cuda::f<dml::A<float> >(int)` as `f<A<float>>`."""
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for i, letter in enumerate(name):  # up to the parameter list: the first parenthesis outside <>
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    name = re.sub(r"\b(?:\w+::)+(?=\w)", "", name)
    return name.replace("> >", ">>").replace("> >", ">>").replace(", ", ",")


def parse_report(text, architecture):
    """{mangled name: registers and memory} of one architecture, from `ptxas -v`."""
    found = {}
    for part in text.split("Compiling entry function '")[1:]:
        if f"for 'sm_{architecture}'" not in part.split("\n")[0]:
            continue
        kernel = found[part.split("'")[0]] = {}
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        kernel["stack_bytes"] = int(stack)
        kernel["spill_bytes"] = int(stores) + int(loads)
        kernel["registers"] = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        kernel["static_shared_bytes"] = int(shared[1]) if shared else 0
    return found


def read_cubin(cubin):
    """{mangled name: {"max_threads", "code_bytes"}}, from the ELF sections .nv.info.<kernel> and
    .text.<kernel>."""
    image = Path(cubin).read_bytes()
    (table,) = struct.unpack_from("<Q", image, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, table + i * size) for i in range(count)]
    names_offset = headers[names_index][4]
    kernels = {}
    for header in headers:
        start = names_offset + header[0]
        name = image[start : image.index(b"\0", start)].decode()
        if name.startswith(".text."):
            kernels.setdefault(name.removeprefix(".text."), {})["code_bytes"] = header[5]
        if not name.startswith(".nv.info."):
            continue
        position, end = header[4], header[4] + header[5]
        while position < end:  # records: a format, an attribute, then a value or the size of what follows
            form, attribute, value = struct.unpack_from("<BBH", image, position)
            position += 4
            if form != 4:
                continue
            if attribute in (0x05, 0x10):  # EIATTR_MAX_THREADS, EIATTR_REQNTID: x, y, z
                x, y, z = struct.unpack_from("<III", image, position)
                kernels.setdefault(name.removeprefix(".nv.info."), {})["max_threads"] = x * y * z
            position += value
    return kernels


INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def count_instructions(cubin):
    """{mangled name: {mnemonic, as HMMA.16816.F32: count}}; cached beside the cubin."""
    known = Path(cubin).with_suffix(".json")
    if known.exists():
        return json.loads(known.read_text())
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        raise RuntimeError("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    counts = {}
    current = None
    for line in text.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line)
        if section:
            current = counts.setdefault(section[1], {})
        instruction = INSTRUCTION.match(line)
        if instruction and current is not None:
            current[instruction[1]] = current.get(instruction[1], 0) + 1
    known.write_text(json.dumps(counts))
    return counts


def matrix_instructions(kernel):
    """{"HMMA": 64}: tensor-core instructions by family, only those that occur."""
    families = {}
    for mnemonic, count in kernel.instructions.items():
        family = mnemonic.split(".")[0]
        if family in MATRIX_INSTRUCTIONS:
            families[family] = families.get(family, 0) + count
    return families


def wgmma_remarks(report):
    """What ptxas says of wgmma that it runs one after another, or waits for by itself: C7510 and others."""
    return [line for line in report.splitlines() if re.search(r"\bC75\d\d\b", line)]


# ---- occupancy -----------------------------------------------------------------------------------------

# CUDA programming guide, "Technical specifications per compute capability".
MULTIPROCESSORS = {  # warps, blocks, shared memory
    "80": (64, 32, 164 * 1024),
    "90a": (64, 32, 228 * 1024),
    "100": (64, 32, 228 * 1024),
    "120": (48, 24, 100 * 1024),
}
RESERVED_SHARED = 1024  # the system's, in each block


def occupancy(architecture, threads, registers, static_shared=0):
    """(blocks on a multiprocessor, occupancy, dynamic shared memory left to each) by registers and threads.

    A multiprocessor has four quarters of 16384 registers; a warp lives in one of them, and gets its
    registers in units of 256.
    """
    max_warps, max_blocks, shared = MULTIPROCESSORS[architecture]
    warps = -(-threads // 32)
    by_registers = 4 * (16384 // (-(-registers * 32 // 256) * 256)) if registers else max_warps
    blocks = min(min(by_registers, max_warps) // warps, max_blocks)
    if blocks == 0:
        return 0, 0.0, 0
    left = shared // blocks - RESERVED_SHARED - static_shared
    return blocks, blocks * warps / max_warps, left // 128 * 128


# ---- all together --------------------------------------------------------------------------------------


def analyse(source, architectures=ARCHITECTURES, flags=FLAGS, disassemble=True):
    """The kernels of one source for some architectures, or for the one named."""
    if isinstance(architectures, str):
        architectures = (architectures,)
    folder = compile_source(source, architectures, flags)
    report = (folder / "ptxas.txt").read_text()
    kernels = []
    for architecture in architectures:
        cubin = _cubin(folder, architecture)
        reported, read = parse_report(report, architecture), read_cubin(cubin)
        counts = count_instructions(cubin) if disassemble and reported else {}
        names = demangle(list(reported))
        for mangled, values in reported.items():
            kernel = Kernel(
                shorten(names[mangled]), Path(source).name, architecture, **values, **read[mangled]
            )
            kernel.instructions = counts.get(mangled, {})
            if kernel.max_threads:
                limits = occupancy(
                    architecture, kernel.max_threads, kernel.registers, kernel.static_shared_bytes
                )
                kernel.blocks_per_multiprocessor, kernel.occupancy, kernel.shared_bytes_left = limits
            kernels.append(kernel)
    return sorted(kernels, key=lambda k: (k.name, architectures.index(k.architecture)))


def formulas():
    """{name: (header, struct)} of the formulas that nvcc compiles."""
    losses = ROOT / "csrc" / "losses"
    listed = re.findall(r"X\((\w+), (\w+)\)", (losses / "list.h").read_text())
    texts = {path: path.read_text() for path in losses.glob("*.h")}
    of = {struct: path for path, text in texts.items() for struct in re.findall(r"^struct (\w+)", text, re.M)}
    chosen = {name: (of[struct], struct) for name, struct in listed if struct in of}
    return {name: pair for name, pair in chosen.items() if "kOnCuda = false" not in texts[pair[0]]}


def instructions_of_one(formula, source, learns, architecture="90a"):
    """{kernel: instructions} of a source of the instantiations with the one formula of this name; unless it
    `learns`, without what runs only where parameters do."""
    header, struct = formulas()[formula]
    folder = CACHE / "formulas" / (formula if learns else f"{formula}_fixed")
    folder.mkdir(parents=True, exist_ok=True)
    fixed = f"""namespace dml {{
template <typename T>
struct Fixed : {struct}<T> {{
    using {struct}<T>::{struct};
    static constexpr const char* kParams = "";
}};
}}
"""
    (folder / "custom_formula.h").write_text(
        f'#pragma once\n#include "losses/{header.name}"\n{"" if learns else fixed}'
        f"#define DML_FORMULAS(X) X({formula}, {struct if learns else 'Fixed'})\n"
    )
    flags = (*FLAGS, "-DDML_CUSTOM_FORMULA", f"-I{folder}")
    kernels = analyse(ROOT / "csrc" / "cuda" / "instantiations" / f"{source}.cu", architecture, flags)
    return {kernel.name: sum(kernel.instructions.values()) for kernel in kernels}


def sources():
    """The .cu files, the largest first: two are compiled at a time, and long ones should not end alone."""
    first = ("matrix_rows", "look_float", "look_double", "f64")
    order = {name: place for place, name in enumerate(first)}
    found = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
    return sorted(found, key=lambda path: order.get(path.stem, len(first)))


def analyse_all(files=None, architectures=ARCHITECTURES, jobs=2):
    """All kernels, `jobs` sources at a time."""
    disassemble = find_nvdisasm() is not None
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(lambda f: analyse(f, architectures, disassemble=disassemble), files or sources())
        return [kernel for part in parts for kernel in part]


def _slashed(values):
    """`166` where all architectures agree, else `166/168/168/170`."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else "/".join(texts)


def table(kernels, architectures=ARCHITECTURES):
    """The kernels as text, one line each, the architectures side by side."""
    rows = {}
    for kernel in kernels:
        rows.setdefault((kernel.source, kernel.name), {})[kernel.architecture] = kernel
    head = [
        "kernel",
        "registers",
        "threads",
        "blocks",
        "shared KiB",
        "occupancy %",
        "spill",
        "stack",
        "code KiB",
        "matrix",
    ]
    lines = []
    for (source, name), by_architecture in sorted(rows.items()):
        these = [by_architecture[a] for a in architectures if a in by_architecture]
        matrix = [" ".join(f"{n} {c}" for n, c in matrix_instructions(k).items()) or "-" for k in these]
        cells = [
            [k.registers for k in these],
            [k.max_threads or "-" for k in these],
            [k.blocks_per_multiprocessor or "-" for k in these],
            [k.shared_bytes_left // 1024 for k in these],
            [round(100 * k.occupancy) for k in these],
            [k.spill_bytes for k in these],
            [k.stack_bytes for k in these],
            [-(-k.code_bytes // 1024) for k in these],
            matrix,
        ]
        lines.append((source, [name, *map(_slashed, cells)]))
    widths = [max(len(cells[i]) for cells in [head, *(row for _, row in lines)]) for i in range(len(head))]

    def line(cells):
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    text = [
        f"Columns with slashes: sm_{', sm_'.join(architectures)}.",
        "blocks: per multiprocessor, by registers and threads. shared KiB: dynamic shared memory per block",
        "up to which these, and not shared memory, are the limit. matrix: tensor-core instructions.",
        "",
        line(head),
    ]
    last = None
    for source, cells in lines:
        if source != last:
            text.append(f"-- {source}")
            last = source
        text.append(line(cells))
    return "\n".join(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="*", type=Path, help="default: every .cu file under csrc/cuda")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--json", type=Path, help="write the kernels here, too")
    parser.add_argument("--jobs", type=int, default=2, help="sources compiled at a time (2)")
    parser.add_argument(
        "--formulas", action="store_true", help="only the instructions of finish_matrix_rows, by formula"
    )
    options = parser.parse_args()
    if find_nvcc() is None:
        parser.error("nvcc is not on the PATH")
    if options.formulas:
        for name in formulas():
            rows = [instructions_of_one(name, "matrix_rows", learns) for learns in (False, True)]
            fixed, learn = (counts["finish_matrix_rows<false,float>"] for counts in rows)
            print(f"{name:20} {fixed:6}, {learn:6} with parameters that learn", flush=True)
        return
    architectures = tuple(options.arch or ARCHITECTURES)
    files = options.sources or sources()
    try:
        kernels = analyse_all(files, architectures, options.jobs)
    except CompileError as error:
        parser.exit(1, f"{error}\n")
    print(table(kernels, architectures))
    print("\nSeconds that nvcc took, by source:")
    for source in files:
        print(f"{(compile_source(source, architectures) / 'seconds.txt').read_text():>7}  {source.name}")
    if find_nvdisasm() is None:
        print("\nInstructions were not counted: pip install nvidia-cuda-nvdisasm")
    if options.json:
        rows = [asdict(kernel) | {"instructions": matrix_instructions(kernel)} for kernel in kernels]
        options.json.write_text(json.dumps({"nvcc": nvcc_build(), "kernels": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
