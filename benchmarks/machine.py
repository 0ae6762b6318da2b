"""What the numbers were measured on: hardware and versions."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import dml_cuda


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _gpu() -> dict:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(device: str) -> dict:
    """Hardware, versions and commit, as they are now."""
    return {
        "device": device,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_kernels": dml_cuda.build_info()["cpu"]["in_use"],
        "gpu": _gpu() if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dml_cuda": dml_cuda.__version__,
        "pytorch_metric_learning": _version("pytorch-metric-learning"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def one_line(machine: dict) -> str:
    """The machine and versions in a sentence for the head of a table."""
    cores = f"{machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores"
    hardware = machine["gpu"]["name"] if machine["gpu"] else f"{cores}, {machine['cpu_kernels']} kernels"
    versions = [f"torch {machine['torch']}", f"dml_cuda {machine['dml_cuda']}", f"Python {machine['python']}"]
    if machine["cuda"]:
        versions.insert(1, f"CUDA {machine['cuda']}")
    if machine["pytorch_metric_learning"]:
        versions.append(f"pytorch-metric-learning {machine['pytorch_metric_learning']}")
    if machine["commit"]:
        versions.append(f"commit {machine['commit'][:8]}{'+' if machine['uncommitted_changes'] else ''}")
    return f"{hardware}; {', '.join(versions)}"
