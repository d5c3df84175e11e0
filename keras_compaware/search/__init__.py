"""Searching for what compresses best: grids of trials, their results, what they say.

Nothing here trains. `expand` lists the trials of a sweep, `ResultsFile` keeps what came out of
them, and `aggregate`, `best_periods` and `markdown` say what it means.
"""

from keras_compaware.search.grid import BASELINES, Trial, expand
from keras_compaware.search.results import ResultsFile, estimate_seconds, finished, latest
from keras_compaware.search.summary import (
    aggregate,
    best_periods,
    csv_text,
    distortions,
    in_order,
    markdown,
)

__all__ = [
    "BASELINES",
    "ResultsFile",
    "Trial",
    "aggregate",
    "best_periods",
    "csv_text",
    "distortions",
    "estimate_seconds",
    "expand",
    "finished",
    "in_order",
    "latest",
    "markdown",
]
