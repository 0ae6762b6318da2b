"""What the CUDA compiler made of the kernels: `python -m tools.machine_code`, no GPU needed.

Compiles every csrc/cuda/*.cu for every architecture and tabulates registers, spills, occupancy and the
tensor-core instructions of each kernel, what the hot path of each issues (control_flow.py), and what follows
for whole problems (issue_slots.py). Results are cached under build/machine_code by content; what was made of
each kernel is kept in the repository (machine_record.py).
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

from . import control_flow, counted

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "machine_code"
ARCHITECTURES = ("80", "90a", "100", "120")
# What nvcc's front end compiles for, of which the assembler makes their code; as in setup.py.
FRONT_ENDS = {"80": "80", "90a": "80", "100": "100", "120": "120"}
# As setup.py's extension is built; the line numbers change no instruction.
FLAGS = ("-O3", "-std=c++17", "-lineinfo", *COMMON_NVCC_FLAGS)
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
    max_threads: int = 0  # of a block, as __launch_bounds__ says; 0 if it does not
    instructions: dict = field(default_factory=dict)  # how often each one of interest occurs
    blocks_per_multiprocessor: int = 0
    occupancy: float = 0.0
    shared_bytes_left: int = 0  # dynamic shared memory per block that keeps this occupancy


class CompileError(RuntimeError):
    """nvcc's own words."""


# ---- tools -------------------------------------------------------------------------------------------


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
    """The compiler and its build, in its own words."""
    return " ".join(_nvcc_version().split("\n")[-3:]).strip()


def with_headers(source, *folders):
    """A source and every header that it may include: what a cached object of it depends on."""
    folders = {ROOT / "csrc", source.parent, *folders}
    headers = {header for folder in folders for kind in ("*.h", "*.cuh") for header in folder.rglob(kind)}
    return [source, *sorted(headers)]


def _place(source, suffix, flags):
    """Where what is made from a source lies under CACHE, and beside it what was said of it."""
    # The path too: line numbers lead back to it.
    digest = hashlib.sha256(" ".join([_nvcc_version(), str(source), suffix, *flags]).encode())
    for path in with_headers(source):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    made = CACHE / f"{source.stem}-{digest.hexdigest()[:20]}-{suffix}"
    return made, made.with_name(made.name + ".txt")


def _made(source, suffix, flags, make):
    """A file made from a source by make(a folder to work in, the file), which returns what was said; and
    that."""
    made, report = _place(source, suffix, flags)
    if not report.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            said = make(Path(folder), made)
        report.write_text(said)
    return made, report.read_text()


def _run_nvcc(source, *options):
    command = [find_nvcc(), *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stderr


def _run_front_end(source, target, flags, *end):
    include = [f"-I{ROOT / 'csrc'}"]
    gencode = f"-gencode=arch=compute_{target},code=compute_{target}"
    return _run_nvcc(source, *flags, *include, gencode, *end)


def _front_end(source, target, flags):
    """The PTX of a source."""

    def make(folder, ptx):
        said = _run_front_end(source, target, flags, "-ptx", "-o", str(folder / "made"))
        os.replace(folder / "made", ptx)
        return said

    return _made(source, f"compute_{target}.ptx", flags, make)[0]


def _host_side(source, flags):
    """What whoever builds the package compiles besides: it must go, and is of no use here."""

    def make(folder, made):
        return _run_front_end(source, FRONT_ENDS[ARCHITECTURES[0]], flags, "-c", "-o", str(folder / "made.o"))

    _made(source, "host", flags, make)


def _compile(source, architecture, flags):
    """Returns the cubin's path and what ptxas said, from the cache if nothing has changed."""

    def make(folder, cubin):
        if architecture == ARCHITECTURES[0]:
            _host_side(source, flags)
        ptx = _front_end(source, FRONT_ENDS[architecture], flags)
        lines = [flag for flag in flags if flag == "-lineinfo"]
        options = [f"-arch=sm_{architecture}", "-cubin", *lines, "-Xptxas", "-v", "-o", str(folder / "made")]
        said = _run_nvcc(ptx, *options)
        os.replace(folder / "made", cubin)
        return said

    return _made(source, f"sm_{architecture}.cubin", flags, make)


# ---- reading what they made ----------------------------------------------------------------------------


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


def parse_report(text):
    """Registers and memory per mangled kernel, from `ptxas -v`."""
    found = {}
    for part in text.split("Compiling entry function '")[1:]:
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


def read_max_threads(cubin):
    """Threads per block that each kernel was compiled for, from the ELF sections .nv.info.<kernel>."""
    image = Path(cubin).read_bytes()
    (table,) = struct.unpack_from("<Q", image, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, table + i * size) for i in range(count)]
    names_offset = headers[names_index][4]
    threads = {}
    for header in headers:
        start = names_offset + header[0]
        name = image[start : image.index(b"\0", start)].decode()
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
                threads[name.removeprefix(".nv.info.")] = x * y * z
            position += value
    return threads


