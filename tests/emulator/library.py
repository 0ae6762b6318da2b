"""The CUDA engine as a shared library for the host, called with torch CPU tensors."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from . import build

HOST_SIDES = [build.HERE / f"{name}_host.cpp" for name in ("pair_loss", "ring", "triplets")]
SOURCES = [*sorted((build.ROOT / "csrc" / "cuda").rglob("*.cu")), *HOST_SIDES]
NARROW = {"f32", "f32_tf32", "f16", "bf16", "look_float"}  # the arithmetics, but for float64
KERNELS = {"all": SOURCES, "double": [source for source in SOURCES if source.stem not in NARROW]}
SCALARS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
PRECISIONS = ["full", "tf32"]
SIMILARITIES = {"cosine": (0, 1), "dot": (0, 0), "euclidean": (1, 1), "euclidean_raw": (1, 0)}
MAX_PARAMS = 8
REDUCTIONS = ["mean", "mean_nonzero", "mean_valid", "sum", "none"]
# For `make sanitize`: kernels are built with this sanitizer, and its runtime is preloaded.
SANITIZER = os.environ.get("DML_EMULATOR_SANITIZER", "none")
# Bytes on either side of every buffer, which the kernels must leave alone. AddressSanitizer has its own, and
# sees reads, too.
GUARD = 0 if SANITIZER == "address" else 64


# ---- the structs of arguments.h, field by field ------------------------------------------------------------


def integers(*names):
    return [(name, ctypes.c_int64) for name in names]


def pointers(*names):
    return [(name, ctypes.c_void_p) for name in names]


class PointRows(ctypes.Structure):
    _fields_ = [*pointers("data"), *integers("count", "stride")]

    @classmethod
    def of(cls, points):
        return cls(points.data_ptr(), len(points), points.stride(0))


class Batch(ctypes.Structure):
    _fields_ = [
        ("embeddings", PointRows),
        *pointers("labels"),
        ("ref_emb", PointRows),
        *pointers("ref_labels", "self_index", "num_valid_refs", "row_weights"),
        *integers("square", "dim", "scalar"),
    ]

    @classmethod
    def of(
        cls,
        embeddings,
        labels,
        ref_emb=None,
        ref_labels=None,
        self_index=None,
        num_valid_refs=None,
        row_weights=None,
    ):
        return cls(
            embeddings=PointRows.of(embeddings),
            labels=labels.data_ptr(),
            ref_emb=PointRows.of(embeddings if ref_emb is None else ref_emb),
            ref_labels=address(labels if ref_emb is None else ref_labels),
            self_index=address(self_index),
            num_valid_refs=address(num_valid_refs),
            row_weights=address(row_weights),
            square=ref_emb is None,
            dim=embeddings.shape[1],
            scalar=SCALARS.index(embeddings.dtype),
        )


class Options(ctypes.Structure):
    _fields_ = [
        *integers("formula"),
        ("params", ctypes.c_double * MAX_PARAMS),
        *integers("mining"),
        ("epsilon", ctypes.c_double),
        *integers("euclidean", "normalize", "reduction", "mine_self_pair", "return_sums", "precision"),
        *pointers("learned", "by_params"),
    ]

    @classmethod
    def of(
        cls,
        loss,
        params,
        epsilon,
        similarity,
        reduction,
        precision,
        mine_self_pair=False,
        return_sums=False,
    ):
        euclidean, normalize = SIMILARITIES[similarity]
        return cls(
            formula=formulas().index(loss),
            params=(ctypes.c_double * MAX_PARAMS)(*params),
            mining=epsilon is not None,
            epsilon=epsilon or 0.0,
            euclidean=euclidean,
            normalize=normalize,
            reduction=REDUCTIONS.index(reduction),
            mine_self_pair=mine_self_pair,
            return_sums=return_sums,
            precision=PRECISIONS.index(precision),
        )


class Tuning(ctypes.Structure):
    _fields_ = integers(
        "matrix_bytes",
        "small_tile_pairs",
        "long_row",
        "whole_line",
        "gradient_blocks",
        "tile_group",
        "cache_bytes",
        "sum_bytes",
        "wide_blocks",
        "line_blocks",
        "split_slots",
        "wgmma",
    )

    @classmethod
    def of(cls, **given):
        """Defaults (-1) but for what is given."""
        return cls(**{name: given.pop(name, -1) for name, _ in cls._fields_}, **given)


class Arguments(ctypes.Structure):
    _fields_ = [("batch", Batch), ("options", Options), ("tuning", Tuning)]


def address(tensor):
    """The address of a tensor's data, or None."""
    return None if tensor is None else tensor.data_ptr()


