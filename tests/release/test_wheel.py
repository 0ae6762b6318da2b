"""What `make wheel` has put into dist/: content, installation without a compiler or the sources, import."""

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import dml_cuda
from tools import import_time

pytestmark = pytest.mark.release

ROOT = Path(__file__).parents[2]
MIB = 2**20

TRAINING = """
import json, torch, dml_cuda

torch.manual_seed(0)
network = torch.nn.Linear(32, 16)
loss_fn = dml_cuda.MultiSimilarityLoss(epsilon=0.1)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
labels = torch.arange(8).repeat_interleave(4)
images = torch.eye(8, 32)[labels] + 0.3 * torch.randn(32, 32)
losses = []
for step in range(5):
    loss = loss_fn(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
print(json.dumps({"file": dml_cuda.__file__, "losses": losses, "version": dml_cuda.__version__}))
"""


def built(pattern: str) -> Path:
    found = sorted((ROOT / "dist").glob(pattern), key=lambda path: path.stat().st_mtime)
    assert found, f"no {pattern} in dist/: run `make wheel` first"
    return found[-1]


@pytest.fixture(scope="module")
def wheel() -> Path:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return built(f"dml_cuda-*-{python}-{python}-*.whl")


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a new environment with the wheel, which borrows torch and what torch needs."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    packages.joinpath("borrowed.pth").write_text("\n".join(borrowed))  # after the environment's own packages
    return python


def run(python: Path, code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs code where there is no compiler and no source tree, unless the environment says otherwise."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX", "CC")}
    alone = {**kept, "PATH": str(python.parent), "DML_CUDA_CACHE": str(folder / "cache"), **environment}
    return subprocess.run(
        [str(python), "-c", code], cwd=folder, env=alone, capture_output=True, text=True, check=False
    )


def test_name(wheel):
    minor = ".".join(torch.__version__.split(".")[:2])
    info = dml_cuda.build_info()["cuda"]
    kernels = "cu" + info["version"].replace(".", "") if info else "cpu"
    assert re.fullmatch(
        rf"dml_cuda-\d+\.\d+\.\d+\+torch{re.escape(minor)}{kernels}-cp\d+-cp\d+-manylinux_\d+_\d+_\w+\.whl",
        wheel.name,
    )


def test_content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    assert f"Version: {wheel.name.split('-')[1]}\n" in text
    assert "License-Expression: MIT\n" in text
    assert f"Requires-Dist: torch=={'.'.join(torch.__version__.split('.')[:2])}.*\n" in text
    for name in ("py.typed", "_C.pyi", "csrc/losses/formula.h", "csrc/custom/library.cpp"):
        assert f"dml_cuda/{name}" in names
    sources = {f"dml_cuda/{path.relative_to(ROOT)}" for path in (ROOT / "csrc").rglob("*.*")}
    assert {name for name in sources if name.endswith((".h", ".cpp", ".cu", ".cuh"))} <= set(names)
    for licence in ("LICENSE", "licenses/pybind11.txt", "licenses/pytorch.txt"):
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in names)
    (library,) = (name for name in names if ".so" in name)  # none of torch's
    assert library.startswith("dml_cuda/_C.")
    assert not any(name.startswith(("tests/", "examples/", "docs/", "benchmarks/")) for name in names)
    assert wheel.stat().st_size <= (40 if dml_cuda.build_info()["cuda"] else 15) * MIB


def test_stripped(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if ".so" in name)
        library = archive.extract(name, tmp_path)
    sections = subprocess.run(["readelf", "-SW", library], capture_output=True, text=True, check=True).stdout
    assert ".dynsym" in sections
    assert ".symtab" not in sections
    assert ".debug" not in sections


def test_sdist():
    path = built("dml_cuda-*.tar.gz")
    assert "+" not in path.name  # sources fit every torch
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "licenses/pytorch.txt",
        "CHANGELOG.md",
        "dml_cuda/_C.pyi",
    }
    assert wanted <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")} <= names


def test_trains_without_a_compiler(python, tmp_path):
    result = run(python, TRAINING, tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert Path(report["file"]).is_relative_to(python.parent.parent)
    assert report["losses"][-1] < report["losses"][0]


COMPILES = """
import dml_cuda, torch
loss_fn = dml_cuda.compile_loss(SOURCE)()
labels = torch.arange(8).repeat_interleave(4)
print(float(loss_fn(torch.randn(32, 16), labels)))
"""


def test_compile_loss_from_the_wheel(python, tmp_path):
    source = sorted((ROOT / "examples/custom_losses").glob("*.h"))[0]
    code = COMPILES.replace("SOURCE", repr(source.read_text()))
    missing = run(python, code, tmp_path)
    assert missing.returncode != 0
    assert "dml_cuda.compile_loss: no C++ compiler (c++) was found; install one" in missing.stderr
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja, the compiler
    compiled = run(python, code, tmp_path, PATH=scripts)
    assert compiled.returncode == 0, compiled.stderr
    assert torch.tensor(float(compiled.stdout)).isfinite()


def test_import_loads_no_compiler(python):
    """torch._dynamo takes longer than all of dml_cuda; `make release` prints the time."""
    (run,) = import_time.measurements(python, 1)
    assert run["dynamo"] == []


def test_another_torch(python, tmp_path):
    code = "import torch; torch.__version__ = '2.99.1+cu999'; torch.version.cuda = '99.9'; import dml_cuda"
    result = run(python, code, tmp_path)
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith(f"ImportError: the compiled extension of dml_cuda {dml_cuda.__version__}")
    assert f"it was built for torch {torch.__version__}" in message
    public = dml_cuda.__version__.partition("+")[0]
    assert f"install the wheel dml_cuda-{public}+torch2.99cu999, or build it: in a clone" in message
    assert "pip install --no-build-isolation" in message


def test_build_isolation_is_explained():
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", os.devnull, str(ROOT)]
    result = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert "dml_cuda cannot be built: PyTorch is not importable" in output
    assert "pip install --no-build-isolation ." in output