def _disassemble(cubin, *options):
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        raise RuntimeError("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    command = [nvdisasm, "-c", *options, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count_instructions(cubin):
    """How often each full mnemonic (HMMA.16816.F32) occurs, per mangled kernel; kept beside the cubin."""
    known = Path(cubin).with_name(Path(cubin).name + ".json")
    if known.exists():
        return json.loads(known.read_text())
    counts = {}
    current = None
    for line in _disassemble(cubin).splitlines():
        section = re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line)
        if section:
            current = counts.setdefault(section[1], {})
        instruction = control_flow.INSTRUCTION.match(line)
        if instruction and current is not None:
            current[instruction[3]] = current.get(instruction[3], 0) + 1
    known.write_text(json.dumps(counts))
    return counts


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


def with_occupancy(kernel):
    """The same kernel, with what its registers, threads and shared memory allow."""
    if kernel.max_threads:
        limits = occupancy(
            kernel.architecture, kernel.max_threads, kernel.registers, kernel.static_shared_bytes
        )
        kernel.blocks_per_multiprocessor, kernel.occupancy, kernel.shared_bytes_left = limits
    return kernel


# ---- all together --------------------------------------------------------------------------------------


def analyse(source, architecture, flags=FLAGS, disassemble=True):
    """The kernels of one source for one architecture."""
    source = Path(source).resolve()
    cubin, report = _compile(source, architecture, flags)
    facts = parse_report(report)
    threads = read_max_threads(cubin)
    counts = count_instructions(cubin) if disassemble and facts else {}
    demangled = demangle(list(facts))
    kernels = []
    for mangled, values in facts.items():
        kernel = Kernel(shorten(demangled[mangled]), source.name, architecture, **values)
        kernel.max_threads = threads.get(mangled, 0)
        kernel.instructions = counts.get(mangled, {})
        kernels.append(with_occupancy(kernel))
    return sorted(kernels, key=lambda k: k.name)


@cache
def _code(source, architecture, flags):
    cubin, _ = _compile(Path(source).resolve(), architecture, flags)
    return control_flow.read_kernels(_disassemble(cubin, "-gi"))


@cache
def flows(source, architecture="90a", flags=FLAGS, formula=None, cached=False):
    """{mangled name: control_flow.Flow} of the kernels of one source."""
    kernels = _code(source, architecture, flags)
    return {name: control_flow.analyse(items, formula, cached) for name, items in kernels.items()}


def matrix_instructions(kernel):
    """{"HMMA": 64}: tensor-core instructions by family, only those that occur."""
    families = {}
    for mnemonic, count in kernel.instructions.items():
        family = mnemonic.split(".")[0]
        if family in MATRIX_INSTRUCTIONS:
            families[family] = families.get(family, 0) + count
    return families


def sources():
    return sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))


def analyse_all(files=None, architectures=ARCHITECTURES, jobs=2):
    """All kernels, compiled two at a time."""
    work = [(source, architecture) for source in files or sources() for architecture in architectures]
    disassemble = find_nvdisasm() is not None
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(lambda item: analyse(*item, disassemble=disassemble), work)
        return [kernel for part in parts for kernel in part]


