"""Tables in Markdown, and the part of a page that they are written into."""

from dataclasses import dataclass


def markdown_table(header: list[str], rows: list[list[str]], left: int) -> str:
    """A table whose first ``left`` columns are flush left, the others right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


@dataclass(frozen=True)
class Section:
    """What lies between two markers of a page."""

    name: str

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}:begin -->"

    @property
    def end(self) -> str:
        return f"<!-- {self.name}:end -->"

    def insert(self, text: str, written: str) -> str:
        """``text`` with what lies between the markers replaced."""
        begin, end = self.begin, self.end
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"the README needs one line {begin} and, after it, one line {end}")
        head, rest = text.split(begin)
        return f"{head}{begin}\n{written}\n{end}{rest.split(end)[1]}"
