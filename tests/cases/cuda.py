"""Cases and the comparison with brute force, for the emulated kernels and for those on a GPU."""

import itertools
from dataclasses import dataclass
from inspect import signature

import torch
from cases.losses import LOSSES
from oracle.pairs import ROWS, brute_force, mining_margin

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def to_tf32(x):
    """The nearest number with 10 bits after the point, ties away from zero."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()


@dataclass(frozen=True)
class Arithmetic:
    """A kind of kernel, what it does to its operands, and how far from the truth it may be.

    The tolerances are of norms, |x - truth| / |truth|. The similarities of float32 inputs have errors of
    a few 1e-7, which beta = 50 and gamma = 80 magnify. In the narrower kinds the weights, or the
    gradient itself, are rounded: 2^-12 on average for tf32 and float16, 2^-9 for bfloat16.
    """

    name: str
    dtype: torch.dtype
    precision: str = "full"
    rounded: object = None
    loss_tolerance: float = 2e-6
    grad_tolerance: float = 1e-5

    @property
    def of_numbers(self):
        """``rounded`` of NumPy's arrays."""
        return self.rounded and (lambda x: self.rounded(torch.from_numpy(x)).numpy())


ARITHMETICS = [
    Arithmetic("f64", F64, loss_tolerance=1e-13, grad_tolerance=1e-12),
    Arithmetic("f32", F32),
    Arithmetic("f32_tf32", F32, "tf32", to_tf32, grad_tolerance=1e-3),
    Arithmetic("f16", F16, grad_tolerance=1e-3),
    Arithmetic("bf16", BF16, grad_tolerance=8e-3),
]
BY_NAME = {a.name: a for a in ARITHMETICS}


def formula(name, similarity="cosine"):
    """The name of a pair loss in the ops, and parameters that suit the similarity."""
    loss = LOSSES[name]
    suitable = loss.on_distances if similarity.startswith("euclidean") else loss.on_cosines
    return name, tuple(loss.params(similarity, **suitable))


MS, CIRCLE, CONTRASTIVE, NT_XENT, SUP_CON = map(
    formula, ("multi_similarity", "circle", "contrastive", "nt_xent", "sup_con")
)
CIRCLE_NOT_DETACHED = ("circle", (*CIRCLE[1][:2], 0.0))
MARGIN_SOFTMAX = ("margin_softmax", (4.0, 0.1, 0.9553364891256061, 0.29552020666133955))  # an angle of 0.3
# Those that are no pair losses, on cosines and on distances.
OTHERS = {
    "margin_softmax": (MARGIN_SOFTMAX, ("margin_softmax", (4.0, 0.1, 1.0, 0.0))),
    "proxy_anchor": (("proxy_anchor", (0.1, 4.0)), ("proxy_anchor", (-1.0, 4.0))),
    "siglip": (("siglip", (4.0, -2.0)), ("siglip", (2.0, 2.0))),
    "ranked_list": (("ranked_list", (-0.2, 4.0, 0.01)), ("ranked_list", (-1.2, 4.0, 0.05))),
    "negatives_lse": (("negatives_lse", (0.2,)), ("negatives_lse", (0.5,))),
}
FORMULAS = [*map(formula, LOSSES), *(on_cosines for on_cosines, _ in OTHERS.values())]


def on_distances(name):
    """A formula with parameters for distances, whose similarities lie below 0. They are no cosines of angles:
    near a distance of 1 the derivative of an angle has no bound."""
    if name == "tuplet_margin":
        return name, (0.0, 8.0)
    return OTHERS[name][1] if name in OTHERS else formula(name, "euclidean")


@dataclass
class Case:
    q: torch.Tensor
    labels: torch.Tensor
    r: torch.Tensor | None = None
    ref_labels: torch.Tensor | None = None
    self_index: torch.Tensor | None = None
    num_valid_refs: torch.Tensor | None = None
    loss: tuple = MS
    epsilon: float | None = None
    similarity: str = "cosine"
    reduction: str = "mean"
    upstream: object = 1.0
    return_sums: bool = False
    mine_self_pair: bool = True

    def truth(self, arithmetic):
        name, params = self.loss
        # Those of the class-level formulas are not in the table: theirs are named as the truth names them.
        of_truth = list(signature(ROWS[name]).parameters)[2:]
        names = LOSSES[name].module.formula.parameters if name in LOSSES else of_truth
        params = dict(zip(names, params, strict=True))
        r, ref_labels = self.r, self.ref_labels
        if self.num_valid_refs is not None:
            used = self.num_valid_refs.clamp(0, len(r))
            r, ref_labels = r[:used], ref_labels[:used]
        of_rows = self.reduction == "none"
        truth = brute_force(
            name, self.q, self.labels, ref_emb=r, ref_labels=ref_labels, epsilon=self.epsilon,
            similarity=self.similarity, reduction=self.reduction,
            upstream=self.upstream * torch.ones(len(self.q)) if of_rows else None, self_index=self.self_index,
            mine_self_pair=self.mine_self_pair, rounded=arithmetic.of_numbers, levels=True,
            undivided=self.upstream.tolist() if self.return_sums else None, **params,
        )  # fmt: skip
        value = torch.as_tensor(truth.losses if of_rows else truth.loss, dtype=torch.float64)
        upstream = float(self.upstream) if not self.return_sums and not of_rows else 1.0
        grads = (truth.grad_emb, truth.grad_ref)
        grad_q, grad_r = (None if grad is None else upstream * torch.from_numpy(grad) for grad in grads)
        if self.num_valid_refs is not None:
            grad_r = torch.cat([grad_r, grad_r.new_zeros(len(self.r) - len(r), grad_r.shape[1])])
        return value, grad_q, grad_r


