"""A report as one page of HTML, with charts, that needs no network.

Plotly draws the charts; it is imported when a page is made and comes with the extra `report`.
"""

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

from keras_compaware.reporting import sections
from keras_compaware.reporting.check import checked
from keras_compaware.reporting.markup import Html, join, tag, text


def html(
    report: Mapping[str, Any],
    compare: Sequence[Mapping[str, Any]] = (),
    labels: Sequence[str] | None = None,
) -> str:
    """Returns the report of a run as a page of HTML.

    The page holds all that it needs, Plotly included (about 5 MB), and its content security policy
    forbids it to load anything and to run any script but its own. It follows the reader's colour
    scheme, fits a phone, and gives every chart as a table as well. It shows

    - accuracy, sizes, multiply-accumulates (MACs) and latency, dense twin against compact model,
    - with `compare`, accuracy against cost for all runs, and their Pareto front,
    - the plan, with the kernels that were left alone and why,
    - parameters, MACs, channels and ranks layer by layer, before and after,
    - training curves with the firings; distortion of the firings; singular values of the kernels,
    - the configuration and the command.

    What the report lacks is left out: reports of earlier versions hold less.

    Args:
        report: Content of a run's `report.json`.
        compare: Contents of further ones.
        labels: What the runs are called, the first one first. Default: network and data set.

    Returns:
        The page. Every text of a report is escaped.

    Raises:
        ImportError: If Plotly is not installed.
        ValueError: If a report is damaged or of a later format, or `labels` are not one for each
            run.

    Example:
    >>> twin = {
    ...     **{"accuracy": 0.97, "parameters": 800, "macs": 790, "latency_ms": 0.02},
    ...     **{"encoded_bytes": 3200, "litert_bytes": 4000, "gzip_bytes": 3600},
    ... }
    >>> report = {
    ...     **{"name": "digits, tiny", "dense": twin, "compact": {**twin, "parameters": 200}},
    ...     **{"config": {"model": "tiny", "seed": 0}, "command": "python -m apps.train ..."},
    ... }
    >>> page = html(report)
    >>> page[:15], "digits, tiny" in page
    ('<!DOCTYPE html>', True)
    """
    reports = [checked(one) for one in (report, *compare)]
    labels = [one["name"] for one in reports] if labels is None else list(labels)
    if len(labels) != len(reports):
        raise ValueError(
            f"html: `labels` must be one for each run. Received: {len(labels)} for "
            f"{len(reports)} runs."
        )
    library = _library()
    charts: dict[str, list[dict[str, Any]]] = {}
    parts = [
        sections.headline(report),
        sections.comparison(reports, labels, charts) if compare else None,
        sections.plan(report),
        sections.layers(report, charts),
        sections.training(report, charts),
        sections.distortion(report, charts),
        sections.spectra(report, charts),
        sections.reproduction(report),
    ]
    return _page(report, [part for part in parts if part is not None], charts, library)


def _library() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(
            "the charts of an HTML report are drawn by Plotly, which is not installed. Install it: "
            "pip install 'keras-compaware[report]'"
        ) from error
    return get_plotlyjs().replace("</script", "<\\/script")  # which would end the element


def _page(report, parts, charts, library):
    scripts = [library, _asset("page.js")] if charts else []
    allowed = " ".join(map(_hash, scripts)) or "'none'"
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {allowed}",
            "style-src 'unsafe-inline'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    links = [tag("li", tag("a", part.title, href=f"#{part.name}")) for part in parts]
    body = join(
        tag("a", "To the results", href="#main", class_="skip"),
        tag(
            "header",
            tag("h1", report["name"]),
            tag("p", sections.summary(report), class_="lede"),
            tag("nav", tag("ul", *links), aria_label="Parts of this report"),
        ),
        tag("main", *(_section(part) for part in parts), id="main"),
        tag("footer", tag("p", _made_by(report))),
    )
    data = json.dumps(charts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    head = join(
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{text(policy)}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        tag("title", f"{report['name']}: compression report"),
        Html(f"<style>{_asset('page.css')}</style>"),
    )
    tail = ""
    if charts:
        tail = f'<script type="application/json" id="charts">{data}</script>'
        tail += "".join(f"<script>{script}</script>" for script in scripts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>{body}\n{tail}</body>\n'
        "</html>\n"
    )


def _section(part):
    title = tag("h2", part.title, id=f"{part.name}-title")
    return tag("section", title, part.body, id=part.name, aria_labelledby=f"{part.name}-title")


def _made_by(report):
    version = report.get("versions")
    version = version.get("keras-compaware") if isinstance(version, dict) else None
    return f"keras_compaware {version}" if version else "keras_compaware"


def _hash(script):
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _asset(name):
    folder = importlib.resources.files("keras_compaware.reporting") / "assets"
    return (folder / name).read_text(encoding="utf-8")
