"""The recipes of examples/recipes train, each where its package is installed; `make recipes` installs all."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.release

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "accelerate_loop": "accelerate",
    "lightning_module": "lightning",
    "pml_trainer": "pytorch_metric_learning",
    "sentence_transformer": "sentence_transformers",
    "timm_backbone": "timm",
}
# PyPI's torchvision is built for a torch with CUDA: beside another its operators do not load, so it cannot be
# imported. timm needs none of them; the one that the import asks for is declared.
PREPARE = """
import runpy, sys, torch
try:
    import torchvision
except RuntimeError:
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[module]
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except ImportError:
    pass
torch.manual_seed(0)
runpy.run_module(sys.argv[1], run_name="__main__")
"""


def loss_of(*command: str) -> float:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return float(result.stdout.split("loss ")[-1].split()[0])


def test_every_recipe_is_tried():
    assert {path.stem for path in (ROOT / "examples/recipes").glob("*.py")} == PACKAGES.keys()


@pytest.mark.parametrize("recipe", PACKAGES)
def test_recipe(recipe):
    if importlib.util.find_spec(PACKAGES[recipe]) is None:
        pytest.skip(f"{PACKAGES[recipe]} is not installed")
    assert 0 < loss_of("-c", PREPARE, f"examples.recipes.{recipe}") < UNTRAINED[recipe]
