"""Reports of runs, and a callback that shows singular values in TensorBoard."""

from keras_compaware.reporting.check import REPORT_FORMAT, checked
from keras_compaware.reporting.page import html
from keras_compaware.reporting.spectra import SpectrumHistograms
from keras_compaware.reporting.table import early_line, results_table, states_table

__all__ = [
    "REPORT_FORMAT",
    "SpectrumHistograms",
    "checked",
    "early_line",
    "html",
    "results_table",
    "states_table",
]
