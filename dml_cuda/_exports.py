"""Names that a subpackage shows, taken from ``dml_cuda`` when asked for: an import would be a cycle."""

from collections.abc import Callable
from typing import Any


def lazy_exports(
    package: str, is_shown: Callable[[str], bool]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__``, which answers for ``__all__`` too, and ``__dir__`` of a package that shows those
    public names of ``dml_cuda``."""

    def names() -> list[str]:
        import dml_cuda

        return sorted(filter(is_shown, dml_cuda.__all__))

    def find(name: str) -> Any:
        if name == "__all__":
            return names()
        if not is_shown(name) or name not in names():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        import dml_cuda

        return getattr(dml_cuda, name)

    return find, names
