"""``make gpu-check`` does first what says most, and keeps to its minutes."""

from pathlib import Path

from tools.gpu_check import OF_THE_EXTENSION, Budget, Part, known_parts, run_parts


def test_the_driver_comes_before_the_extension():
    names = list(known_parts(Path("out"), "NVIDIA H100 80GB HBM3", 1.0))
    assert names[:4] == ["driver", "profile", "build", "tests"]
    assert set(names[3:]) == OF_THE_EXTENSION


def run_with(parts, minutes, takes, fails=()):
    """The outcome, and (command, seconds granted) of what ran, on a clock that only commands move."""
    now, ran = [0.0], []

    def run(command, seconds):
        ran.append((command[0], seconds))
        now[0] += min(takes[command[0]], seconds)
        return command[0] not in fails and takes[command[0]] <= seconds

    outcome = run_parts(parts, Budget(minutes, lambda: now[0]), run)
    assert minutes is None or now[0] <= 60 * minutes
    return outcome, ran


PARTS = {name: Part(seconds, [[name]]) for name, seconds in (("driver", 100), ("build", 60), ("tests", 300))}


def test_parts_keep_to_the_minutes():
    takes = {"driver": 100, "build": 60, "tests": 200}
    outcome, ran = run_with(PARTS, 5, takes)
    assert outcome == {"driver": True, "build": True, "tests": None}  # 140 s are not half of what tests want
    assert ran == [("driver", 300), ("build", 200)]
    outcome, ran = run_with(PARTS, 6, takes)
    assert outcome == {"driver": True, "build": True, "tests": True}
    assert ran[-1] == ("tests", 200)
    outcome, _ = run_with(PARTS, 6, {**takes, "tests": 201})
    assert outcome["tests"] is False  # ended by the clock
    assert all(run_with(PARTS, None, takes)[0].values())


def test_without_a_build_the_extension_is_left_out():
    outcome, ran = run_with(PARTS, None, {"driver": 1, "build": 1, "tests": 1}, fails=("driver", "build"))
    assert outcome == {"driver": False, "build": False, "tests": None}
    assert [name for name, _ in ran] == ["driver", "build"]
