"""Every public class among the tools that people put around a loss; public_classes.py is the table."""

import copy
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from integration.public_classes import (
    HEADS,
    MAKERS,
    SUBJECTS,
    call,
    make,
    make_batch,
    name_of,
    step,
)
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

import dml_cuda

pytestmark = pytest.mark.slow(60)

EVERY = pytest.mark.parametrize("name", SUBJECTS)
# A forward pass of the memory changes its queue: a second one is another step, which no trace repeats.
EVERY_STATELESS = pytest.mark.parametrize("name", [name for name in SUBJECTS if name != "CrossBatchMemory"])
EVERY_HEAD = pytest.mark.parametrize("name", HEADS)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory):
    """One cache for the custom loss of the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DML_CUDA_CACHE", str(tmp_path_factory.mktemp("formulas")))
        yield


def assert_same(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert any(b.abs().max() > 0 for b in expected[1:])


@pytest.mark.check
def test_every_public_class_can_be_made():
    unknown = [name_of(cls) for cls, maker in MAKERS.items() if maker is None]
    assert not unknown, f"add {unknown} to SPECIAL in tests/integration/public_classes.py"
    assert len(MAKERS) > 40


# ---- parameters ------------------------------------------------------------------------------------------


@EVERY
def test_parameters_and_gradients_are_contiguous(name):
    module = make(name)
    embeddings, labels = make_batch()
    for gradient in step(module, embeddings, labels):
        assert gradient.is_contiguous()
    call(module, embeddings.requires_grad_(), labels).backward()
    for x in (embeddings, *module.parameters()):
        assert x.is_contiguous()
        assert x.grad.is_contiguous()
        assert torch.equal(x.grad.view(-1), x.grad.flatten())


@EVERY
def test_a_vector_of_parameters(name):
    module = make(name)
    if not list(module.parameters()):
        return
    vector = parameters_to_vector(module.parameters())
    expected = step(module, *make_batch())
    other = make(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    vector_to_parameters(vector.detach().clone(), other.parameters())
    assert_same(step(other, *make_batch()), expected)


@EVERY
def test_lbfgs(name):
    module = make(name)
    embeddings, labels = make_batch()
    embeddings.requires_grad_()
    optimizer = torch.optim.LBFGS([embeddings, *module.parameters()], lr=0.01, max_iter=3)

    def closure():
        optimizer.zero_grad()
        value = call(module, embeddings, labels)
        value.backward()
        return value

    before = [x.detach().clone() for x in (embeddings, *module.parameters())]
    assert torch.isfinite(optimizer.step(closure))
    assert any(not torch.equal(a, b) for a, b in zip(before, (embeddings, *module.parameters()), strict=True))


@EVERY
def test_safetensors(name, tmp_path):
    files = pytest.importorskip("safetensors.torch")
    module = make(name)
    files.save_file(module.state_dict(), tmp_path / "loss.safetensors")
    other = make(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(files.load_file(tmp_path / "loss.safetensors"))
    files.load_model(other, tmp_path / "loss.safetensors") if module.state_dict() else None
    assert_same(step(other, *make_batch()), step(make(name), *make_batch()))


# One process of two. Each class is sharded and trained a step; its weights are those of one process.
FULLY_SHARD = """
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch import nn
from integration.public_classes import SUBJECTS, call, make, make_batch


def as_vectors(module):
    # fully_shard takes no scalars, so parameters that learn have the shape [1].
    for m in module.modules():
        for name, p in list(m.named_parameters(recurse=False)):
            if p.ndim == 0:
                setattr(m, name, nn.Parameter(p.detach().reshape(1)))


rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
embeddings, labels = make_batch()
failed = {}
for name in SUBJECTS:
    whole, module = make(name), make(name)
    if not list(module.parameters()):
        continue
    for m in (whole, module):
        as_vectors(m)
        if hasattr(m, "group"):  # both processes have the same batch
            m.group = dist.new_group([rank], use_local_synchronization=True)
    try:
        fully_shard(module, mesh=mesh)
        for m in (whole, module):
            optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
            call(m, embeddings.clone().requires_grad_(), labels).backward()
            optimizer.step()
        for sharded, own in zip(module.parameters(), whole.parameters()):
            torch.testing.assert_close(sharded.full_tensor(), own.detach())
    except Exception as error:
        failed[name] = repr(error)[:300]
