"""Every wrong argument: the type of error, and a message with the argument, what was expected, what came."""

import re
import subprocess
import sys

import pytest
import torch
from cases.losses import LOSSES

import dml_cuda
from dml_cuda import _warnings
from dml_cuda._ops.arguments import OpOptions

POINTS, LABELS = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
META = torch.device("meta")  # another device that every machine has
NAN, INF = float("nan"), float("inf")

# name: (changed arguments, error, what the message must say, in this order)
COMMON = {
    "embeddings 1-D": ({"embeddings": POINTS[0]}, ValueError, ["embeddings", r"\[rows, D\]", r"\[4\]"]),
    "embeddings 3-D": ({"embeddings": POINTS[None]}, ValueError, ["embeddings", "shape", r"\[1, 6, 4\]"]),
    "embeddings integer": ({"embeddings": POINTS.long()}, TypeError, ["embeddings", "float32", "int64"]),
    "embeddings complex": (
        {"embeddings": POINTS.cfloat()},
        TypeError,
        ["embeddings", "float32", "complex64"],
    ),
    "embeddings float8": (
        {"embeddings": POINTS.to(torch.float8_e5m2)},
        TypeError,
        ["embeddings", "float32", "float8_e5m2"],
    ),
    "embeddings list": ({"embeddings": POINTS.tolist()}, TypeError, ["embeddings", "tensor", "list"]),
    "embeddings array": ({"embeddings": POINTS.numpy()}, TypeError, ["embeddings", "tensor", "ndarray"]),
    "embeddings None": ({"embeddings": None}, TypeError, ["embeddings", "tensor", "NoneType"]),
    "labels too few": ({"labels": LABELS[:5]}, ValueError, ["labels", "6", "5"]),
    "labels too many": ({"labels": LABELS.repeat(2)}, ValueError, ["labels", "6", "12"]),
    "labels scalar": ({"labels": LABELS[0]}, ValueError, ["labels", r"\[6\]", r"\[\]"]),
    "labels 2-D": ({"labels": LABELS[:, None]}, ValueError, ["labels", r"\[6\]", r"\[6, 1\]"]),
    "labels float": ({"labels": LABELS.float()}, TypeError, ["labels", "integer", "float32"]),
    "labels None": ({"labels": None}, ValueError, ["labels", "indices_tuple", "neither"]),
    "labels list": ({"labels": LABELS.tolist()}, TypeError, ["labels", "integer tensor", "list"]),
    "ref_emb alone": ({"ref_emb": POINTS}, ValueError, ["ref_labels", "ref_emb", "None"]),
    "ref_labels alone": ({"ref_labels": LABELS}, ValueError, ["ref_emb", "ref_labels", "None"]),
    "ref_emb other D": ({"ref_emb": POINTS[:, :3], "ref_labels": LABELS}, ValueError, ["ref_emb", "4", "3"]),
    "ref_emb 1-D": ({"ref_emb": POINTS[0], "ref_labels": LABELS}, ValueError, ["ref_emb", "shape", r"\[4\]"]),
    "ref_emb other dtype": (
        {"ref_emb": POINTS.double(), "ref_labels": LABELS},
        TypeError,
        ["ref_emb", "float32", "float64"],
    ),
    "ref_emb list": (
        {"ref_emb": POINTS.tolist(), "ref_labels": LABELS},
        TypeError,
        ["ref_emb", "tensor", "list"],
    ),
    "ref_emb elsewhere": (
        {"ref_emb": POINTS.to(META), "ref_labels": LABELS},
        ValueError,
        ["ref_emb", "cpu", "meta"],
    ),
    "ref_labels too few": (
        {"ref_emb": POINTS, "ref_labels": LABELS[:3]},
        ValueError,
        ["ref_labels", "6", "ref_emb", "3"],
    ),
    "ref_labels float": (
        {"ref_emb": POINTS, "ref_labels": LABELS.double()},
        TypeError,
        ["ref_labels", "integer", "float64"],
    ),
    "ref_labels 2-D": (
        {"ref_emb": POINTS, "ref_labels": LABELS[None]},
        ValueError,
        ["ref_labels", r"\[6\]", r"\[1, 6\]"],
    ),
    "epsilon NaN": ({"epsilon": NAN}, ValueError, ["epsilon", "finite", "nan"]),
    "epsilon infinite": ({"epsilon": INF}, ValueError, ["epsilon", "finite", "inf"]),
    "epsilon string": ({"epsilon": "0.1"}, TypeError, ["epsilon", "number", "str"]),
    "epsilon True": ({"epsilon": True}, TypeError, ["epsilon", "number", "bool"]),
    "epsilon beyond float": ({"epsilon": 10**400}, ValueError, ["epsilon", "finite", "1"]),
    "similarity": ({"similarity": "l1"}, ValueError, ["similarity", "cosine", "dot", "euclidean", "l1"]),
    "similarity None": ({"similarity": None}, TypeError, ["similarity", "cosine", "dot", "NoneType"]),
    "reduction": ({"reduction": "average"}, ValueError, ["reduction", "mean", "sum", "average"]),
    "reduction None": ({"reduction": None}, TypeError, ["reduction", "mean", "none", "NoneType"]),
    "normalize_embeddings": (
        {"normalize_embeddings": 1},
        TypeError,
        ["normalize_embeddings", "True or False", "int"],
    ),
    "check_pairs": ({"check_pairs": None}, TypeError, ["check_pairs", "True or False", "NoneType"]),
    "cache_bytes": ({"cache_bytes": 1e9}, TypeError, ["cache_bytes", "integer", "float"]),
    "cache_bytes_below_0": ({"cache_bytes": -1}, ValueError, ["cache_bytes", "at least 0", "-1"]),
    "no such option": ({"epsilom": 0.1}, TypeError, ["epsilom", "options", "epsilon", "similarity"]),
    "backend": ({"backend": "cuda"}, ValueError, ["backend", "auto", "reference", "cuda"]),
    "backend number": ({"backend": 1}, TypeError, ["backend", "auto", "int"]),
}
BATCH = ("embeddings", "labels", "ref_emb", "ref_labels")
CASES = [
    pytest.param(loss, *case, id=f"{loss.name}: {name}")
    for loss in LOSSES.values()
    for name, case in {**COMMON, **loss.wrong}.items()
]


