"""The benchmark runs end to end, and its ratios and tables follow from what it measured."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases.accuracy import reference

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import chunked, drop_in, readme, triplets, two_towers
from benchmarks.cases import Case, DropInCase, default_cases, make_batch, quick_cases
from benchmarks.losses import CLASS_LOSSES
from benchmarks.machine import describe
from benchmarks.measure import CpuClock, plan_rounds
from benchmarks.plot import plot
from benchmarks.records import ratios, read_json, write_json
from benchmarks.report import print_report
from benchmarks.run import run_case, run_cases

pytestmark = [pytest.mark.slow(30), pytest.mark.long]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder that a tiny run wrote."""
    out = tmp_path_factory.mktemp("benchmarks")
    options = [
        "--filter",
        "MultiSimilarity-mined/128x128/noisy/float32",
        "--seconds",
        "0.1",
        "--out",
        str(out),
    ]
    peers = ["--peers", "matmuls", "fused", "reference", "chunked", "pml"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options, *peers], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "128 x 128" in done.stdout
    return out


def test_record(run):
    record = read_json(run / "cpu.json")
    assert {"cpu", "cores", "threads", "torch", "dml_cuda", "python", "commit"} <= record["machine"].keys()
    (case,) = record["cases"]
    assert (case["n"], case["d"], case["dtype"], case["passes"]) == (128, 128, "float32", "forward+backward")
    assert 0 < case["kept_share"] < 1
    for name in ("matmuls", "fused", "reference", "chunked"):
        result = case["results"][name]
        assert 0 < result["q1_s"] <= result["median_s"] <= result["q3_s"]
        assert result["samples"] >= 3
    for name in ("fused", "chunked"):
        assert case["results"][name]["loss_difference"] < 1e-5
        assert case["results"][name]["gradient_difference"] < 1e-4
    medians = {name: result["median_s"] for name, result in case["results"].items() if "median_s" in result}
    for base in ("matmuls", "fused"):
        for name, ratio in case[f"time_over_{base}"].items():
            assert ratio == pytest.approx(medians[name] / medians[base])
    line = case["roofline"]
    assert line["fraction_of_floor"] == pytest.approx(line["floor_s"] / medians["fused"])


def test_plot(run):
    assert (run / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_readme_tables(run, tmp_path):
    pages = tmp_path / "README.md", tmp_path / "all.md"
    for page in pages:
        page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    command = [sys.executable, "-m", "benchmarks.readme", str(run / "cpu.json")]
    for _ in range(2):  # the second time replaces what the first wrote
        subprocess.run([*command, "--readme", str(pages[0]), "--all", str(pages[1])], cwd=ROOT, check=True)
    short, text = (page.read_text() for page in pages)
    for page in (short, text):
        assert page.startswith("before\n")
        assert page.endswith("\nafter\n")
        assert "old" not in page
    assert text.count("| 128 x 128 |") == 1
    (case,) = read_json(run / "cpu.json")["cases"]
    ratio = case["time_over_matmuls"]["fused"]
    shown = float(re.search(r"\*\*([\d.]+)\*\*", text.split("| 128 x 128 |")[1])[1])
    assert shown == pytest.approx(ratio, rel=0.03)  # as rounded: two or three digits


def test_summary():
    """The short table: some losses, each at the largest size that both packages were timed at."""
    machine = describe("cpu")
    results = {"fused": {"median_s": 0.002}, "pml": {"median_s": 0.025}}
    small = {"loss_title": "Circle, all pairs", "n": 512, "d": 128, "results": results}
    small["time_over_fused"] = {"fused": 1.0, "pml": 12.5}
    large = {**small, "n": 2048}
    too_large = {**small, "n": 4096, "results": {**results, "pml": {"skipped": "needs 600 GiB"}}}
    too_large["time_over_fused"] = {"fused": 1.0}
    mined = {**small, "loss_title": "MultiSimilarity given its miner"}
    left_out = {**small, "loss_title": "MultiSimilarity, mined"}
    cases = [small, large, too_large, mined, left_out]
    text = readme.summary([{"machine": machine, "cases": cases}])
    assert text.count("\n| ") == 4  # with the header and its rule
    assert "| Circle, all pairs | 2048 x 128 | 2.00 ms | 25.0 ms | 12.5x |" in text
    assert "| MultiSimilarity given its miner | 512 x 128 | 2.00 ms | 25.0 ms | 12.5x |" in text


def test_every_row_of_the_short_table_is_measured():
    """And stands in README.md."""
    titles = {case.loss_title for case in default_cases("cpu") if "pml" in case.peers}
    assert set(readme._SHORT) <= titles
    page = (ROOT / "README.md").read_text()
    assert all(f"\n| {title} |" in page for title in readme._SHORT)


def test_a_record_is_read_as_it_was_written(tmp_path):
    results = {"matmuls": {"median_s": 0.5}, "fused": {"median_s": 1 / 3, "samples": 7}}
    record = {"machine": {"cores": 2}, "cases": [{"name": "one", "results": results, **ratios(results)}] * 2}
    write_json(record, tmp_path / "new" / "run.json")
    found = read_json(tmp_path / "new" / "run.json")
    assert found["machine"] == record["machine"]
    assert found["cases"][0]["results"]["fused"] == {"median_s": 0.333333333, "samples": 7}
    assert found["cases"][1]["time_over_matmuls"]["fused"] == pytest.approx(2 / 3, rel=1e-5)
    assert len((tmp_path / "new" / "run.json").read_text().splitlines()) == 7  # a line a case


def test_readme_without_markers():
    with pytest.raises(ValueError, match="benchmarks:begin"):
        readme.insert("no markers", "tables")


def test_an_interrupted_run_keeps_what_it_measured(monkeypatch):
    def interrupted_at_the_third(case, *options):
        if case is cases[2]:
            raise KeyboardInterrupt
        return {"name": case.name}

    cases = quick_cases()
    monkeypatch.setattr("benchmarks.run.run_case", interrupted_at_the_third)
    record = run_cases(cases, "cpu")
    assert [case["name"] for case in record["cases"]] == [case.name for case in cases[:2]]
    assert record["interrupted"]
    assert not run_cases(cases[:2], "cpu")["interrupted"]
    with pytest.raises(KeyboardInterrupt):
        run_cases(cases[2:], "cpu")


def test_ratios_skip_peers_that_did_not_run():
    record = {"matmuls": {"median_s": 2.0}, "fused": {"median_s": 1.0}, "pml": {"skipped": "not installed"}}
    assert ratios(record) == {
        "time_over_matmuls": {"matmuls": 1.0, "fused": 0.5},
        "time_over_fused": {"matmuls": 2.0, "fused": 1.0},
    }


def test_rounds_spread_the_slow_over_the_run():
    rounds = plan_rounds({"fast": 12, "slow": 3})
    assert [sum(name in names for names in rounds) for name in ("fast", "slow")] == [12, 3]
    assert [i for i, names in enumerate(rounds) if "slow" in names] == [3, 7, 11]


@pytest.mark.parametrize("loss", ["multi_similarity", "circle"])
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_chunked_equals_reference(monkeypatch, loss, epsilon):
    monkeypatch.setattr(chunked, "_FEWEST_ROWS", 40)  # several chunks, the last one short
    monkeypatch.setitem(chunked._ELEMENTS_PER_CHUNK, "cpu", 1)
    x, labels = make_batch(Case("test", loss, 150, 16, dtype="float64"), "cpu")
    truth = reference(f"{loss}_loss")(x, labels, epsilon=epsilon)
    value = chunked.chunked_loss(x, labels, loss, epsilon)
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(truth, x))


