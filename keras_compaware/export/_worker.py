"""Converts a saved Keras model in a process of its own, on the backend of that process.

Run as `python -m keras_compaware.export._worker JOB`, where JOB is a JSON file. It is the way to
a file for models that live on a backend whose converter is missing or fails.
"""

import contextlib
import importlib
import json
import pathlib
import sys


def main(job_path: str) -> None:
    """Does one job and writes its outcome.

    Args:
        job_path: a JSON file with "converter" (module of this package that has `convert`), "model"
            (.keras file to read), "modules" (to import first, for custom layers), "inputs" and
            "outputs" (names, shapes, dtypes), "options" (keyword arguments of `convert`),
            "calibration" (.npz file of examples by input, or None: no such argument), "result"
            (file to write) and "outcome" (JSON file to write).
    """
    import keras
    import numpy as np

    from keras_compaware.export._plan import ConversionError, Spec, structure_of

    job = json.loads(pathlib.Path(job_path).read_text(encoding="utf-8"))
    convert = importlib.import_module(f"keras_compaware.export.{job['converter']}").convert
    outcome = {"ok": True}
    try:
        for name in job["modules"]:
            with contextlib.suppress(ImportError):  # the loader says which class it misses
                importlib.import_module(name)
        try:
            model = keras.saving.load_model(job["model"], compile=False, safe_mode=False)
        except Exception as error:
            raise ConversionError("load", str(error)) from error
        options = dict(job["options"])
        if job["calibration"] is not None:
            with np.load(job["calibration"]) as file:
                values = (file[str(n)] for n in range(len(file)))
                options["calibration"] = list(zip(*values, strict=True))
        content, outcome["notes"] = convert(
            model,
            structure_of(model),
            [Spec(i["name"], tuple(i["shape"]), i["dtype"]) for i in job["inputs"]],
            job["outputs"],
            **options,
        )
        pathlib.Path(job["result"]).write_bytes(content)
    except ConversionError as error:
        outcome = {
            "ok": False,
            "reason": error.reason,
            "message": error.message,
            "operations": error.operations,
            "places": error.places,
        }
    pathlib.Path(job["outcome"]).write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
