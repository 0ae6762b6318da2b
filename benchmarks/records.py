"""The record of a run as a JSON file: the machine, and of each case a summary a line."""

import json
from pathlib import Path

_DIGITS = 9  # significant ones, so that rounding twice gives the figures of one rounding
_RATIOS = ("time_over_matmuls", "time_over_fused")  # not written: they follow from the medians


def ratios(peers: dict[str, dict]) -> dict:
    """Ratios of medians: each peer over the bare matmuls, and each peer over the fused loss."""
    medians = {name: record["median_s"] for name, record in peers.items() if "median_s" in record}

    def over(base: str) -> dict[str, float]:
        return {name: seconds / medians[base] for name, seconds in medians.items()} if base in medians else {}

    return {f"time_over_{base}": over(base) for base in ("matmuls", "fused")}


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _summary(case: dict) -> str:
    return json.dumps(_rounded({key: value for key, value in case.items() if key not in _RATIOS}))


def write_json(record: dict, path: Path) -> None:
    head = {key: value for key, value in record.items() if key != "cases"}
    lines = [f'"{key}": {json.dumps(value)}' for key, value in _rounded(head).items()]
    cases = ",\n  ".join(map(_summary, record["cases"]))
    lines.append(f'"cases": [\n  {cases}\n ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n " + ",\n ".join(lines) + "\n}\n")


def read_json(path: Path) -> dict:
    """A record as the run gave it, up to rounding."""
    record = json.loads(path.read_text())
    for case in record.get("cases", ()):
        case |= ratios(case["results"]) if "results" in case else {}
    return record
