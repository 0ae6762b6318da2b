"""The C++ source of a formula, as a user gives it."""

import os
import re
from pathlib import Path
from typing import NamedTuple

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_STRUCT = re.compile(
    r"template\s*<\s*(?:typename|class)\s+\w+\s*>\s*(?:struct|class)\s+(\w+)\s*(?:final\s*)?"
    r":\s*(?:public\s+)?(?:::)?(?:dml::)?FormulaDefaults\b"
)
_NAME = re.compile(r"[A-Za-z_]\w*")


class Source(NamedTuple):
    """The text of a formula."""

    text: str
    shown: str  # what messages call it: its path, or a name for a string
    struct: str  # of the formula

    @property
    def file_name(self) -> str:
        return Path(self.shown).name


def read(source: object) -> Source:
    """A formula from a path or a string. Raises TypeError, ValueError or OSError."""
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"source: expected C++ text, or the path of a file with it; got {type(source).__name__}"
        )
    if isinstance(source, str) and ("\n" in source or "{" in source):
        text, shown = source, None
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"source: expected a file with the formula, got {str(path)!r}")
        text, shown = path.read_text(encoding="utf-8"), str(path)
    found = _STRUCT.findall(_COMMENT.sub(" ", text))
    if len(found) != 1:
        which = f"got {len(found)} ({', '.join(found)})" if found else "got none"
        raise ValueError(
            "source: expected one formula, template <typename T> struct NAME : FormulaDefaults { .. }; "
            + which
        )
    return Source(text, shown or f"{found[0]}.h", found[0])


def parameters(stated: str) -> dict[str, float | None]:
    """The parameters of kParams, "alpha, beta = 50", each with its default or None. Raises ValueError."""
    found: dict[str, float | None] = {}
    for part in filter(None, (part.strip() for part in stated.split(","))):
        name, equals, default = (word.strip() for word in part.partition("="))
        if not _NAME.fullmatch(name) or name in found:
            raise ValueError(f'kParams: expected names, each once, as in "alpha, beta = 50"; got {stated!r}')
        if not equals and any(value is not None for value in found.values()):
            raise ValueError(f"kParams: expected a default for {name}, as what precedes it has one")
        try:
            found[name] = float(default) if equals else None
        except ValueError:
            raise ValueError(f"kParams: expected a number for {name}, got {default!r}") from None
    return found
