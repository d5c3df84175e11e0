"""Reports of runs."""

from keras_compaware.reporting.table import early_line, results_table, states_table

__all__ = ["early_line", "results_table", "states_table"]
