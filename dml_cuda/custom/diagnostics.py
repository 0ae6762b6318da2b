"""What a compiler says of a formula, in the formula's own lines."""

import re
from collections.abc import Iterator

# g++ and clang write FILE:LINE:COLUMN, nvcc FILE(LINE).
_ERROR = re.compile(
    r"(?P<file>[^\s:(][^:(]*)[:(](?P<line>\d+)[:)](?:\d+:)?:? (?:fatal )?error(?: #[\w-]+)?: (?P<text>.*)"
)
_PLACE = re.compile(r"(?P<file>[^\s:(][^:(]*)[:(](?P<line>\d+)")
_LACKS = "the formula: "  # how the assertions of losses/derivatives.h begin
_TYPES = re.compile(r"(?:dml::)?Dual<(?:float|double)>")
_DETAIL = re.compile(r"\s+(\d+ )?\||\s")  # the source line, and the mark under it
_MOST = 6


def _blocks(log: str) -> Iterator[tuple[re.Match, list[str], list[str]]]:
    """Each error, with the lines that show its place and those that tell how the compiler came there."""
    lines = log.splitlines()
    starts = [k for k, line in enumerate(lines) if _ERROR.match(line)]
    for at, k in enumerate(starts):
        end = starts[at + 1] if at + 1 < len(starts) else len(lines)
        detail = []
        for line in lines[k + 1 : end]:
            if not _DETAIL.match(line):
                break
            detail.append(line)
        before = []
        for line in reversed(lines[starts[at - 1] + 1 if at else 0 : k]):
            if (
                "required from" not in line
                and "In instantiation" not in line
                and "requested here" not in line
            ):
                break
            before.append(line)
        yield _ERROR.match(lines[k]), detail, before + lines[k + 1 : end]


def explain(log: str, path: str, shown: str) -> str:
    """The errors that a user can act on: what the formula lacks, else errors in the formula's lines.

    ``path`` is the formula's file as the compiler saw it, ``shown`` what the user calls it.
    """
    lacking, own, reached, other = [], [], [], []
    for error, detail, context in _blocks(log):
        text, line = _TYPES.sub("Dual<T>", error["text"]), error["line"]
        if text.startswith("static") and _LACKS in text:
            lacking.append(f"{shown}: {text.partition(_LACKS)[2].rstrip(chr(34))}")
        elif error["file"].strip() == path:
            own.append("\n".join([f"{shown}:{line}: {text}", *detail]))
        else:
            places = [place for place in map(_PLACE.match, context) if place and place["file"] == path]
            if places:
                reached.append(f"{shown}:{places[0]['line']}: {text}")
            other.append(text)
    found = lacking or own or reached or other or [log.strip()[-2000:]]
    return "\n".join(list(dict.fromkeys(found))[:_MOST])
