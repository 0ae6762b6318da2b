"""How long whole problems take at least, if nothing but one of an H100's resources limits them.

Three bounds, each alone: the schedulers' issue slots, the tensor cores and the bytes from L2. Counted from
what the hot path of each kernel issues (control_flow.py) and from the launches that the engine itself asks
for: the host build of the engine (tests/emulator) writes them down instead of running them.
"""

import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from .control_flow import global_bytes, kinds, multiply_adds

# An H100 SXM.
MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.755e9
HMMA_CLOCKS = 4  # of a scheduler's tensor core, m16n8k16 in 16 bits or m16n8k8 in tf32, at the dense peak
L2_BYTES = 5.5e12  # a second, as others have measured
TILE = 128
TILE_KERNELS = ("find_extremes", "accumulate", "pair_weights")


@dataclass(frozen=True)
class Problem:
    name: str
    dtype: torch.dtype
    precision: str
    n: int
    m: int | None  # None: square
    d: int
    need_refs: bool = False
    epsilon: float = 0.1


PROBLEMS = [
    Problem("4096 x 512, mined, bf16", torch.bfloat16, "full", 4096, None, 512),
    Problem("4096 x 512, mined, tf32", torch.float32, "tf32", 4096, None, 512),
    Problem("4096 x 512, mined, 3 x tf32", torch.float32, "full", 4096, None, 512),
    Problem("512 x 65,536 x 128, mined, tf32, no gradient to refs", torch.float32, "tf32", 512, 65536, 128),
]


@dataclass
class Bound:
    problem: str
    launches: int
    products: float  # seconds of issue slots, by what they are spent on
    gradients: float
    pairs: float
    tensor_cores: float
    l2: float
    not_counted: dict  # kernels that no bound knows: how many launches

    @property
    def issue_slots(self):
        return self.products + self.gradients + self.pairs


def engine(problem):
    """The engine without data, and its launches."""
    tests = str(Path(__file__).resolve().parent.parent / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    from emulator import library

    e = library.Engine(
        torch.empty(0, problem.d, dtype=problem.dtype), torch.empty(0, dtype=torch.int64),
        epsilon=problem.epsilon, precision=problem.precision,
    )  # fmt: skip
    square = problem.m is None
    e.arguments.query_count, e.arguments.num_valid_refs = problem.n, problem.n if square else problem.m
    e.arguments.square = square
    return e, e.launches(need_r=problem.need_refs)


def plain_name(symbol):
    """find_extremes, from its mangled name."""
    for name in (*TILE_KERNELS, "add_gradients"):
        if name in symbol:
            return name
    digits = symbol.removeprefix("_ZN3dml4cuda")
    length = int("".join(c for c in digits[:2] if c.isdigit()))
    return digits[len(str(length)) : len(str(length)) + length]


def seconds(blocks, slots):
    """Of a launch whose blocks each issue that much, the multiprocessors taking them in turn."""
    return math.ceil(blocks / MULTIPROCESSORS) * slots / SCHEDULERS / CLOCK


def bound(problem, flows):
    """The Bound of one problem; flows: {mangled name: (source, Flow, Flow of a cached tile)}."""
    e, launches = engine(problem)
    square = problem.m is None
    along = [-(-count // TILE) for count in (problem.n, problem.n if square else problem.m)]
    tiles = along[0] * (along[0] + 1) // 2 if square else along[0] * along[1]
    cached = e.ask_sizes()[0] > 4 * TILE**2 * tiles  # what is saved holds the similarities
    asked = Counter()  # blocks of each tile kernel: where square, some of them have no tile
    for symbol, grid, _, _ in launches:
        asked[plain_name(symbol)] += grid[0] * grid[1]

    result = Bound(problem.name, len(launches), 0, 0, 0, 0, 0, {})
    last_tiles = (1, 1)
    for symbol, grid, block, _ in launches:
        name, warps = plain_name(symbol), block[0] // 32
        if name not in (*TILE_KERNELS, "add_gradients"):
            result.not_counted[name] = result.not_counted.get(name, 0) + 1
            continue
        from_cache = cached and name in ("pair_weights", "accumulate")
        _, anew, of_cached_tile = flows[symbol]
        flow, loop = of_cached_tile if from_cache else anew, anew.costliest_product
        parts = 3 if "Tf32MathIfLb1E" in symbol else 1  # products for one
        if name == "add_gradients":
            owners = last_tiles[0] + last_tiles[1] if square or problem.need_refs else last_tiles[0]
            if square and grid[1] == last_tiles[0]:  # on the diagonal rows and columns are the same
                owners = last_tiles[0]
            blocks = grid[0] * owners * grid[2]  # of which several share a line
            width = -(-problem.d // grid[0] // 8) * 8 if grid[0] > 1 else problem.d
            width = max(width, 64)
            depth = warps * multiply_adds(loop.counts) / parts / (TILE * width)
            # Each tile serves its rows and, where wanted, its columns.
            kept = last_tiles[0] * last_tiles[1]
            uses = kept * (2 if owners > last_tiles[0] else 1)
            rounds = uses / owners / grid[2] * TILE / depth
        else:
            blocks = grid[0] * grid[1] * tiles / asked[name]
            last_tiles = (grid[1], grid[0])
            depth = warps * multiply_adds(loop.counts) / parts / TILE**2
            rounds = 0 if from_cache else -(-problem.d // round(depth))
        product, rest = rounds * loop.counts.total(), flow.counts.total()
        whole = seconds(blocks, warps * (product + rest))
        share = product / (product + rest)
        if name == "add_gradients":
            result.gradients += whole
        else:
            result.products += whole * share
            result.pairs += whole * (1 - share)
        hmma = rounds * kinds(loop.counts)["HMMA"]
        result.tensor_cores += seconds(blocks, warps * hmma * HMMA_CLOCKS)
        moved = rounds * global_bytes(loop.counts) + global_bytes(flow.counts)
        result.l2 += blocks * warps * moved / L2_BYTES
    return result


def bounds(flows):
    return [bound(problem, flows) for problem in PROBLEMS]


def table(found):
    lines = [
        f"Least time on {MULTIPROCESSORS} multiprocessors at {CLOCK / 1e9:.3f} GHz, microseconds, each "
        "resource alone.",
        "issue slots = similarities + pairs + gradients; tensor cores at their dense peak; L2 at "
        f"{L2_BYTES / 1e12:.1f} TB/s.",
        "",
        f"{'':54}{'launches':>9}{'issue':>8}{'simil.':>8}{'pairs':>8}{'grad.':>8}{'tensor':>8}{'L2':>8}",
    ]
    for b in found:
        numbers = (b.issue_slots, b.products, b.pairs, b.gradients, b.tensor_cores, b.l2)
        lines.append(f"{b.problem:54}{b.launches:9}" + "".join(f"{1e6 * x:8.0f}" for x in numbers))
    others = Counter()
    for b in found:
        others.update(b.not_counted)
    lines += ["", "Not counted (bound by memory or latency): " + ", ".join(sorted(others))]
    return "\n".join(lines)
