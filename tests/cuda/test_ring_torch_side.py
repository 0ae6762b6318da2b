"""The torch side of the CUDA ops on blocks of columns, on CPU tensors and emulated kernels: against the CPU's
ops, and as the ops of a ring of processes."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases.data import make_labels
from cases.losses import LOSSES, ON_CUDA, SIMILARITIES
from distributed.processes import finish, start
from emulator import torch_side
from torch._subclasses.fake_tensor import FakeTensorMode

from dml_cuda import _C
from dml_cuda._ops.arguments import OpOptions

pytestmark = [pytest.mark.slow(60), pytest.mark.long]

CPU = torch.ops.dml_cuda
HERE = Path(__file__).parents[1] / "distributed"


@pytest.fixture(scope="module")
def on_host():
    torch_side.load("ring")
    return torch.ops.dml_cuda_blocks_on_host


class Batch:
    """Rows, the first block of columns being the rows themselves."""

    def __init__(self, n=20, others=(30, 0, 1), d=6, dtype=torch.float64, device="cpu"):
        torch.manual_seed(3)
        sides = [(torch.randn(m, d).to(dtype), make_labels(m)) for m in (n, *others)]
        sides = [(points.to(device), labels.to(device)) for points, labels in sides]
        self.x, self.labels = sides[0]
        self.blocks = [(*side, None) for side in sides]
        self.blocks[0] = (*sides[0], torch.arange(n, device=device))
        every = torch.cat([labels for _, labels in sides])
        positives = (self.labels[:, None] == every).sum(1)
        self.pairs = torch.stack([positives - 1, len(every) - positives])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.grad_parts = torch.randn(2, n, dtype=wide).to(device)

    def batches(self):
        return [(self.x, self.labels, *block, None, None) for block in self.blocks]

    def around(
        self, of, device, formula, params, epsilon, similarity="cosine", reduction="mean", *, keep=True,
        precision="ieee", learns=False,
    ):  # fmt: skip
        """Losses and gradients of the ops ``of``, in the stages of a kind of device; by parameters last, if
        they learn."""
        is_double = self.x.dtype == torch.float64
        options = OpOptions(
            formula, params, epsilon, similarity, reduction, mine_self_pair=False, precision=precision
        )
        options = options.with_dynamic_params() if learns else options
        state = of.pair_block_turn(*options, None, self.pairs, "start", is_double)
        found = [None] * len(self.blocks)
        for stage in _C.ring_stages(device, formula, epsilon is not None):
            for k, batch in enumerate(self.batches()):
                state, found[k] = of.pair_block(*batch, *options, state, stage, found[k])
                if stage == "hardest" and not keep:
                    found[k] = None
            state = of.pair_block_turn(*options, state, self.pairs, stage, is_double)
        losses, weights = of.pair_block_rows(*options, state, self.pairs)
        gradients, by_params = [], []
        for k, (batch, kept) in enumerate(zip(self.batches(), found, strict=True)):
            given = self.grad_parts, weights, kept, True, True, learns, k == 0
            *by_points, by_param = of.pair_block_backward(*batch, *options, *given)
            gradients += by_points
            by_params.append(by_param)
            if learns:  # alone, it is the same
                alone = of.pair_block_backward(*batch, *options, *given[:3], False, False, True, k == 0)
                assert torch.equal(alone[2], by_param)
        by_params = [sum(by_params)] if learns else []
        return losses[:2], (losses[2:] * (losses[:2] != 0)), *gradients, *by_params


def check(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = max(1.0, float(b.double().abs().max())) if b.numel() else 1.0
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("epsilon", [None, 0.1], ids=["all", "mined"])
@pytest.mark.parametrize("loss", ON_CUDA.values(), ids=ON_CUDA)
def test_parameters_that_learn(on_host, loss, epsilon):
    """The first block may be empty: its rows are not."""
    for similarity in SIMILARITIES:
        how = loss.name, loss.params(similarity, **loss.smooth), epsilon, similarity
        for sizes in ((20, (30, 0, 1)), (3, (140,)), (1, (0, 2))):
            batch = Batch(*sizes)
            expected = batch.around(CPU, "cpu", *how, learns=True)
            check(batch.around(on_host, "cuda", *how, learns=True), expected, 1e-9)


@pytest.mark.parametrize("epsilon", [None, 0.1], ids=["all", "mined"])
@pytest.mark.parametrize("loss", ON_CUDA.values(), ids=ON_CUDA)
def test_as_the_ops_of_the_cpu(on_host, loss, epsilon):
    for similarity in SIMILARITIES:
        how = loss.name, loss.params(similarity, **loss.smooth), epsilon, similarity
        batch = Batch()
        expected = batch.around(CPU, "cpu", *how)
        check(batch.around(on_host, "cuda", *how), expected, 1e-10)
        check(batch.around(on_host, "cuda", *how, keep=False), expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(on_host, dtype):
    """The gradients come in float32."""
    how = "multi_similarity", [2.0, 5.0, 0.5], None
    batch = Batch(dtype=dtype)
    expected = batch.around(CPU, "cpu", *how)
    check(batch.around(on_host, "cuda", *how), expected, 1e-5 if dtype == torch.float32 else 1e-2)


def test_rows_that_are_not_dense(on_host):
    how = "multi_similarity", [2.0, 5.0, 0.5], 0.1
    batch = Batch()
    expected = batch.around(on_host, "cuda", *how)
    batch.x = batch.x.T.contiguous().T
    batch.blocks = [(points.T.contiguous().T, *more) for points, *more in batch.blocks]
    batch.pairs = batch.pairs.T.contiguous().T
    batch.grad_parts = batch.grad_parts.T.contiguous().T
    check(batch.around(on_host, "cuda", *how), expected, 0)


@pytest.mark.parametrize("n", [0, 1])
def test_odd_batches(on_host, n):
    for loss in ON_CUDA.values():
        for epsilon in (None, 0.1):
            how = loss.name, loss.params(), epsilon
            batch = Batch(n, (5, 0))
            check(batch.around(on_host, "cuda", *how), batch.around(CPU, "cpu", *how), 1e-10)


def test_float32_is_multiplied_as_asked(on_host):
    """As the option says, whatever torch is set to."""
    how = "multi_similarity", [2.0, 5.0, 0.5], 0.1
    batch = Batch(dtype=torch.float32)
    ieee, tf32 = (batch.around(on_host, "cuda", *how, precision=way) for way in ("ieee", "tf32"))
    assert not torch.equal(ieee[0], tf32[0])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        again = batch.around(on_host, "cuda", *how)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(again, ieee, strict=True))


def told_as_made(op, *arguments):
    """What an op makes of CPU tensors has the shapes that its fake kernel tells of CUDA tensors."""
    made = op(*arguments)
    with FakeTensorMode():
        fakes = [
            torch.empty(x.shape, dtype=x.dtype, device="cuda") if torch.is_tensor(x) else x for x in arguments
        ]
        told = getattr(CPU, op.__name__)(*fakes)
    shapes = (
        [(x.shape, x.dtype) for x in (found if isinstance(found, tuple) else (found,))]
        for found in (made, told)
    )
    assert next(shapes) == next(shapes), arguments
    return made


@pytest.mark.parametrize("epsilon", [None, 0.1], ids=["all", "mined"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shapes_are_those_that_torch_is_told(on_host, dtype, epsilon):
    """What the ops' fake kernels say of CUDA tensors, which need no GPU."""
    batch = Batch(150, (300, 0), dtype=dtype)
    is_double = dtype == torch.float64
    for formula in ("multi_similarity", "nt_xent"):
        options = OpOptions(formula, LOSSES[formula].params(), epsilon, mine_self_pair=False)
        state = told_as_made(on_host.pair_block_turn, *options, None, batch.pairs, "start", is_double)
        found = [None] * len(batch.blocks)
        for stage in _C.ring_stages("cuda", formula, epsilon is not None):
            for k, block in enumerate(batch.batches()):
                state, found[k] = told_as_made(on_host.pair_block, *block, *options, state, stage, found[k])
            state = told_as_made(on_host.pair_block_turn, *options, state, batch.pairs, stage, is_double)
        _, weights = told_as_made(on_host.pair_block_rows, *options, state, batch.pairs)
        for block, kept in zip(batch.batches(), found, strict=True):
            for needs in ((True, True), (False, True), (True, False)):
                given = batch.grad_parts, weights, kept, *needs, False, False
                told_as_made(on_host.pair_block_backward, *block, *options, *given)


