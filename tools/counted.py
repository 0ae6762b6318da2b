"""The tables of csrc/cuda/README.md, written from what machine_code counts: `python -m tools.machine_code
--readme`."""

from pathlib import Path

README = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "README.md"
BEGIN, END = "<!-- counted by tools.machine_code: -->", "<!-- end of what is counted -->"

# As kernels name them, and as people do; in the order of the table.
ARITHMETICS = {
    "HalfMath<__nv_bfloat16>": "bfloat16",
    "HalfMath<__half>": "float16",
    "Tf32Math<float,false>": "tf32",
    "Tf32Math<float,true>": "3 x tf32",
}


def arithmetic_of(kernel):
    """The key of ARITHMETICS that a kernel's name begins with, or None."""
    arguments = kernel.partition("<")[2]
    if arguments.startswith("Tf32Math<__half"):  # the gradient of float16
        return "HalfMath<__half>"
    return next((math for math in ARITHMETICS if arguments.startswith(math)), None)


def collect(of_formulas, shorten, pairs_of):
    """{arithmetic: {what: number}} of the kernels, and {fold: Flow}; shorten: the names of kernels; pairs_of:
    the pairs that a thread looks at."""
    numbers, folds = {}, {}
    for formula, kernels in of_formulas.items():
        for symbol, (_, flow, cached) in kernels.items():
            name = shorten(symbol)
            kind, math = name.partition("<")[0], arithmetic_of(name)
            if kind.startswith("fold_") and "float" in name:
                folds[kind] = flow
            if math is None:
                continue
            row = numbers.setdefault(math, {})
            loops = [loop.in_code / loop.hmma for loop in flow.product_loops]
            pairs = pairs_of(name, flow)
            if kind == "find_extremes":
                row["find"] = flow.counts.total() / pairs
                row["similarities"] = max(row.get("similarities", 0), loops[0])
            elif kind in ("accumulate", "pair_weights"):
                row["similarities"] = max(row.get("similarities", 0), *loops)
                row[kind, formula] = flow.counts.total() / pairs
                row[kind, formula, "cached"] = cached.counts.total() / pairs
            elif kind.startswith("strip_"):
                row[kind, formula] = flow.counts.total() / pairs
            elif kind == "add_gradients":
                row["gradient", 128 if ",128," in name else 64] = max(loops)
    return numbers, folds


def markdown(of_formulas, bounds, shorten, pairs_of, fold_seconds):
    numbers, folds = collect(of_formulas, shorten, pairs_of)
    rows = [(people, numbers[math]) for math, people in ARITHMETICS.items() if math in numbers]
    ms, circle = "multi_similarity", "circle"
    lines = [
        "In a product's loop, for each HMMA, everything between its head and its backward branch:",
        "",
        "| | similarities | gradient, panels of 64 columns | of 128 |",
        "|---|---|---|---|",
        *(
            f"| {people} | {n['similarities']:.1f} | {n['gradient', 64]:.1f} | {n['gradient', 128]:.1f} |"
            for people, n in rows
        ),
        "",
        "For each of a thread's pairs, everything else in the kernel, multi-similarity / circle loss; in "
        "brackets where the similarities come from the cache:",
        "",
        "| | `find_extremes` | `accumulate` | `pair_weights` | `strip_forward` | `strip_backward` |",
        "|---|---|---|---|---|---|",
    ]
    for people, n in rows:
        cells = [f"{n['find']:.0f}"]
        for kind in ("accumulate", "pair_weights"):
            cached = f"{n[kind, ms, 'cached']:.0f} / {n[kind, circle, 'cached']:.0f}"
            cells.append(f"{n[kind, ms]:.0f} / {n[kind, circle]:.0f} ({cached})")
        cells += [
            f"{n[kind, ms]:.0f} / {n[kind, circle]:.0f}" for kind in ("strip_forward", "strip_backward")
        ]
        lines.append(f"| {people} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "A fold over 64 tiles: "
        + "; ".join(
            f"`{name}` waits for memory {flow.waits} times, {1e6 * fold_seconds(flow):.1f} us"
            for name, flow in sorted(folds.items())
        )
        + ".",
        "",
        "Least time of whole calls, forward and backward, on an H100, each resource alone, in microseconds:",
        "",
        "| | launches | issue slots | of which similarities, pairs, gradient | tensor cores | L2 |",
        "|---|---|---|---|---|---|",
        *(
            f"| {b.problem} | {b.launches} | {1e6 * b.issue_slots:.0f} | {1e6 * b.products:.0f}, "
            f"{1e6 * b.pairs:.0f}, {1e6 * b.gradients:.0f} | {1e6 * b.tensor_cores:.0f} | {1e6 * b.l2:.0f} |"
            for b in bounds
        ),
    ]
    return "\n".join(lines)


def write(text):
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
