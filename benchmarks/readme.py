"""``python -m benchmarks.readme``: writes the tables of earlier runs, a short one into README.md and all into
benchmarks/README.md."""

import argparse
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from .machine import one_line
from .markdown import Section, markdown_table
from .records import read_json
from .report import (
    NOTHING,
    SPEEDUP_PEERS,
    duration,
    factor,
    least_peak,
    mebibytes,
    percent,
    present,
    size,
    split,
    versus,
)

SECTION = Section("benchmarks")
BEGIN, END, insert = SECTION.begin, SECTION.end, SECTION.insert
_RESULTS = Path(__file__).parent / "results"
_COLUMNS = {
    "cached": "all cached",
    "reference": "dense PyTorch",
    "compiled": "`torch.compile`",
    "pml": "PML",
    "chunked": "chunked PyTorch",
}


def _peaks(case: dict) -> str:
    return f"{mebibytes(case['results']['fused'].get('peak_bytes'))} / {mebibytes(least_peak(case))}"


def _row(case: dict, peers: list[str]) -> list[str]:
    ratio = case["time_over_matmuls"].get("fused")
    return [
        case["loss_title"],
        size(case),
        case["batch"],
        percent(case["kept_share"]),
        duration(case["results"]["fused"]["median_s"]),
        NOTHING if ratio is None else f"**{factor(ratio)}**",
        *(versus(case, peer) for peer in peers),
        _peaks(case),
    ]


def _drop_in_table(cases: list[dict]) -> str:
    peers = present(cases, SPEEDUP_PEERS, "median_s")
    header = ["part", "N x D, or N x M x D", "time", *(f"vs {_COLUMNS[peer]}" for peer in peers)]
    rows = [
        [
            case["loss_title"],
            size(case),
            duration(case["results"]["fused"]["median_s"]),
            *(versus(case, peer) for peer in peers),
            _peaks(case),
        ]
        for case in cases
    ]
    table = markdown_table([*header, "peak MiB, here / there"], rows, left=2)
    return f"**parts that stand in for pytorch-metric-learning's; losses forward+backward**\n\n{table}"


def table(record: dict) -> str:
    """Markdown of one run: the machine and versions, a table per kind of pass and dtype, one of drop-ins."""
    measured = [case for case in record["cases"] if "median_s" in case["results"].get("fused", {})]
    cases, drop_ins = split(measured)
    cases.sort(key=lambda case: (not case["backward"], case["dtype_title"] != "float32", case["dtype_title"]))
    parts = [f"Measured on {one_line(record['machine'])}."]
    for (passes, dtype), members in groupby(cases, lambda case: (case["passes"], case["dtype_title"])):
        members = list(members)
        peers = present(members, SPEEDUP_PEERS, "median_s")
        matmuls = "three matmuls" if members[0]["backward"] else "one matmul"
        header = ["loss", "N x D", "batch", "pairs kept", "time", f"time / {matmuls}"]
        header += [f"vs {_COLUMNS[peer]}" for peer in peers]
        header += ["peak MiB, here / least of the others"]
        rows = [_row(case, peers) for case in members]
        parts.append(f"**{passes}, {dtype}**\n\n{markdown_table(header, rows, left=3)}")
    if drop_ins:
        parts.append(_drop_in_table(drop_ins))
    return "\n\n".join(parts)


_TOWER_COLUMNS = {"eager": "PyTorch", "compiled": "`torch.compile`", "chunked": "chunked PyTorch"}


def _of_towers(record: dict) -> bool:
    return record.get("kind") == "two_towers"


def _tower_row(case: dict, peers: Iterable[str]) -> list[str]:
    fused, least = case["results"]["fused"], least_peak(case, tuple(_TOWER_COLUMNS))
    ratios = [versus(case, peer) for peer in peers]
    peaks = f"{mebibytes(fused['peak_bytes'])} / {mebibytes(least)}"
    return [case["loss"], size(case), duration(fused["median_s"]), *ratios, peaks]