def test_sizes_of_many_tiles():
    """Past so many tiles, first their extremes and then their kept flags are not known."""

    def sizes(n, m):
        return _C.ring_found_bytes("cuda", n, m, 4)

    assert sizes(128 * 1024, 128 * 1024) == (8 << 20, 1 << 20)
    assert sizes(128 * 1024, 128 * 2048 + 1) == (0, 1024 * 2049)
    assert sizes(128 * 4096, 128 * 4096) == (0, 16 << 20)
    assert sizes(128 * 4096, 128 * 4096 + 1) == (0, 0)


def test_what_is_refused(on_host):
    batch = Batch(8, (5,))
    circle = OpOptions("circle", LOSSES["circle"].params(), mine_self_pair=False)
    contrast = OpOptions("nt_xent", LOSSES["nt_xent"].params(), mine_self_pair=False)
    start = on_host.pair_block_turn(*circle, None, batch.pairs, "start", True)
    block = batch.batches()[1]

    def refused(message, op, *arguments, error=ValueError):
        with pytest.raises(error, match=message):
            getattr(on_host, op)(*arguments)

    refused("state.*start", "pair_block_turn", *circle, None, batch.pairs, "both", True)
    refused("stage.*first", "pair_block_turn", *circle, start, batch.pairs, "first", True)
    refused("epsilon.*hardest", "pair_block_turn", *circle, start, batch.pairs, "hardest", True)
    refused(r"pairs.*\[2, N\]", "pair_block_turn", *circle, None, batch.pairs[:1], "start", True)
    refused(r"state.*\[52\]", "pair_block_turn", *circle, start[:51], batch.pairs, "both", True)
    unknown = circle._replace(formula="linear", params=[])
    refused("formula.*linear", "pair_block_turn", *unknown, None, batch.pairs, "start", True)
    unknown = circle._replace(precision="half")
    refused("precision.*half", "pair_block", *block, *unknown, start, "both")
    refused(r"state.*Float", "pair_block", *block, *circle, start.float(), "both")
    narrow = batch.x, batch.labels, batch.x[:, 1:], batch.labels, None, None, None
    refused("ref_emb", "pair_block", *narrow, *circle, start, "both")
    errors = RuntimeError, ValueError
    refused("not a stage", "pair_block", *block, *circle, start, "negatives", error=errors)
    short = torch.zeros(3, dtype=torch.uint8)
    refused("found.*0 or 16 bytes.*got 3", "pair_block", *block, *circle, start, "both", short)
    refused("found.*1 or 17 bytes.*got 0", "pair_block", *block, *contrast, start, "positives")
    parts = torch.ones(2, 8, dtype=torch.float64)
    kept = torch.zeros(1, dtype=torch.uint8)
    arguments = *block, *circle
    on_host.pair_block_backward(*arguments, parts, start, kept, True, True, False, False)
    refused("grad_parts", "pair_block_backward", *arguments, parts[:1], start, kept, True, True, False, False)
    refused("weights", "pair_block_backward", *arguments, parts, start[:-1], kept, True, True, False, False)
    refused("kept.*1 bytes", "pair_block_backward", *arguments, parts, start, short, True, True, False, False)
    unknown = circle._replace(reduction="median")
    refused("reduction", "pair_block_rows", *unknown, start, batch.pairs)


@pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without torch.distributed")
@pytest.mark.parametrize("size", [2, 3])
def test_a_ring_of_cuda_kernels(on_host, size, tmp_path):
    """What several processes make with the CUDA kernels, on the host, is what one makes on the CPU."""
    assert on_host
    finish(start([str(HERE / "ring_of_cuda_kernels.py")], size, tmp_path), 900)
    for rank in range(size):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [name for name, text in found.items() if text] == [], next(filter(None, found.values()))
        assert len(found) == 3 * (len(ON_CUDA) if size == 3 else 3) + 8