def expect(error, says):
    """A message that starts with the argument's name and then says these things in order."""
    return pytest.raises(error, match=re.compile("^" + ".*".join(says), re.DOTALL))


@pytest.mark.parametrize(("loss", "changed", "error", "says"), CASES)
def test_function(loss, changed, error, says):
    arguments = {"embeddings": POINTS, "labels": LABELS, **changed}
    with expect(error, says):
        loss.function(**arguments)


@pytest.mark.parametrize(("loss", "changed", "error", "says"), CASES)
def test_module(loss, changed, error, says):
    """A module refuses wrong options when made and when they are set, and wrong batches when called."""
    options = {k: v for k, v in changed.items() if k not in BATCH}
    if not options:
        with expect(error, says):
            loss.module()(**{"embeddings": POINTS, "labels": LABELS, **changed})
        return
    with expect(error, says):
        loss.module(**options)
    ((name, value),) = options.items()
    module = loss.module()
    if not hasattr(module, name):
        return
    before = getattr(module, name), repr(module)
    with expect(error, says):
        setattr(module, name, value)
    assert (getattr(module, name), repr(module)) == before


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_no_kernel_for_the_device(loss):
    """ "fused" refuses a device without a kernel; "auto" warns, once, and takes the reference."""
    batch = POINTS.to(META), LABELS.to(META)
    with pytest.raises(RuntimeError, match=r"backend.*fused.*meta"):
        loss.function(*batch, backend="fused")
    _warnings._given.clear()
    with pytest.warns(UserWarning, match=r"no kernel for meta.*reference") as warned:
        results = [loss.function(*batch, epsilon=0.1) for _ in range(3)]
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert all(r.device == META and r.shape == () for r in results)


def test_no_kernel_for_the_device_of_compiled_code():
    _warnings._given.clear()
    compiled = torch.compile(dml_cuda.CircleLoss(epsilon=0.1), fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match=r"no kernel for meta.*reference") as warned:
        assert compiled(POINTS.to(META), LABELS.to(META)).shape == ()
    assert [w.filename for w in warned] == [__file__]


