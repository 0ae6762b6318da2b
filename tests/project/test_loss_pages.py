"""Every loss has a page with its figure and a place in the API reference; the choice chart names losses."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

import dml_cuda
from benchmarks.losses import LOSSES, short_name
from docs.figures import choosing, loss_weights

ROOT = Path(__file__).parents[2]
NAMES = {short_name(loss.__name__) for loss in LOSSES.values()}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_page(name):
    page = (ROOT / f"docs/losses/{name}.md").read_text()
    assert f"(../figures/losses/{name}.png)" in page
    assert (ROOT / f"docs/figures/losses/{name}.png").is_file()
    assert "## When to use it\n" in page
    assert f".. autoclass:: dml_cuda.{LOSSES[name].__name__}\n" in page
    assert f"\n   {LOSSES[name].__name__}\n" in (ROOT / "docs/api.md").read_text()


def test_every_public_class_is_documented():
    pages = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    classes = [name for name in dml_cuda.__all__ if isinstance(getattr(dml_cuda, name), type)]
    assert [name for name in classes if f".. autoclass:: dml_cuda.{name}\n" not in pages] == []


def test_no_page_is_left_of_a_loss_that_went():
    assert {path.stem for path in (ROOT / "docs/losses").glob("*.md")} == LOSSES.keys()


def test_a_figure_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_weights, "MOVING", torch.linspace(-0.2, 0.9, 5, dtype=torch.float64))
    for name in ("circle", "triplet_margin", "proxy_anchor"):
        loss_weights.draw(name, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    choosing.draw(tmp_path / "choosing.png")
    assert (tmp_path / "choosing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["contrastive", "generalized_lifted_structure"])
def test_both_ways_to_a_weight_agree(name):
    """Losses of triplets have no weights of pairs: theirs come from angles. On losses that have both:"""
    cosines = torch.tensor([0.6, 0.2, 0.55, 0.5, 0.7], dtype=torch.float64)
    is_positive = torch.tensor([True, True, False, False, False])
    by_angle = loss_weights.by_angle(name, cosines, is_positive)
    torch.testing.assert_close(by_angle, loss_weights.of_pairs(name, cosines, is_positive))
    assert (by_angle[:2] < 0).all()  # positives are pulled
    assert (by_angle[2:] > 0).any()


@pytest.mark.parametrize("name", LOSSES)
def test_positives_are_pulled_and_negatives_pushed(name):
    assert loss_weights.weight(name, "positive", 0.1, 0.5) < 0
    near = 0.57 if name == "fast_ap" else 0.9  # which pushes negatives in bins that hold positives
    assert loss_weights.weight(name, "negative", near, 0.5) > 0


def test_the_chart_names_losses():
    named = {loss for _, replies in choosing.CHART.values() for losses in replies.values() for loss in losses}
    assert named <= NAMES