def towers_table(record: dict) -> str:
    """Markdown of a run of ``benchmarks.two_towers``."""
    parts = [f"Measured on {one_line(record['machine'])}."]
    header = ["loss", "N x D", "time", *(f"vs {name}" for name in _TOWER_COLUMNS.values())]
    header += ["peak MiB, here / least of the others"]
    for dtype in dict.fromkeys(case["dtype"] for case in record["cases"]):
        cases = [case for case in record["cases"] if case["dtype"] == dtype]
        rows = [_tower_row(case, _TOWER_COLUMNS) for case in cases if "median_s" in case["results"]["fused"]]
        title = f"**two towers, parameters that learn, forward+backward, {dtype}**"
        parts.append(f"{title}\n\n{markdown_table(header, rows, left=2)}")
    return "\n\n".join(parts)


def towers_summary(record: dict) -> str:
    """Markdown of its float32 cases that plain PyTorch ran too, the largest of each loss."""
    measured = [case for case in record["cases"] if "eager" in case["time_over_fused"]]
    largest = {case["loss"]: case for case in sorted(measured, key=_pairs) if case["dtype"] == "float32"}
    rows = []
    for case in largest.values():
        seconds = [case["results"][peer]["median_s"] for peer in ("fused", "eager")]
        rows.append([case["loss"], size(case), *map(duration, seconds), versus(case, "eager")])
    header = ["two towers", "N x D", "dml_cuda", "PyTorch", "ratio"]
    return f"On {one_line(record['machine'])}.\n\n{markdown_table(header, rows, left=2)}"


# Of every kind one: the rows of the short table, by what the whole one calls them.
_SHORT = (
    "MultiSimilarity given its miner",
    "Circle, all pairs",
    "SupCon, all pairs",
    "cross-batch memory, MultiSimilarity and miner",
    "TripletMargin, batch-hard miner",
    "Margin, distance-weighted miner",
)


def _pairs(case: dict) -> int:
    return case["n"] * (case.get("columns") or case["n"])


def summary(records: list[dict]) -> str:
    """Markdown of a few rows: each at the largest size that both packages were timed at, on CPUs."""
    largest: dict[str, tuple[dict, dict]] = {}
    for record in records:
        for case in record["cases"] if record["machine"]["device"] == "cpu" else ():
            title, is_measured = case["loss_title"], "pml" in case["time_over_fused"]
            if is_measured and (title not in largest or _pairs(case) > _pairs(largest[title][0])):
                largest[title] = case, record["machine"]
    shown = [largest[title] for title in _SHORT if title in largest]
    rows = []
    for case, _ in shown:
        seconds = [case["results"][peer]["median_s"] for peer in ("fused", "pml")]
        rows.append([case["loss_title"], size(case), *map(duration, seconds), versus(case, "pml")])
    machines = dict.fromkeys(one_line(machine) for _, machine in shown)
    where = f"Forward and backward, float32, on {'; and on '.join(machines)}.\n\n" if machines else ""
    header = ["loss", "N x D, or N x M x D", "dml_cuda", "PML", "ratio"]
    return where + markdown_table(header, rows, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument(
        "json", nargs="*", type=Path, help="records of runs (default: all of benchmarks/results)"
    )
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--all", type=Path, default=Path("benchmarks/README.md"))
    arguments = parser.parse_args()
    paths = arguments.json or sorted(_RESULTS.glob("*.json"))
    if not paths:
        parser.error("no JSON yet: python -m benchmarks --out benchmarks/results")
    records = [read_json(path) for path in paths]
    # The others are of tools.kernel_times.
    records = [record for record in records if "machine" in record]
    of_towers = [record for record in records if _of_towers(record)]
    others = [record for record in records if not _of_towers(record)]
    on_cpus = [record for record in of_towers if record["machine"]["device"] == "cpu"]
    written = {
        arguments.readme: "\n\n".join([summary(others), *map(towers_summary, on_cpus)]),
        arguments.all: "\n\n".join([*map(table, others), *map(towers_table, of_towers)]),
    }
    try:
        for page, tables in written.items():
            page.write_text(insert(page.read_text(), tables))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    names = ", ".join(path.name for path in paths)
    print(f"wrote the tables of {names} into {arguments.readme} and {arguments.all}")


if __name__ == "__main__":
    main()
