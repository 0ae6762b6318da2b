"""The fused losses against the truth: every size, label pattern and option, forward and backward.

A pair within rounding of a mining threshold may be kept or not. Rows with such a pair are *doubtful*:
their loss must lie between those of the two choices, and they get no upstream gradient, so that
everything else can be checked strictly.
"""

import pytest
import torch
from cases.accuracy import assert_as_accurate, evaluate
from cases.data import LABELS, make_batch, make_integer_batch, make_labels, make_points
from cases.losses import EVERY_LOSS, LOSSES, REDUCTIONS, SIMILARITIES, by_name
from oracle.pairs import brute_force

pytestmark = pytest.mark.slow(80)

SIZES = [(2, 3), (3, 1), (31, 65), (33, 31), (127, 64), (128, 16), (129, 129), (151, 512), (257, 7)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def several_threads():
    torch.set_num_threads(3)


def reference(loss, embeddings, labels, *, similarity="cosine", **options):
    how = {"backend": "reference", **by_name(similarity)}
    return evaluate(loss.function, embeddings, labels, **how, **options)


def losses_in_float64(loss, embeddings, labels, epsilon, **options):
    """The reference's losses per row; test_reference.py shows them equal to brute force."""
    if options.get("ref_emb") is not None:
        options = {**options, "ref_emb": options["ref_emb"].double()}
    return reference(loss, embeddings.double(), labels, epsilon=epsilon, reduction="none", **options)[0]


def doubtful_rows(loss, embeddings, labels, epsilon, **options):
    """Least and greatest loss of each row, over the ways that rounding may decide, and where they differ."""
    if epsilon is None:
        losses = losses_in_float64(loss, embeddings, labels, None, **options)
        return losses, losses, torch.zeros(len(labels), dtype=torch.bool)
    unit = 1e-13 if embeddings.dtype == torch.float64 else 1e-5
    less, more = (
        losses_in_float64(loss, embeddings, labels, epsilon + margin, **options) for margin in (-unit, unit)
    )
    low, high = torch.minimum(less, more), torch.maximum(less, more)
    return low, high, (high - low).abs() > 1e-12 * high.abs()


def references(loss, embeddings, labels, *, ref_emb=None, **options):
    """The reference's results: one, or several for a lone row or column, and for a steep loss.

    The largest error of a lone row, or of a pair where the loss is steep, is one draw of the reference's
    rounding, which may be a lucky one. Other orders of the coordinates change nothing else, so they give more
    draws.
    """
    lone = ref_emb is not None and min(len(labels), len(ref_emb)) == 1
    draws = 5 if lone or loss.steep else 1
    dim = embeddings.shape[1]
    results = []
    for k in range(draws):
        order = torch.arange(dim).roll(k * dim // draws)
        columns = None if ref_emb is None else ref_emb[:, order]
        value, *grads = reference(loss, embeddings[:, order], labels, ref_emb=columns, **options)
        back = order.argsort()
        results.append((value, *(None if x is None else x[:, back] for x in grads)))
    return results


def check(loss, embeddings, labels, *, epsilon=None, logit=600.0, brute=True, similarity=None, **options):
    """Fused against truth, with the reference in the same dtype (float32 for the short ones) as yardstick."""
    similarity = options["similarity"] = similarity or loss.similarity
    low, high, doubtful = doubtful_rows(loss, embeddings, labels, epsilon, **options)
    n = len(labels)
    assert doubtful.sum() <= max(2, n // 5), "too many doubtful rows to prove anything"
    upstream = torch.where(doubtful, 0.0, torch.randint(32, 97, (n,)) / 64)  # exact in every dtype
    kwargs = {"upstream": upstream, "epsilon": epsilon, "reduction": "none", **options}

    fused = evaluate(loss.function, embeddings, labels, backend="fused", **{**kwargs, **by_name(similarity)})
    assert fused[0].dtype == fused[1].dtype == embeddings.dtype
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    wide_kwargs = (
        {**kwargs, "ref_emb": options["ref_emb"].to(wide)} if options.get("ref_emb") is not None else kwargs
    )
    same = references(loss, embeddings.to(wide), labels, **wide_kwargs)
    if brute:
        answer = brute_force(loss.name, embeddings, labels, **kwargs)
        truth = [
            torch.as_tensor(t) for t in (answer.losses, answer.grad_emb, answer.grad_ref) if t is not None
        ]
    else:
        exact = {k: v.double() if k in ("ref_emb", "upstream") else v for k, v in kwargs.items()}
        truth = reference(loss, embeddings.double(), labels, **exact)

    sure = ~doubtful
    losses, grads, ref_grads = zip(*same, strict=True)
    assert_as_accurate("loss", fused[0][sure], [x[sure] for x in losses], truth[0][sure], logit=logit)
    slack = 1e-3 * high.abs() + 1e-6 if fused[0].dtype != torch.float64 else 1e-9 * high.abs()
    slack = slack + torch.finfo(fused[0].dtype).eps * high.abs()
    assert ((fused[0] >= low - slack) & (fused[0] <= high + slack))[doubtful].all(), "loss of a doubtful row"
    assert_as_accurate("gradient", fused[1], grads, truth[1], logit=logit)
    if fused[2] is not None:
        assert_as_accurate("gradient to ref_emb", fused[2], ref_grads, truth[2], logit=logit)
    return fused


@EVERY_LOSS
@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_sizes(loss, epsilon, n, dim):
    for dtype in (torch.float32, torch.float64):
        # In one dimension unit rows are 1 or -1, and the gradient of their distances is that of rounding.
        for similarity in ("cosine", "euclidean") if dim > 1 else ("cosine", "euclidean_raw"):
            options = {"epsilon": epsilon, "similarity": similarity, "brute": n < 130}
            check(loss, *make_batch(n, dim, dtype=dtype), **options)


@EVERY_LOSS
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_large(loss, epsilon, instruction_set):
    check(loss, *make_batch(1000, 65, spread=0.3 if epsilon else 1.0), epsilon=epsilon, brute=False)


@EVERY_LOSS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(loss, dtype, instruction_set):
    for n, dim in ((33, 31), (151, 65)):
        for epsilon in (None, 0.1):
            check(loss, *make_batch(n, dim, dtype=dtype), epsilon=epsilon, brute=n < 130)


@EVERY_LOSS
@pytest.mark.parametrize("kind", LABELS)
def test_label_patterns(loss, kind):
    for n in (20, 150, 300):
        for epsilon in (None, 0.1):
            check(loss, *make_batch(n, 9, kind), epsilon=epsilon, brute=n < 130)


@EVERY_LOSS
@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize(("n", "m"), [(1, 200), (200, 1), (40, 129), (257, 130)])
def test_rectangular(loss, epsilon, n, m):
    labels, ref_labels = make_labels(n), make_labels(m)
    points = make_points(torch.cat([labels, ref_labels]), 17)
    for similarity in SIMILARITIES:
        rectangle = {"ref_emb": 0.5 * points[n:], "ref_labels": ref_labels, "similarity": similarity}
        check(loss, 0.5 * points[:n], labels, epsilon=epsilon, brute=n * m < 10_000, **rectangle)


@EVERY_LOSS
def test_same_points_as_columns(loss):
    """As ref_emb the points are no longer the rows themselves: (i, i) is a pair, even for one tensor."""
    embeddings, labels = make_batch(50, 8)
    check(loss, embeddings, labels, ref_emb=embeddings, ref_labels=labels)
    shared = embeddings.clone().requires_grad_()
    function = loss.function
    (gradient,) = torch.autograd.grad(function(shared, labels, ref_emb=shared, ref_labels=labels), shared)
    parts = evaluate(function, embeddings, labels, ref_emb=embeddings, ref_labels=labels)
    torch.testing.assert_close(gradient, parts[1] + parts[2])


@EVERY_LOSS
def test_class_weights(loss):
    """Class-level circle loss: the columns are one weight vector for each class."""
    labels = torch.randint(0, 150, (90,))
    check(loss, torch.randn(90, 12), labels, ref_emb=torch.randn(150, 12), ref_labels=torch.arange(150))


@EVERY_LOSS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mining_is_strict(loss, dtype, instruction_set):
    """Integer dot products and thresholds are exact in every dtype: here no row is doubtful."""
    embeddings, labels = make_integer_batch(140, classes=30, dtype=dtype)
    ties = 0
    for epsilon in (0, 1, -2):
        options = {"epsilon": epsilon, "similarity": "dot", "reduction": "none"}
        fused = evaluate(loss.function, embeddings, labels, **options)
        wide = torch.promote_types(dtype, torch.float32)
        same = reference(loss, embeddings.to(wide), labels, **options)
        truth = brute_force(loss.name, embeddings, labels, **options)
        assert_as_accurate("loss", fused[0], same[0], truth.losses)
        assert_as_accurate("gradient", fused[1], same[1], truth.grad_emb)
        looser = brute_force(loss.name, embeddings, labels, **{**options, "epsilon": epsilon + 1e-9})
        ties += (looser.kept & ~truth.kept).sum()
    assert ties > 100, "too few pairs on their threshold"


@pytest.mark.check
@EVERY_LOSS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(loss, reduction):
    labels = torch.cat([make_labels(130), torch.arange(1000, 1020)])  # twenty rows without a positive
    embeddings = make_points(labels, 6, spread=0.3)
    for epsilon in (None, -0.25):
        options = {"similarity": loss.similarity, "epsilon": epsilon}
        _, _, doubtful = doubtful_rows(loss, embeddings, labels, **options)
        assert not doubtful.any(), "choose another batch"
        options["reduction"] = reduction
        fused = evaluate(loss.function, embeddings, labels, **options)
        same = reference(loss, embeddings, labels, **options)
        truth = brute_force(loss.name, embeddings, labels, **options)
        assert_as_accurate("loss", fused[0], same[0], truth.losses if reduction == "none" else truth.loss)
        assert_as_accurate("gradient", fused[1], same[1], truth.grad_emb)


@pytest.mark.check
@EVERY_LOSS
def test_parameters_reach_the_kernel(loss):
    embeddings, labels = make_batch(60, 10)
    for name, value in loss.changed.items():
        for similarity in ("cosine", "euclidean"):
            check(loss, embeddings, labels, similarity=similarity, **{name: value})
    for parameters in loss.cases:
        check(loss, embeddings, labels, **parameters)


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_logits(scale, dtype, instruction_set):
    """Dot products to 100, far outside [-1, 1]: logits to millions, relus closed on either side."""
    embeddings, labels = make_batch(140, 9, dtype=dtype)
    embeddings = scale * torch.nn.functional.normalize(embeddings)
    options = {"similarity": "dot", "brute": False, "logit": 256 * (1 + scale**2) ** 2}
    check(LOSSES["multi_similarity"], embeddings, labels, **options)
    for detach in (True, False):
        faces = {"m": 0.25, "gamma": 256.0, "detach_weights": detach}
        check(LOSSES["circle"], embeddings, labels, **faces, **options)


@EVERY_LOSS
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_duplicates_and_zero_rows(loss, similarity):
    embeddings, labels = make_batch(140, 6)
    embeddings[10:30] = embeddings[40:60]  # in any class: similarity 1 to a positive or to a negative
    embeddings[100:104] = 0
    labels[100:102] = 0
    check(loss, embeddings, labels, similarity=similarity, brute=False)
    options = {"epsilon": 0.1, **by_name(similarity)}
    gradient = evaluate(loss.function, embeddings, labels, **options)[1]
    assert torch.isfinite(gradient).all()
    if similarity in ("cosine", "euclidean"):
        assert (gradient[100:104] == 0).all()
    zeros = evaluate(loss.function, torch.zeros(9, 4), labels[:9], **options)
    assert torch.isfinite(zeros[0])
    assert (zeros[1] == 0).all()


@EVERY_LOSS
def test_length_of_rows_does_not_matter_to_cosine(loss):
    """Rows from 1e-10 to 1e30 long: the same loss, and a gradient that scales with 1 / length."""
    embeddings, labels = make_batch(60, 7)
    expected = evaluate(loss.function, embeddings, labels)
    scale = torch.logspace(-10, 30, 60)[:, None]
    scaled = evaluate(loss.function, embeddings * scale, labels)
    torch.testing.assert_close(scaled[0], expected[0], rtol=1e-5, atol=0)
    largest = expected[1].abs().max().item()
    torch.testing.assert_close(scaled[1] * scale, expected[1], rtol=1e-4, atol=1e-5 * largest)
