"""The compiled module, for type checkers: csrc/torch/ops.cpp says what is in it."""

from typing import Any

version: str
torch_version: str
cuda_version: str
cuda_archs: str
compile_flags: str

def cpu_instruction_sets() -> list[str]: ...
def cpu_instruction_set() -> str: ...
def __getattr__(name: str) -> Any: ...
