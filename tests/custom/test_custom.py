"""Formulas of one's own: from a struct to a loss, what it says when something is wrong, and the cache."""

import copy
import inspect
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from cases.losses import LOSSES

import dml_cuda
from dml_cuda import _C
from dml_cuda.custom import Formula, build, diagnostics, softplus
from dml_cuda.custom.formula import CompiledFormula
from dml_cuda.custom.source import parameters, read
from dml_cuda.functional import pair_weights
from dml_cuda.losses.ranked_list import RankedListNegatives
from dml_cuda.reference import pairs as reference
from examples import custom_losses
from tools import machine_code

pytestmark = [pytest.mark.slow(100), pytest.mark.long]

ROOT = Path(__file__).parents[2]
UNIFIED_TEXT = (custom_losses.HERE / "unified.h").read_text()
ARC_CON_TEXT = (custom_losses.HERE / "arc_con.h").read_text()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that is empty at first, for all tests here."""
    before = os.environ.get("DML_CUDA_CACHE")
    os.environ["DML_CUDA_CACHE"] = str(tmp_path_factory.mktemp("formulas"))
    yield Path(os.environ["DML_CUDA_CACHE"])
    if before is None:
        del os.environ["DML_CUDA_CACHE"]
    else:
        os.environ["DML_CUDA_CACHE"] = before


@pytest.fixture(scope="module")
def unified(cache):
    """Without a reference."""
    return dml_cuda.compile_loss(custom_losses.HERE / "unified.h")


@pytest.fixture(scope="module")
def arc_con(cache):
    return dml_cuda.compile_loss(custom_losses.HERE / "arc_con.h")


@pytest.fixture
def circle(cache):
    """For the instruction set in use."""
    return dml_cuda.compile_loss(build.SOURCES / "losses" / "circle.h")


def batch(n=60, d=16, classes=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, d, generator=generator, dtype=dtype)
    return x.requires_grad_(), torch.randint(0, classes, (n,), generator=generator)


def with_gradient(loss_fn, x, *rest, **options):
    value = loss_fn(x, *rest, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), x)


def assert_same(found, wanted, tolerance=1e-9):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


# ---- what it is ----------------------------------------------------------------------------------------


def test_equals_pytorch_metric_learning(arc_con):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, y = batch()
    ours, theirs = arc_con(scale=10.0, margin=0.0), losses.NTXentLoss(temperature=0.1)
    assert_same(with_gradient(ours, x, y), with_gradient(theirs, x, y), 1e-7)


@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loaded_circle_is_circle(instruction_set, circle, dtype, epsilon):
    """To the bit: the same formulas, the same loops."""
    x, y = batch(dtype=dtype)
    options = {"epsilon": epsilon, "reduction": "mean_nonzero"}
    loaded = circle(m=0.3, gamma=40.0, detach_weights=1, **options)
    built_in = dml_cuda.CircleLoss(m=0.3, gamma=40.0, **options)
    for a, b in zip(with_gradient(loaded, x, y), with_gradient(built_in, x, y), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["unified", "arc_con"])
def test_with_and_without_reference(cache, name):
    """The fused loss, the reference in PyTorch and the formulas as ops agree, whatever the options."""
    fused = getattr(custom_losses, f"{name}_loss")()
    bare = dml_cuda.compile_loss(custom_losses.HERE / f"{name}.h")
    assert bare is not fused
    x, y = batch()
    z, w = batch(30)
    for options in (
        {},
        {"epsilon": 0.1},
        {"reduction": "none"},
        {"reduction": "mean_nonzero"},
        {"similarity": "dot"},
    ):
        for refs in ({}, {"ref_emb": z.detach(), "ref_labels": w}):
            found = with_gradient(fused(scale=8.0, **options), x, y, **refs)
            for other in (fused(scale=8.0, backend="reference", **options), bare(scale=8.0, **options)):
                assert_same(with_gradient(other, x, y, **refs), found)
            other = bare(scale=8.0, backend="reference", **options)
            assert_same(with_gradient(other, x, y, **refs), found)


@pytest.mark.parametrize("name", ["unified", "arc_con"])
def test_listed_pairs(cache, name):
    bare = dml_cuda.compile_loss(custom_losses.HERE / f"{name}.h")(scale=8.0)
    stated = getattr(custom_losses, f"{name}_loss")()(scale=8.0)
    x, y = batch()
    pairs = tuple(dml_cuda.MultiSimilarityMiner(0.1)(x, y))
    assert_same(with_gradient(bare, x, None, pairs), with_gradient(stated, x, None, pairs))
    mined = type(bare)(scale=8.0, epsilon=0.1)
    assert_same(with_gradient(bare, x, None, pairs), with_gradient(mined, x, y))
    for a, b in zip(pair_weights(bare, x, y), pair_weights(stated, x, y), strict=True):
        torch.testing.assert_close(a, b)
    twice = tuple(torch.cat([each, each]) for each in pairs)
    assert_same(with_gradient(bare, x, None, twice), with_gradient(stated, x, None, twice))


def test_no_second_derivative_without_reference(unified, cache):
    x, y = batch(20)
    for options, indices in (
        ({"backend": "reference"}, None),
        ({}, dml_cuda.MultiSimilarityMiner(0.1)(x, y)),
    ):
        value = unified(**options)(x, y, indices)
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.sum(), x)
    stated = custom_losses.unified_loss()(backend="reference")
    (grad,) = torch.autograd.grad(stated(x, y), x, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), x)[0].abs().sum() > 0


def check_known_by_its_ops(name, stated, params_of):
    """A formula known by its ops alone is the formula that is written in Python: parts, units, contexts."""
    _, facts = _C.formula_facts(name)
    bare = type("Bare", (CompiledFormula,), {"name": name, "facts": facts, "repeats": stated.repeats})
    x, y = batch(40)
    for similarity in ("cosine", "euclidean"):
        params = params_of(similarity)
        for reduction in ("mean", "mean_nonzero", "sum", "none"):
            how = {"similarity": similarity, "reduction": reduction}

            def value(formula, how=how, params=params):
                return reference.pair_loss(formula, params, x, y, **how)

            found, wanted = (
                (v.detach(), *torch.autograd.grad(v.sum(), x)) for v in (value(bare), value(stated))
            )
            assert_same(found, wanted, 1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_formulas_of_the_built_in_formulas(name):
    loss = LOSSES[name]
    stated = loss.module.formula
    check_known_by_its_ops(name, stated, lambda similarity: stated.params(loss.defaults, similarity))


def test_a_formula_of_negatives_alone():
    level = {"cosine": 0.2, "euclidean": -1.2}
    check_known_by_its_ops(
        "ranked_list", RankedListNegatives, lambda similarity: [level[similarity], 4.0, 0.05]
    )


def test_options_and_parameters_by_name(unified):
    loss_fn = unified(scale=4.0, epsilon=0.2)
    assert (loss_fn.scale, loss_fn.epsilon, loss_fn.similarity) == (4.0, 0.2, "cosine")
    assert "scale=4.0" in repr(loss_fn)
    assert "Unified" in repr(loss_fn)
    assert unified().scale == 16.0
    assert unified(4.0).scale == 4.0
    x, y = batch()
    loss_fn.scale = 8.0
    assert_same(with_gradient(loss_fn, x, y), with_gradient(unified(scale=8.0, epsilon=0.2), x, y))


def test_compiled(unified, arc_con):
    x, y = batch(dtype=torch.float32)
    for loss_fn in (unified(epsilon=0.1), arc_con()):
        fast = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (60, 41):
            assert_same(
                with_gradient(fast, x[:n].detach().requires_grad_(), y[:n]),
                with_gradient(loss_fn, x[:n].detach().requires_grad_(), y[:n]),
            )
    torch._dynamo.reset()


def test_compiled_listed_pairs(unified):
    x, y = batch(dtype=torch.float32)
    pairs = tuple(dml_cuda.MultiSimilarityMiner(0.1)(x, y))
    fast = torch.compile(unified(), backend="aot_eager")
    assert_same(with_gradient(fast, x, None, pairs), with_gradient(unified(), x, None, pairs), 1e-6)
    torch._dynamo.reset()


def test_autocast(unified):
    x, y = batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert unified()(x.bfloat16(), y).dtype == torch.float32


def test_memory(cache, unified):
    """The queue, one process and miner and all, as with the reference."""
    found = []
    for backend in ("fused", "reference"):
        memory = dml_cuda.CrossBatchMemory(
            custom_losses.unified_loss()(backend=backend),
            16,
            memory_size=128,
            miner=dml_cuda.MultiSimilarityMiner(0.1),
        )
        for _ in range(2):
            x, y = batch(dtype=torch.float32)
            found.append(with_gradient(memory, x, y))
    assert_same(found[1], found[3], 1e-5)
    memory = dml_cuda.CrossBatchMemory(
        unified(), 16, memory_size=128, miner=dml_cuda.MultiSimilarityMiner(0.1)
    )
    for k in range(2):
        x, y = batch(dtype=torch.float32)
        assert_same(with_gradient(memory, x, y), found[k])


def test_copies(unified):
    loss_fn = unified(scale=4.0, epsilon=0.1)
    loss_fn.reduction = "sum"
    loss_fn.eval()
    for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert type(other) is type(loss_fn)
        assert repr(other) == repr(loss_fn)
        assert not other.training
        assert other.call == loss_fn.call
        x, y = batch()
        assert torch.equal(other(x, y), loss_fn(x, y))


def test_a_new_text_is_a_new_formula(cache, unified, arc_con):
    """What was loaded before stays; the name of a class is nobody's key."""
    x, y = batch()
    before = unified()(x, y)
    other = dml_cuda.compile_loss(ARC_CON_TEXT, name="Unified")
    assert other.__name__ == unified.__name__ == "Unified"
    assert not torch.equal(other()(x, y), before)
    assert torch.equal(unified()(x, y), before)


