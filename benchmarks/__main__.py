"""``python -m benchmarks``: measures, prints tables, writes JSON and a plot."""

import argparse
from pathlib import Path

import torch
from rich.console import Console

import dml_cuda

from .cases import Case, default_cases, quick_cases
from .peers import PEERS
from .plot import plot
from .records import write_json
from .report import print_report
from .run import run_cases


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="five cases only, under a minute")
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="GROUP",
        help="only these groups, such as train, pml, memory, drop-in, triplets",
    )
    parser.add_argument("--filter", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--peers", nargs="+", choices=tuple(PEERS), help="only these implementations")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="measuring time per case, about (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/benchmarks"), help="folder to write to (default %(default)s)"
    )
    parser.add_argument("--name", help="name of the files written (default: the device)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if arguments.device == "cuda" and dml_cuda.build_info()["cuda"] is None:
        parser.error(
            "--device cuda: dml_cuda was built without its CUDA kernels; see the README on installing"
        )
    arguments.selected = select(arguments)
    if not arguments.selected:
        parser.error("no case is left; --list shows their names")
    return arguments


def select(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for."""
    cases = quick_cases() if arguments.quick else default_cases(arguments.device)
    if arguments.cases:
        cases = [case for case in cases if case.group in arguments.cases]
    if arguments.filter:
        cases = [case for case in cases if arguments.filter in case.name]
    return cases


def main() -> None:
    arguments = _parse()
    if arguments.list:
        print(*(case.name for case in arguments.selected), sep="\n")
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    record = run_cases(arguments.selected, arguments.device, arguments.seconds, arguments.peers)
    console = Console()
    print_report(record, console)
    stem = arguments.out / (arguments.name or arguments.device)
    write_json(record, stem.with_suffix(".json"))
    picture = f" and {stem}.png" if plot(record, stem.with_suffix(".png")) else ""
    console.print(f"\nwrote {stem}.json{picture} after {record['total_s']:.0f} s", highlight=False)


if __name__ == "__main__":
    main()
