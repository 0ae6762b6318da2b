"""Which cases of a test stand for all of them."""

import zlib


def covering(cases):
    """Indices of few cases ``[(value of each parameter, ...)]`` that show every value of every parameter.

    Greedy: the case that shows most that is new comes first; of equals the one that a hash puts first, so
    that the values meet in many ways, and in the same ones every time.
    """
    shows = [set(enumerate(case)) for case in cases]
    order = sorted(range(len(cases)), key=lambda k: zlib.crc32(repr(cases[k]).encode()))
    missing, chosen = set().union(*shows), []
    while missing:
        best = max(order, key=lambda k: len(shows[k] & missing))
        chosen.append(best)
        missing -= shows[best]
    return sorted(chosen)