# ---- check_loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_check_loss_passes(cache, unified, similarity):
    dml_cuda.check_loss(unified(similarity=similarity))
    dml_cuda.check_loss(custom_losses.unified_loss()(similarity=similarity))


def test_check_loss_passes_classes(cache, arc_con, circle):
    dml_cuda.check_loss(arc_con)
    dml_cuda.check_loss(custom_losses.arc_con_loss())
    dml_cuda.check_loss(circle(m=0.4, gamma=80.0, detach_weights=1))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_check_loss_passes_what_is_built_in(loss):
    for module in (loss.module(), loss.module(**loss.smooth)):
        dml_cuda.check_loss(module)


class WrongNegatives(Formula):
    @staticmethod
    def row(pos, neg, scale):
        push, pull = neg.lse(scale * (neg.s + 0.1)), pos.lse(-scale * pos.s)
        return softplus(push + pull, where=(pos.count > 0) & (neg.count > 0))


class WrongRow(Formula):
    @staticmethod
    def row(pos, neg, scale):
        push, pull = neg.lse(scale * neg.s), pos.lse(-scale * pos.s)
        return 2 * softplus(push + pull, where=(pos.count > 0) & (neg.count > 0))


class HeldDerivative(Formula):
    @staticmethod
    def row(pos, neg, scale):
        push, pull = neg.lse(scale * neg.s.detach()), pos.lse(-scale * pos.s)
        return softplus(push + pull, where=(pos.count > 0) & (neg.count > 0))


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        (WrongNegatives, r"neg_term: at s = \S+ it is \S+, the reference's is"),
        (WrongRow, r"row, or what the formula declares: .*the loss is \S+, the reference's"),
        (HeldDerivative, r"neg_term: at s = \S+ its derivative is 16, the reference's is 0"),
    ],
)
def test_check_loss_names_the_formula(cache, stated, says):
    with pytest.raises(ValueError, match=says):
        dml_cuda.check_loss(dml_cuda.compile_loss(custom_losses.HERE / "unified.h", stated))


