"""The recipes of examples/recipes train, each where its package is installed; `make recipes` installs all.

The one whose package the other tests need too is a part of `make test`.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

release = pytest.mark.release

ROOT = Path(__file__).parents[2]
BESIDE = Path(sys.prefix, "timm")  # timm and torchvision, where `make recipes` puts them
PACKAGES = {
    "accelerate_loop": "accelerate",
    "lightning_module": "lightning",
    "pml_trainer": "pytorch_metric_learning",
    "sentence_transformer": "sentence_transformers",
    "timm_backbone": "timm",
}
# PyPI's torchvision is built for a torch with CUDA: beside another its operators do not load, which fails the
# import. timm needs none of them; those that the import asks for are declared.
RUN = """
import runpy, sys, torch
try:
    import torchvision
except ImportError:
    pass
except RuntimeError:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name in ("nms", "qnms"):
        torch.library.define("torchvision::" + name, "(Tensor boxes, Tensor scores, float x) -> Tensor")
torch.manual_seed(0)
runpy.run_module(sys.argv[1], run_name="__main__")
"""


def losses_of(*command: str, path: str = "") -> tuple[float, float]:
    """The first and the last loss that a recipe prints."""
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    first, last = re.findall(r"loss (\S+) -> (\S+)", result.stdout)[-1]
    return float(first), float(last)


def test_every_recipe_is_tried():
    assert {path.stem for path in (ROOT / "examples/recipes").glob("*.py")} == PACKAGES.keys()


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name == "pml_trainer" else release) for name in PACKAGES]
)
def test_recipe(recipe):
    path = str(BESIDE) if recipe == "timm_backbone" else ""
    if not (importlib.util.find_spec(PACKAGES[recipe]) or Path(path, PACKAGES[recipe]).is_dir()):
        pytest.skip(f"{PACKAGES[recipe]} is not installed")
    first, last = losses_of("-c", RUN, f"examples.recipes.{recipe}", path=path)
    assert 0 < last < 0.8 * first


@release
def test_accelerate_on_two_processes():
    pytest.importorskip("accelerate")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    first, last = losses_of(*launch, *options, "-m", "examples.recipes.accelerate_loop")
    assert 0 < last < 0.8 * first
