"""What the CUDA compiler made of every kernel for every architecture, kept in csrc/cuda/machine_code.json.

`make ptxas` writes it, one line for a kernel and an architecture: so a change of registers, spills or
tensor-core instructions is seen in review. Beside each source stand the files that it is made of and a hash
of them: while this is theirs, and nvcc is the same, tests take from here what they need not compile again.
"""

import hashlib
import json
import subprocess
from functools import cache
from pathlib import Path

from . import machine_code
from .machine_code import ROOT, Kernel

RECORD = ROOT / "csrc" / "cuda" / "machine_code.json"
FIELDS = ("name", "registers", "spill_bytes", "stack_bytes", "static_shared_bytes", "max_threads")


def facts(kernel: Kernel) -> list:
    """What is kept of a kernel: FIELDS and its tensor-core instructions."""
    return [*(getattr(kernel, name) for name in FIELDS), machine_code.matrix_instructions(kernel)]


def depends(source: Path) -> list[str]:
    """The files of this repository that a source is made of, from the root."""
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    command = [machine_code.find_nvcc(), *machine_code.FLAGS, *include, "-MM", str(source)]
    rule = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, _, names = rule.replace("\\\n", " ").partition(":")
    paths = {Path(name).resolve() for name in names.split()}
    return sorted(str(path.relative_to(ROOT)) for path in paths if path.is_relative_to(ROOT))


def digest(names: list[str]) -> str:
    """Of files and of how they are compiled."""
    flags = *machine_code.FLAGS, *sorted(machine_code.FRONT_ENDS.items())
    found = hashlib.sha256(repr(flags).encode())
    for name in names:
        path = ROOT / name
        found.update(name.encode() + b"\0" + (path.read_bytes() if path.exists() else b""))
    return found.hexdigest()


@cache
def read() -> dict:
    return json.loads(RECORD.read_text())


def is_of_this_nvcc() -> bool:
    return read()["nvcc"] == machine_code.nvcc_build()


def is_current(source: Path) -> bool:
    """Whether the record is of the source as it is."""
    known = read()["sources"].get(source.name)
    return known is not None and known["digest"] == digest(known["depends"])


def kernels(source: Path, architecture: str) -> list[Kernel]:
    """As machine_code.analyse, of what is kept."""
    made = []
    for values in read()["sources"][source.name]["kernels"][architecture]:
        numbers = dict(zip(FIELDS, values, strict=False))
        kernel = Kernel(source=source.name, architecture=architecture, **numbers)
        kernel.instructions = values[-1]
        made.append(machine_code.with_occupancy(kernel))
    return made


def write(found: list[Kernel]) -> None:
    """Keeps the kernels of all sources for all architectures."""
    sources = {}
    for source in machine_code.sources():
        names = depends(source)
        of = {
            architecture: [
                facts(k) for k in found if (k.source, k.architecture) == (source.name, architecture)
            ]
            for architecture in machine_code.ARCHITECTURES
        }
        sources[source.name] = {"depends": names, "digest": digest(names), "kernels": of}
    record = {"nvcc": machine_code.nvcc_build(), "fields": [*FIELDS, "instructions"], "sources": sources}
    RECORD.write_text(_a_line_each(record) + "\n")
    read.cache_clear()


def _a_line_each(value: object, depth: int = 0) -> str:
    """JSON with a line for each list of plain values."""
    inside, end = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict) and any(isinstance(item, dict | list) for item in value.values()):
        items = (f"{json.dumps(name)}: {_a_line_each(item, depth + 1)}" for name, item in value.items())
        return "{" + inside + f",{inside}".join(items) + end + "}"
    if isinstance(value, list) and any(isinstance(item, list) for item in value):
        return "[" + inside + f",{inside}".join(json.dumps(item) for item in value) + end + "]"
    return json.dumps(value)
