"""Whether counts could be those of a distribution."""

from math import erfc, sqrt

import torch


def chi_squared_is_likely(observed, expected):
    """At a level of 1e-4, of counts whose expectations are at least 5 (rarer ones are put together)."""
    observed, expected = observed.double(), expected.double()
    rare = expected < 5
    if rare.any():
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        keep = expected >= 5
        if not keep[-1]:
            observed, expected = observed[:-1], expected[:-1]
    freedom = len(observed) - 1
    if freedom < 1:
        return True
    statistic = float(((observed - expected) ** 2 / expected).sum())
    # Wilson and Hilferty's normal approximation of the chi-squared distribution.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / sqrt(2 / (9 * freedom))
    return erfc(z / sqrt(2)) / 2 > 1e-4
