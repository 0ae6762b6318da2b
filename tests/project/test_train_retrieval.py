"""The retrieval example learns, says what went wrong, and goes the same way as pytorch-metric-learning."""

import json
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("faiss")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

from PIL import Image

from benchmarks.losses import PAIR_LOSSES, TRIPLET_LOSSES
from examples import train_retrieval
from examples.criteria import LOSSES
from examples.networks import make_network
from examples.options import parse

pytestmark = [pytest.mark.slow(90), pytest.mark.long]

ROOT = Path(__file__).parents[2]
# Of those that both libraries have; multi-similarity and circle loss have tests of their own.
OTHER_PAIR_LOSSES = [
    name for name in PAIR_LOSSES if f"pml-{name}" in LOSSES and name not in ("multi_similarity", "circle")
]
PICTURES = ("curves.png", "neighbours.png", "similarities.png")


def train(out, *options):
    always = ["--data", "digits", "--device", "cpu", "--out", str(out)]
    return train_retrieval.run(parse([*always, *options]))


def main_says(monkeypatch, *options):
    """The message with which the program ends."""
    monkeypatch.setattr(sys, "argv", ["train_retrieval", "--device", "cpu", *options])
    with pytest.raises(SystemExit) as ended:
        train_retrieval.main()
    return ended.value.code


def write_folder(root, classes=6, count=6):
    generator = np.random.default_rng(0)
    for number in range(classes):
        (root / f"class_{number}").mkdir(parents=True)
        for i in range(count):
            noise = generator.integers(0, 60, (20, 24, 3), dtype=np.uint8)
            noise[..., number % 3] += np.uint8(30 * number)
            Image.fromarray(noise).save(root / f"class_{number}" / f"{i}.png")
    return root


@pytest.mark.parametrize("loss", ["multi_similarity", "circle"])
def test_learns_as_pytorch_metric_learning_does(tmp_path, loss):
    options = ["--steps", "60", "--eval-every", "30", "--seed", "5", "--loss"]
    fused = train(tmp_path / "fused", *options, loss)
    peer = train(tmp_path / "pml", *options, f"pml-{loss}", "--no-pictures")
    for log in (fused, peer):
        before, *_, after = log["evaluations"]
        assert [found["step"] for found in log["evaluations"]] == [0, 30, 60]
        assert after["Recall@1"] > before["Recall@1"] + 0.05
        assert after["MAP@R"] > before["MAP@R"] + 0.05
    assert fused["evaluations"][0] == peer["evaluations"][0]
    np.testing.assert_allclose(fused["loss"][0], peer["loss"][0], rtol=1e-5)
    assert fused["loss"] != peer["loss"]  # or one library's loss was compared with itself
    assert fused["evaluations"][-1]["Recall@1"] == pytest.approx(
        peer["evaluations"][-1]["Recall@1"], abs=0.03
    )
    assert {path.name for path in (tmp_path / "pml").iterdir()} == {"log.json", "network.pt"}
    assert {path.name for path in (tmp_path / "fused").iterdir()} == {"log.json", "network.pt", *PICTURES}
    weights = torch.load(tmp_path / "fused" / "network.pt")
    make_network("small", channels=1, embedding_size=64).load_state_dict(weights)
    for name in PICTURES:
        with Image.open(tmp_path / "fused" / name) as picture:
            assert picture.width > 400
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    written = json.loads((tmp_path / "fused" / "log.json").read_text())
    assert written == fused
    assert len(written["loss"]) == len(written["step_seconds"]) == len(written["loss_seconds"]) == 60
    assert all(0 < a < b for a, b in zip(written["loss_seconds"], written["step_seconds"], strict=True))
    assert written["peak_memory_bytes"] > 100 << 20


@pytest.mark.parametrize("loss", ["multi_similarity", "pml-circle"])
def test_cross_batch_memory_joint_and_amp(tmp_path, loss):
    short = ["--steps", "12", "--no-pictures", "--loss", loss]
    plain = train(tmp_path, *short)["loss"]
    for extra in (
        ["--memory", "256"],
        ["--joint", "normalized_softmax"],
        ["--joint", "soft_triple"],
        ["--amp"],
    ):
        log = train(tmp_path, *short, *extra)
        assert np.isfinite(log["loss"]).all()
        assert log["loss"] != plain
        if extra == ["--amp"]:
            np.testing.assert_allclose(log["loss"][0], plain[0], rtol=0.02)
        if extra[0] == "--joint":
            assert log["loss"][0] > 0.1 * plain[0]
            assert ("centers_left" in log) == ("soft_triple" in extra)


def both_ways(out, loss, *options):
    """Losses of the same training with our loss and with pytorch-metric-learning's.

    In float64, so that they have to agree to the last digits: in float32 Adam's first steps, which divide a
    gradient by its own size, make a difference of 1e-3 out of the rounding of gradients near 0.
    """
    options = [*options, "--float64", "--no-pictures", "--loss"]
    return (train(out, *options, name)["loss"] for name in (loss, f"pml-{loss}"))


@pytest.mark.parametrize("extra", [[], ["--memory", "200", "--miner"]], ids=["batch", "memory"])
@pytest.mark.parametrize("loss", ["multi_similarity", "circle"])
def test_pairs_go_the_same_way(tmp_path, loss, extra):
    ours, theirs = both_ways(tmp_path, loss, "--steps", "12", *extra)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("extra", [["--miner", "batch_hard"], [], ["--no-miner"]])
