"""``python -m benchmarks.readme``: from the JSON of earlier runs, a short table for the README and all tables
for benchmarks/README.md."""

import argparse
import json
from itertools import groupby
from pathlib import Path

from .machine import one_line
from .markdown import Section, markdown_table
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


def _times(case: dict) -> str:
    result = case["results"].get("pml", {})
    return result.get("skipped", NOTHING) if "median_s" not in result else duration(result["median_s"])


def _has_peer(case: dict | None) -> bool:
    return case is not None and "pml" in case["time_over_fused"]


def summary(records: list[dict]) -> str:
    """Markdown of what a newcomer wants to know: each loss once, beside pytorch-metric-learning's."""
    records = [
        record
        for record in records
        if record["machine"]["device"] == "cpu" and any(case["group"] == "family" for case in record["cases"])
    ]
    cases = [case for record in records for case in record["cases"]]
    family = [case for case in cases if case["group"] == "family" and "loaded" not in case["loss_title"]]
    others = [
        case
        for case in cases
        if (case.get("part") in ("mined", "memory") or case["group"] == "triplets") and _has_peer(case)
    ]
    # Of each loss the largest batch that pytorch-metric-learning can do, else the largest.
    shown = {}
    for case in (*family, *others):
        if _has_peer(case) or not _has_peer(shown.get(case["loss_title"])):
            shown[case["loss_title"]] = case
    rows = []
    for case in shown.values():
        peaks = (case["results"].get(peer, {}).get("peak_bytes") for peer in ("fused", "pml"))
        ours = duration(case["results"]["fused"]["median_s"])
        times = versus(case, "pml") if _has_peer(case) else NOTHING
        rows.append([case["loss_title"], size(case), ours, _times(case), times, *map(mebibytes, peaks)])
    machines = {one_line(record["machine"]): None for record in records}
    header = ["loss", "N x D, or N x M x D", "dml_cuda", "PML", "as fast", "MiB here", "MiB PML"]
    where = f"Forward and backward, float32; runs on {'; and on '.join(machines)}.\n\n" if machines else ""
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
    records = [json.loads(path.read_text()) for path in paths]
    # The others are from tools.kernel_times.
    records = [record for record in records if "machine" in record]
    written = {arguments.readme: summary(records), arguments.all: "\n\n".join(map(table, records))}
    try:
        for page, tables in written.items():
            page.write_text(insert(page.read_text(), tables))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    names = ", ".join(path.name for path in paths)
    print(f"wrote the tables of {names} into {arguments.readme} and {arguments.all}")


if __name__ == "__main__":
    main()
