"""The programs, configurations and runs of the tests of the programs, also for these tests."""

from tests.cli.conftest import config, contents, finished, programs, write_config

__all__ = ["config", "contents", "finished", "programs", "write_config"]
