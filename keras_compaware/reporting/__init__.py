"""Reports of runs."""

from keras_compaware.reporting.table import results_table, states_table

__all__ = ["results_table", "states_table"]