def shared(sources):
    """A shared library of sources and the emulator. Compiles what is not cached, two files at a time."""
    native = ["-mfma"] if "fma" in Path("/proc/cpuinfo").read_text() else []  # without, std::fma is slow
    # Without unique symbols: else a table of csrc's is dml_cuda._C's own, which may be an older build.
    sanitize = build.kernel_flags(SANITIZER)
    kernel = [*build.COMMON, *build.WARNINGS, *sanitize, "-fPIC", "-fno-gnu-unique", *native]
    with ThreadPoolExecutor(2) as pool:
        objects = [
            *pool.map(lambda s: build._compile(s, [*build.COMMON, "-O3", "-fPIC"]), build.RUNTIME),
            *pool.map(lambda s: build._compile(s, kernel), sources),
        ]
    link = ["g++", "-shared", *build.LINKED[SANITIZER], "-Wl,-z,lazy", *map(str, objects)]
    return build.cached(objects, link, suffix=".so")


@cache
def load(kernels="all"):
    """The library, or one without the engines of other arithmetics than float64, in half the time."""
    path = str(shared(KERNELS[kernels]))
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    # Lazily: functions that were left out are missed when they are called. CDLL itself misses them now; it
    # opens what could not be opened here, and tells why not.
    return ctypes.CDLL(path, handle=dlopen(path.encode(), os.RTLD_LAZY))


def load_for(dtype):
    """The library with the kernels for points of a type."""
    return load("double" if dtype == torch.float64 else "all")


@cache
def formulas():
    """The names of the formulas, in the order of csrc/losses/list.h."""
    library = load("double")
    library.dml_formula_names.restype = ctypes.c_char_p
    return library.dml_formula_names().decode().split()


def call(library, function, *arguments, schedule, buffers):
    """Calls one of the functions that return whether they failed, and looks after the buffers' guards."""
    name, seed = schedule
    library.dml_set_schedule(name == "warp_first", ctypes.c_int64(seed))
    error = ctypes.create_string_buffer(1000)
    if getattr(library, function)(*arguments, error, ctypes.c_int64(1000)):
        raise RuntimeError(error.value.decode())
    look_after_guards(buffers)


def look_after_guards(buffers):
    for raw in buffers:
        assert (torch.cat([raw[:GUARD], raw[len(raw) - GUARD :]]) == 255).all(), "a guard was overwritten"


def poisoned(count, dtype):
    """An uninitialised buffer between two guards: every byte 0xFF, which is NaN in every float type."""
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.full((count * size + 2 * GUARD,), 255, dtype=torch.uint8)
    return raw[GUARD : GUARD + count * size].view(dtype), raw


