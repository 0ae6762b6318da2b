"""The CUDA engine's stand-alone driver (bench_kernels.cu), without torch: ``python -m tools.bench_kernels``.

Builds it with nvcc for the GPU that is there (or ``--arch 90a``), sources in parallel, cached by content, and
runs the parts that are named (see there). ``--build`` only builds.
"""

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.machine_code import FLAGS, find_nvcc, with_headers

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "bench_kernels"
DRIVER = ROOT / "tools" / "bench_kernels.cu"
PARTS = [[], "dependent", "wgmma", "constants", "check", "times", "cases"]
ENGINE = [
    *sorted((ROOT / "csrc" / "cuda" / "instantiations").glob("*.cu")),
    *(ROOT / "csrc" / "cuda" / f"{name}.cu" for name in ("pairs/pair_loss", "ring/ring", "ring/rows")),
]


def _make(command: list[str], inputs: list[Path], name: str, suffix: str = "") -> Path:
    digest = hashlib.sha256(" ".join(command).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    target = CACHE / f"{name}-{digest.hexdigest()[:20]}{suffix}"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f"{os.getpid()}-{target.name}")
        subprocess.run([*command, "-o", str(fresh)], check=True)
        os.replace(fresh, target)
    return target


def _native_architecture() -> str:
    ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    found = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip().replace(".", "")
    return "90a" if found == "90" else found


def build(architecture: str = "native", jobs: int | None = None) -> Path:
    """The program for one architecture."""
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("tools.bench_kernels: found no nvcc")
    if architecture == "native":
        architecture = _native_architecture()
    where = [f"-arch=sm_{architecture}"]
    common = [nvcc, *FLAGS, *where, f"-I{ROOT / 'csrc'}"]

    def compiled(source: Path) -> Path:
        return _make([*common, "-c", str(source)], with_headers(source), source.stem, ".o")

    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*ENGINE, DRIVER]))
    return _make([nvcc, *where, *map(str, objects)], objects, "bench_kernels")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=PARTS)
    parser.add_argument("--arch", default="native", help="such as 90a (the GPU that is there)")
    parser.add_argument("--jobs", type=int, help="sources compiled at a time (all cores)")
    parser.add_argument("--build", action="store_true", help="only build")
    parser.add_argument("--under", default="", help='a tool to run it under, such as "ncu -c 9"')
    arguments = parser.parse_args()
    program = build(arguments.arch, arguments.jobs)
    print(program, file=sys.stderr)
    if arguments.build:
        return 0
    command = [*shlex.split(arguments.under), str(program), *arguments.parts]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