def test_check_loss_finds_what_is_wrong_alone(cache):
    """Without a reference: a derivative, a derivative of the row, a number that is not finite, a maximum
    between
    the ends, all in one struct."""
    text = """
template <typename T>
struct Wrong : FormulaDefaults {
    static constexpr const char* kParams = "which";
    static constexpr bool kNeedsPos = true, kNeedsNeg = true;
    T which;
    DML_INLINE explicit Wrong(Params<T> params) : which(T(params[0])) {}
    static DML_INLINE T half(T x) { return x / T(2); }
    static DML_INLINE Dual<T> half(Dual<T> x) { return {x.value / T(2), x.derivative}; }

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        if (which == T(1)) return half(s);
        if (which == T(2)) return -s * s;
        return which == T(3) ? root(S(T(1)) - s * s) * T(-1) : T(4) * s;
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return T(4) * s;
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        if (which == T(4)) return softplus(half(g.neg) - g.pos);
        return softplus(g.neg - g.pos);
    }
};
"""
    wrong = dml_cuda.compile_loss(text)
    dml_cuda.check_loss(wrong(which=0.0))
    for which, says in (
        (1, r"neg_term: its derivative is 1 at s = \S+, finite differences say 0\.5"),
        (2, r"neg_term: has a maximum at s = 0, between smaller logits"),
        (3, r"neg_term: its value is \S*nan at s = -1\.0000004"),
        (4, r"row: its derivative by neg is \S+ at neg = \S+, pos = \S+, finite differences say"),
    ):
        with pytest.raises(ValueError, match=says):
            dml_cuda.check_loss(wrong(which=float(which)))


