"""The C++ source of a custom formula: its text, struct and parameters."""

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
_PARAMETERS = re.compile(r'\bkParams\s*=\s*((?:"[^"\\\n]*"\s*)+);')
_STRING = re.compile(r'"([^"]*)"')
_HELD_CONSTANT = re.compile(r"\b(?:constant|with_share_of_derivative)\s*\(")


class Source(NamedTuple):
    """The source of a formula."""

    text: str
    title: str  # its name in messages: its path, or one made from the struct for a string
    struct: str  # the name of the formula's struct

    @property
    def file_name(self) -> str:
        return Path(self.title).name

    @property
    def declaration(self) -> str | None:
        """What kParams says, or None if it is not a plain string."""
        found = _PARAMETERS.search(_without_comments(self.text))
        return None if found is None else "".join(_STRING.findall(found[1]))


def _without_comments(text: str) -> str:
    return _COMMENT.sub(" ", text)


def holds_constants(text: str) -> bool:
    """Whether a formula treats something as constant in its gradient."""
    return _HELD_CONSTANT.search(_without_comments(text)) is not None


def read(source: object) -> Source:
    """Reads a formula from a path or a string. Raises TypeError, ValueError or OSError."""
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source: expected C++ text or the path of a file; got {type(source).__name__}")
    if isinstance(source, str) and ("\n" in source or "{" in source):
        text, title = source, None
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"source: expected a file with the formula, got {str(path)!r}")
        text, title = path.read_text(encoding="utf-8"), str(path)
    structs = _STRUCT.findall(_without_comments(text))
    if len(structs) != 1:
        which = f"got {len(structs)} ({', '.join(structs)})" if structs else "got none"
        raise ValueError(
            "source: expected one formula, template <typename T> struct NAME : FormulaDefaults { .. }; "
            + which
        )
    return Source(text, title or f"{structs[0]}.h", structs[0])


def parameters(declaration: str) -> dict[str, float | None]:
    """The parameters that kParams declares, "alpha, beta = 50", with their defaults. Raises ValueError."""
    defaults: dict[str, float | None] = {}
    for part in filter(None, (part.strip() for part in declaration.split(","))):
        name, equals, default = (word.strip() for word in part.partition("="))
        if not _NAME.fullmatch(name) or name in defaults:
            raise ValueError(
                f'kParams: expected distinct names, as in "alpha, beta = 50"; got {declaration!r}'
            )
        if not equals and any(value is not None for value in defaults.values()):
            raise ValueError(f"kParams: expected a default for {name}, which follows one with a default")
        try:
            defaults[name] = float(default) if equals else None
        except ValueError:
            raise ValueError(f"kParams: expected a number for {name}, got {default!r}") from None
    return defaults
