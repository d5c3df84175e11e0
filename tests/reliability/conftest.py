"""What the tests of the programs have: the programs, a configuration, a run that has ended."""

import pytest

from tests.cli.conftest import SWEEP, config, contents, finished, programs, write_config

__all__ = ["config", "contents", "finished", "programs", "write_config", "write_sweep"]


@pytest.fixture(scope="session")
def write_sweep(write_config):
    """Returns a function that writes the configuration of a sweep over pruning with two seeds."""
    code = 'config.sweep.seeds = [0, 1]\ndel config.sweep.families["rank"]'
    return lambda: write_config(code, SWEEP)
