"""The tables of examples/README.md, from the JSON that ``compare_retrieval`` writes."""

import numpy as np

from benchmarks.losses import CLASS_LOSSES, LOSSES, TRIPLET_LOSSES, short_name
from benchmarks.machine import one_line
from benchmarks.markdown import Section, markdown_table

from .criteria import LOSSES as CHOICES
from .criteria import TAU
from .options import CLASS_RATE

SECTION = Section("comparison")
BEGIN, END, insert = SECTION.begin, SECTION.end, SECTION.insert
_TRIPLET_MINERS = {"triplet_margin": "semi-hard", "margin": "distance-weighted"}
TITLES = {
    name: ", ".join(
        [short_name(loss.__name__), *([_TRIPLET_MINERS[name]] if name in _TRIPLET_MINERS else [])]
    )
    for name, loss in LOSSES.items()
}
BOTH = tuple(name for name in TITLES if f"pml-{name}" in CHOICES)  # libraries have it
TIMED = ("multi_similarity", "circle", *TRIPLET_LOSSES)  # whose steps are timed at several batch sizes
# Those that do not compute the same in both libraries, seed for seed: drawn triplets; a regulariser; rows
# that are ranked among their own columns.
APART = ("margin", "soft_triple", "smooth_ap")
OURS, THEIRS = "dml_cuda", "PML"
_SCORES = ("Recall@1", "Recall@2", "Recall@4", "Recall@8", "NMI", "MAP@R")
EARLY = 20  # steps in which rounding has not yet grown


def _titles(runs: dict[str, list[dict]]) -> dict[str, str]:
    """Of the losses that there are runs of."""
    return {loss: TITLES[loss] for loss in runs if loss in TITLES}


def _percent(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _mebibytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 2**20:.0f} MiB"


def _row(title: str, runs: list[dict], when: str) -> list[str]:
    cells = [title, str(runs[0]["embedding_size"])]
    cells += [_percent([run[when][name] for run in runs]) for name in _SCORES]
    if when == "before":
        return [*cells, "", ""]
    peaks = [run["peak_memory_bytes"] for run in runs]
    peak = None if None in peaks else max(peaks)
    return [*cells, _milliseconds(np.median([run["step_s"] for run in runs])), _mebibytes(peak)]


def _settings(runs: dict[str, list[dict]], options: dict) -> str:
    sentences = ["Every loss has its defaults."]
    if "multi_similarity" in runs:
        sentences.append(f"MultiSimilarity mines with epsilon {options['epsilon']}.")
    if any(loss in runs for loss in CLASS_LOSSES):
        sentences.append(f"Weights of classes learn {CLASS_RATE} times as fast as the network.")
    if "soft_triple" in runs:
        left = np.mean([run["centers_left"] for run in runs["soft_triple"]])
        sentences.append(
            f"SoftTriple's regulariser ({TAU}) is dml_cuda's alone; of its 10 centres a class {left:.1f} "
            "were left at the end."
        )
    return " ".join(sentences)


def _retrieval(runs: dict[str, list[dict]]) -> str:
    header = ["loss", "dim", *_SCORES, "step", "peak memory"]
    rows = [_row("untrained", next(iter(runs.values())), "before")]
    for loss, title in _titles(runs).items():
        for name, library in ((loss, OURS), (f"pml-{loss}", THEIRS)):
            if name in runs:
                rows.append(_row(f"{title}, {library}", runs[name], "after"))
    return markdown_table(header, rows, left=1)


def _relative(differences: np.ndarray) -> str:
    most = differences.max()
    return f"at most {most:.0e} of its value" if most else "nothing"


def _agreement(runs: dict[str, list[dict]]) -> str:
    """How far the two libraries' trainings are from each other, seed by seed, in words."""
    lines = []
    for loss, title in _titles(runs).items():
        if loss in APART or f"pml-{loss}" not in runs:
            continue
        ours, theirs = runs[loss], runs[f"pml-{loss}"]
        losses = [np.array([run["first_losses"] for run in side]) for side in (ours, theirs)]
        apart = np.abs(losses[0] - losses[1]) / losses[1]
        recall = [100 * np.array([run["after"]["Recall@1"] for run in side]) for side in (ours, theirs)]
        differences = ", ".join(f"{points:+.1f}" for points in recall[0] - recall[1])
        line = (
            f"- {title}: the loss differs by {_relative(apart[:, 0])} in the first step and by "
            f"{_relative(apart)} in the first {EARLY}, Recall@1 at the end by {differences} "
            "points"
        )
        spread = f" ({THEIRS}'s seeds spread by {recall[1].std(ddof=1):.1f})" if len(theirs) > 1 else ""
        lines.append(line + spread + ".")
    return f"{OURS} against {THEIRS}, seed by seed:\n\n" + "\n".join(lines) if lines else ""


def _share(run: dict) -> str:
    return f"{100 * run['loss_s'] / run['step_s']:.0f} %"


def _batches(batches: list[dict]) -> str:
    sides = (OURS, THEIRS)
    header = ["loss", "batch", *(f"step, {side}" for side in sides), "ratio"]
    header += [f"loss's share, {side}" for side in sides]
    header += [f"peak memory, {side}" for side in sides]
    rows = []
    for batch in batches:
        runs = (batch["ours"], batch["theirs"])
        cells = [TITLES[batch["loss"]], str(batch["batch_size"])]
        cells += [_milliseconds(run["step_s"]) for run in runs]
        cells += [f"{runs[1]['step_s'] / runs[0]['step_s']:.1f}x"]
        cells += [_share(run) for run in runs]
        cells += [_mebibytes(run["peak_memory_bytes"]) for run in runs]
        rows.append(cells)
    return markdown_table(header, rows, left=1)


def tables(record: dict) -> str:
    """All of it, in Markdown."""
    data, options, runs, batches = (record[key] for key in ("data", "options", "retrieval", "batches"))
    train, test = data["train"], data["test"]
    seeds = len(next(iter(runs.values())))
    averaged = "of one seed" if seeds == 1 else f"mean ± standard deviation of {seeds} seeds"
    parts = [
        f"Measured on {one_line(record['machine'])}.",
        f"**Retrieval.** {data['title']}: {train['images']} images of {train['classes']} classes to train "
        f"on, {test['images']} of {test['classes']} others to search. {options['steps']} steps of "
        f"{options['batch_size']} images, {options['per_class']} of a class; in %, {averaged}. "
        + _settings(runs, options),
        _retrieval(runs),
        _agreement(runs),
    ]
    if batches:
        parts += [
            f"**Step time, and the share of the loss in it,** by batch size: the same network, data and "
            f"{options['embedding_size']} dimensions, {batches[0]['classes']} classes in a batch; median of "
            f"{batches[0]['timed_steps']} steps at the start of a training, without the loading of images.",
            _batches(batches),
        ]
    parts.append(f"Peak memory is that of {record['peak_memory_of']}.")
    return "\n\n".join(part for part in parts if part)