assert not failed, failed
dist.destroy_process_group()
"""


@pytest.mark.long
def test_fully_shard(tmp_path, monkeypatch):
    from distributed.two_ranks import run_two_ranks

    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    run_two_ranks(FULLY_SHARD, tmp_path)


@EVERY
def test_accelerate(name):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    module = make(name)
    expected = step(make(name), *make_batch())
    prepared = accelerator.prepare(module)
    embeddings, labels = make_batch()
    leaf = embeddings.requires_grad_()
    value = call(prepared, leaf, labels)
    accelerator.backward(value)
    gradients = [value.detach(), leaf.grad, *(p.grad for p in prepared.parameters())]
    assert_same(gradients, expected)


# ---- dtypes, devices and how heads are called -----------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_embeddings_of_any_dtype(name, dtype):
    """Under a module in float32: computed in the wider type, each gradient in its own."""
    module = make(name)
    embeddings, labels = make_batch(dtype)
    value, gradient, *of_parameters = step(module, embeddings, labels)
    assert gradient.dtype == dtype
    if name.startswith("pml."):  # which converts the weights, in place
        return
    assert all(g.dtype == torch.float32 for g in of_parameters)
    truth = step(make(name).double(), embeddings.double(), labels)
    wide = dtype if not of_parameters else torch.promote_types(dtype, torch.float32)
    for found, true in zip((value, gradient, *of_parameters), truth, strict=True):
        bound = 8 * max(torch.finfo(found.dtype).eps, torch.finfo(wide).eps)
        torch.testing.assert_close(found.double(), true, rtol=bound, atol=bound * true.abs().max().item())


@EVERY_HEAD
def test_on_the_meta_device_first(name):
    expected = make(name)
    with torch.device("meta"):
        module = HEADS[name]()
    assert all(p.is_meta for p in module.parameters())
    module.to_empty(device="cpu")
    torch.manual_seed(1)
    module.reset_parameters()
    assert_same(step(module, *make_batch()), step(expected, *make_batch()))


@EVERY_HEAD
def test_five_arguments(name):
    module, (embeddings, labels) = make(name), make_batch()
    expected = module(embeddings, labels)
    assert torch.equal(module(embeddings, labels, None, None, None), expected)
    assert torch.equal(module(embeddings, labels, ref_emb=None, ref_labels=None), expected)
    for refused in ("ref_emb", "ref_labels"):
        with pytest.raises(ValueError, match=rf"^{refused}: expected None.*class-level"):
            module(embeddings, labels, **{refused: embeddings})


@EVERY_HEAD
def test_a_weight_of_another_shape_or_kind_is_named(name):
    module, (embeddings, labels) = make(name), make_batch()
    own, shape = module.weight, list(getattr(module, module.weight).shape)
    for replaced, says in (
        (torch.randn(shape[0] + 1, shape[1]), rf"expected shape \[{shape[0]}, {shape[1]}\], got"),
        (torch.randn(shape[1], shape[0]), "expected shape"),
        (torch.randn(shape[0]), "expected shape"),
        (torch.zeros(shape, dtype=torch.long), "expected a floating-point tensor"),
    ):
        if list(replaced.shape) == shape and replaced.is_floating_point():
            continue
        setattr(module, own, nn.Parameter(replaced, requires_grad=False))
        with pytest.raises((TypeError, ValueError), match=rf"^{own}: {says}"):
            module(embeddings, labels)


@EVERY_HEAD
@pytest.mark.parametrize("listed", [False, True])
def test_ignored_rows_are_no_valid_rows(name, listed):
    module, (embeddings, labels) = make(name), make_batch()
    module.reduction = "mean_valid"
    labels[[1, 5, 9]] = -1
    left = labels >= 0
    rows = (torch.arange(len(labels)),) * 3 if listed else None
    of_left = (torch.arange(int(left.sum())),) * 3 if listed else None
    found, expected = module(embeddings, labels, rows), module(embeddings[left], labels[left], of_left)
    torch.testing.assert_close(found, expected)
    alone = dml_cuda.distributed.DistributedLoss(module)
    torch.testing.assert_close(alone(embeddings, labels), module(embeddings, labels))


# ---- autograd's tools -----------------------------------------------------------------------------------


@EVERY_STATELESS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(name, reentrant):
    module, (embeddings, labels) = make(name), make_batch()
    expected = step(module, embeddings, labels)
    leaf = embeddings.clone().requires_grad_()
    torch.manual_seed(3)
    value = checkpoint(module, leaf, labels, use_reentrant=reentrant)
    value.backward()
    found = [value.detach(), leaf.grad, *(p.grad for p in module.parameters())]
    assert_same(found, expected, 0)


@EVERY
def test_func_grad(name):
    module, (embeddings, labels) = make(name), make_batch()
    expected = step(make(name), embeddings, labels)

    def value(x, buffers):  # which a transform must know, as it changes those of a memory
        torch.manual_seed(3)
        return torch.func.functional_call(module, buffers, (x, labels))

    gradient, found = torch.func.grad_and_value(value)(embeddings, dict(module.named_buffers()))
    assert_same([found, gradient], expected[:2])


@EVERY
def test_functional_call(name):
    """The gradients of all parameters, as a function of them and of the embeddings."""
    module, (embeddings, labels) = make(name), make_batch()
    expected = step(make(name), embeddings, labels)
    parameters = {key: p.detach() for key, p in module.named_parameters()}

    def value(parameters, x, buffers):
        torch.manual_seed(3)
        return torch.func.functional_call(module, (parameters, buffers), (x, labels))

    points = parameters, embeddings, dict(module.named_buffers())
    of_parameters, gradient = torch.func.grad(value, argnums=(0, 1))(*points)
    assert_same([expected[0], gradient, *of_parameters.values()], expected)


# One process of two, each with half of the rows.
FUNC_OF_TWO = """
import sys

