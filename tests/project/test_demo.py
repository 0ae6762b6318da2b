"""The demo learns from real images, and writes what it says."""

from functools import partial

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from examples import data, demo, picture


@pytest.mark.long
def test_learns_digits(tmp_path, monkeypatch):
    # Few steps: what t-SNE draws is looked at by nobody here.
    monkeypatch.setattr(picture, "TSNE", partial(picture.TSNE, max_iter=250))
    options = [
        "--data",
        "digits",
        "--device",
        "cpu",
        "--steps",
        "80",
        "--no-benchmark",
        "--out",
        str(tmp_path),
    ]
    found = demo.run(demo.parse(options))
    assert found["after"]["Recall@1"] > found["before"]["Recall@1"]
    assert found["after"]["MAP@R"] > found["before"]["MAP@R"] + 0.05
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_classes_are_not_trained_on():
    digits = data.load("digits")
    assert set(digits.held_out_labels.tolist()) == set(digits.held_out)
    assert not set(digits.train_labels.tolist()) & set(digits.held_out)
    assert len(digits.train_labels) + len(digits.held_out_labels) == 1797


def test_reads_fashion_mnist_where_it_is_installed():
    if not data.FASHION_FOLDER.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    fashion = data.load("auto")
    assert fashion.title == "Fashion-MNIST"
    assert fashion.train_images.shape[1:] == (1, 28, 28)
    assert 0 <= fashion.train_images.min() < fashion.train_images.max() <= 1


def test_missing_fashion_mnist_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "FASHION_FOLDER", tmp_path / "nowhere")
    assert data.load("auto").title == "Handwritten digits"
    with pytest.raises(SystemExit, match="apt install dataset-fashion-mnist"):
        demo.run(demo.parse(["--data", "fashion-mnist"]))


@pytest.mark.parametrize("loss", ["multi_similarity", "circle"])
def test_fused_equals_reference_on_a_real_batch(loss):
    digits = data.load("digits")
    embeddings = digits.held_out_images[:200].flatten(1) - 0.3
    found = demo.compare_with_reference(embeddings, digits.held_out_labels[:200], loss)
    assert found["loss"] < 1e-5
    assert found["gradient"] < 1e-4


def test_distorted_images_keep_their_shape():
    images = data.load("digits").held_out_images[:5]
    moved = data.distort(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert not torch.equal(moved, images)
