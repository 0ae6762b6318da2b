"""The modules of the package import each other in one direction, and not what few programs use."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import dml_cuda

PACKAGE = Path(dml_cuda.__file__).parent


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, modules):
    """The modules of the package that a file imports while it is loaded."""
    package = path.relative_to(PACKAGE.parent).parts[:-1]
    tree = ast.parse(path.read_text())
    inside = {id(x) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for x in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0 and id(node) not in inside:
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in modules else base


def loaded(name, used):
    """A used module and the packages that are loaded before it, but for those that hold the user."""
    parts = used.split(".")
    return {".".join(parts[:k]) for k in range(2, len(parts) + 1)} - {name} - _packages_of(name)


def _packages_of(name):
    parts = name.split(".")
    return {".".join(parts[:k]) for k in range(1, len(parts))}


def test_no_import_cycle():
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    graph = {
        name: set().union(*(loaded(name, used) for used in imports(path, files)))
        for name, path in files.items()
    }
    assert "dml_cuda.miners.mined" in graph["dml_cuda._inputs.batch"]
    assert "dml_cuda.reference" in graph["dml_cuda.miners.mined"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_import_leaves_out_the_compiler_of_torch():
    """It would take as long again as torch. How long an import may take, tests/release says of the wheel."""
    code = "import sys, dml_cuda, dml_cuda.pml; assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
