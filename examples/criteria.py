"""The losses to choose from: dml_cuda's, and pytorch-metric-learning's (PML) to compare them with."""

from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from torch import Tensor, nn

import dml_cuda
from benchmarks.losses import CLASS_LOSSES, short_name
from benchmarks.losses import LOSSES as ALL_LOSSES
from benchmarks.peers import PML_OPTIONS
from dml_cuda.distributed import DistributedLoss

LOSSES = {
    f"{prefix}{name}": f"{short_name(loss.__name__)}, {package}"
    for name, loss in ALL_LOSSES.items()
    for prefix, package, classes in (
        ("", "dml_cuda", dml_cuda),
        ("pml-", "pytorch-metric-learning", pml_losses),
    )
    if hasattr(classes, loss.__name__)
}

# By their name in --miner: their class, what it is called and what of the paper's it is given.
MINERS = {
    "multi_similarity": ("MultiSimilarityMiner", "mined with epsilon {epsilon}", {}),
    "batch_hard": ("BatchHardMiner", "batch-hard triplets", {}),
    "semihard": ("TripletMarginMiner", "semi-hard triplets", {"type_of_triplets": "semihard"}),
    "distance_weighted": ("DistanceWeightedMiner", "distance-weighted triplets", {}),
}
# Where none is chosen.
DEFAULT_MINERS = {
    "multi_similarity": "multi_similarity",
    "triplet_margin": "semihard",
    "margin": "distance_weighted",
}

TAU = 0.2  # SoftTriple's regulariser, as in its paper; pytorch-metric-learning has none


def make_head(name: str, classes: int, embedding_size: int) -> nn.Module:
    """A class-level loss, one of ``CLASS_LOSSES`` or with ``pml-`` before it."""
    more = {"tau": TAU} if name == "soft_triple" else {}
    return _loss_class(name)(classes, embedding_size, **more)


def _loss_class(name: str) -> type[nn.Module]:
    """Both libraries' classes have the same names."""
    losses = pml_losses if name.startswith("pml-") else dml_cuda
    return getattr(losses, ALL_LOSSES[name.removeprefix("pml-")].__name__)


class _Mined(nn.Module):
    """A loss on the pairs that a miner keeps."""

    def __init__(self, loss: nn.Module, miner: nn.Module | None) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        pairs = None if self.miner is None else self.miner(embeddings, labels)
        return self.loss(embeddings, labels, pairs)


def make_loss(
    name: str,
    miner: str | None,
    epsilon: float,
    gamma: float,
    embedding_size: int,
    classes: int,
    memory: int = 0,
    distributed: bool = False,
) -> nn.Module:
    """A module to call with embeddings and labels in ``range(classes)``.

    Both libraries' classes have the same names, the same arguments and the same defaults.

    Args:
        name: one of ``LOSSES``.
        miner: one of ``MINERS``, or ``None`` to keep every pair or triplet.
        epsilon: the margin of the multi-similarity miner.
        gamma: the scale of circle loss; the others have none.
        embedding_size: the columns of the embeddings.
        classes: how many are trained on.
        memory: how many rows of earlier batches to pair the batch with (cross-batch memory), 0 for none.
        distributed: whether the batch is spread over processes; not with pytorch-metric-learning's losses.
    """
    is_pml = name.startswith("pml-")
    losses, miners = (pml_losses, pml_miners) if is_pml else (dml_cuda, dml_cuda)
    kind = name.removeprefix("pml-")
    if kind in CLASS_LOSSES:
        loss = make_head(name, classes, embedding_size)
    else:
        options = PML_OPTIONS.get(kind, {}) if is_pml else {}
        loss = _loss_class(name)(**options, **({"gamma": gamma} if kind == "circle" else {}))
    if distributed:
        loss = DistributedLoss(loss)
    find = None
    if miner is not None:
        cls, _, options = MINERS[miner]
        find = getattr(miners, cls)(
            **options, **({"epsilon": epsilon} if miner == "multi_similarity" else {})
        )
    if memory:
        return losses.CrossBatchMemory(loss, embedding_size, memory, miner=find)
    return _Mined(loss, find)
