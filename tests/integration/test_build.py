"""The build: what it reports, and what it says when something it needs is missing."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

try:
    import tomllib
except ImportError:  # Python 3.10
    import pip._vendor.tomli as tomllib

import dml_cuda
from tools import machine_code

ROOT = Path(__file__).parents[2]

# Stands for a torch built with CUDA, as far as setup.py asks before it compiles anything.
CUDA_TORCH = {
    "torch/__init__.py": "__version__ = '2.99.0'\nfrom . import __config__, version, cuda",
    "torch/__config__.py": "def parallel_info(): return 'ATen parallel backend: OpenMP'",
    "torch/version.py": "cuda = '13.0'",
    "torch/cuda.py": "def is_available(): return False",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": """
import os, sys
from setuptools import Extension
from setuptools.command.build_ext import build_ext as BuildExtension
CUDA_HOME = os.environ.get("CUDA_HOME")
def include_paths(device_type): return [os.path.join(CUDA_HOME, "include")]
def CppExtension(name, sources, extra_link_args, **_):
    print("linked with", extra_link_args, file=sys.stderr)
    return Extension(name, sources)
def CUDAExtension(name, sources, extra_compile_args, **_):
    print("architectures", os.environ["TORCH_CUDA_ARCH_LIST"])
    print("flags", *extra_compile_args["nvcc"])
    return Extension(name, sources)
""",
}
NO_TORCH = {"torch/__init__.py": "raise ImportError('no torch here')"}


def run_setup(tmp_path, *arguments, modules=None, **environment):
    """Runs setup.py with some modules replaced; everything it writes goes to tmp_path."""
    for name, text in (modules or {}).items():
        path = tmp_path / "modules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("DML_CUDA_BUILD", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST")
    }
    return subprocess.run(
        [sys.executable, "setup.py", *(arguments or ["--version"])],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(tmp_path / "modules"), **environment},
        capture_output=True,
        text=True,
    )


def assert_fails(run, *says):
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    position = 0
    for text in ("dml_cuda cannot be built", *says):
        position = run.stderr.index(text, position) + len(text)


def test_build_info():
    info = dml_cuda.build_info()
    assert info.keys() == {"version", "torch", "cuda", "cpu"}
    assert info["version"] == dml_cuda.__version__
    assert info["torch"] == torch.__version__
    if torch.version.cuda is None:
        assert info["cuda"] is None
    elif info["cuda"] is not None:
        assert info["cuda"]["version"] == torch.version.cuda
        assert info["cuda"]["architectures"]
    available = info["cpu"]["available"]
    assert available[0] == "baseline"
    assert set(available) <= {"baseline", "avx2", "avx512"}
    assert info["cpu"]["in_use"] == available[-1]
    for name in available:
        dml_cuda._C.set_cpu_instruction_set(name)
        assert dml_cuda.build_info()["cpu"]["in_use"] == name


def test_version(tmp_path):
    run = run_setup(tmp_path, modules=CUDA_TORCH)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == dml_cuda.__version__.partition("+")[0] + "+torch2.99cpu"


def test_version_with_cuda_kernels(tmp_path):
    run = run_setup(tmp_path, **toolkit(tmp_path))
    assert run.stdout.split()[-1] == dml_cuda.__version__.partition("+")[0] + "+torch2.99cu130"


@pytest.mark.parametrize(("command", "torch_wanted"), [("sdist", ">=2.11"), ("egg_info", "==2.99.*")])
def test_dependency_on_torch(tmp_path, command, torch_wanted):
    """What is built needs the torch that it was built for; sources fit all."""
    options = ["-d", str(tmp_path)] if command == "sdist" else []
    run = run_setup(
        tmp_path,
        "egg_info",
        "-e",
        str(tmp_path),
        *([command, *options] if options else []),
        modules=CUDA_TORCH,
    )
    assert run.returncode == 0, run.stderr
    assert f"torch{torch_wanted}" in (tmp_path / "dml_cuda.egg-info/requires.txt").read_text().split()


def test_one_version():
    """In the citation and at the top of the changelog too."""
    version = dml_cuda.__version__.partition("+")[0]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert changelog[changelog.index("\n## ") :].startswith(f"\n## {version} ")


def test_torch_missing(tmp_path):
    says = "PyTorch is not importable", "an environment", "Install torch first", "--no-build-isolation"
    assert_fails(run_setup(tmp_path, modules=NO_TORCH), *says)


def test_unknown_choice(tmp_path):
    run = run_setup(tmp_path, modules=CUDA_TORCH, DML_CUDA_BUILD="gpu")
    assert_fails(run, "DML_CUDA_BUILD='gpu'", "auto, cpu or cuda")


def test_cuda_forced_without_cuda_torch(tmp_path):
    modules = {**CUDA_TORCH, "torch/version.py": "cuda = None"}
    run = run_setup(tmp_path, modules=modules, DML_CUDA_BUILD="cuda")
    assert_fails(run, "2.99.0", "without CUDA", "Install a CUDA build of torch", "DML_CUDA_BUILD=cpu")


def test_cuda_forced_without_nvcc(tmp_path):
    run = run_setup(tmp_path, modules=CUDA_TORCH, DML_CUDA_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert_fails(run, "no nvcc", "CUDA_HOME", "DML_CUDA_BUILD=cpu")


def toolkit(folder, release="13.0", headers=True):
    """A CUDA toolkit, as far as setup.py looks at one."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    if headers:
        (folder / "include").mkdir(exist_ok=True)
        (folder / "include/cuda_runtime.h").touch()
    return {"modules": CUDA_TORCH, "CUDA_HOME": str(folder)}


