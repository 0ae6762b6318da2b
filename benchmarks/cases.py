"""What is measured: a loss on a batch, and the groups of such cases that one run goes through."""

from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from .losses import CLASS_LOSSES, LOSSES, PAIR_LOSSES, RANKING_LOSSES, short_name

ROWS_PER_CLASS = 4
CENTRE_SCALE = 0.5
NOISE = {"noisy": 1.0, "separated": 0.5}
EPSILON = 0.1

DENSE_PEERS = ("matmuls", "fused", "reference", "compiled", "pml", "chunked")
STREAMING_PEERS = ("fused", "chunked")  # those that never hold the N x N matrix
CUDA_GRAPH_LIMIT = 1024  # rows up to which a CUDA-graph replay is measured too


# Formulas compiled on demand, of examples/custom_losses, by the name of their class.
CUSTOM_LOSSES = {"unified": "UnifiedLoss", "arc_con": "ArcConLoss"}
RANKING_PEERS = ("matmuls", "fused", "reference", "pml")
FAMILY_PEERS = ("matmuls", "fused", "reference", "compiled", "pml")


def loss_title(loss: str) -> str:
    """What tables call a loss of dml_cuda or of CUSTOM_LOSSES."""
    return (
        short_name(LOSSES[loss].__name__) if loss in LOSSES else f"{short_name(CUSTOM_LOSSES[loss])}, custom"
    )