@dataclass
class Engine:
    """One problem: forward, then backward, as often as wanted."""

    q: torch.Tensor
    labels: torch.Tensor
    r: torch.Tensor | None = None
    ref_labels: torch.Tensor | None = None
    self_index: torch.Tensor | None = None
    num_valid_refs: torch.Tensor | None = None
    loss: str = "multi_similarity"
    params: tuple = (2.0, 50.0, 0.5)
    epsilon: float | None = None
    similarity: str = "cosine"
    reduction: str = "mean"
    mine_self_pair: bool = True
    return_sums: bool = False
    precision: str = "full"
    save_for_backward: bool = True
    tuning: dict = field(default_factory=dict)  # fields of Tuning
    schedule: tuple = ("round_robin", 0)
    row_weights: torch.Tensor | None = None  # of the type of sums
    learns: bool = False  # whether the kernels read the parameters from memory

    def __post_init__(self):
        self.library = load_for(self.q.dtype)
        self.acc = torch.float64 if self.q.dtype == torch.float64 else torch.float32
        self.arguments = Arguments(
            batch=Batch.of(
                self.q,
                self.labels,
                self.r,
                self.ref_labels,
                self.self_index,
                self.num_valid_refs,
                self.row_weights,
            ),
            options=Options.of(
                self.loss,
                [torch.nan] * len(self.params) if self.learns else self.params,
                self.epsilon,
                self.similarity,
                self.reduction,
                self.precision,
                self.mine_self_pair,
                self.return_sums,
            ),
            tuning=Tuning.of(**self.tuning),
        )
        self.buffers = []
        self.values = torch.tensor(self.params, dtype=torch.float64)
        if self.learns:
            self.by_params = self.buffer(len(self.params) + 1, torch.float64)
            options = self.arguments.options
            options.learned, options.by_params = address(self.values), address(self.by_params)
        self.sizes = self.ask_sizes()
        self.saved = self.buffer(self.sizes[0], torch.uint8)

    def ask_sizes(self):
        """Bytes of what is saved, and of the workspaces of forward and backward."""
        sizes = (ctypes.c_int64 * 3)()
        self.library.dml_sizes(ctypes.byref(self.arguments), self.save_for_backward, sizes)
        return list(sizes)

    def launches(self, with_backward=True, need_q=True, need_r=True):
        """[(kernel's symbol, grid, block, shared bytes, whether dependent)] of a whole call, without running
        it."""
        text, error = ctypes.create_string_buffer(1 << 20), ctypes.create_string_buffer(1000)
        asked = ctypes.byref(self.arguments), with_backward, need_q, need_r
        if self.library.dml_launches(*asked, text, ctypes.c_int64(len(text)), error, ctypes.c_int64(1000)):
            raise RuntimeError(error.value.decode())
        rows = [line.split() for line in text.value.decode().splitlines()]
        shape = lambda numbers: tuple(map(int, numbers.split(",")))  # noqa: E731
        return [
            (name, shape(grid), shape(block), int(shared), dependent == "1")
            for name, grid, block, shared, dependent in rows
        ]

    def kept(self, tiles):
        """Whether each tile may hold a gradient: the last bytes saved, but for rounding up."""
        bytes_before = self.sizes[0] - tiles
        starts = [at for at in range(bytes_before, bytes_before - 16, -1) if (at - len(self.q)) % 16 == 0]
        return [bool(flag & 1) for flag in self.saved[starts[0] : starts[0] + tiles]]

    @property
    def losses(self):
        return len(self.q) if self.reduction == "none" else 4 if self.return_sums else 1

    def buffer(self, count, dtype):
        view, raw = poisoned(count, dtype)
        self.buffers.append(raw)
        return view

    def call(self, function, *tensors):
        given = [ctypes.c_void_p(address(tensor)) for tensor in tensors]
        reference, saves = ctypes.byref(self.arguments), int(self.save_for_backward)
        call(self.library, function, reference, saves, *given, schedule=self.schedule, buffers=self.buffers)

    def forward(self):
        loss = self.buffer(self.losses, self.acc)
        workspace = self.buffer(self.sizes[1], torch.uint8)
        self.call("dml_forward", self.saved, loss, workspace)
        return loss if self.reduction == "none" or self.return_sums else loss[0]

    def backward(self, upstream=None, need_q=True, need_r=True):
        if upstream is None:
            upstream = torch.ones(self.losses)
        upstream = upstream.to(self.acc).contiguous()
        grads = []
        for points, needed in ((self.q, need_q), (self.r, need_r)):
            wanted = points is not None and needed
            grads.append(self.buffer(points.numel(), self.q.dtype).view(points.shape) if wanted else None)
        workspace = self.buffer(self.sizes[2], torch.uint8)
        self.call("dml_backward", self.saved, upstream, *grads, workspace)
        return grads


