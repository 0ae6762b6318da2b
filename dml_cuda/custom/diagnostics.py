"""Translates compiler output into errors with the line numbers of the formula."""

import re
from collections.abc import Iterator

# g++ and clang write FILE:LINE:COLUMN, nvcc FILE(LINE).
_ERROR = re.compile(
    r"(?P<file>[^\s:(][^:(]*)[:(](?P<line>\d+)[:)](?:\d+:)?:? (?:fatal )?error(?: #[\w-]+)?: (?P<text>.*)"
)
_PLACE = re.compile(r"(?P<file>[^\s:(][^:(]*)[:(](?P<line>\d+)")
_ASSERTION = "the formula: "  # how the messages of static_assert in losses/derivatives.h begin
_TYPES = re.compile(r"(?:dml::)?Dual<(?:float|double)>")
_DETAIL = re.compile(r"\s+(\d+ )?\||\s")  # the source line, and the marker below it
_MAX_ERRORS = 6


def _blocks(log: str) -> Iterator[tuple[re.Match, list[str], list[str]]]:
    """Yields each error with the lines that show its position and the chain of instantiations."""
    lines = log.splitlines()
    starts = [k for k, line in enumerate(lines) if _ERROR.match(line)]
    for i, k in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else len(lines)
        detail = []
        for line in lines[k + 1 : end]:
            if not _DETAIL.match(line):
                break
            detail.append(line)
        before = []
        for line in reversed(lines[starts[i - 1] + 1 if i else 0 : k]):
            if (
                "required from" not in line
                and "In instantiation" not in line
                and "requested here" not in line
            ):
                break
            before.append(line)
        yield _ERROR.match(lines[k]), detail, before + lines[k + 1 : end]


def explain(log: str, path: str, title: str) -> str:
    """The errors that the author can act on: missing members, else errors in the formula's lines.

    ``path`` is the formula's file in the compiler output, ``title`` its name in the messages.
    """
    missing, in_formula, instantiated, elsewhere = [], [], [], []
    for error, detail, context in _blocks(log):
        text, line = _TYPES.sub("Dual<T>", error["text"]), error["line"]
        if text.startswith("static") and _ASSERTION in text:
            missing.append(f"{title}: {text.partition(_ASSERTION)[2].rstrip(chr(34))}")
        elif error["file"].strip() == path:
            in_formula.append("\n".join([f"{title}:{line}: {text}", *detail]))
        else:
            places = [place for place in map(_PLACE.match, context) if place and place["file"] == path]
            if places:
                instantiated.append(f"{title}:{places[0]['line']}: {text}")
            elsewhere.append(text)
    errors = missing or in_formula or instantiated or elsewhere or [log.strip()[-2000:]]
    return "\n".join(list(dict.fromkeys(errors))[:_MAX_ERRORS])
