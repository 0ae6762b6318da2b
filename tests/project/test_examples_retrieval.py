"""Scores and neighbours of the examples against loops; batches, splits and meters."""

import itertools
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("faiss")
pytest.importorskip("pytorch_metric_learning")

import numpy as np

from examples import data, retrieval, splits
from examples.meters import StepTimer


def embeddings_and_labels(count, classes, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, 6, generator=generator)
    return F.normalize(centres[labels] + spread * torch.randn(count, 6, generator=generator), dim=1), labels


def recall_by_loops(queries, labels, searched, searched_labels, k, same):
    hits = []
    for i, query in enumerate(queries):
        order = (searched @ query).argsort(descending=True).tolist()
        others = [j for j in order if not (same and j == i)]
        if any(searched_labels[j] == labels[i] for j in others):
            hits.append(any(searched_labels[j] == labels[i] for j in others[:k]))
    return sum(hits) / len(hits)


@pytest.mark.parametrize("with_gallery", [False, True])
def test_recall_is_what_loops_find(with_gallery):
    queries, labels = embeddings_and_labels(70, 9, 1.5, seed=1)
    labels[0] = 100  # nothing to find: does not count
    gallery, gallery_labels = embeddings_and_labels(50, 9, 1.5, seed=1) if with_gallery else (None, None)
    found = retrieval.scores(queries, labels, gallery, gallery_labels)
    searched = (queries, labels) if gallery is None else (gallery, gallery_labels)
    for k in (1, 2, 4, 8):
        expected = recall_by_loops(queries, labels, *searched, k, same=not with_gallery)
        assert 0.1 < expected < 1
        assert found[f"Recall@{k}"] == pytest.approx(expected)


def test_scores_of_perfect_and_of_random_embeddings():
    labels = torch.arange(2).repeat_interleave(40)
    perfect = retrieval.scores(F.one_hot(labels).float() + 0.01 * torch.randn(80, 2), labels)
    assert set(perfect) == {"Recall@1", "Recall@2", "Recall@4", "Recall@8", "MAP@R", "NMI"}
    assert all(value == pytest.approx(1) for value in perfect.values())
    labels = torch.arange(5).repeat_interleave(40)
    random = retrieval.scores(F.normalize(torch.randn(200, 16), dim=1), labels)
    assert random["Recall@1"] < 0.5
    assert random["MAP@R"] < 0.3
    assert random["NMI"] < 0.5


def test_small_classes_do_not_shorten_the_search():
    """Recall@8 looks at eight neighbours, also where no class has more than two images."""
    embeddings, labels = F.normalize(torch.randn(40, 3), dim=1), torch.arange(20).repeat(2)
    expected = recall_by_loops(embeddings, labels, embeddings, labels, 8, same=True)
    assert retrieval.scores(embeddings, labels)["Recall@8"] == pytest.approx(expected)


def test_neighbours_are_the_nearest_others():
    embeddings = F.normalize(torch.randn(30, 4), dim=1)
    for query, found in zip([3, 17], retrieval.neighbours(embeddings, [3, 17], 5), strict=True):
        order = [i for i in (embeddings @ embeddings[query]).argsort(descending=True).tolist() if i != query]
        assert found.tolist() == order[:5]
    gallery = F.normalize(torch.randn(20, 4), dim=1)
    assert retrieval.neighbours(embeddings, [3], 20, gallery)[0].tolist() == (
        (gallery @ embeddings[3]).argsort(descending=True).tolist()
    )


def test_digits_are_split_by_class_and_the_test_images_fixed():
    torch.manual_seed(1)
    split = splits.open_split("digits", image_size=64)
    torch.manual_seed(2)
    again = splits.open_split("digits", image_size=64)
    assert torch.equal(split.test.images, again.test.images)
    assert set(split.train.labels.tolist()) == set(range(10))  # five digits in two orientations
    assert set(split.test.labels.tolist()) == {2 * digit + turn for digit in range(5, 10) for turn in (0, 1)}
    assert len(split.train) + len(split.test) == 2 * 1797
    upright, turned = (split.train.images[split.train.labels == label] for label in (0, 1))
    assert torch.equal(turned, torch.rot90(upright, 1, (2, 3)))