# ---- pairs given as lists, as the ops of the same names -------------------------------------------------


def _call_pairs(function, like, shape, *arguments, schedule):
    """Fills a tensor of this shape; tensors among the arguments become addresses, numbers int64."""
    view, raw = poisoned(torch.Size(shape).numel(), like.dtype)
    given = [
        ctypes.c_void_p(a.data_ptr()) if torch.is_tensor(a) else ctypes.c_int64(a) for a in (*arguments, view)
    ]
    wide = like.dtype == torch.float64
    call(load("double"), function, wide, *given, schedule=schedule, buffers=[raw])
    return view.view(shape)


def pair_products(x, y, rows, cols, schedule=("round_robin", 0)):
    return _call_pairs(
        "dml_multiply_pairs", x, rows.shape,
        x, len(x), y, len(y), x.shape[1], rows, cols, len(rows), schedule=schedule,
    )  # fmt: skip


def pair_sums(weights, points, index, offsets, schedule=("round_robin", 0)):
    rows, dim = len(offsets) - 1, points.shape[1]
    return _call_pairs(
        "dml_sum_pairs", points, (rows, dim),
        weights, points, len(points), dim, index, offsets, rows, len(index), schedule=schedule,
    )  # fmt: skip


def segment_logsumexp(logits, offsets, plus_one, schedule=("round_robin", 0)):
    rows = len(offsets) - 1
    return _call_pairs(
        "dml_log_sum_exps", logits, (rows,),
        logits, offsets, rows, len(logits), plus_one, schedule=schedule,
    )  # fmt: skip


def segment_softmax(grad, logits, value, offsets, schedule=("round_robin", 0)):
    return _call_pairs(
        "dml_softmaxes", logits, logits.shape,
        grad, logits, value, offsets, len(grad), len(logits), schedule=schedule,
    )  # fmt: skip


# ---- triplets --------------------------------------------------------------------------------------------

TERMS = ["hinge", "softplus", "margin"]
SELECTIONS = ["all", "hardest", "easiest", "semihard", "drawn"]  # as in csrc/core/triplets.h
TRIPLET_PARAMS = 10
RANKINGS = ["smooth_ap", "recall_at_k", "fast_ap"]  # as in csrc/core/ranking.h


class TripletArguments(ctypes.Structure):  # as in triplets_host.cpp, field by field
    _fields_ = [
        ("s", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("rows", "columns", "pitch", "first")],
        *[(name, ctypes.c_void_p) for name in ("members", "begin", "end", "self_index")],
        ("square", ctypes.c_int64),
        ("num_valid_refs", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("term", "positives", "negatives")],
        ("params", ctypes.c_double * TRIPLET_PARAMS),
        *[(name, ctypes.c_int64) for name in ("euclidean", "write")],
        *[(name, ctypes.c_void_p) for name in ("seed", "anchors", "anchors_positives")],
        *[(name, ctypes.c_int64) for name in ("pairs", "of_positives")],
    ]


