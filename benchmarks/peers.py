"""Who is measured. A peer turns a case and its batch into a step: a function that does one pass over it."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dml_cuda import functional
from examples import custom_losses

from .cases import CUDA_GRAPH_LIMIT, CUSTOM_LOSSES, Case
from .chunked import chunked_loss
from .losses import PAIR_LOSSES, RANKING_LOSSES
from .measure import available_bytes

try:
    from pytorch_metric_learning import losses as pml_losses
    from pytorch_metric_learning import miners as pml_miners
except ImportError:
    pml_losses = pml_miners = None

# One case of many shapes, dtypes and losses follows another through the same compiled functions.
torch._dynamo.config.recompile_limit = 256

Step = Callable[[], tuple[Tensor, ...]]
Maker = Callable[[Case, Tensor, Tensor], Step]


class Unavailable(Exception):
    """This peer cannot run this case; the message says why."""


def require_pml() -> None:
    if pml_losses is None:
        raise Unavailable("pytorch-metric-learning is not installed")


def loss_step(
    case: Case, loss_fn: Callable[[Tensor, Tensor], Tensor], embeddings: Tensor, labels: Tensor
) -> Step:
    """One forward pass, or one forward and backward pass; returns the loss, and its gradient if asked for."""

    def forward():
        return (loss_fn(embeddings, labels),)

    def forward_backward():
        loss = loss_fn(embeddings, labels)
        return loss.detach(), *torch.autograd.grad(loss, embeddings)

    return forward_backward if case.backward else forward


def matmuls(case: Case, embeddings: Tensor, labels: Tensor) -> Step:
    """The matmuls alone, into memory already there: S = X X^T, and for backward S X and S^T X."""
    x = F.normalize(embeddings.detach(), dim=1)  # its products stay inside the range of float16
    s = x.new_empty(case.n, case.n)
    out = torch.empty_like(x)

    def step():
        torch.mm(x, x.T, out=s)
        if case.backward:
            torch.mm(s, x, out=out)
            torch.mm(s.T, x, out=out)
        return ()

    return step


def _loss(case: Case, backend: str, **more: int) -> Callable[[Tensor, Tensor], Tensor]:
    options = {"backend": backend, **more}
    if case.loss not in RANKING_LOSSES:  # which do not mine
        options["epsilon"] = case.epsilon
    if case.loss in CUSTOM_LOSSES:
        return getattr(custom_losses, f"{case.loss}_loss")()(**options)
    return partial(getattr(functional, f"{case.loss}_loss"), **options)


def fused(case: Case, embeddings: Tensor, labels: Tensor) -> Step:
    """This package's kernels."""
    return loss_step(case, _loss(case, "fused"), embeddings, labels)


def cached(case: Case, embeddings: Tensor, labels: Tensor) -> Step:
    """The same, with all similarities kept for backward."""
    return loss_step(case, _loss(case, "fused", cache_bytes=1 << 40), embeddings, labels)


def fused_graph(case: Case, embeddings: Tensor, labels: Tensor) -> Step:
    """The fused kernels replayed from a CUDA graph: their time without the host's."""
    if not embeddings.is_cuda:
        raise Unavailable("CUDA only")
    if case.n > CUDA_GRAPH_LIMIT:
        raise Unavailable(f"measured up to {CUDA_GRAPH_LIMIT} rows")
    step = fused(case, embeddings, labels)
    side = torch.cuda.Stream()  # capture must not see first-call work, which a side stream does beforehand
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay():
        graph.replay()
        return result

    return replay


def dense_reference(case: Case, embeddings: Tensor, labels: Tensor) -> Step:
    """The readable PyTorch reference, which stores the whole matrix."""
    return loss_step(case, _loss(case, "reference"), embeddings, labels)


def compiled(case: Case, embeddings: Tensor, labels: Tensor) -> Step:
    """The reference under torch.compile."""
    return loss_step(case, torch.compile(_loss(case, "reference"), dynamic=True), embeddings, labels)


# The classes of both packages have the same names.
_CLASS_NAMES = CUSTOM_LOSSES | {name: cls.__name__ for name, cls in (PAIR_LOSSES | RANKING_LOSSES).items()}


# What pytorch-metric-learning wants to be given: our defaults.
PML_OPTIONS = {"ranked_list": {"margin": 0.4, "Tn": 10.0}}


def _check_triplets(case: Case, device: torch.device) -> None:
    """pytorch-metric-learning crosses these losses' positive pairs with negative ones, or pairs with rows."""
    positives, negatives = case.n * (case.per_class - 1), case.n * (case.n - case.per_class)
    numbers = dict.fromkeys(("nt_xent", "tuplet_margin", "lifted_structure"), positives * negatives)
    numbers["smooth_ap"] = case.n**3
    if case.loss not in numbers:
        return
    needed = 5 * numbers[case.loss] * torch.finfo(getattr(torch, case.dtype)).bits // 8
    if needed > available_bytes(device):
        raise Unavailable(f"needs {needed / 2**30:,.0f} GiB")


def pml(case: Case, embeddings: Tensor, labels: Tensor) -> Step:
    """pytorch-metric-learning's loss, with its miner where the case mines."""
    require_pml()
    loss_class = getattr(pml_losses, _CLASS_NAMES[case.loss], None)
    if loss_class is None:
        raise Unavailable("none")
    _check_triplets(case, embeddings.device)
    loss_fn = loss_class(**PML_OPTIONS.get(case.loss, {}))
    if case.epsilon is None:
        return loss_step(case, loss_fn, embeddings, labels)
    miner = pml_miners.MultiSimilarityMiner(case.epsilon)
    return loss_step(case, lambda x, y: loss_fn(x, y, miner(x, y)), embeddings, labels)


def chunked(case: Case, embeddings: Tensor, labels: Tensor) -> Step:
    """Plain PyTorch over chunks of rows: what little memory costs without a kernel."""
    return loss_step(case, lambda x, y: chunked_loss(x, y, case.loss, case.epsilon), embeddings, labels)


PEERS: dict[str, Maker] = {
    "matmuls": matmuls,
    "fused": fused,
    "cached": cached,
    "fused_graph": fused_graph,
    "reference": dense_reference,
    "compiled": compiled,
    "pml": pml,
    "chunked": chunked,
}

TITLES = {
    "matmuls": "matmuls",
    "fused": "dml_cuda",
    "cached": "dml_cuda, all cached",
    "fused_graph": "dml_cuda, CUDA graph",
    "reference": "PyTorch",
    "compiled": "compiled",
    "pml": "PML",
    "chunked": "chunked",
}
LEGEND = """\
times: medians, ± half the interquartile range; ratios of medians; vs 3.0x: dml_cuda takes a third of the time
matmuls: S = X X^T and, for backward, S X and S^T X, into memory already there
all cached: with cache_bytes for all similarities
PyTorch: the dense reference, eager; compiled: the same under torch.compile
PML: pytorch-metric-learning's loss, and its miner where mined
chunked: PyTorch over chunks of rows, recomputed in backward"""
