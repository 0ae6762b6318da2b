"""The recipe for a new pair loss is short: few files spell the losses, all others derive from them."""

import re
import subprocess
from pathlib import Path

import pytest
from cases.losses import EVERY_LOSS, LOSSES

ROOT = Path(__file__).parents[2]
SOURCES = ("*.py", "*.h", "*.cpp", "*.cu", "*.cuh", "*.toml", "Makefile")
MOST = 8


def spelling(loss):
    """The names of a loss in source: its class, its function and its formula; as words, and case counts."""
    return {loss.module.__name__, loss.function.__name__, loss.name}


def is_source(path):
    return (ROOT / path).is_file() and not path.startswith(("dml_cuda/pml/", "tests/pml/"))


@pytest.fixture(scope="module")
def spelt():
    """The tracked source files that spell each loss. Pages and generated results are no sources, and the
    adapters are a step of their own, for the losses that pytorch-metric-learning has too."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this is no checkout: git lists no files")
    paths = [path for path in listed.stdout.split("\0") if is_source(path)]
    words = {path: set(re.findall(r"\w+", (ROOT / path).read_text())) for path in paths}
    return {
        name: {path for path, found in words.items() if found & spelling(loss)}
        for name, loss in LOSSES.items()
    }


def recipe(loss, spelt):
    """The files that spell every loss, which a new one is entered in, and the two of its own."""
    own = {f"csrc/losses/{loss.name}.h", f"dml_cuda/losses/{loss.name}.py"}
    assert all((ROOT / path).is_file() for path in own)
    return own | set.intersection(*spelt.values())


@pytest.mark.check
@EVERY_LOSS
def test_few_files_must_spell_a_loss(loss, spelt):
    found = recipe(loss, spelt)
    assert len(found) <= MOST, sorted(found)


@pytest.mark.check
def test_those_files_are_enough(spelt):
    """A loss needs no other: one is spelt nowhere else, but in tests that take it as their example."""
    others = {name: spelt[name] - recipe(loss, spelt) for name, loss in LOSSES.items()}
    fewest = min(others.values(), key=len)
    assert not {path for path in fewest if not path.startswith("tests/")}, others
