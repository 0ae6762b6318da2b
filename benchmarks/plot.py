"""A picture of a run: time over the bare matmuls, and peak memory."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

from .machine import one_line
from .peers import TITLES
from .report import split

# Okabe and Ito's colours, told apart by colour-blind eyes too; the shapes differ as well.
_STYLE = {
    "fused": ("#D55E00", "o"),
    "fused_graph": ("#F0A060", "o"),
    "cached": ("#E69F00", "o"),
    "compiled": ("#009E73", "s"),
    "reference": ("#0072B2", "D"),
    "chunked": ("#CC79A7", "^"),
    "pml": ("#555555", "v"),
}


def _label(case: dict) -> str:
    batch = "" if case["batch"] == "noisy" else f", {case['batch']}"
    dtype = "" if case["dtype_title"] == "float32" else f", {case['dtype_title']}"
    return f"{case['n']} × {case['d']}{batch}{dtype}"


def _order(case: dict) -> tuple:
    return case["dtype_title"] != "float32", case["dtype_title"], case["batch"], case["d"], case["n"]


def _dots(axis, rows: dict[int, dict[str, float]], seen: dict) -> None:
    """A row of dots per case, joined by a thin line from the least to the greatest."""
    for y, values in rows.items():
        if values:
            axis.plot([min(values.values()), max(values.values())], [y, y], color="#DDDDDD", lw=1.5, zorder=1)
        for peer, value in values.items():
            colour, marker = _STYLE[peer]
            ours = peer == "fused"
            seen[peer] = axis.scatter(
                value, y, s=70 if ours else 42, color=colour, marker=marker, zorder=4 if ours else 3,
                edgecolor="white", linewidth=0.8, label=TITLES[peer],
            )  # fmt: skip
        if "fused" in values and axis.get_xscale() == "log":
            axis.annotate(
                f"{values['fused']:.2g}", (values["fused"], y), (0, 7), textcoords="offset points",
                ha="center", fontsize=7.5, color=_STYLE["fused"][0],
                bbox={"fc": "white", "ec": "none", "pad": 0.5},
            )  # fmt: skip


def plot(record: dict, path: Path) -> bool:
    """Draw the forward+backward cases, grouped by loss; time on the left, memory on the right.

    Returns whether there was such a case.
    """
    cases = [case for case in split(record["cases"])[0] if case["backward"]]
    if not cases:
        return False
    groups: dict[str, list[dict]] = {}
    for case in cases:
        groups.setdefault(case["loss_title"], []).append(case)
    ticks: list[tuple[float, str]] = []
    heads: list[tuple[float, str]] = []
    times: dict[int, dict[str, float]] = {}
    memory: dict[int, dict[str, float]] = {}
    y = 0
    for title, members in groups.items():
        heads.append((y, title))
        for case in sorted(members, key=_order):
            y += 1
            ticks.append((y, _label(case)))
            ratios, results = case["time_over_matmuls"], case["results"]
            times[y] = {peer: ratios[peer] for peer in _STYLE if peer in ratios}
            peaks = {peer: results.get(peer, {}).get("peak_bytes") for peer in _STYLE}
            memory[y] = {peer: max(value / 2**20, 0.01) for peer, value in peaks.items() if value is not None}
        y += 1.6
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(12, 1.9 + 0.3 * y), width_ratios=(1.25, 1), layout="constrained"
    )
    seen: dict = {}
    for axis, rows in ((left, times), (right, memory)):
        axis.set_xscale("log")
        _dots(axis, rows, seen)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", color="#EEEEEE", zorder=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.margins(x=0.06)
    left.axvline(1, color="#222222", lw=1, ls="--", zorder=2)
    left.text(1, -1.0, "the matmuls alone ", ha="right", va="center", fontsize=8)
    left.set_yticks(*zip(*ticks, strict=True))
    for position, title in heads:
        left.annotate(
            title, (0, position), (-6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="center", fontweight="bold",
        )  # fmt: skip
    left.set_ylim(y - 0.8, -1.6)
    left.set_xlabel("time / time of three bare matmuls (log scale; left is faster)")
    right.set_xlabel("peak memory beyond the inputs, MiB (log scale)")
    ordered = [peer for peer in _STYLE if peer in seen]
    figure.legend(
        [seen[peer] for peer in ordered], [TITLES[peer] for peer in ordered], loc="outside upper center",
        ncols=len(ordered), frameon=False, fontsize=10,
    )  # fmt: skip
    left.set_title("Loss and gradient of one batch: time", loc="left", fontsize=12)
    right.set_title("memory", loc="left", fontsize=12)
    figure.supxlabel(one_line(record["machine"]), fontsize=7.5, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True