def test_a_comment_turns_no_check_off(cache):
    """The derivative is wrong, and a comment speaks of constant(x)."""
    wrong = UNIFIED_TEXT.replace(
        "        return rounded_product(scale, s);",
        "        return half(s);  // not constant(s), /* nor with_share_of_derivative(s) */",
        1,
    ).replace(
        "    T scale;",
        "    T scale;\n    static DML_INLINE T half(T x) { return x / T(2); }\n"
        "    static DML_INLINE Dual<T> half(Dual<T> x) { return {x.value / T(2), x.derivative}; }",
    )
    with pytest.raises(ValueError, match=r"neg_term: its derivative is 1 .*finite differences say 0\.5"):
        dml_cuda.check_loss(dml_cuda.compile_loss(wrong))


FUNCTIONS = """
template <typename T>
struct Functions : FormulaDefaults {
    static constexpr const char* kParams = "power = 1.5";
    static constexpr Accumulator kNeg = Accumulator::kSum, kPos = Accumulator::kSum;
    static constexpr bool kNeedsPos = true, kNeedsNeg = true;
    T power;
    DML_INLINE explicit Functions(Params<T> params) : power(T(params[0])) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return pow(T(2) + s, power) + pow(T(2) + s, 2) + pow(T(2), s) + pow(T(2) + s, T(1) + s * s);
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return log(T(2) + s) + abs(s) + sqrt(T(3) - s);
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return log(T(1) + g.neg) + sqrt(T(9) + abs(g.pos)) - T(3);
    }
};
"""


class Functions(Formula):
    @staticmethod
    def row(pos, neg, power):
        s, both = 2 + neg.s, (pos.count > 0) & (neg.count > 0)
        push = neg.sum(s**power + s**2 + 2**neg.s + s ** (1 + neg.s**2))
        pull = pos.sum(torch.log(2 + pos.s) + pos.s.abs() + torch.sqrt(3 - pos.s))
        return torch.where(both, torch.log(1 + push) + torch.sqrt(9 + pull.abs()) - 3, 0.0)


