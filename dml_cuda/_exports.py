"""Names that a subpackage shows, taken from ``dml_cuda`` when asked for: an import would be a cycle."""

from collections.abc import Callable, Sequence
from typing import Any


def lazy_exports(package: str, names: Sequence[str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that shows public names of ``dml_cuda``."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        import dml_cuda

        return getattr(dml_cuda, name)

    return find, lambda: sorted(names)
