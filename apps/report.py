"""Prints the results of a run, or of several side by side, and writes them as a page with charts.

python -m apps.report --workdir=runs/digits --compare=runs/rare,runs/often --out=report.html
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

from keras_compaware.cli import report

if __name__ == "__main__":
    report.run()
