"""Reports made by hand, and a reader of pages."""

import copy
import html.parser

VOID = {"meta", "br", "link", "img", "hr", "input"}


def side(accuracy=0.9, parameters=1000, **more):
    """What a report tells of the dense twin or the compact model."""
    return {
        "accuracy": accuracy,
        "parameters": parameters,
        "macs": parameters - 10,
        "encoded_bytes": 4 * parameters + 100,
        "litert_bytes": 4 * parameters + 1024,
        "gzip_bytes": 4 * parameters,
        "latency_ms": parameters / 1e5,
        **more,
    }


def history(epochs=3):
    return [
        {
            "epoch": epoch,
            "loss": 1 / epoch,
            "accuracy": 1 - 0.5 / epoch,
            "val_loss": 1.5 / epoch,
            "val_accuracy": 0.95 - 0.5 / epoch,
            "learning_rate": 1e-3 / epoch,
            "rank": 10.0 - epoch,
        }
        for epoch in range(1, epochs + 1)
    ]


def report(name="digits, tiny", **changes):
    """A report with all its parts; `changes` replace those at the top."""
    firings = [
        {
            "step": step,
            "seconds": 0.25,
            "final": step == 39,
            "distortion": {"hidden/kernel": 1 / step, "out/kernel": 2 / step},
        }
        for step in (10, 20, 30, 39)
    ]
    rows = [("hidden", 900, 180, "rank 4 of 16"), ("out", 100, 100, "as it is")]
    compact = side(
        *(0.88, 280),
        seconds=12.5,
        history=history(),
        firings=firings,
        compact_error=1e-6,
        layers=[
            {"name": name, "layer": "Dense", "before": before, "after": after, "note": note}
            for name, before, after, note in rows
        ],
        channels=[{"name": "space", "before": 32, "after": 24}],
    )
    whole = {
        "format": 1,
        "name": name,
        "dense": side(seconds=10.0, history=history()),
        "compact": compact,
        "plan": [
            {
                "name": "hidden/kernel",
                "layer": "Dense",
                "shape": [16, 32],
                "reason": None,
                "actions": ["Every(every=10, constraint=LowRank(rank=None, ratio=0.25))"],
            },
            {
                "name": "out/kernel",
                "layer": "Dense",
                "shape": [32, 10],
                "actions": [],
                "reason": "it produces the model's output",
            },
        ],
        "layers": [
            {
                "name": name,
                "class": "Dense",
                "parameters": [before, after],
                "macs": [before - 10, after - 10],
                "channels": [32, 24],
            }
            for name, before, after, _ in rows
        ],
        "spectra": [
            {
                "name": "hidden/kernel",
                "layer": "hidden",
                "full_rank": 3,
                "rank": 2,
                "dense": [[1, 3.0], [2, 2.0], [3, 1.0]],
                "trained": [[1, 3.0], [2, 2.0], [3, 1e-9]],
            }
        ],
        "config": {"model": "tiny", "seed": 7, "epochs": 3, "rules": {"low_rank": {"ratio": 0.25}}},
        "steps_per_epoch": 13,
        "data": {"name": "digits", "version": "1.0.0"},
        "backend": "tensorflow",
        "versions": {"python": "3.11.7", "keras-compaware": "0.1.0"},
        "machine": "x86_64, 2 cores, Linux",
        "command": "python -m apps.train --config=a.py --workdir='my run'",
    }
    return copy.deepcopy({**whole, **changes})


class Page(html.parser.HTMLParser):
    """A page as a list of elements: (tag, attributes, text inside); it must be well-formed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements = []
        self._open = []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        element = [tag, dict(attributes), ""]
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1][0]}"
        self._open.pop()

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, tag, **attributes):
        """The elements with a tag and some attributes."""
        return [
            (found, text)
            for name, found, text in self.elements
            if name == tag and all(found.get(key) == value for key, value in attributes.items())
        ]

    def text(self, tag="body"):
        """The text of the only element with a tag."""
        ((_, text),) = self.all(tag)
        return text
