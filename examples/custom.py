"""``python -m examples.custom``: two losses that dml_cuda has not, checked, compared and trained with.

``docs/custom_loss.md`` tells how they are written.
"""

import argparse

import torch
from torch import Tensor

import dml_cuda

from . import custom_losses
from .data import distort, load
from .retrieval import embed, scores
from .training import make_network, train


def _losses() -> dict[str, tuple[torch.nn.Module, torch.nn.Module]]:
    """Ours, and the same in plain PyTorch. Soft, with a small margin: the network is not trained yet."""
    unified, arc_con = custom_losses.unified_loss(), custom_losses.arc_con_loss()
    backends = "fused", "reference"
    return {
        "unified": tuple(unified(scale=4.0, backend=backend) for backend in backends),
        "ArcCon": tuple(arc_con(scale=8.0, margin=0.02, backend=backend) for backend in backends),
    }


def _gradient(loss_fn: torch.nn.Module, embeddings: Tensor, labels: Tensor) -> Tensor:
    x = embeddings.clone().requires_grad_()
    return torch.autograd.grad(loss_fn(x, labels), x)[0]


def run(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """For each loss: how far its gradient is from plain PyTorch's, Recall@1 before and after."""
    data = load(arguments.data)
    found = {}
    for name, (ours, plain) in _losses().items():
        dml_cuda.check_loss(ours)
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        network = make_network()
        batches = distort(data.held_out_images, generator).split(512)
        before = embed(network, batches, "cpu")
        gradients = [_gradient(f, before, data.held_out_labels) for f in (ours, plain)]
        train(network, data.train_images, data.train_labels, arguments.steps, "cpu", generator, loss_fn=ours)
        after = embed(network, batches, "cpu")
        recalls = [scores(rows, data.held_out_labels)["Recall@1"] for rows in (before, after)]
        difference = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
        found[name] = {"difference": difference, "before": recalls[0], "after": recalls[1]}
        print(
            f"{name}: gradient beside plain PyTorch's {difference:.1e}, Recall@1 on new classes "
            f"{recalls[0]:.1%} before, {recalls[1]:.1%} after"
        )
    return found


def parse(options: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.custom", description=__doc__)
    parser.add_argument("--data", choices=("auto", "digits", "fashion-mnist"), default="auto")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default %(default)s)")
    return parser.parse_args(options)


if __name__ == "__main__":
    run(parse())