def test_fashion_mnist_from_a_folder_of_ones_own(tmp_path):
    if not data.FASHION_FOLDER.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    (tmp_path / "here").symlink_to(data.FASHION_FOLDER)
    split = splits.open_split(f"fashion-mnist:{tmp_path / 'here'}", image_size=64)
    assert len(split.train.labels.unique()) == len(split.test.labels.unique()) == 20
    assert split.train.images.shape[1:] == (1, 28, 28)


def test_a_broken_fashion_mnist_is_named(tmp_path):
    with pytest.raises(data.DataError, match=r"is not at .*nowhere.*make data"):
        splits.open_split(f"fashion-mnist:{tmp_path / 'nowhere'}", image_size=64)
    with pytest.raises(data.DataError, match=r"cannot read .*train-labels"):
        splits.open_split(f"fashion-mnist:{tmp_path}", image_size=64)


@pytest.mark.parametrize("spec", ["mnist", "folder:", "digits:here", "auto:x", ""])
def test_unknown_data_is_explained(spec):
    with pytest.raises(data.DataError, match="it is auto, digits, fashion-mnist"):
        splits.open_split(spec, image_size=64)


def test_every_batch_is_balanced():
    split = splits.open_split("digits", image_size=64)
    batches = list(splits.training_batches(split.train, batch_size=24, per_class=6, steps=5, workers=0))
    assert len(batches) == 5
    for images, labels in batches:
        assert images.shape == (24, 1, 16, 16)
        assert labels.unique(return_counts=True)[1].tolist() == [6, 6, 6, 6]


def test_same_seed_same_batches():
    def draw():
        torch.manual_seed(3)
        np.random.seed(3)
        split = splits.open_split("digits", image_size=64)
        return list(itertools.islice(splits.training_batches(split.train, 16, 4, steps=3, workers=0), 3))

    for (images, labels), (other_images, other_labels) in zip(draw(), draw(), strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize(
    ("batch_size", "per_class", "message"),
    [
        (30, 4, "no multiple of --per-class 4"),
        (64, 4, "needs 16 classes, and there are 10"),
        (8, 8, "no negatives"),
    ],
)
def test_batches_that_cannot_be_made(batch_size, per_class, message):
    labels = torch.arange(10).repeat(5)
    with pytest.raises(data.DataError, match=message):
        splits.check_batch(labels, batch_size, per_class)


def test_the_step_timer_sees_the_loss():
    timer = StepTimer(torch.device("cpu"))
    x = torch.ones(3, requires_grad=True)
    timer.start()
    time.sleep(0.03)
    embeddings = x * 2
    timer.embedded(embeddings)
    time.sleep(0.06)
    embeddings.sum().backward()
    time.sleep(0.03)
    step, loss = timer.stop()
    assert 0.06 <= loss < step - 0.055
    assert step >= 0.12


# In a process of its own: what other tests leave for later, or give back meanwhile, would count.
SPANS = """
import torch
from examples.meters import PeakMemory

memory = PeakMemory(torch.device("cpu"))

def span(inside):
    memory.start()
    torch.ones(inside << 20, dtype=torch.uint8)
    memory.stop()
    print(memory.bytes or 0)

span(0)
torch.ones(100 << 20, dtype=torch.uint8)
span(0)
span(100)
"""


def test_peak_memory_is_that_between_start_and_stop():
    run = subprocess.run([sys.executable, "-c", SPANS], capture_output=True, text=True, check=True)
    idle, idle_again, raised = (int(size) for size in run.stdout.split())
    if not idle:
        pytest.skip("this system does not tell a process's peak memory")
    assert idle_again < idle + (50 << 20)
    assert raised > idle + (90 << 20)