def call(
    embeddings=POINTS,
    labels=LABELS,
    ref_emb=None,
    ref_labels=None,
    self_index=None,
    num_valid_refs=None,
    formula="circle",
    params=(0.4, 80.0, 1.0),
    similarity="cosine",
    reduction="mean",
    return_sums=False,
    precision="ieee",
    dynamic_params=None,
):
    batch = embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs, None
    options = OpOptions(
        formula, list(params), 0.1, similarity, reduction, True, return_sums, False, precision
    )
    return torch.ops.dml_cuda.pair_loss(*batch, *options._replace(dynamic_params=dynamic_params))


OP_CASES = {
    "embeddings 1-D": ({"embeddings": POINTS[0]}, ["embeddings", "2-D", "1"]),
    "embeddings integer": ({"embeddings": POINTS.long()}, ["Long"]),
    "labels too few": ({"labels": LABELS[:5]}, ["6 rows", "5"]),
    "labels int32": ({"labels": LABELS.int()}, ["labels", "int64", "Int"]),
    "ref_labels missing": ({"ref_emb": POINTS}, ["ref_emb", "ref_labels"]),
    "ref_emb other D": ({"ref_emb": POINTS[:, :3], "ref_labels": LABELS}, ["ref_emb", "4", "3"]),
    "ref_emb other dtype": (
        {"ref_emb": POINTS.double(), "ref_labels": LABELS},
        ["ref_emb", "Float", "Double"],
    ),
    "formula unknown": ({"formula": "triplet"}, [*LOSSES, "triplet"]),
    "params too few": ({"params": ()}, ["params", "3", "0"]),
    "similarity unknown": ({"similarity": "manhattan"}, ["similarity", "manhattan"]),
    "reduction unknown": ({"reduction": "average"}, ["reduction", "average"]),
    "sums of each row": ({"return_sums": True, "reduction": "none"}, ["return_sums", "reduction"]),
    "dynamic_params too few": ({"dynamic_params": torch.zeros(3).double()}, ["params", "3", "2"]),
    "dynamic_params float32": ({"dynamic_params": torch.zeros(4)}, ["dynamic_params", "float64", "Float"]),
}


@pytest.mark.parametrize("name", OP_CASES)
def test_op_called_directly(name):
    changed, says = OP_CASES[name]
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=".*".join(says)):
        call(**changed)


# In a process of its own: an access out of bounds would take all the tests with it.
BACKWARD_CALLS = """
import torch
import dml_cuda

points, labels = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
many, many_labels = torch.randn(400, 4), torch.zeros(400, dtype=torch.long)
arguments = {
    "embeddings": points, "labels": labels, "ref_emb": None, "ref_labels": None,
    "self_index": None, "num_valid_refs": None, "row_weights": None,
    "formula": "circle", "params": [0.4, 80.0, 1.0],
    "similarity": "cosine", "reduction": "mean", "return_sums": False, "both_directions": False,
    "epsilon": 0.1, "mine_self_pair": True, "precision": "ieee", "save_for_backward": True, "cache_bytes": -1,
    "dynamic_params": None,
}
value, saved = torch.ops.dml_cuda.pair_loss(**arguments)
arguments |= {"grad_loss": value, "saved": saved, "need_emb": True, "need_ref": True, "need_params": False}
torch.ops.dml_cuda.pair_loss_backward(**arguments)
for changed in (
    {"saved": torch.zeros(3, dtype=torch.uint8)},
    {"saved": torch.zeros(0, dtype=torch.uint8)},
    {"saved": saved.float()},
    {"saved": saved.repeat(2)[::2]},
    {"grad_loss": torch.zeros(0)},
    {"grad_loss": torch.zeros(2), "reduction": "none"},
    {"grad_loss": torch.zeros(4)},
    {"embeddings": many, "labels": many_labels},
    {"ref_emb": many, "ref_labels": many_labels},
):
    print(list(changed), flush=True)
    try:
        torch.ops.dml_cuda.pair_loss_backward(**{**arguments, **changed})
    except (TypeError, ValueError, RuntimeError):
        continue
    raise SystemExit("accepted")
"""


def test_backward_op_called_directly():
    """What forward saved is checked before it is believed: never an access out of bounds."""
    run = subprocess.run([sys.executable, "-c", BACKWARD_CALLS], capture_output=True, text=True)
    last = (run.stdout.splitlines() or ["the valid call"])[-1]
    assert run.returncode == 0, f"{last}: {run.stderr}"


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="mmx"):
        dml_cuda._C.set_cpu_instruction_set("mmx")
