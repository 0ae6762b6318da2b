"""Every Python block of the documentation runs, page by page, from a small batch."""

import re
from pathlib import Path

import pytest
import torch

import dml_cuda

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"custom_loss.md", "several_gpus.md"}  # tests/custom compiles; tests/distributed has processes
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if BLOCK.search(page.read_text())]


def batch() -> dict[str, object]:
    """The names that the pages take for granted."""
    embeddings = torch.randn(32, 128, requires_grad=True)
    labels = torch.arange(8).repeat_interleave(4)
    loss_fn = dml_cuda.MultiSimilarityLoss()
    return {
        "torch": torch,
        "dml_cuda": dml_cuda,
        "embeddings": embeddings,
        "labels": labels,
        "ref_emb": torch.randn(64, 128),
        "ref_labels": torch.arange(64) % 8,
        "loss_fn": loss_fn,
        "indices_tuple": dml_cuda.MultiSimilarityMiner(0.1)(embeddings, labels),
    }


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ELSEWHERE], ids=lambda page: page.stem
)
def test_code_runs(page):
    if "dml_cuda.pml" in page.read_text():
        pytest.importorskip("pytorch_metric_learning")
    names = batch()
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, page.name, "exec"), names)
    loss = names.get("loss")
    if loss is not None:
        assert loss.isfinite()
    if loss is not None and ".backward()" not in page.read_text():
        loss.backward()
        assert names["embeddings"].grad.isfinite().all()
