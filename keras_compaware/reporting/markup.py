"""Pieces of HTML (private). Text is escaped unless it is marked as HTML."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Html(str):
    """Text that is HTML already."""


def text(value: Any) -> Html:
    """Returns a value as text: escaped, for elements and for attributes in quotes.

    >>> text('<b title="1">')
    '&lt;b title=&quot;1&quot;&gt;'
    """
    if isinstance(value, Html):
        return value
    return Html(html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True))


def join(*parts: Any) -> Html:
    """Returns parts one after the other, what is no HTML escaped; None is left out."""
    return Html("".join(text(part) for part in parts if part is not None))


def tag(name: str, *parts: Any, **attributes: Any) -> Html:
    """Returns an element; `class_` is the attribute "class", `data_x` "data-x", None is left out.

    >>> tag("p", "1 < 2", class_="note")
    '<p class="note">1 &lt; 2</p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{join(*parts)}</{name}>")


def table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    left: Sequence[int] = (0,),
    wide: int | None = None,
    hide_caption: bool = False,
) -> Html:
    """Returns a table in a box that scrolls by itself and can be reached by the keyboard.

    Args:
        caption: What it shows.
        header: Texts over the columns. The first cell of a row is its header.
        rows: Cells: texts, or HTML.
        left: Columns whose cells are text; the others are numbers, set flush right.
        wide: The column of the longest texts, which needs room on a phone.
        hide_caption: Whether the caption is for screen readers only, because a heading says it.
    """

    def cell(place, value, name="td", **attributes):
        kind = "number" if place not in left else ("wide" if place == wide else None)
        return tag(name, value, class_=kind, **attributes)

    head = join(*(cell(i, value, "th", scope="col") for i, value in enumerate(header)))
    lines = [
        tag(
            "tr",
            *(
                cell(i, value) if i else cell(i, value, "th", scope="row")
                for i, value in enumerate(row)
            ),
        )
        for row in rows
    ]
    label = "hidden" if hide_caption else None
    return tag(
        "div",
        tag(
            "table",
            tag("caption", tag("span", caption, class_=label)),
            tag("thead", tag("tr", head)),
            tag("tbody", *lines),
        ),
        class_="scroll",
        role="region",
        tabindex="0",
        aria_label=caption,
    )


def details(summary: str, *parts: Any) -> Html:
    """Returns what is shown only when its summary is chosen."""
    return tag("details", tag("summary", summary), *parts)