def test_functions_of_dual_numbers(cache, instruction_set):
    """log, pow, abs and sqrt, with their derivatives, in both precisions."""
    bare, stated = dml_cuda.compile_loss(FUNCTIONS), dml_cuda.compile_loss(FUNCTIONS, Functions)
    for power in (1.5, 0.0, 1.0, -2.0):
        dml_cuda.check_loss(bare(power=power))
        dml_cuda.check_loss(stated(power=power))
    x, y = batch(dtype=torch.float32)
    truth = with_gradient(stated(backend="reference"), x.detach().double().requires_grad_(), y)
    assert_same(with_gradient(bare(), x, y), truth, 1e-6)


UNGUARDED = ARC_CON_TEXT.replace("is_empty(lse) ? decltype(z)(T(0)) : softplus(z)", "z * z")


def test_an_unguarded_context_is_explained(cache):
    """As docs/custom_loss.md does: a row without negatives has the context -inf."""
    assert UNGUARDED != ARC_CON_TEXT
    with pytest.raises(ValueError, match=r"context = -inf.*without negatives: guard it with is_empty"):
        dml_cuda.check_loss(dml_cuda.compile_loss(UNGUARDED))


def test_check_loss_of_something_else():
    with pytest.raises(TypeError, match="formula: expected what compile_loss returns"):
        dml_cuda.check_loss(torch.nn.Identity())


# ---- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ("(scale, s)", "(scle, s)"),
            r"Unified\.h:1[0-9]: 'scle' was not declared[^/]*rounded_product\(scle, s\)",
        ),
        (
            ("neg_term", "negterm"),
            r"Unified\.h: lacks a member template <typename S> S neg_term\(S s\) const",
        ),
        ((" row(", " raw("), r"Unified\.h: lacks a member template <typename S> RowLoss<S> row"),
        (
            ('const char* kParams = "scale = 16"', "int kParams = 1"),
            r"lacks its parameters, static constexpr",
        ),
        (('"scale = 16"', '"a, b, c, d, e, f, g, h, i"'), "names more than 8 parameters"),
        (("(scale, s)", "(scale, std::exp(s))"), r"Unified\.h:1[0-9]: no matching function .*Dual<T>"),
    ],
    ids=["undeclared", "no neg_term", "no row", "kParams", "too many", "no dual"],
)
def test_compile_errors_are_your_own_lines(cache, change, says):
    with pytest.raises(ValueError, match="the formula does not compile") as caught:
        dml_cuda.compile_loss(UNIFIED_TEXT.replace(*change))
    message = str(caught.value)
    assert re.search(says, message), message
    assert len(message.splitlines()) < 20
    assert "tile_kernels" not in message
    log = Path(message.rpartition("is in ")[2])
    assert "error" in log.read_text()
    assert not list(log.parent.glob("build-*"))


def test_messages_of_nvcc():
    log = (
        '/x/formula/unified.h(17): error: identifier "scle" is undefined\n'
        "      return rounded_product(scle, s);\n"
        "                             ^\n\n"
        '1 error detected in the compilation of "kernels_f16.cu".\n'
    )
    told = diagnostics.explain(log, "/x/formula/unified.h", "unified.h")
    assert told.startswith('unified.h:17: identifier "scle" is undefined\n      return rounded')
    assert "detected" not in told
    log = (
        '/y/losses/derivatives.h(60): error: static assertion failed with "the formula: lacks a member row"\n'
    )
    assert diagnostics.explain(log, "/x/formula/unified.h", "unified.h") == "unified.h: lacks a member row"


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        (3, TypeError, "source: expected C"),
        ("no_such.h", FileNotFoundError, "source: expected a file.*no_such.h"),
        ("struct A {};", ValueError, "expected one formula.*got none"),
        (UNIFIED_TEXT + ARC_CON_TEXT, ValueError, r"expected one formula.*got 2 \(Unified, ArcCon\)"),
        ("// " + UNIFIED_TEXT.replace("\n", "\n// "), ValueError, "got none"),
    ],
)
def test_what_is_no_formula(source, error, says):
    with pytest.raises(error, match=says):
        dml_cuda.compile_loss(source)


