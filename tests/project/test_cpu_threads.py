"""What tools.cpu_threads makes of times."""

import threading
import time

import pytest
import torch

from tools import cpu_threads


def test_whoever_is_free_takes_the_next_task():
    assert cpu_threads.critical_path([3.0, 1.0, 1.0, 1.0, 2.0], 2) == 5.0
    assert cpu_threads.critical_path([1.0] * 7, 1) == 7.0
    assert cpu_threads.critical_path([], 3) == 0.0


def test_processor_time_is_that_of_each_thread():
    done = threading.Event()
    sleeper = threading.Thread(target=done.wait)
    sleeper.start()
    before, start = cpu_threads.processor_seconds(), time.thread_time()
    while time.thread_time() - start < 0.2:
        pass
    after = cpu_threads.processor_seconds()
    done.set()
    sleeper.join()
    here, other = threading.get_native_id(), sleeper.native_id
    assert after[here] - before[here] == pytest.approx(0.2, abs=0.1)
    assert after[other] - before[other] < 0.05


def test_both_ways_of_measuring(monkeypatch):
    monkeypatch.setattr(cpu_threads, "SECONDS", 0.1)
    monkeypatch.setattr(cpu_threads, "ROUNDS", 3)
    torch.set_num_threads(1)
    for loss in cpu_threads.LOSSES.values():
        assert 0.2 < cpu_threads.efficiency(loss, 128, 32, 2) <= 1
    for of in cpu_threads.measured(256, 64, 2).values():
        assert 0.4 < of["even"] <= 1
        assert of["times_one_thread"] > 0