def build_seconds(files, jobs=2):
    """{source's name: seconds} of compiling for all architectures, as setup.py does (but with line numbers);
    and of all together. What is made is kept for the other functions."""

    def compile_one(source):
        source = Path(source).resolve()
        targets = [f"-gencode=arch=compute_{FRONT_ENDS[a]},code=sm_{a}" for a in ARCHITECTURES]
        last = FRONT_ENDS[ARCHITECTURES[-1]]
        targets.append(f"-gencode=arch=compute_{last},code=compute_{last}")
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            keep = ["-Xptxas", "-v", "--keep", f"--keep-dir={folder}", "-o", str(Path(folder, "made.o"))]
            start = time.perf_counter()
            said = _run_nvcc(source, *FLAGS, *targets, "-c", *keep)
            seconds = time.perf_counter() - start
            for architecture in ARCHITECTURES:
                made, report = _place(source, f"sm_{architecture}.cubin", FLAGS)
                # nvcc names what a front end's output became by that alone, where it became one thing only.
                names = (f"*.sm_{architecture}.cubin", f"*.compute_{FRONT_ENDS[architecture]}.cubin")
                kept = [path for name in names for path in Path(folder).glob(name)]
                os.replace(kept[0], made)
                _, *kernels = re.split(r"(?=Compiling entry function ')", said)
                report.write_text("".join(k for k in kernels if f"for 'sm_{architecture}'" in k))
            return source.name, seconds

    start = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        seconds = dict(pool.map(compile_one, files))
    return seconds, time.perf_counter() - start


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
            matrix,
        ]
        lines.append((source, [name, *map(_slashed, cells)]))
    widths = [max(len(cells[i]) for cells in [head, *(row for _, row in lines)]) for i in range(len(head))]

    def line(cells):
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    text = [
        f"Columns with slashes: sm_{', sm_'.join(architectures)}.",
        "blocks: on a multiprocessor, by registers and threads. shared KiB: dynamic shared memory that each",
        "may take before it, and not the registers, is the limit.",
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


FORMULAS = ("multi_similarity", "circle")  # whose loops over pairs are counted
# Of an H100, as others have measured: from a load of what lies in L2 to its use; and a scheduler's clock.
L2_SECONDS, CLOCK = 0.16e-6, 1.755e9


def fold_seconds(flow):
    """How long a fold takes at least: all its warps at once, each waiting and issuing by turns."""
    return flow.waits * L2_SECONDS + flow.counts.total() / CLOCK


def hot_flows(files, architecture):
    """{formula: {mangled name: (source's name, Flow, Flow where similarities come from the cache)}}."""
    return {
        formula: {
            name: (source.name, flow, flows(source, architecture, formula=formula, cached=True)[name])
            for source in files
            for name, flow in flows(source, architecture, formula=formula).items()
        }
        for formula in FORMULAS
    }


def pairs_of(kernel, flow):
    """How many pairs each thread looks at, or None: of a tile, or of a strip of 512 columns."""
    if kernel.startswith("strip_"):
        return 16 * 512 // 256
    if not has_tile(kernel):
        return None
    return (128 * 128 if flow.product_loops else 64 * 64) // 256


def hot_table(of_formulas):
    """What the hot path of each kernel issues; of_formulas: as hot_flows makes them."""
    found = of_formulas[FORMULAS[0]]
    names = demangle(list(found))
    lines = [
        "What a warp issues on the hot path, by machine code and control flow.",
        "in code: between the head of the product loop and its backward branch; per HMMA in brackets.",
        "rest of the kernel: one way through it without product loops; for each of a thread's pairs.",
        "",
    ]
    rare, untold = {}, {}
    for name, (source, flow, _) in sorted(found.items(), key=lambda item: (item[1][0], names[item[0]])):
        kernel = shorten(names[name])
        lines.append(f"{source}: {kernel}")
        for loop in flow.product_loops:
            parts = control_flow.kinds(loop.counts)
            hmma = parts["HMMA"]
            text = "  ".join(f"{kind} {count}" for kind, count in parts.items())
            lines.append(
                f"    slice   {text}  all {loop.counts.total()} ({loop.counts.total() / hmma:.2f})"
                f"  in code {loop.in_code} ({loop.in_code / hmma:.2f})"
            )
        pairs = pairs_of(kernel, flow)
        if pairs:
            for formula in FORMULAS[: 1 if kernel.startswith("find") else None]:
                _, rest, cached = (
                    x if isinstance(x, str) else x.counts.total() for x in of_formulas[formula][name]
                )
                text = f"    rest    {rest} = {rest / pairs:.1f} a pair, {formula}"
                if kernel.startswith(("accumulate", "pair_weights")):
                    text += f"; {cached} = {cached / pairs:.1f} of a cached tile"
                lines.append(text)
        else:
            lines.append(f"    rest    {flow.counts.total()}")
        if kernel.startswith("fold_"):
            lines.append(
                f"    waits for memory {flow.waits} times; {1e6 * fold_seconds(flow):.1f} us, of 64 tiles"
            )
        for reason, count in flow.rare.items():
            rare[reason] = rare.get(reason, 0) + count
        for place in flow.untold:
            if place:
                untold.setdefault((Path(place[0]).name, place[1]), set()).add(kernel.split("<")[0])
    lines += ["", "Left out as rarely taken, instructions in all kernels and why:"]
    lines += [f"    {count:6}  {reason}" for reason, count in sorted(rare.items(), key=lambda item: -item[1])]
    lines += ["", "Loops whose rounds no comment tells (`// times: 4`), counted once:"]
    lines += [
        f"    {file}:{line} in {', '.join(sorted(kernels))}"
        for (file, line), kernels in sorted(untold.items())
    ]
    return "\n".join(lines)


def has_tile(kernel):
    return kernel.startswith(("find_extremes", "accumulate", "pair_weights"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="*", type=Path, help="default: every csrc/cuda/*.cu")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--hot", default="90a", choices=ARCHITECTURES, help="whose hot paths are counted")
    parser.add_argument("--json", type=Path, help="write everything here, too")
    parser.add_argument("--readme", action="store_true", help="write the tables of csrc/cuda/README.md")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--build-time", action="store_true", help="only how long setup.py's compilations take"
    )
    options = parser.parse_args()
    if find_nvcc() is None:
        parser.error("nvcc is not on the PATH")
    if options.build_time:
        seconds, together = build_seconds(options.sources or sources(), options.jobs)
        for name, of_one in seconds.items():
            print(f"{of_one:7.1f} s  {name}")
        print(f"{together:7.1f} s  all, {options.jobs} at a time")
        return
    architectures = tuple(options.arch or ARCHITECTURES)
    try:
        kernels = analyse_all(options.sources, architectures, options.jobs)
    except CompileError as error:
        parser.exit(1, f"{error}\n")
    print(table(kernels, architectures))
    if find_nvdisasm() is None:
        print("\nInstructions were not counted: pip install nvidia-cuda-nvdisasm")
        return
    if not options.sources and architectures == ARCHITECTURES:
        from . import machine_record

        machine_record.write(kernels)
    of_formulas = hot_flows(options.sources or sources(), options.hot)
    print(f"\nsm_{options.hot}. " + hot_table(of_formulas))
    bounds = []
    if not options.sources:
        from . import issue_slots

        bounds = issue_slots.bounds(of_formulas["multi_similarity"])
        print("\n" + issue_slots.table(bounds))
        if options.readme:
            names = demangle([name for kernels in of_formulas.values() for name in kernels])

            def short(name):
                return shorten(names[name])

            counted.write(counted.markdown(of_formulas, bounds, short, pairs_of, fold_seconds))
    if options.json:
        rows = [asdict(kernel) | {"instructions": matrix_instructions(kernel)} for kernel in kernels]
        everything = {
            "nvcc": nvcc_build(),
            "kernels": rows,
            "bounds": [asdict(bound) for bound in bounds],
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