@pytest.mark.parametrize("choice", ["auto", "cpu", "cuda"])
def test_cuda_found(tmp_path, choice):
    run = run_setup(tmp_path, **toolkit(tmp_path, headers=False), DML_CUDA_BUILD=choice)
    if choice != "cpu":
        assert_fails(run, str(tmp_path / "bin"), "cuda_runtime.h", "CUDA_HOME", "DML_CUDA_BUILD=cpu")
    run = run_setup(tmp_path, **toolkit(tmp_path), DML_CUDA_BUILD=choice)
    assert run.returncode == 0, run.stderr
    assert ("architectures 8.0;9.0;10.0;12.0+PTX" in run.stdout) == (choice != "cpu")
    run = run_setup(tmp_path, **toolkit(tmp_path), DML_CUDA_BUILD=choice, TORCH_CUDA_ARCH_LIST="9.0a")
    assert ("architectures 9.0a" in run.stdout) == (choice != "cpu")


@pytest.mark.parametrize(
    ("asked", "targets"),
    [
        (
            "",
            [
                "80,code=sm_80",
                "90a,code=sm_90a",
                "100,code=sm_100",
                "120,code=sm_120",
                "120,code=compute_120",
            ],
        ),
        ("8.6;9.0+PTX", ["80,code=sm_86", "90a,code=sm_90a", "90,code=compute_90"]),
        ("10.3 12.1", ["100,code=sm_103", "120,code=sm_121"]),
        ("9.0a;10.0a", ["90a,code=sm_90a", "100,code=sm_100a"]),
        ("Hopper", []),  # torch's builder knows the names
    ],
)
def test_one_front_end_for_several_architectures(tmp_path, asked, targets):
    run = run_setup(tmp_path, **toolkit(tmp_path), TORCH_CUDA_ARCH_LIST=asked)
    assert run.returncode == 0, run.stderr
    flags = [flag for flag in run.stdout.split() if flag.startswith("-gencode")]
    assert flags == [f"-gencode=arch=compute_{target}" for target in targets]
    assert ("-DDML_BUILDS_SM90A" in run.stdout.split()) == any("sm_90a" in target for target in targets)
    if not asked:  # what tools.machine_code compiles
        built = {flag.split("code=")[-1]: flag.split("compute_")[1].split(",")[0] for flag in flags[:4]}
        assert built == {f"sm_{a}": f for a, f in machine_code.FRONT_ENDS.items()}


def test_architectures_follow_the_compiler_not_torch(tmp_path):
    run = run_setup(tmp_path, **toolkit(tmp_path, release="12.6"))
    assert run.returncode == 0, run.stderr
    assert "architectures 8.0;9.0+PTX\n" in run.stdout