import torch
import torch.distributed as dist
from integration.public_classes import SUBJECTS, make, make_batch

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
embeddings, labels = (x[rank::2].contiguous() for x in make_batch())
for name in SUBJECTS:
    if not name.startswith("DistributedLoss"):
        continue
    module = make(name)
    leaf = embeddings.clone().requires_grad_()
    expected = torch.autograd.grad(module(leaf, labels), [leaf, *module.parameters()])

    def value(x, parameters):
        return torch.func.functional_call(module, parameters, (x, labels))

    points = embeddings, {key: p.detach() for key, p in module.named_parameters()}
    gradient, of_parameters = torch.func.grad(value, argnums=(0, 1))(*points)
    for found, true in zip((gradient, *of_parameters.values()), expected):
        assert true.abs().max() > 0, name
        torch.testing.assert_close(found, true)
dist.destroy_process_group()
"""


@pytest.mark.long
def test_func_grad_of_two_processes(tmp_path, monkeypatch):
    from distributed.two_ranks import run_two_ranks

    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    run_two_ranks(FUNC_OF_TWO, tmp_path)


@pytest.mark.long
@EVERY
def test_compiled_autograd(name):
    from torch._dynamo import compiled_autograd

    module, (embeddings, labels) = make(name), make_batch()
    expected = step(make(name), embeddings, labels)
    leaf = embeddings.clone().requires_grad_()
    value = call(module, leaf, labels)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        value.backward()
    torch._dynamo.reset()
    assert_same([value.detach(), leaf.grad, *(p.grad for p in module.parameters())], expected)


def _to_disk(folder):
    """Hooks that keep no tensor: each unpacking reads a new one."""
    paths = []

    def pack(x):
        paths.append(folder / f"{len(paths)}.pt")
        torch.save(x, paths[-1])
        return paths[-1]

    return torch.autograd.graph.saved_tensors_hooks(pack, torch.load)


@EVERY
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloading(name, where, tmp_path):
    module, (embeddings, labels) = make(name), make_batch()
    expected = step(make(name), embeddings, labels)
    with torch.autograd.graph.save_on_cpu() if where == "cpu" else _to_disk(tmp_path):
        leaf = embeddings.clone().requires_grad_()
        value = call(module, leaf, labels)
    value.backward()
    assert_same([value.detach(), leaf.grad, *(p.grad for p in module.parameters())], expected, 0)


@EVERY_STATELESS
def test_jit_trace(name):
    module, (embeddings, labels) = make(name), make_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        traced = torch.jit.trace(module, (embeddings.clone().requires_grad_(), labels), check_trace=False)
    other = embeddings.flip(0) + 0.1
    expected = step(make(name), other, labels)
    assert_same(step(traced, other, labels), expected)


# ---- copies and modes -----------------------------------------------------------------------------------


@EVERY
def test_copies(name):
    """Of a new module, and of one that has computed."""
    module, (embeddings, labels) = make(name), make_batch()
    for again in (False, True):
        copies = [copy.deepcopy(module)]
        if not name.startswith("pml."):
            copies.append(pickle.loads(pickle.dumps(module)))
        expected = step(copy.deepcopy(module), embeddings, labels)
        for other in copies:
            assert_same(step(other, embeddings, labels), expected, 0)
        if not again:
            call(module, embeddings.clone().requires_grad_(), labels).backward()


def test_a_copy_for_the_same_processes():
    group = object()  # stands for a group of torch.distributed, which cannot be copied
    loss = dml_cuda.distributed.DistributedLoss(dml_cuda.CircleLoss())
    loss.group = group
    other = copy.deepcopy(nn.ModuleList([loss, loss]))
    assert other[0] is other[1]
    assert other[0].group is group
    assert other[0].loss is not loss.loss


@EVERY
def test_evaluated_in_inference_mode(name):
    """Between two steps of training."""
    module, (embeddings, labels) = make(name), make_batch()
    with torch.inference_mode():
        value = call(module, embeddings.clone(), labels)
        assert torch.isfinite(value)
    gradient = step(module, embeddings, labels)[1]
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda memory: None,
        lambda memory: setattr(memory, "memory_size", 150),
        lambda memory: setattr(memory, "embedding_size", 16),
        lambda memory: memory.double(),
        lambda memory: memory.reset_queue(),
        lambda memory: memory.load_state_dict(memory.state_dict(), assign=True),
        lambda memory: memory.load_state_dict({k: v.clone() for k, v in memory.state_dict().items()}),
    ],
    ids=["made", "memory_size", "embedding_size", "double", "reset", "assigned", "loaded"],
)
@pytest.mark.parametrize("made_inside", [False, True])
def test_a_memory_of_inference_mode_is_trained(change, made_inside):
    expected, (embeddings, labels) = make("CrossBatchMemory"), make_batch()
    with torch.inference_mode(made_inside):
        memory = make("CrossBatchMemory")
    with torch.inference_mode():
        change(memory)
    change(expected)
    if memory.embedding_size != embeddings.shape[1]:
        embeddings = embeddings.repeat(1, 2)
    for _ in range(2):
        assert_same(step(memory, embeddings, labels), step(expected, embeddings, labels), 0)
    with torch.inference_mode():
        memory(embeddings, labels)
    copy.deepcopy(memory).reset_queue()


# ---- settings -------------------------------------------------------------------------------------------


def numbers_of(cls):
    """The parameters of a class whose defaults are numbers, with those."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if type(p.default) is float}


