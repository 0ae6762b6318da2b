"""The comparison of the two libraries: its tables say what was measured."""

import json
import re

import pytest

pytest.importorskip("faiss")
pytest.importorskip("matplotlib")
pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

from examples import compare_retrieval, tables, train_retrieval


@pytest.mark.whole
def test_runs_and_writes_everything(tmp_path, monkeypatch):
    """All in this process."""
    monkeypatch.setattr(compare_retrieval, "_train", train_retrieval.main)
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n")
    options = [
        "--losses",
        "multi_similarity",
        "circle",
        "soft_triple",
        "--data",
        "digits",
        "--device",
        "cpu",
        "--seeds",
        "1",
        "--steps",
        "6",
        "--batches",
        "16",
    ]
    options += ["--timed-steps", "2", "--out", str(tmp_path / "out"), "--readme", str(readme)]
    compare_retrieval.main(options)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {"curves.png", "neighbours.png", "similarities.png", "loss_curves.png"}
    assert names == {"comparison.json", *pictures}
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    written = tables.tables(record)
    assert readme.read_text() == f"above\n{tables.BEGIN}\n{written}\n{tables.END}\nbelow\n"
    recall = {name: 100 * runs[0]["after"]["Recall@1"] for name, runs in record["retrieval"].items()}
    assert f"| MultiSimilarity, dml_cuda | 64 | {recall['multi_similarity']:.1f} |" in written
    assert f"| Circle, PML | 64 | {recall['pml-circle']:.1f} |" in written
    assert re.search(r"of its 10 centres a class \d+\.\d were left", written)
    row = next(line for line in written.splitlines() if line.startswith("| Circle | 16 |"))
    shares = [int(share) for share in re.findall(r"(\d+) %", row)]
    assert len(shares) == 2
    assert all(0 < share < 100 for share in shares)
    check_spread(record)


@pytest.mark.long
def test_chosen_losses(tmp_path, monkeypatch):
    """The first training in a process of its own, as is usual."""
    turns = iter([compare_retrieval._train])
    monkeypatch.setattr(
        compare_retrieval, "_train", lambda options: next(turns, train_retrieval.main)(options)
    )
    readme = tmp_path / "README.md"
    begin, end = (getattr(tables.Section("triplets"), name) for name in ("begin", "end"))
    readme.write_text(f"{begin}\n{end}\n")
    options = ["--data", "digits", "--device", "cpu", "--seeds", "1", "--steps", "3", "--batches", "16"]
    options += ["--timed-steps", "1", "--out", str(tmp_path / "out"), "--losses", "triplet_margin"]
    compare_retrieval.main([*options, "--readme", str(readme), "--section", "triplets"])
    written = readme.read_text()
    assert "| TripletMargin, semi-hard, PML | 64 |" in written
    assert "MultiSimilarity" not in written


@pytest.mark.long
def test_losses_that_only_dml_cuda_has(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_retrieval, "_train", train_retrieval.main)
    options = ["--data", "digits", "--device", "cpu", "--seeds", "2", "--steps", "3", "--batch-size", "24"]
    options += ["--per-class", "4", "--out", str(tmp_path), "--losses", "recall_at_k", "multi_similarity"]
    compare_retrieval.main([*options, "--without-pml"])
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert list(record["retrieval"]) == ["recall_at_k", "multi_similarity"]
    written = (tmp_path / "tables.md").read_text()
    assert "3 steps of 24 images, 4 of a class" in written
    assert "| RecallAtK, dml_cuda | 64 |" in written
    assert "PML" not in written


def check_spread(record):
    """With two seeds, mean ± standard deviation, and the libraries' differences seed by seed."""
    for name, runs in record["retrieval"].items():
        first, second = (runs[0] | {"after": dict(runs[0]["after"])} for _ in range(2))
        first["after"]["Recall@1"], second["after"]["Recall@1"] = (
            (0.80, 0.83) if name.startswith("pml-") else (0.81, 0.82)
        )
        runs[:] = [first, second]
    written = tables.tables(record)
    assert "| MultiSimilarity, dml_cuda | 64 | 81.5 ± 0.7 |" in written
    assert "| MultiSimilarity, PML | 64 | 81.5 ± 2.1 |" in written
    assert "Recall@1 at the end by +1.0, -1.0 points (PML's seeds spread by 2.1)." in written


@pytest.mark.long
def test_a_failed_training_is_explained(tmp_path):
    options = ["--data", f"folder:{tmp_path / 'none'}", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        compare_retrieval.main(options)
    assert "there is no folder" in ended.value.code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "60"], "share it evenly"),
        (["--seeds", "0"], "at least 1"),
        (["--losses", "circle", "recall_at_k"], "recall_at_k: not in pytorch-metric-learning"),
    ],
)
def test_options_that_do_not_fit(capsys, options, message):
    with pytest.raises(SystemExit):
        compare_retrieval.parse(options)
    assert message in capsys.readouterr().err


def test_a_readme_without_markers_is_not_touched():
    with pytest.raises(ValueError, match="needs one line"):
        tables.insert("no markers", "tables")
    with pytest.raises(ValueError, match="needs one line"):
        tables.insert(f"{tables.END} {tables.BEGIN}", "tables")
