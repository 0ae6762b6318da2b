"""The record of a run as tables on the terminal."""

from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .machine import one_line
from .peers import LEGEND, TITLES

SPEEDUP_PEERS = ("cached", "reference", "compiled", "pml", "chunked")
MEMORY_PEERS = ("fused", *SPEEDUP_PEERS)
NOTHING = "–"
_FILE_WIDTH = 110


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{seconds * 1e6:.0f} µs"


def factor(value: float | None) -> str:
    """A ratio to read, such as 0.84, 3.1 or 27."""
    if value is None:
        return NOTHING
    return f"{value:.2f}" if value < 2 else f"{value:.1f}" if value < 20 else f"{value:.0f}"


def times(value: float | None) -> str:
    """A ratio of speeds, such as 3.1x."""
    return NOTHING if value is None else f"{factor(value)}x"


def mebibytes(value: int | None) -> str:
    return (
        NOTHING if value is None else f"{value / 2**20:,.0f}" if value >= 10 << 20 else f"{value / 2**20:.1f}"
    )


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 or share == 0 else f"{100 * share:.1g} %"


def spread(result: dict) -> str:
    """Half the interquartile range, in percent of the median."""
    return f"±{50 * (result['q3_s'] - result['q1_s']) / result['median_s']:.0f} %"


def speedup(case: dict, peer: str) -> float | None:
    """How many times the fused loss is as fast as the peer."""
    return case["time_over_fused"].get(peer)


def versus(case: dict, peer: str) -> str:
    """That as text, or why there is no such number."""
    return case["results"].get(peer, {}).get("skipped") or times(speedup(case, peer))


def size(case: dict) -> str:
    """``N x D``, or ``N x M x D`` where the batch meets other columns."""
    return " x ".join(str(case[name]) for name in ("n", "columns", "d") if case.get(name))


def least_peak(case: dict, peers: tuple[str, ...] = MEMORY_PEERS[1:]) -> int | None:
    """The peak of the peer, other than the fused one, that needs the least memory."""
    peaks = (case["results"].get(peer, {}).get("peak_bytes") for peer in peers)
    return min((peak for peak in peaks if peak is not None), default=None)


def split(cases: list[dict]) -> tuple[list[dict], list[dict]]:
    """The cases of a loss alone, and those of parts that stand in for another package's."""
    return [case for case in cases if "part" not in case], [case for case in cases if "part" in case]