@pytest.mark.parametrize(
    ("asked", "built", "left_out"),
    [
        ("7.0;7.5;8.0;8.6;9.0+PTX", "8.0;8.6;9.0+PTX", "7.0, 7.5"),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "8.0;8.6;9.0;10.0;12.0+PTX", "7.5"),
        ("Volta;Turing;Ampere", "Ampere", "Volta, Turing"),
        ("5.2+PTX, 10.0a", "10.0a", "5.2+PTX"),
        ("", "8.0;9.0;10.0;12.0+PTX", None),
    ],
)
def test_architectures_that_are_too_old(tmp_path, asked, built, left_out):
    """As container images ask for them."""
    run = run_setup(tmp_path, **toolkit(tmp_path), TORCH_CUDA_ARCH_LIST=asked)
    assert run.returncode == 0, run.stderr
    assert f"architectures {built}\n" in run.stdout
    assert (f"no kernels for {left_out}: older than 8.0" in run.stderr) == (left_out is not None)


def test_only_architectures_that_are_too_old(tmp_path):
    run = run_setup(tmp_path, **toolkit(tmp_path), TORCH_CUDA_ARCH_LIST="7.0;7.5+PTX")
    assert_fails(run, "no architecture from 8.0 on", "7.0 7.5+PTX", "DML_CUDA_BUILD=cpu")


def test_every_gpu_of_the_machine(tmp_path):
    gpus = """
def is_available(): return True
def device_count(): return 4
def get_device_capability(i): return [(9, 0), (7, 5), (8, 6), (9, 0)][i]
"""
    options = toolkit(tmp_path)
    options["modules"] = {**CUDA_TORCH, "torch/cuda.py": gpus}
    run = run_setup(tmp_path, **options)
    assert run.returncode == 0, run.stderr
    assert "architectures 8.6;9.0\n" in run.stdout
    assert "7.5" in run.stderr


@pytest.mark.parametrize(
    ("compiler", "flags"), [("g++", []), ("g++ -static-libstdc++", ["-l:libstdc++.so.6"])]
)
def test_the_one_libstdcxx(tmp_path, compiler, flags):
    """Two of them in one process crash where a message prints a number."""
    run = run_setup(tmp_path, modules=CUDA_TORCH, DML_CUDA_BUILD="cpu", CXX=compiler)
    assert run.returncode == 0, run.stderr
    assert f"linked with {flags}" in run.stderr


def test_compiler_missing(tmp_path):
    build = ["build_ext", "--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    run = run_setup(tmp_path, *build, DML_CUDA_BUILD="cpu", CXX="no-such-compiler")
    assert_fails(run, "no-such-compiler", "apt install g++", "CXX")


def test_extension_that_does_not_fit_torch(tmp_path):
    """An extension that cannot be loaded says which torch it must be built for, and how."""
    package = tmp_path / "dml_cuda"
    package.mkdir()
    for source in (ROOT / "dml_cuda").glob("*.py"):
        (package / source.name).write_text(source.read_text())
    (package / "_C.py").write_text("raise ImportError('undefined symbol')")
    run = subprocess.run(
        [sys.executable, "-c", "import dml_cuda"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert run.returncode != 0
    message = run.stderr.strip().splitlines()[-1]
    assert "undefined symbol" in message
    assert torch.__version__ in message
    assert "pip install --no-build-isolation" in message


def test_a_checkout_before_the_installed_package(tmp_path):
    """Without an extension in the folder of the package, a rebuild elsewhere would not help."""
    package = tmp_path / "dml_cuda"
    package.mkdir()
    for source in (*(ROOT / "dml_cuda").glob("*.py"), ROOT / "dml_cuda" / "_C.pyi"):
        (package / source.name).write_text(source.read_text())
    no_finders = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]"
    run = subprocess.run(
        [sys.executable, "-c", f"{no_finders}; import dml_cuda"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert run.returncode != 0
    message = run.stderr.strip().splitlines()[-1]
    assert f"{package} has no compiled extension" in message
    assert f'pip install --no-build-isolation -e "{tmp_path}"' in message
    assert "start Python in another folder" in message


def test_the_install_block_of_the_readme(tmp_path):
    """It installs what the build requires, in place, and its last line runs in the clone."""
    requirements, install, check = (ROOT / "README.md").read_text().split("```")[1].strip().splitlines()
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert requirements.startswith("pip install torch ")
    assert set(shlex.split(requirements)[3:]) == set(required)
    assert install == "pip install --no-build-isolation -e ."
    _, *arguments = shlex.split(check)
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert dml_cuda.__version__ in run.stdout
