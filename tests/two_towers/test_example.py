"""The example of two towers learns the same as plain PyTorch."""

import pytest

from examples import two_towers


@pytest.mark.parametrize("name", two_towers.LOSSES)
def test_as_plain_pytorch(name):
    ours, plain = (two_towers.train(name, is_plain, 200) for is_plain in (False, True))
    for key in ("loss", "scale"):  # of the first steps: later ones carry the rounding of all before
        assert ours[key][:60] == pytest.approx(plain[key][:60], rel=2e-3)
    assert ours["loss"][-1] < 0.8 * ours["loss"][0]
    assert ours["scale"][-1] != ours["scale"][0]
    for key in two_towers.RECALLS:
        assert ours[key][-1] > 3 * ours[key][0]


def test_draws(tmp_path, capsys):
    two_towers.main(["--steps", "5", "--out", str(tmp_path)])
    assert (tmp_path / "two_towers.png").stat().st_size > 10_000
    assert "upper finds lower" in capsys.readouterr().out
