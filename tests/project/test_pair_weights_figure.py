"""The figure of docs/pair_weights.md is drawn, and shows what its text says."""

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import dml_cuda
from docs.figures.pair_weights import LOSSES, PANELS, ROW, weight

ROOT = Path(__file__).parents[2]
OWN, OTHERS, POSITIVES = PANELS.values()
SIMILARITIES = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85)  # none of them at a mining bound


def weights(name: str, place, epsilon: float | None = None) -> list[float]:
    return [weight(LOSSES[name](epsilon=epsilon, reduction="sum"), place(s)) for s in SIMILARITIES]


LEAST = {  # how much nearer than the negative a positive at this cosine is
    "cosine": lambda s: s - ROW.own,
    "euclidean": lambda s: math.sqrt(2 - 2 * ROW.own) - math.sqrt(2 - 2 * s),
}


def rises(values: list[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def falls(values: list[float]) -> bool:
    return all(a > b for a, b in pairwise(values))


@pytest.mark.whole
def test_draws(tmp_path):
    path = tmp_path / "new" / "figure.png"
    subprocess.run(
        [sys.executable, "-m", "docs.figures.pair_weights", "--out", str(path)], cwd=ROOT, check=True
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 150_000


def movement(values: list[float]) -> str:
    """In the words of the page."""
    if rises(values):
        return "grows"
    if falls(values):
        return "shrinks"
    different = {round(value, 12) for value in values}
    return "–" if len(different) == 1 else "switches" if len(different) == 2 else "moves"


def table() -> dict[str, list[str]]:
    rows = [line.strip("| \n").split(" | ") for line in (ROOT / "docs/pair_weights.md").open() if "|" in line]
    return {name: kinds for name, *kinds in rows if name in LOSSES}


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_of_the_page(name):
    assert [movement(weights(name, place)) for place in PANELS.values()] == table()[name]


# The others weigh each pair by its own similarity alone.
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("Contrastive", "BinomialDeviance")])
def test_more_negatives_take_their_share(name):
    loss = LOSSES[name]()
    assert falls([weight(loss, ROW._replace(others=(0.5,) * count)) for count in (1, 2, 4, 8)])


@pytest.mark.parametrize("name", LOSSES)
def test_mining_drops_a_negative_below_all_positives(name):
    mined, every = weights(name, POSITIVES, epsilon=0.1), weights(name, POSITIVES)
    nearer = [LEAST[LOSSES[name].formula.similarity](s) for s in SIMILARITIES]
    kept = [s < 0.1 for s in nearer]
    assert mined == [pytest.approx(w) if keep else 0 for w, keep in zip(every, kept, strict=True)]
    assert any(kept)
    assert not all(kept)


def test_formulas_of_the_page():
    row = ROW._replace(own=0.6, others=(0.5, 0.4), positives=(0.7, 0.8))
    negatives = (row.own, *row.others)
    exponentials = [math.exp(50 * (s - 0.5)) for s in negatives]
    assert weight(dml_cuda.MultiSimilarityLoss(), row) == pytest.approx(
        exponentials[0] / (1 + sum(exponentials))
    )
    m, gamma = 0.4, 80
    push = [math.exp(gamma * max(s + m, 0) * (s - m)) for s in negatives]
    pull = [math.exp(-gamma * max(1 + m - s, 0) * (s - (1 - m))) for s in row.positives]
    solved = 1 / (1 + 1 / (sum(push) * sum(pull)))
    expected = gamma * max(row.own + m, 0) * push[0] / sum(push) * solved
    assert weight(dml_cuda.CircleLoss(), row) == pytest.approx(expected)