def test_names_of_parameters():
    assert parameters("") == {}
    assert parameters("alpha, beta = 5e1") == {"alpha": None, "beta": 50.0}
    for stated, says in (
        ("a b", "expected distinct names"),
        ("a, a", "expected distinct names"),
        ("a = 1, b", "a default for b"),
        ("a = x", "a number for a, got 'x'"),
    ):
        with pytest.raises(ValueError, match=says):
            parameters(stated)


def test_arguments(cache, unified, circle):
    for make, error, says in (
        (lambda: circle(m=0.4), TypeError, r"circle\(m, gamma, detach_weights\).*'gamma'"),
        (
            lambda: unified(sale=1.0),
            TypeError,
            r"^sale: expected one of .*options scale, .*did you mean scale\?",
        ),
        (lambda: unified(1.0, 2.0), TypeError, "too many positional"),
        (lambda: unified(scale="1"), TypeError, "scale: expected a number, got str"),
        (lambda: unified(scale=float("nan")), ValueError, "scale: expected a finite number"),
        (lambda: unified(epsilon="x"), TypeError, "epsilon"),
        (
            lambda: dml_cuda.compile_loss(UNIFIED_TEXT, name="a b"),
            ValueError,
            "name: expected a Python identifier",
        ),
        (lambda: dml_cuda.compile_loss(UNIFIED_TEXT, object), TypeError, "reference: expected a subclass"),
    ):
        with pytest.raises(error, match=f"(?i){says}"):
            make()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("epsilon", "an option"),
        ("reduction", "an option"),
        ("forward", "an attribute"),
        ("training", "an attribute"),
        ("call", "an attribute"),
        ("_values", "an attribute"),
        ("embeddings", "an argument"),
        ("self", "an argument"),
        ("lambda", "a Python keyword"),
        ("None", "a Python keyword"),
    ],
)
def test_names_that_a_parameter_cannot_have(name, what, monkeypatch):
    """Refused before anything is compiled."""
    monkeypatch.setattr(build, "load", lambda source: pytest.fail("it was compiled"))
    for declaration in (f'"{name} = 16"', f'"scale = 16, "\n        "{name} = 2"'):
        text = UNIFIED_TEXT.replace('"scale = 16"', declaration)
        with pytest.raises(ValueError, match=rf"kParams: expected another name than {name} .*{what}"):
            dml_cuda.compile_loss(text)


def test_signature(unified, arc_con):
    shown = inspect.signature(unified)
    assert list(shown.parameters)[:2] == ["scale", "epsilon"]
    assert shown.parameters["scale"].default == 16.0
    options = {name: p.default for name, p in shown.parameters.items() if p.kind == p.KEYWORD_ONLY}
    loss = unified(**options)
    assert {name: getattr(loss, name) for name in options} == options
    assert list(inspect.signature(arc_con).parameters)[:2] == ["scale", "margin"]
    assert list(inspect.signature(loss.forward).parameters)[:2] == ["embeddings", "labels"]


def test_reference_with_other_parameters(cache):
    class Other(Formula):
        parameters = dict.fromkeys(("scale", "margin"), lambda name, value: None)

    with pytest.raises(ValueError, match="reference: expected the parameters that the struct names, scale"):
        dml_cuda.compile_loss(custom_losses.HERE / "unified.h", Other)


