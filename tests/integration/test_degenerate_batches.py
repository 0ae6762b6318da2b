"""Batches of 0 or 1 rows, one class or all distinct, 0 or 1 references: no miner and no loss may stumble.

In a process of its own (degenerate_batches.py), as such batches have crashed the interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("degenerate_batches.py")
EVERY = 23  # of the cases, one in so many: each batch meets each miner, each loss and each reduction


@pytest.mark.long
@pytest.mark.slow(30)
def test_degenerate_batches():
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "0", str(EVERY)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-6000:]
