"""Converts a saved Keras model in a process of its own, on the TensorFlow backend.

Run as `python -m keras_compaware.export._worker JOB`, where JOB is a JSON file. It is the way to
LiteRT for models that live on the JAX or torch backend.
"""

import contextlib
import importlib
import json
import pathlib
import sys


def main(job_path: str) -> None:
    """Does one job and writes its outcome.

    Args:
        job_path: a JSON file with "model" (.keras file to read), "modules" (to import first, for
            custom layers), "inputs" and "outputs" (names, shapes, dtypes), "allow_select_ops",
            "quantization", "calibration" (.npz file of examples by input, or None), "result"
            (.tflite file to write) and "outcome" (JSON file to write).
    """
    import keras
    import numpy as np

    from keras_compaware.export import _convert

    job = json.loads(pathlib.Path(job_path).read_text(encoding="utf-8"))
    outcome = {"ok": True}
    try:
        for name in job["modules"]:
            with contextlib.suppress(ImportError):  # the loader says which class it misses
                importlib.import_module(name)
        try:
            model = keras.saving.load_model(job["model"], compile=False, safe_mode=False)
        except Exception as error:
            raise _convert.ConversionError("load", str(error)) from error
        structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
        calibration = []
        if job["calibration"]:
            with np.load(job["calibration"]) as file:
                calibration = list(zip(*(file[str(n)] for n in range(len(file))), strict=True))
        content, outcome["grids"] = _convert.convert(
            model,
            structure,
            [_convert.Spec(i["name"], tuple(i["shape"]), i["dtype"]) for i in job["inputs"]],
            job["outputs"],
            allow_select_ops=job["allow_select_ops"],
            quantization=job["quantization"],
            calibration=calibration,
        )
        pathlib.Path(job["result"]).write_bytes(content)
    except _convert.ConversionError as error:
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