def test_tools_that_are_missing(cache, monkeypatch, tmp_path):
    changed = UNIFIED_TEXT + "// not in the cache\n"
    monkeypatch.setenv("CXX", "no-such-compiler")
    build._package_hash.cache_clear()
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler \(no-such-compiler\).*apt install g"):
        dml_cuda.compile_loss(changed)
    monkeypatch.delenv("CXX")
    build._package_hash.cache_clear()
    (tmp_path / "c++").symlink_to(shutil.which("c++"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(RuntimeError, match="no ninja was found; pip install ninja"):
        dml_cuda.compile_loss(changed)


def test_a_gpu_without_nvcc(monkeypatch):
    monkeypatch.setattr(build, "_C", type("Built", (), {"cuda_version": "13.0", "cpu_instruction_set": str}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build, "_cuda_home", lambda: None)
    monkeypatch.setattr("dml_cuda._warnings._given", set())
    with pytest.warns(UserWarning, match="found no nvcc"):
        assert build.this_machine().gpu == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.this_machine().gpu == ()  # said once
    monkeypatch.setattr(build, "_cuda_home", lambda: "/usr/local/cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k: [(9, 0), (7, 5), (8, 6)][k])
    assert build.this_machine() == ("", ("86", "90"), "/usr/local/cuda")


def test_a_cache_that_cannot_be_written(cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DML_CUDA_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot write its cache.*set DML_CUDA_CACHE"):
        dml_cuda.compile_loss(UNIFIED_TEXT + "// elsewhere\n")


# ---- the cache -----------------------------------------------------------------------------------------

LOAD = """
import sys, torch, dml_cuda
loss = dml_cuda.compile_loss(sys.argv[1])()
print(float(loss(torch.eye(8), torch.arange(8) // 2)))
"""


def start_process(source, **environment):
    command = [sys.executable, "-c", LOAD, str(source)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=environment.pop("cwd", ROOT),
        env={**os.environ, "PYTHONPATH": str(environment.pop("path", ROOT)), **environment},
        start_new_session=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return float(out)


def test_cached_loads_compile_nothing(cache, unified):
    def libraries():
        return {path: path.stat().st_mtime_ns for path in cache.rglob("formula-*.so")}

    before = libraries()
    finish(start_process(custom_losses.HERE / "unified.h"))
    assert libraries() == before != {}


def test_an_interrupted_build_and_several_processes(cache, tmp_path):
    """Two processes ask at once, after a third was killed while it compiled; then a library is spoilt."""
    changed = tmp_path / "unified.h"
    changed.write_text(UNIFIED_TEXT + "// for several\n")
    folder = tmp_path / "cache"
    killed = start_process(changed, DML_CUDA_CACHE=str(folder))
    deadline = time.monotonic() + 120
    while not list(folder.glob("Unified-*/build-*/build.ninja")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert list(folder.glob("Unified-*/build-*"))
    assert not list(folder.glob("Unified-*/formula-*.so"))

    both = [start_process(changed, DML_CUDA_CACHE=str(folder)) for _ in range(2)]
    first, second = (finish(process) for process in both)
    assert first == second
    (place,) = folder.iterdir()
    library, lock = sorted(place.iterdir())
    assert re.fullmatch(r"formula-[0-9a-f]{16}\.so", library.name)
    assert lock.name == "lock"


def test_a_library_that_was_cut_short(cache, tmp_path):
    """It is built again; loaded, it would kill the process with SIGBUS."""
    changed = tmp_path / "unified.h"
    changed.write_text(UNIFIED_TEXT + "// to be cut\n")
    expected = finish(start_process(changed, DML_CUDA_CACHE=str(tmp_path / "cache")))
    for length in (-1, 5000):
        (library,) = (tmp_path / "cache").rglob("*.so")
        whole = library.read_bytes()
        library.write_bytes(whole[:length])
        assert finish(start_process(changed, DML_CUDA_CACHE=str(tmp_path / "cache"))) == expected
        (library,) = (tmp_path / "cache").rglob("*.so")
        assert len(library.read_bytes()) == len(whole)


@pytest.mark.parametrize("folder", ["~/formulas", 'it\'s "quoted"', "$HOME and: more", "späce"])
def test_a_cache_at_an_unusual_path(cache, tmp_path, folder):
    home = tmp_path / "home"
    home.mkdir()
    changed = tmp_path / "unified.h"
    changed.write_text(UNIFIED_TEXT + "// elsewhere\n")
    chosen = folder if folder.startswith("~") else str(tmp_path / folder)
    finish(start_process(changed, DML_CUDA_CACHE=chosen, HOME=str(home), cwd=tmp_path))
    place = home / folder[2:] if folder.startswith("~") else Path(chosen)
    (entry,) = place.iterdir()
    assert [path.suffix for path in sorted(entry.iterdir())] == [".so", ""]
    assert not (tmp_path / "~").exists()


def test_a_library_of_other_sources(cache, tmp_path):
    source = tmp_path / "other.c"
    source.write_text("static long layout[5] = {1}; static void* formula[4] = {layout};\n"
                      "const void* dml_custom_formula(void) { return formula; }\n")  # fmt: skip
    library = tmp_path / "other.so"
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    with pytest.raises(RuntimeError, match="not made from the sources of this dml_cuda"):
        _C.load_formula(str(library), "other")


def test_from_an_installed_package(cache, tmp_path):
    """As a wheel lays it out: no checkout beside it, the headers inside."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "DML_CUDA_BUILD": "cpu"},
        check=True,
        capture_output=True,
    )
    package = tmp_path / "site" / "dml_cuda"
    assert (package / "csrc" / "losses" / "formula.h").is_file()
    for extension in (ROOT / "dml_cuda").glob("_C*.so"):
        shutil.copy(extension, package)
    text = f"import dml_cuda; assert dml_cuda.__file__.startswith({str(tmp_path)!r}), dml_cuda.__file__\n"
    formula = tmp_path / "unified.h"
    formula.write_text(UNIFIED_TEXT)
    command = [sys.executable, "-c", text + LOAD, str(formula)]
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "DML_CUDA_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(machine_code.find_nvcc() is None, reason="nvcc is not installed")
def test_cuda_kernels_compile(tmp_path):
    """The sources of the CUDA engine with one formula in the list: nothing spills."""
    source = read(custom_losses.HERE / "arc_con.h")
    build.write_headers(source, tmp_path)
    includes = [f"-I{folder}" for folder in (tmp_path, build.SOURCES, build.SOURCES / "losses")]
    flags = (*machine_code.FLAGS, "-DDML_CUSTOM_FORMULA", "-DDML_WITH_CUDA", *includes)
    for name, least in (("instantiations/f16", 10), ("instantiations/look_float", 5), ("ring/rows", 3)):
        kernels = machine_code.analyse(build.SOURCES / "cuda" / f"{name}.cu", "90a", flags)
        assert len(kernels) > least
        assert all(kernel.spill_bytes == 0 for kernel in kernels)


# ---- the walk-through ----------------------------------------------------------------------------------


def test_walk_through(cache, tmp_path, monkeypatch, capsys):
    """All code of docs/custom_loss.md, in order; what it says that it prints, it prints."""
    pytest.importorskip("sklearn")
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "custom_loss.md").read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks].count("cpp") == 2
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "walk_through"}
    for kind, text in blocks:
        if kind == "cpp":
            Path(re.match(r"// (\w+\.h)", text)[1]).write_text(text)
        elif kind == "python":
            exec(compile(text, "custom_loss.md", "exec"), names)
        else:
            assert capsys.readouterr().out == text
    for name in ("unified", "arc_con"):  # the examples are what the walk-through ends with
        assert (tmp_path / f"{name}.h").read_text() == (custom_losses.HERE / f"{name}.h").read_text()


def test_example(cache, capsys):
    for module in ("pytorch_metric_learning", "sklearn", "tqdm"):
        pytest.importorskip(module)
    from examples import custom

    found = custom.run(custom.parse(["--data", "digits", "--steps", "100"]))
    for scores in found.values():
        assert scores["difference"] < 1e-4
        assert scores["after"] > scores["before"]