def surrounded(x, offset=0, gap=0, amid=torch.nan):
    """x amid NaN: before its first row, between its rows and after the last. What a kernel reads from
    there by mistake poisons its result; or, where a pair whose similarity is not finite would be looked at
    again, amid a large number. offset (elements) and gap decide how rows are aligned."""
    n, d = x.shape
    raw = torch.full((64 + offset + n * (d + gap) + 64,), amid, dtype=x.dtype)
    view = raw[64 + offset :].as_strided((n, d), (d + gap, 1))
    view.copy_(x)
    return view


LARGE_NUMBER = 3e3  # with sums of squares that are finite


def make(
    n, d, arithmetic, *, m=None, classes=8, spread=1.0, seed=0, offset=0, gap=0, amid=torch.nan, **options
):
    """A noisy batch around class centres in which no pair lies too near its mining threshold."""
    options = {"loss": MS, "similarity": "cosine", "epsilon": None, **options}
    for attempt in itertools.count(1000 * seed):
        g = torch.Generator().manual_seed(attempt)
        centres = torch.randn(classes, d, generator=g)

        def points(count, g=g, centres=centres):
            labels = torch.randint(classes, (count,), generator=g)
            x = (centres[labels] + spread * torch.randn(count, d, generator=g)).to(arithmetic.dtype)
            # Labels far apart and negative mean the same as 0, 1, 2.
            return surrounded(x, offset, gap, amid), labels * 1234567890123 - 4 * 1234567890123

        q, labels = points(n)
        r, ref_labels = points(m) if m is not None else (None, None)
        case = Case(q, labels, r, ref_labels, **options)
        if clear_margin(case, arithmetic):
            return case


def clear_margin(case, arithmetic):
    """Whether no pair lies too near its mining threshold."""
    sides = (case.q, case.labels, case.r, case.ref_labels)
    how = {"similarity": case.similarity, "rounded": arithmetic.of_numbers}
    margin = mining_margin(*sides, case.epsilon, **how)
    return margin > 2e-6


def of_similarity(loss, similarity, n, d, arithmetic, **options):
    """A case of a formula whose parameters suit the similarity."""
    name, _ = loss
    turns = name in ("margin_softmax", "tuplet_margin") and similarity == "dot"  # which has no angle either
    if similarity.startswith("euclidean") or turns:
        loss = on_distances(name)
    case = make(n, d, arithmetic, loss=loss, similarity=similarity, **options)
    if similarity in ("dot", "euclidean_raw"):
        case.q *= 0.25  # of order 1
        if case.r is not None:
            case.r *= 0.25
    return case


def make_from_refs(n, d, arithmetic, *, m, some=False, seed=0, **options):
    """A batch of which every row is one of the references; a tenth of those has a class of its own. With
    some, not every row says so, and two call a point themselves that is of another class."""
    for attempt in itertools.count(1000 * seed):
        case = make(n, d, arithmetic, m=m, seed=attempt, **{**options, "epsilon": None})
        case.epsilon = options.get("epsilon")
        case.ref_labels[: m // 10] = torch.arange(m // 10) + 5
        g = torch.Generator().manual_seed(attempt)
        case.self_index = torch.cat([torch.randperm(m, generator=g) for _ in range(n // m + 1)])[:n]
        case.q.copy_(case.r[case.self_index])
        case.labels = case.ref_labels[case.self_index]
        if some:
            other = case.labels[:, None] != case.ref_labels[None, :]
            case.self_index[4:6] = other[4:6].int().argmax(1)
            case.self_index[6::5] = -1
            outside = torch.tensor([m, -m, 2**63 - 1, -(2**63)])
            case.self_index[: len(outside)] = outside
        if clear_margin(case, arithmetic):
            return case


def relative_error(x, truth):
    norm = truth.norm().item()
    return (x.double() - truth).norm().item() / (norm if norm > 0 else 1.0)


def check(case, arithmetic, loss, grads):
    """Loss and gradients (None where not asked for) against brute force."""
    expected, *expected_grads = case.truth(arithmetic)
    # Below 1 an error is absolute: there a loss is the exponential of something of order 10, rounded.
    assert (loss.double() - expected).norm() <= arithmetic.loss_tolerance * max(expected.norm().item(), 1.0)
    for got, want in zip(grads, expected_grads, strict=True):
        if got is None:
            continue
        assert got.dtype == case.q.dtype
        subnormal = 2.0**-25 if got.dtype == F16 else 0.0  # half the distance of float16's least numbers
        allowed = arithmetic.grad_tolerance * want.norm().item() + subnormal * want.numel() ** 0.5
        assert (got.double() - want).norm().item() <= allowed
