"""The docstring of a module from that of the function which it stands for."""

import inspect
import re
from collections.abc import Callable
from typing import TypeVar

_Class = TypeVar("_Class", bound=type)
_ENTRY = re.compile(r"    (\w[\w, ]*):")


def _entries(section: str) -> list[tuple[list[str], str]]:
    """The entries of an Args section: their names and their text."""
    entries: list[tuple[list[str], str]] = []
    for line in section.splitlines():
        if named := _ENTRY.match(line):
            entries.append((re.split(r",\s*", named[1]), line))
        elif entries:
            names, text = entries[-1]
            entries[-1] = names, f"{text}\n{line}"
    return entries


def described_by(function: Callable) -> Callable[[_Class], _Class]:
    """Puts the function's text and the parameters that the class takes before the rest of its docstring,
    whose first line names the class."""

    def describe(cls: _Class) -> _Class:
        if cls.__doc__ is None or function.__doc__ is None:  # python -OO
            return cls
        text, _, rest = inspect.getdoc(function).partition("\nArgs:\n")
        section = re.split(r"\n(?=\S)", rest)[0]
        taken = {*inspect.signature(cls).parameters, "options"}
        arguments = [entry for names, entry in _entries(section) if taken.intersection(names)]
        own = inspect.cleandoc(cls.__doc__).partition("\n")[2]
        cls.__doc__ = "\n".join([text, "Args:", *arguments, own])
        return cls

    return describe