SETTINGS = [
    pytest.param(cls, name, id=f"{name_of(cls)}-{name}")
    for cls in MAKERS
    if not cls.__module__.startswith("dml_cuda.pml")
    for name in numbers_of(cls)
]


@pytest.mark.parametrize(("cls", "name"), SETTINGS)
@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64])
def test_numbers_of_numpy(cls, name, kind):
    """As Python's: infinity is refused, and nothing warns."""
    sizes = (6, 8) if "num_classes" in list(inspect.signature(cls).parameters)[:1] else ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = kind(numbers_of(cls)[name])
        module, plain = cls(*sizes, **{name: value}), cls(*sizes, **{name: float(value)})
        if name != "beta" or cls is not dml_cuda.MarginLoss:
            assert getattr(module, name) == getattr(plain, name)
        setattr(module, name, value)
        for wrong in (kind("inf"), kind("-inf"), kind("nan")):
            with pytest.raises(ValueError, match=rf"^{name}: expected a"):
                cls(*sizes, **{name: wrong})
            with pytest.raises(ValueError, match=rf"^{name}: expected a"):
                setattr(module, name, wrong)


def test_optional_packages_are_in_the_development_set_up():
    named = (ROOT / "requirements-dev.txt").read_text().split()
    assert "safetensors" in named
    if importlib.util.find_spec("safetensors") is None:
        pytest.skip("safetensors is not installed")


# ---- what users see -------------------------------------------------------------------------------------


OWN = [cls for cls in MAKERS if cls.__module__.startswith("dml_cuda.") and ".pml" not in cls.__module__]
OWN = [cls for cls in OWN if cls is not dml_cuda.custom.CustomLoss]  # the base of compiled classes


@pytest.mark.parametrize("cls", OWN)
def test_unknown_arguments(cls):
    parameters = [p.name for p in inspect.signature(cls).parameters.values() if p.kind != p.VAR_KEYWORD]
    sizes = (6, 8) if parameters[:1] == ["num_classes"] else ()
    numbers = [name for name in numbers_of(cls) if len(name) > 3]
    for name in numbers:
        wrong = name[0] + name[2] + name[1] + name[3:]
        with pytest.raises(TypeError, match=rf"{wrong}.*{name}"):
            cls(*sizes, **{wrong: 1.0})
    if not issubclass(cls, dml_cuda.CrossBatchMemory | dml_cuda.distributed.DistributedLoss):
        for name in ("reducer", "distance", "embedding_regularizer"):
            with pytest.raises(TypeError, match=rf"{name}.*dml_cuda\.pml"):
                cls(*sizes, **{name: None})


def test_the_public_names():
    listed = [name for name in dir(dml_cuda) if not name.startswith("_")]
    assert listed == sorted(dml_cuda.__all__)
    run = [sys.executable, "-c", "import dml_cuda; dml_cuda._C; dml_cuda.memory"]
    subprocess.run(run, check=True, cwd=ROOT)


@pytest.mark.parametrize("cls", OWN)
def test_help_begins_with_the_parameters(cls):
    """Formula, parameters and options stand in the docstring, which help() shows before the methods."""
    text = inspect.getdoc(cls)
    for name in inspect.signature(cls).parameters:
        assert f"{name}" in text, name
    losses = dml_cuda.losses
    if issubclass(cls, losses._pair.PairLoss | losses._triplet.TripletLoss | losses._ranking.RankingLoss):
        assert ".. math::" in text
        assert "embeddings, labels" not in text.partition("Args:")[2].partition(">>>")[0]
        assert text.index(".. math::") < text.index("Args:") < text.index("options:") < text.index(">>>")