@pytest.mark.parametrize("loss", TRIPLET_LOSSES)
def test_triplets_go_the_same_way(tmp_path, loss, extra):
    drawn = loss == "margin" and not extra
    ours, theirs = both_ways(tmp_path, loss, "--steps", "4" if drawn else "8", *extra)
    # Draws differ; what they are drawn from does not.
    np.testing.assert_allclose(ours, theirs, rtol=0.2 if drawn else 1e-9)


@pytest.mark.parametrize("loss", OTHER_PAIR_LOSSES)
def test_every_loss_goes_the_same_way(tmp_path, loss):
    ours, theirs = both_ways(tmp_path, loss, "--steps", "8")
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("loss", [*TRIPLET_LOSSES, *OTHER_PAIR_LOSSES])
def test_float32_goes_the_way_of_float64(tmp_path, loss):
    options = ["--steps", "2", "--no-pictures", "--no-miner", "--loss", loss]
    single, double = (train(tmp_path, *options, *more)["loss"] for more in ([], ["--float64"]))
    np.testing.assert_allclose(single, double, rtol=1e-3)
    assert single != double


def test_compiled_is_as_good(tmp_path, monkeypatch):
    """Traced and derived as always, but run without the C++ that inductor would write for the network."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    options = ["--steps", "3", "--no-pictures"]
    plain, compiled = train(tmp_path, *options), train(tmp_path, *options, "--compile")
    np.testing.assert_allclose(compiled["loss"], plain["loss"], rtol=1e-3)


def test_folder_of_images(tmp_path):
    folder = write_folder(tmp_path / "photos")
    options = ["--data", f"folder:{folder}", "--image-size", "16", "--batch-size", "9", "--per-class", "3"]
    log = train(tmp_path / "out", *options, "--steps", "4", "--workers", "1")
    assert log["data"] == {
        "title": "photos",
        "train": {"images": 18, "classes": 3},
        "test": {"images": 18, "classes": 3},
    }
    assert (tmp_path / "out" / "neighbours.png").is_file()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_ends_in_one_line(tmp_path, monkeypatch, workers):
    folder = write_folder(tmp_path / "photos", count=3)
    broken = folder / "class_1" / "2.png"
    broken.write_bytes(b"nothing")
    options = ["--batch-size", "9", "--per-class", "3", "--image-size", "16", "--workers", workers]
    message = main_says(monkeypatch, "--data", f"folder:{folder}", *options, "--out", str(tmp_path / "out"))
    assert message.startswith(f"train_retrieval: cannot read the image {broken}: ")
    assert "\n" not in message


def test_what_does_not_fit_ends_in_one_line(tmp_path, monkeypatch):
    out = ["--out", str(tmp_path / "out")]
    assert "there is no folder" in main_says(monkeypatch, "--data", f"folder:{tmp_path / 'none'}", *out)
    write_folder(tmp_path / "one", classes=1)
    assert "1 class of images (class_0)" in main_says(
        monkeypatch, "--data", f"folder:{tmp_path / 'one'}", *out
    )
    digits = ("--data", "digits", *out)
    assert "needs 64 classes" in main_says(monkeypatch, *digits, "--per-class", "1")
    assert "no multiple" in main_says(monkeypatch, *digits, "--batch-size", "60")
    assert "resnet50 is for colour" in main_says(monkeypatch, *digits, "--network", "resnet50")
    assert not (tmp_path / "out").exists()


def test_resnet50_says_what_it_needs(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "photos")
    monkeypatch.setitem(sys.modules, "torchvision.models", None)  # as if it were not installed
    batch = ["--batch-size", "9", "--per-class", "3"]
    message = main_says(monkeypatch, "--data", f"folder:{folder}", "--network", "resnet50", *batch)
    assert "resnet50 needs a torchvision that fits this torch" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "10"], "--memory 10 does not hold a batch of 64"),
        (["--amp", "fp16", "--device", "cpu"], "--amp bf16"),
        (["--steps", "0"], "less than 1"),
        (["--loss", "cubic"], "invalid choice"),
    ],
)
def test_options_that_do_not_fit(capsys, options, message):
    with pytest.raises(SystemExit):
        parse(options)
    assert message in capsys.readouterr().err


def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse(["--device", "cuda"])
    assert "torch sees no GPU" in capsys.readouterr().err


def test_a_loss_that_overflows_stops_the_training(tmp_path, monkeypatch):
    options = ["--data", "digits", "--lr", "1e30", "--out", str(tmp_path)]
    message = main_says(monkeypatch, *options)
    assert "a smaller --lr may help" in message
    assert json.loads((tmp_path / "log.json").read_text())["interrupted"]


def test_interrupted_it_keeps_what_was_logged(tmp_path):
    command = [sys.executable, "-m", "examples.train_retrieval", "--data", "digits", "--device", "cpu"]
    command += ["--steps", "3000", "--eval-every", "5", "--out", str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        seen = ""
        while not re.search(r" [1-9]\d*/3000 ", seen):  # the progress bar has come past its start
            letter = process.stderr.read(1)
            assert letter, f"it ended by itself: {seen}"
            seen += letter
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["interrupted"]
    assert f"stopped after {len(log['loss'])} steps" in said
    assert 0 < len(log["loss"]) < 3000
