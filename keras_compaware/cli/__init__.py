"""The programs behind `python -m apps.NAME`."""
