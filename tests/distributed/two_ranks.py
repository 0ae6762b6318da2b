"""A script run as two processes of a distributed job."""

import subprocess
import sys


def run_two_ranks(script: str, folder) -> None:
    """Runs ``script`` with its rank and the path of a store as arguments; each rank must get to its end."""
    # Without the interpreter's own end, at which a thread of gloo's that is still there aborts the process.
    script += "\nprint('done', flush=True)\nimport os\nos._exit(0)\n"
    commands = [[sys.executable, "-c", script, str(rank), str(folder / "store")] for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, **pipes) for command in commands]
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
        assert out == "done\n"
