"""``python -m examples.compare_retrieval``: the same trainings with dml_cuda's losses and with PML's, or with
several of dml_cuda's.

Runs ``train_retrieval`` for each loss and seed, then for a few steps at several batch sizes, each in a
process of its own. Writes comparison.json, the tables in Markdown, the loss curves, and the pictures of one
training.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.markdown import Section

from .plots import draw_comparison
from .tables import BOTH, EARLY, OURS, THEIRS, TIMED, TITLES, tables

_CLASSES = 8  # in a batch of the step times, whatever its size
_WARM_UP = 3  # steps that are not timed
_PICTURES = ("curves.png", "neighbours.png", "similarities.png")


class RunError(Exception):
    """A training that failed; the message is what it said."""


def parse(options: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.compare_retrieval",
        description="Trains with dml_cuda's losses and with pytorch-metric-learning's, side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", default="auto", help="as for train_retrieval")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--losses",
        nargs="+",
        choices=TITLES,
        default=["multi_similarity", "circle"],
        metavar="LOSS",
        help="as --loss there",
    )
    parser.add_argument("--without-pml", action="store_true", help="dml_cuda's losses alone, no step times")
    parser.add_argument("--batch-size", type=int, default=64, help="of each training")
    parser.add_argument("--per-class", type=int, default=8, help="images of each class in a batch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[64, 256, 1024, 4096], help="for step times"
    )
    parser.add_argument("--timed-steps", type=int, default=12, help="for step times")
    parser.add_argument("--out", type=Path, default=Path("out/comparison"), help="folder to write to")
    parser.add_argument("--readme", type=Path, help="a file to put the tables in, between its markers")
    parser.add_argument("--section", default="comparison", help="the name in those markers")
    arguments = parser.parse_args(options)
    for size in arguments.batches:
        if size % _CLASSES:
            parser.error(f"--batches {size}: {_CLASSES} classes must share it evenly")
    alone = [] if arguments.without_pml else [loss for loss in arguments.losses if loss not in BOTH]
    if alone:
        parser.error(f"--losses {' '.join(alone)}: not in pytorch-metric-learning; add --without-pml")
    if min(arguments.seeds, arguments.steps, arguments.timed_steps) < 1:
        parser.error("--seeds, --steps and --timed-steps are at least 1")
    return arguments


def _train(options: list[str]) -> None:
    command = [sys.executable, "-m", "examples.train_retrieval", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{' '.join(command[1:])}:\n{done.stderr.strip().splitlines()[-1]}")


def _run(arguments: argparse.Namespace, out: Path, loss: str, pictures: bool = False, **options) -> dict:
    """A training's log."""
    options = {"data": arguments.data, "device": arguments.device, "loss": loss, "out": out} | options
    words = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    _train(words if pictures else [*words, "--no-pictures"])
    return json.loads((out / "log.json").read_text())


def _summary(log: dict, skip: int = 0) -> dict:
    return {
        "step_s": float(np.median(log["step_seconds"][skip:])),
        "loss_s": float(np.median(log["loss_seconds"][skip:])),
        "peak_memory_bytes": log["peak_memory_bytes"],
    }


def _trainings(arguments: argparse.Namespace, folder: Path, progress: tqdm) -> tuple[dict, dict, dict]:
    """The runs of each loss, seed by seed; the loss curve of each's first; and the log of the one whose
    pictures are kept."""
    runs = {name: [] for loss in arguments.losses for name in _sides(arguments, loss)}
    curves = {}
    for seed in range(arguments.seeds):
        for loss, found in runs.items():
            progress.set_postfix_str(f"{loss}, seed {seed}")
            is_kept = loss == arguments.losses[0] and seed == 0
            log = _run(
                arguments, folder / loss, loss, is_kept, seed=seed, steps=arguments.steps,
                batch_size=arguments.batch_size, per_class=arguments.per_class,
            )  # fmt: skip
            first, last = log["evaluations"][0], log["evaluations"][-1]
            found.append(
                {
                    "seed": seed,
                    "before": first,
                    "after": last,
                    "first_losses": log["loss"][:EARLY],
                    **_summary(log),
                    "embedding_size": log["arguments"]["embedding_size"],
                    "centers_left": log.get("centers_left"),
                }
            )
            curves.setdefault(loss, log["loss"])
            if is_kept:
                kept = log
                for name in _PICTURES:
                    shutil.copy(folder / loss / name, arguments.out / name)
            progress.update()
    return runs, curves, kept


def _sides(arguments: argparse.Namespace, loss: str) -> list[str]:
    """The names of a loss in the libraries that train with it."""
    return [loss] if arguments.without_pml else [loss, f"pml-{loss}"]


def _timed(arguments: argparse.Namespace) -> list[str]:
    return [loss for loss in arguments.losses if loss in TIMED and not arguments.without_pml]


def _step_times(arguments: argparse.Namespace, folder: Path, progress: tqdm) -> list[dict]:
    rows = []
    for loss in _timed(arguments):
        for size in arguments.batches:
            sides = {}
            for side, name in (("ours", loss), ("theirs", f"pml-{loss}")):
                progress.set_postfix_str(f"{name}, batch {size}")
                steps = _WARM_UP + arguments.timed_steps
                log = _run(
                    arguments, folder / "steps", name, steps=steps, eval_every=steps,
                    batch_size=size, per_class=size // _CLASSES,
                )  # fmt: skip
                sides[side] = _summary(log, skip=_WARM_UP)
                progress.update()
            counts = {"classes": _CLASSES, "timed_steps": arguments.timed_steps}
            rows.append({"loss": loss, "batch_size": size, **counts, **sides})
    return rows


def compare(arguments: argparse.Namespace) -> dict:
    """Runs everything, and writes everything."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainings = sum(len(_sides(arguments, loss)) for loss in arguments.losses) * arguments.seeds
    total = trainings + 2 * len(_timed(arguments)) * len(arguments.batches)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=total, unit="run") as progress:
        runs, curves, log = _trainings(arguments, Path(folder), progress)
        batches = _step_times(arguments, Path(folder), progress)
    keys = ("steps", "batch_size", "per_class", "epsilon", "embedding_size")
    record = {
        "machine": log["machine"],
        "data": log["data"],
        "options": {key: log["arguments"][key] for key in keys},
        "peak_memory_of": log["peak_memory_of"],
        "retrieval": runs,
        "batches": batches,
    }
    (arguments.out / "comparison.json").write_text(json.dumps(record, indent=1) + "\n")
    panels = {
        TITLES[loss]: {OURS if name == loss else THEIRS: curves[name] for name in _sides(arguments, loss)}
        for loss in arguments.losses
    }
    draw_comparison(arguments.out / "loss_curves.png", panels)
    return record


def main(options: list[str] | None = None) -> None:
    arguments = parse(options)
    try:
        written = tables(compare(arguments))
        if arguments.readme:
            arguments.readme.write_text(
                Section(arguments.section).insert(arguments.readme.read_text(), written)
            )
        else:
            (arguments.out / "tables.md").write_text(written + "\n")
    except KeyboardInterrupt:
        print("stopped before the end: nothing is written", file=sys.stderr)
        sys.exit(130)
    except (RunError, OSError, ValueError) as error:
        sys.exit(f"compare_retrieval: {error}")
    print(written)
    print(f"\nwrote {arguments.out}" + (f" and the tables of {arguments.readme}" if arguments.readme else ""))


if __name__ == "__main__":
    main()