def drop_in_case(part: str) -> DropInCase:
    """A small one, like those of a full run."""
    case = next(case for case in default_cases("cpu") if getattr(case, "part", None) == part)
    return replace(case, n=64, d=16, columns=None if case.columns is None else 256)


@pytest.mark.parametrize("part", drop_in.PARTS)
def test_drop_in_parts_do_what_they_replace(part):
    case = drop_in_case(part)
    if "pml" in case.peers:
        pytest.importorskip("pytorch_metric_learning")
    results = run_case(case, budget=0.01)["results"]
    assert set(results) == set(case.peers)
    assert all(result["median_s"] > 0 for result in results.values())
    differences = {name: value for name, value in results["fused"].items() if name.endswith("_difference")}
    assert differences.keys() <= set(case.compared)
    assert max(differences.values()) < 1e-5


@pytest.mark.parametrize("loss", [name for name in CLASS_LOSSES if name != "circle_classifier"])
def test_class_level_losses_of_both_packages_have_the_same_weights(loss):
    pytest.importorskip("pytorch_metric_learning")
    case = replace(drop_in_case("classifier"), loss=loss, peers=("fused", "pml"))
    results = run_case(case, budget=0.01)["results"]["fused"]
    assert max(results[name] for name in case.compared) < 1e-5


def test_every_drop_in_part_is_measured():
    for device in ("cpu", "cuda"):
        assert {case.part for case in default_cases(device) if case.group == "drop-in"} == set(drop_in.PARTS)
    assert sum(isinstance(case, DropInCase) for case in quick_cases()) == 1


@pytest.mark.parametrize("part", triplets.TRIPLET_PARTS)
def test_losses_of_triplets_do_what_they_replace(part):
    pytest.importorskip("pytorch_metric_learning")
    results = run_case(replace(drop_in_case(part), peers=("fused", "pml")), budget=0.01)["results"]
    assert all(result["median_s"] > 0 for result in results.values())
    differences = [value for name, value in results["fused"].items() if name.endswith("_difference")]
    assert len(differences) == (0 if part == "distance_weighted" else 2)  # draws differ
    assert max(differences, default=0) < 1e-5