@dataclass
class TripletRows:
    """Rows [first, first + len(s)) of a batch against all columns, by their similarities."""

    s: torch.Tensor  # [rows, columns]; the weights are left in its place
    labels: torch.Tensor  # [N]
    ref_labels: torch.Tensor | None = None  # [columns], None: the rows are the columns
    self_index: torch.Tensor | None = None
    num_valid_refs: torch.Tensor | None = None
    first: int = 0
    params: list = field(default_factory=lambda: [0.0] * TRIPLET_PARAMS)
    euclidean: bool = False
    seed: torch.Tensor | None = None
    schedule: tuple = ("round_robin", 0)

    def __post_init__(self):
        self.wide = self.s.dtype == torch.float64
        columns = self.labels if self.ref_labels is None else self.ref_labels
        self.members = columns.argsort(stable=True)
        self.begin, self.end = (
            torch.searchsorted(columns[self.members], self.labels, right=right) for right in (False, True)
        )

    def arguments(
        self, term="hinge", positives="all", negatives="all", write=True, pairs=None, of_positives=False
    ):
        anchors, asked = pairs if pairs is not None else (None, None)
        return TripletArguments(
            self.s.data_ptr(), *self.s.shape, self.s.stride(0), self.first,
            *map(address, (self.members, self.begin, self.end, self.self_index)),
            self.ref_labels is None, address(self.num_valid_refs),
            TERMS.index(term), SELECTIONS.index(positives), SELECTIONS.index(negatives),
            (ctypes.c_double * TRIPLET_PARAMS)(*self.params), self.euclidean, write, address(self.seed),
            address(anchors), address(asked), 0 if anchors is None else len(anchors), of_positives,
        )  # fmt: skip

    def call(self, name, arguments, *tensors, numbers=()):
        outputs = [poisoned(count, dtype) for count, dtype in tensors]
        pointers = [ctypes.c_void_p(view.data_ptr()) for view, _ in outputs]
        given = [ctypes.c_void_p(x.data_ptr()) if torch.is_tensor(x) else x for x in numbers]
        wide = ctypes.c_int64(self.wide)
        reference = ctypes.byref(arguments)
        raw = [raw for _, raw in outputs]
        call(load("double"), name, reference, wide, *given, *pointers, schedule=self.schedule, buffers=raw)
        return [view for view, _ in outputs]

    def losses(self, term, positives, negatives, row_params=None, write=True):
        """Sums, counts and the gradient by row_params, of all N rows; rows of other blocks keep theirs."""
        n, dtype = len(self.labels), self.s.dtype
        sums, counts, by_param = self.call(
            "dml_triplet_rows",
            self.arguments(term, positives, negatives, write),
            (n, dtype),
            (2 * n, torch.int64),
            (n, dtype),
            numbers=(row_params,),
        )
        return sums, counts.view(n, 2), by_param

    def rankings(self, loss, values, row_weights=None, write=True):
        """Losses, counts and the derivatives by both temperatures, of all N rows."""
        n, dtype = len(self.labels), self.s.dtype
        cutoffs = values.get("ks", ())
        temperatures = values.get("temperature", 1.0), values.get("temperature_k", 1.0)
        numbers = torch.tensor([*temperatures, *cutoffs], dtype=torch.float64)
        losses, counts, by_params = self.call(
            "dml_ranking_rows",
            self.arguments(write=write),
            (n, dtype),
            (2 * n, torch.int64),
            (2 * n, torch.float64),
            numbers=(
                ctypes.c_int64(RANKINGS.index(loss)),
                numbers,
                ctypes.c_int64(len(cutoffs)),
                ctypes.c_int64(values.get("num_bins", 0)),
                row_weights,
            ),
        )
        return losses, counts.view(n, 2), by_params.view(n, 2)

    def select(self, which, of_positives, pairs=None):
        n = len(self.labels) if pairs is None else len(pairs[0])
        arguments = self.arguments(negatives=which, pairs=pairs, of_positives=of_positives)
        return self.call("dml_select_rows", arguments, (n, torch.int64), (n, self.s.dtype))

    def make_distances(self, x, y):
        squares = x.square().sum(1), y.square().sum(1)
        given = x, squares[0], y, squares[1], ctypes.c_int64(x.shape[1])
        self.call("dml_make_distances", self.arguments(), numbers=given)