def present(cases: list[dict], peers: tuple[str, ...], field: str) -> list[str]:
    """The peers that have the field in any of the cases."""
    return [
        peer for peer in peers if any(case["results"].get(peer, {}).get(field) is not None for case in cases)
    ]


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("N x D", "batch"):
        table.add_column(column, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _add_rows(table: Table, cases: list[dict], cells: Callable[[dict], Iterable]) -> None:
    """A heading per loss, under it a row per case."""
    for title, members in groupby(cases, itemgetter("loss_title")):
        table.add_row(Text(title, style="italic"))
        for case in members:
            table.add_row(size(case), case["batch"], *cells(case))
        table.add_section()


def _time_table(title: str, cases: list[dict]) -> Table:
    peers = present(cases, SPEEDUP_PEERS, "median_s")
    per = "time per\n" + ("3 matmuls" if cases[0]["backward"] else "1 matmul")
    ratios = [f"vs\n{TITLES[peer]}" for peer in peers]
    table = _table(title, ["pairs\nkept", "\ndml_cuda", "", per, *ratios])

    def cells(case: dict) -> Iterable:
        fused = case["results"].get("fused", {})
        measured = "median_s" in fused
        ratio = case["time_over_matmuls"].get("fused")
        yield percent(case["kept_share"])
        yield duration(fused["median_s"]) if measured else fused.get("skipped", NOTHING)
        yield Text(spread(fused) if measured else "", style="dim")
        yield Text(factor(ratio), style="bold green" if ratio is not None and ratio <= 1 else "bold")
        yield from (versus(case, peer) for peer in peers)

    _add_rows(table, cases, cells)
    return table


def _memory_table(cases: list[dict]) -> Table | None:
    peers = present(cases, MEMORY_PEERS, "peak_bytes")
    if not peers:
        return None
    table = _table("peak memory beyond the inputs, MiB", [TITLES[peer] for peer in peers])

    def cells(case: dict) -> Iterable[str]:
        return (mebibytes(case["results"].get(peer, {}).get("peak_bytes")) for peer in peers)

    _add_rows(table, cases, cells)
    return table


def _difference(case: dict) -> str:
    """How far, at worst, an output lies from the other peer's."""
    compared = any("median_s" in case["results"].get(peer, {}) for peer in SPEEDUP_PEERS)
    fused = case["results"].get("fused", {})
    found = [value for name, value in fused.items() if name.endswith("_difference")]
    if not compared or not found:
        return NOTHING
    return f"{max(found):.1e}" if max(found) > 0 else "0"


def _drop_in_table(cases: list[dict]) -> Table:
    peers = present(cases, SPEEDUP_PEERS, "median_s")
    ratios = [f"vs\n{TITLES[peer]}" for peer in peers]
    headings = ["\ndml_cuda", "", *ratios, "MiB\nhere", "MiB\nthere", "differs\nby"]
    table = _table("drop-in: parts that stand in for pytorch-metric-learning's", headings)
    table.caption = (
        "MiB: peak beyond the inputs; differs by: loss and gradients, or numbers of pairs, relative"
    )
    table.caption_justify = "left"

    def cells(case: dict) -> Iterable:
        fused = case["results"].get("fused", {})
        measured = "median_s" in fused
        yield duration(fused["median_s"]) if measured else fused.get("skipped", NOTHING)
        yield Text(spread(fused) if measured else "", style="dim")
        yield from (versus(case, peer) for peer in peers)
        yield mebibytes(fused.get("peak_bytes"))
        yield mebibytes(least_peak(case))
        yield _difference(case)

    _add_rows(table, cases, cells)
    return table


def _gpu_table(cases: list[dict]) -> Table:
    """The roofline, and what is left of the time when the host's part is taken away."""
    headings = [
        "TFLOP/s, no\nrecompute",
        "with\nrecompute",
        "big\nmatmul",
        "floor /\ntime",
        "host",
        "CUDA\ngraph",
    ]
    table = _table("dml_cuda against what the GPU could do", headings)

    def cells(case: dict) -> Iterable[str]:
        line, results = case["roofline"], case["results"]
        yield f"{line['tflops_without_recompute']:.1f}"
        yield f"{line['tflops_with_recompute']:.1f}"
        yield f"{line['ceiling_tflops']:.0f}"
        yield factor(line["fraction_of_floor"])
        for seconds in (results["fused"].get("host_s"), results.get("fused_graph", {}).get("median_s")):
            yield NOTHING if seconds is None else duration(seconds)

    _add_rows(table, [case for case in cases if "roofline" in case], cells)
    return table


def _agreement(cases: list[dict]) -> str | None:
    """How far, at worst, a fused gradient in full float32 lies from the reference's."""
    values = [
        case["results"].get("fused", {}).get("gradient_difference")
        for case in cases
        if (case["dtype"], case["precision"]) == ("float32", "highest")
    ]
    values = [value for value in values if value is not None]
    return (
        f"largest relative difference of a float32 gradient from PyTorch's: {max(values):.1e}"
        if values
        else None
    )


def print_report(record: dict, console: Console | None = None) -> None:
    """All tables of a run."""
    console = console or Console()
    if not console.is_terminal:  # a file has no width
        console = Console(width=_FILE_WIDTH)
    console.print(one_line(record["machine"]), style="dim", highlight=False)

    def key(case: dict) -> tuple:
        return case["group"], case["passes"], case["dtype_title"]

    cases, drop_ins = split(record["cases"])
    for (group, passes, dtype), members in groupby(cases, key):
        members = list(members)
        console.print()
        console.print(_time_table(f"{group}: {passes}, {dtype}", members))
        if record["machine"]["device"] == "cuda":
            console.print(_gpu_table(members))
        if memory := _memory_table(members):
            console.print(memory)
    if drop_ins:
        console.print()
        console.print(_drop_in_table(drop_ins))
    console.print(LEGEND, style="dim", highlight=False)
    if agreement := _agreement(cases):
        console.print(agreement, style="dim", highlight=False)