def test_every_part_of_triplets_is_measured(monkeypatch):
    for device in ("cpu", "cuda"):
        parts = {case.part for case in default_cases(device) if case.group == "triplets"}
        assert parts == {*triplets.TRIPLET_PARTS, "mined"}
    monkeypatch.setattr(triplets, "available_bytes", lambda device: 0)
    case = replace(drop_in_case("every"), peers=("fused", "pml"))
    assert run_case(case, budget=0.01)["results"]["pml"] == {"skipped": "needs 0 GiB"}


def test_batches_that_take_turns_leave_the_queue_as_it_is():
    case = drop_in_case("memory")
    step = drop_in.PARTS["memory"]["fused"](case, *make_batch(case, "cpu"))
    first, *_ = (step() for _ in range(case.columns // case.n))
    torch.testing.assert_close(step(), first)


def test_drop_in_tables(monkeypatch, tmp_path, capsys):
    pytest.importorskip("pytorch_metric_learning")
    cases = [run_case(drop_in_case(part), budget=0.01) for part in ("memory", "classifier")]
    monkeypatch.setattr(drop_in, "available_bytes", lambda device: 0)
    cases.append(run_case(drop_in_case("memory"), budget=0.01))
    assert cases[-1]["results"]["pml"] == {"skipped": "needs 0.0 GiB"}
    record = {"machine": describe("cpu"), "cases": cases}
    rows = [line for line in readme.table(record).splitlines() if line.startswith(("| cross", "| class"))]
    assert len(rows) == 3
    ratio = cases[0]["time_over_fused"]["pml"]
    shown = rows[0].split(" | ")[4]  # part, size, time, vs dense PyTorch, vs PML, peaks
    assert float(shown.removesuffix("x")) == pytest.approx(ratio, rel=0.03)
    assert "64 x 256 x 16" in rows[0]
    assert "needs 0.0 GiB" in rows[2]
    print_report(record)
    printed = capsys.readouterr().out
    assert "drop-in" in printed
    assert printed.count("64 x 256 x 16") == 3
    assert not plot(record, tmp_path / "none.png")


def test_separated_batches_keep_fewer_pairs():
    shares = [
        chunked.kept_share(*make_batch(Case("test", "circle", 512, 512, batch=b), "cpu"), 0.1)
        for b in ("noisy", "separated")
    ]
    assert shares[0] > 0.01
    assert shares[1] == 0
    assert chunked.kept_share(*make_batch(Case("test", "circle", 64, 8), "cpu"), None) == 1


def test_cases_have_names_of_their_own():
    for cases in (default_cases("cpu"), default_cases("cuda"), quick_cases()):
        assert len({case.name for case in cases}) == len(cases)


def test_peak_memory_sees_an_allocation():
    peak = CpuClock().peak_bytes(lambda: torch.ones(16 << 20))
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 60 << 20 < peak < 80 << 20


def test_two_towers(tmp_path, monkeypatch):
    """A tiny run: a compiler that takes too long, and a second size with steps over the limit."""
    monkeypatch.setattr(two_towers, "SIZES", ((32, 8), (64, 8)))
    options = ["--seconds", "0.01", "--dtypes", "float32", "--compile-limit", "0", "--out", str(tmp_path)]
    two_towers.main([*options, "--limit", "0"])
    record = read_json(tmp_path / "cpu-two-towers.json")
    assert [(case["loss"], case["n"]) for case in record["cases"]] == [
        ("CLIP", 32), ("SigLIP", 32), ("CLIP", 64), ("SigLIP", 64)
    ]  # fmt: skip
    first, last = record["cases"][0]["results"], record["cases"][-1]["results"]
    assert first["compiled"] == {"skipped": "compiles over 0 s"}
    assert {"fused", "fused, fixed", "chunked", "eager", "NT-Xent one way"} < first.keys()
    assert first["fused"]["median_s"] > 0
    assert last["fused"] == last["eager"] == {"skipped": "over 0 s"}
    monkeypatch.setattr(two_towers, "available_bytes", lambda device: 0)
    limits = two_towers.LeftOut(1e9, "cpu")
    limits.note(("CLIP", "float32", "eager"), 10, 8, {"median_s": 1.0, "peak_bytes": 1 << 30})
    assert limits.reason(("CLIP", "float32", "eager"), 20, 8) == {"skipped": "needs 4 GiB"}
    table, summary = readme.towers_table(record), readme.towers_summary(record)
    assert table.count("\n| CLIP | 32 x 8 |") == table.count("\n| SigLIP | 32 x 8 |") == 1
    assert "compiles over 0 s" in table
    assert "| CLIP | 32 x 8 |" in summary


def test_two_towers_in_plain_pytorch():
    """The peers compute the same."""
    a, b = two_towers.points(40, 8, "float32", "cpu")
    for name in two_towers.FUSED:
        found = two_towers.peers(name, 40, "cpu")
        names = "fused", "eager", "chunked"
        fused, *others = (two_towers.step_of(found[x][0], a, b, found[x][1])() for x in names)
        for other in others:
            torch.testing.assert_close(other, fused, rtol=1e-4, atol=1e-5)