@dataclass(frozen=True)
class Case:
    """One loss on one batch of ``n`` rows of ``d`` columns."""

    group: str
    loss: str  # a key of LOSSES or CUSTOM_LOSSES
    n: int
    d: int
    epsilon: float | None = EPSILON  # the miner's margin; None takes every pair
    batch: str = "noisy"  # or "separated"
    dtype: str = "float32"
    precision: str = "highest"  # torch.set_float32_matmul_precision
    backward: bool = True
    peers: tuple[str, ...] = DENSE_PEERS
    once: bool = False  # so slow that a single call of each peer must do, cold
    per_class: int = ROWS_PER_CLASS  # rows of a class

    compared = ("loss_difference", "gradient_difference")  # what the outputs of a peer are, in order

    @property
    def loss_title(self) -> str:
        return f"{loss_title(self.loss)}, {'all pairs' if self.epsilon is None else 'mined'}"

    @property
    def size(self) -> str:
        return f"{self.n}x{self.d}"

    @property
    def dtype_title(self) -> str:
        return self.dtype if self.precision == "highest" else f"{self.dtype} ({self.precision})"

    @property
    def passes(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def name(self) -> str:
        fields = (
            self.group,
            self.loss_title,
            self.size,
            self.batch,
            self.dtype_title,
            self.passes,
        )
        return "/".join(fields).replace(", ", "-").replace(" ", "-")


_PART_TITLES = {
    "list": "miner, pairs listed",
    "count": "miner, pairs counted",
    "pairs": "{} given pairs",
    "triplets": "{} given triplets",
    "mined": "{} given its miner",
    "memory": "cross-batch memory, {} and miner",
    "classifier": "class-level {}",
    # of triplets
    "every": "{}, all triplets",
    "semihard": "{}, semi-hard miner",
    "batch_hard": "{}, batch-hard miner",
    "distance_weighted": "{}, distance-weighted miner",
    "bank": "{} against a bank",
}


@dataclass(frozen=True)
class DropInCase(Case):
    """A part that stands in for another package's, on a batch of ``n`` rows."""

    peers: tuple[str, ...] = ("fused", "pml")
    part: str = "mined"  # or another key of _PART_TITLES
    columns: int | None = None  # what the batch is compared with, if not with itself

    @property
    def compared(self) -> tuple[str, ...]:
        if self.part == "distance_weighted":
            return ()  # everybody draws other triplets
        mines = self.part in ("list", "count")
        return ("pairs_difference",) if mines else (*Case.compared, "weights_gradient_difference")

    @property
    def loss_title(self) -> str:
        return _PART_TITLES[self.part].format(loss_title(self.loss))

    @property
    def size(self) -> str:
        return f"{self.n}x{self.d}" if self.columns is None else f"{self.n}x{self.columns}x{self.d}"


TRAINED = tuple(product(("multi_similarity", "circle"), (EPSILON, None)))


def _training_cases(shapes: dict[str, list[tuple[int, int]]], losses=TRAINED, **options) -> list[Case]:
    return [
        Case("train", loss, n, d, epsilon, batch, **options)
        for loss, epsilon in losses
        for batch, sizes in shapes.items()
        for n, d in sizes
    ]


def _pml_protocol() -> list[Case]:
    """The sizes that pytorch-metric-learning publishes its own timings for."""
    sizes, dtypes = (128, 512, 2048), ("float32", "bfloat16")
    losses = ("multi_similarity", "circle")
    return [Case("pml", loss, n, 128, dtype=dtype) for dtype in dtypes for loss in losses for n in sizes]


def _forward_cases() -> list[Case]:
    return [
        Case("forward", loss, 2048, 512, batch=batch, backward=False)
        for loss in ("multi_similarity", "circle")
        for batch in NOISE
    ]


def _memory_case(
    n: int,
    d: int,
    peers: tuple[str, ...] = STREAMING_PEERS,
    loss: str = "multi_similarity",
    epsilon: float | None = EPSILON,
) -> Case:
    return Case("memory", loss, n, d, epsilon, peers=peers, once=True)


def _cache_cases() -> list[Case]:
    """Batches of which the default cache holds a part on the CPU, and nothing on a GPU."""
    return [
        Case("cache", "multi_similarity", 8192, d, epsilon, dtype=dtype, peers=("fused", "cached"))
        for d, dtype in ((128, "float32"), (512, "float32"), (512, "bfloat16"))
        for epsilon in (EPSILON, None)
    ]


def _family_cases() -> list[Case]:
    """Every loss over all pairs, with its default options."""
    return [
        Case("family", loss, n, d, epsilon=None, peers=FAMILY_PEERS)
        for loss in (*PAIR_LOSSES, *CUSTOM_LOSSES)
        for n, d in ((512, 128), (2048, 512))
    ]


def _ranking_cases() -> list[Case]:
    """Losses of ranks, and one of pairs for the time beside which theirs are judged."""
    case = partial(Case, "ranking", epsilon=None, per_class=8)
    return [
        *(
            case(loss, n, 128, batch=batch, peers=peers)
            for loss, peers in (("circle", FAMILY_PEERS[:3]), *((x, RANKING_PEERS) for x in RANKING_LOSSES))
            for n, batch in ((128, "noisy"), (2048, "noisy"), (2048, "separated"))
        ),
        *(case(loss, 16_384, 32, peers=("fused",), once=True) for loss in RANKING_LOSSES),
    ]


def _head_peers(loss: str) -> tuple[str, ...]:
    """pytorch-metric-learning has circle loss on pairs only."""
    peers = "matmuls", "fused", "reference", "pml"
    return peers[:3] if loss == "circle_classifier" else peers


def _drop_in_cases() -> list[Case]:
    case = partial(DropInCase, "drop-in")
    mining = product(("list", "count"), (512, 2048), (128, 512))
    listed = product(("multi_similarity", "circle"), ("pairs", "triplets"))
    batches = (8192, False), (65_536, True)
    several_centres = ("soft_triple", "sub_center_arc_face")
    heads = [loss for loss in CLASS_LOSSES if loss not in several_centres]
    classifier = partial(case, epsilon=None, part="classifier")
    return [
        *(case("multi_similarity", n, d, backward=False, part=part) for part, n, d in mining),
        *(case(loss, 2048, 512, part=part) for loss, part in listed),
        *(case("multi_similarity", n, d, part="mined") for n, d in ((512, 128), (2048, 512))),
        *(case("multi_similarity", 512, 128, part="memory", columns=m, once=once) for m, once in batches),
        *(
            classifier(loss, n, 128, columns=c, peers=_head_peers(loss))
            for loss, (n, c) in product(heads, ((128, 100), (512, 10_000), (512, 100_000)))
        ),
        *(
            classifier(loss, n, 128, columns=c, peers=("fused", "reference", "pml"))
            for loss, (n, c) in product(several_centres, ((128, 100), (512, 10_000)))
        ),
    ]


def _triplet_cases() -> list[Case]:
    """Two losses of pairs among them, for the times beside which those of triplets are judged."""
    case = partial(DropInCase, "triplets", epsilon=None)
    small, large = (512, 128), (2048, 512)
    mined = partial(DropInCase, "triplets", "multi_similarity", peers=("fused",))
    return [
        *(case("triplet_margin", *small, part=part) for part in ("every", "semihard")),
        *(case("triplet_margin", *size, part="batch_hard") for size in (small, large)),
        case("margin", *small, part="every"),
        case("margin", *small, part="distance_weighted"),
        case("margin", *large, part="distance_weighted", once=True),
        case("triplet_margin", 4096, 512, part="every", peers=("fused",)),
        mined(4096, 512, part="mined"),
        case("triplet_margin", 512, 128, part="bank", columns=65_536, peers=("fused",)),
        mined(512, 128, part="bank", columns=65_536),
    ]


def _cpu_cases() -> list[Case]:
    shapes = {"noisy": [(512, 512), (2048, 512), (4096, 512)], "separated": [(2048, 512)]}
    memory = [_memory_case(32_768, 64), _memory_case(32_768, 64, ("fused",), "nt_xent", None)]
    family = _family_cases()
    return [
        *_training_cases(shapes),
        *_pml_protocol(),
        *family,
        *_forward_cases(),
        *memory,
        *_drop_in_cases(),
        *_triplet_cases(),
        *_ranking_cases(),
        *_cache_cases(),
    ]


def _cuda_cases() -> list[Case]:
    shapes = {"noisy": [(512, 512), (1024, 128), (4096, 512), (8192, 512)], "separated": [(4096, 512)]}
    large = {"noisy": [(4096, 512), (8192, 128)], "separated": [(4096, 512)]}
    mined = [("multi_similarity", EPSILON)]
    cases = _training_cases(shapes)
    cases += _training_cases(large, mined, precision="high")
    for dtype in ("float16", "bfloat16"):
        cases += _training_cases(large, mined, dtype=dtype)
    memory = [_memory_case(131_072, 128), _memory_case(1_000_000, 128, peers=("fused",))]
    others = *_pml_protocol(), *_family_cases(), *_forward_cases(), *memory, *_drop_in_cases()
    return [*cases, *others, *_triplet_cases(), *_cache_cases()]


def default_cases(device: str) -> list[Case]:
    """Every case of a full run on ``"cpu"`` or ``"cuda"``."""
    return _cuda_cases() if device == "cuda" else _cpu_cases()


def quick_cases() -> list[Case]:
    """Five cases for two tables in under a minute; torch.compile is left out, it takes longer than that."""
    peers = tuple(peer for peer in DENSE_PEERS if peer != "compiled")
    sizes = (("noisy", 128, 128), ("noisy", 512, 128), ("noisy", 2048, 512), ("separated", 2048, 512))
    cases = [Case("quick", "multi_similarity", n, d, batch=batch, peers=peers) for batch, n, d in sizes]
    return [*cases, DropInCase("quick", "multi_similarity", 512, 128, part="mined")]


def make_batch(case: Case, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings ``[n, d]`` that require a gradient and labels ``[n]``, rows in random order.

    Class centres are ``0.5 * N(0, 1)``; each row is its centre plus ``N(0, 1)`` noise ("noisy": early
    in training) or half of that ("separated": late in training).
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(case.n) // case.per_class
    labels = labels[torch.randperm(case.n, generator=generator)]
    classes = -(-case.n // case.per_class)
    centres = CENTRE_SCALE * torch.randn(classes, case.d, generator=generator)
    noise = NOISE[case.batch] * torch.randn(case.n, case.d, generator=generator)
    embeddings = (centres[labels] + noise).to(device, getattr(torch, case.dtype))
    return embeddings.requires_grad_(), labels.to(device)
