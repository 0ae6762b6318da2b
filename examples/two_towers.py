"""``python -m examples.two_towers``: two small networks learn that two halves of an image belong together.

One network sees the upper half of a handwritten digit, the other the lower half; SigLIP's loss, with a scale
and a bias that learn, pulls the halves of one image together. Beside it the same training in plain PyTorch.
Draws how well halves find each other, in both directions, and the scale, by step.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dml_cuda

LOSSES = ("siglip", "clip")
RECALLS = ("upper finds lower", "lower finds upper")


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.normalize(a, dim=1) @ nn.functional.normalize(b, dim=1).T


class PlainSigLIP(nn.Module):
    def __init__(self, scale: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.scale, self.bias = scale, bias

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        logits = (
            self.scale * nn.functional.normalize(a, dim=1) @ nn.functional.normalize(b, dim=1).T + self.bias
        )
        z = 2 * torch.eye(len(a)) - 1
        return -nn.functional.logsigmoid(z * logits).sum(1).mean()


class PlainCLIP(nn.Module):
    def __init__(self, temperature: nn.Parameter) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        logits = nn.functional.normalize(a, dim=1) @ nn.functional.normalize(b, dim=1).T / self.temperature
        target = torch.arange(len(a))
        return (
            nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
        ) / 2


def make_loss(name: str, plain: bool) -> nn.Module:
    """The loss with parameters that learn, and the scale of its logits."""
    if name == "siglip":
        kind = PlainSigLIP if plain else dml_cuda.SigLIPLoss
        return kind(scale=nn.Parameter(torch.tensor(10.0)), bias=nn.Parameter(torch.tensor(-5.0)))
    return (PlainCLIP if plain else dml_cuda.CLIPLoss)(temperature=nn.Parameter(torch.tensor(0.1)))


def scale_of(loss: nn.Module) -> float:
    return float(loss.scale) if hasattr(loss, "scale") else 1 / float(loss.temperature)


def halves() -> tuple[Tensor, Tensor]:
    """``[1797, 32]`` each: the upper and the lower half of scikit-learn's digits."""
    images = torch.from_numpy(load_digits().images).float() / 16
    return images[:, :4].flatten(1), images[:, 4:].flatten(1)


def tower() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))


@torch.no_grad()
def recalls(towers: list[nn.Module], held_out: list[Tensor]) -> tuple[float, float]:
    """The share of held-out halves whose nearest neighbour in the other tower is their own."""
    nearest = cosines(*(net(x) for net, x in zip(towers, held_out, strict=True)))
    own = torch.arange(len(nearest))
    return tuple(float((s.argmax(1) == own).float().mean()) for s in (nearest, nearest.T))


def train(name: str, plain: bool, steps: int, seed: int = 0) -> dict[str, list[float]]:
    """Trains both towers; by step the loss and the scale, and every 20 steps the recalls."""
    torch.manual_seed(seed)
    data, towers, loss = halves(), [tower(), tower()], make_loss(name, plain)
    kept, held_out = ([x[part] for x in data] for part in (slice(0, 1500), slice(1500, None)))
    learned = [p for module in (*towers, loss) for p in module.parameters()]
    optimizer = torch.optim.Adam(learned, lr=2e-3)
    log: dict[str, list[float]] = {key: [] for key in ("loss", "scale", *RECALLS)}
    for step in range(steps):
        rows = torch.randint(0, 1500, (256,))
        value = loss(*(net(x[rows]) for net, x in zip(towers, kept, strict=True)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        log["loss"].append(value.item())
        log["scale"].append(scale_of(loss))
        if step % 20 == 0 or step == steps - 1:
            for key, recall in zip(
                ("upper finds lower", "lower finds upper"), recalls(towers, held_out), strict=True
            ):
                log[key].append(recall)
    return log


def plot(logs: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for (label, log), style in zip(logs.items(), ("-", "--"), strict=True):
        axes[0].plot(log["loss"], style, label=label)
        axes[2].plot(log["scale"], style, label=label)
        for key in RECALLS:
            steps = [20 * k for k in range(len(log[key]))]
            axes[1].plot(steps, log[key], style, label=f"{key}, {label}")
    for axis, title in zip(axes, ("loss", "recall@1 of held-out halves", "scale of the logits"), strict=True):
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(options: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.two_towers", description=__doc__)
    parser.add_argument("--loss", choices=LOSSES, default="siglip")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("out"))
    chosen = parser.parse_args(options)
    logs = {
        "dml_cuda": train(chosen.loss, False, chosen.steps),
        "plain PyTorch": train(chosen.loss, True, chosen.steps),
    }
    for label, log in logs.items():
        found = ", ".join(f"{key} {log[key][-1]:.1%}" for key in RECALLS)
        first, last = log["loss"][0], log["loss"][-1]
        print(f"{label}: loss {first:.3f} -> {last:.3f}, {found}, scale {log['scale'][-1]:.2f}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    plot(logs, chosen.out / "two_towers.png")
    print(f"wrote {chosen.out / 'two_towers.png'}")


if __name__ == "__main__":
    main()
