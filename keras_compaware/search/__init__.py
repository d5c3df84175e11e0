"""Searching for what compresses best: sensitivities and budgets, grids of trials, what they say.

Nothing here trains. `fit_budget` distributes a budget over a model by its `sensitivity`. `expand`
lists the trials of a sweep, `ResultsFile` keeps what came out of them, and `aggregate`,
`best_periods` and `markdown` say what it means.
"""

from keras_compaware.search.budget import Allocation, fit_budget
from keras_compaware.search.grid import BASELINES, Trial, expand
from keras_compaware.search.results import ResultsFile, estimate_seconds, finished, latest
from keras_compaware.search.sensitivities import Sensitivity, sensitivity
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
    "Allocation",
    "ResultsFile",
    "Sensitivity",
    "Trial",
    "aggregate",
    "best_periods",
    "csv_text",
    "distortions",
    "estimate_seconds",
    "expand",
    "finished",
    "fit_budget",
    "in_order",
    "latest",
    "markdown",
    "sensitivity",
]
