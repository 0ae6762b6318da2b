"""The figure of docs/sampling.md is drawn, and shows what its text says."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from docs.figures.sampling import STRATEGIES, distances, trained, untrained

ROOT = Path(__file__).parents[2]


@pytest.mark.whole
def test_draws(tmp_path):
    path = tmp_path / "new" / "figure.png"
    subprocess.run([sys.executable, "docs/figures/sampling.py", "--out", str(path)], cwd=ROOT, check=True)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 150_000


@pytest.fixture(scope="module")
def found():
    return {
        make.__name__: {name: distances(name, make, 6) for name in STRATEGIES}
        for make in (untrained, trained)
    }


def test_what_the_page_says(found):
    start, later = found["untrained"], found["trained"]
    assert start["uniform"].mean() == pytest.approx(math.sqrt(2), abs=0.05)
    assert start["semi-hard"].mean() > math.sqrt(2) > 2 * later["semi-hard"].mean()
    for at in (start, later):
        assert at["hard"].mean() < at["distance-weighted"].mean() < at["uniform"].mean()
        assert at["distance-weighted"].std() > max(at["hard"].std(), at["semi-hard"].std())
        assert at["distance-weighted"].max() < 1.4
    flat = torch.histc(start["distance-weighted"], 8, 1.0, 1.4)
    assert flat.max() < 1.3 * flat.min()
    every = torch.histc(start["uniform"], 8, 1.0, 1.4)
    assert every.max() > 2 * every.min()


def test_the_table_names_every_strategy():
    rows = [line.split(" | ")[0].strip("| ") for line in (ROOT / "docs/sampling.md").open() if "|" in line]
    assert rows[2:] == list(STRATEGIES)
