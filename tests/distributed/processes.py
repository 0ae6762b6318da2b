"""Starts the processes of a job and waits for them."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
MOST_SECONDS = 240


def start(script, size, folder):
    """The processes of a job, each told its rank, how many they are, and a folder."""
    environment = {"PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}", "OMP_WAIT_POLICY": "passive"}
    return [
        subprocess.Popen(
            [sys.executable, *script, str(rank), str(size), str(folder)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes, seconds=MOST_SECONDS):
    """``(exit code, what it wrote to stderr)`` of each; none outlives the test."""
    try:
        written = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, written, strict=True)]
