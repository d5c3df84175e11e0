"""The page of a report in a real browser: charts, colours, widths, no errors."""

import json
import os
import re
import shutil
import subprocess

import pytest

pytest.importorskip("plotly")

from keras_compaware.reporting import html
from tests.reporting.helpers import report
from tests.reporting.html_test import NASTY, hostile

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
BROWSER = os.environ.get("BROWSER_FOR_TESTS") or next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)}"),
]

# The page stands in a frame of some width: a window cannot be as narrow as a phone everywhere.
FRAME = """<!DOCTYPE html>
<iframe id="frame" src="page.html" style="width:%dpx;height:900px;border:0"></iframe>
<script>
  const frame = document.getElementById("frame");
  const timer = setInterval(() => {
    const page = frame.contentDocument;
    if (!page || !page.documentElement || !page.documentElement.dataset.drawn) return;
    clearInterval(timer);
    %s
    const style = frame.contentWindow.getComputedStyle(page.body);
    const widths = [...page.querySelectorAll("main *")]
      .filter((node) => !node.closest(".scroll, pre, svg, .hidden"))
      .map((node) => node.getBoundingClientRect().right);
    document.title = JSON.stringify({
      scroll: page.documentElement.scrollWidth,
      width: page.documentElement.clientWidth,
      right: Math.max(...widths),
      charts: page.querySelectorAll(".plot").length,
      drawn: page.querySelectorAll(".plot .main-svg:first-of-type").length,
      background: style.backgroundColor,
      ink: page.querySelector(".xtick text") && page.querySelector(".xtick text").style.fill,
      title: page.querySelector(".plot .xtitle") && page.querySelector(".plot .xtitle").textContent,
      text: page.body.innerText,
    });
  }, 50);
</script>
"""
DARK, LIGHT = 0, 1


def show(folder, page, width, scheme=LIGHT, then=""):
    """Returns (what the page is like, what it printed) after running some JavaScript in it."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME % (width, then), encoding="utf-8")
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--allow-file-access-from-files", "--enable-logging=stderr", "--dump-dom"),
        *("--virtual-time-budget=20000", f"--user-data-dir={folder / 'profile'}"),
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={width + 100},1000",
        (folder / "frame.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, f"the page was not drawn:\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    found = title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(found), re.findall(r"CONSOLE:?\d*[)\]:].*", done.stderr)


def page_of(nasty=False):
    if nasty:
        return html(hostile(), [hostile()], [NASTY, NASTY])
    return html(report(), [report(compact=report()["compact"])], ["a run", "another"])


@pytest.mark.parametrize(
    ("width", "scheme", "nasty"),
    [(360, LIGHT, True), (360, DARK, False), (1280, LIGHT, False), (1280, DARK, True)],
)
def test_it_fits_and_is_drawn(tmp_path, width, scheme, nasty):
    found, console = show(tmp_path, page_of(nasty), width, scheme)
    assert console == []
    assert found["scroll"] == found["width"] == width
    assert found["right"] <= width
    assert found["drawn"] == found["charts"] == 11
    dark = "rgb(17, 22, 29)", "rgb(163, 176, 193)"
    light = "rgb(246, 247, 249)", "rgb(86, 98, 115)"
    assert (found["background"], found["ink"]) == (dark if scheme == DARK else light)
    if nasty:
        assert NASTY in found["text"]


def test_another_cost_is_chosen(tmp_path):
    then = """
      const chosen = page.querySelector("select[data-for=tradeoff]");
      chosen.value = "4";
      chosen.dispatchEvent(new Event("change"));
    """
    found, console = show(tmp_path, page_of(), 800, then=then)
    assert console == []
    assert found["title"] == "MACs"


def test_what_the_browser_prints_is_seen(tmp_path):
    """And a script that is not the page's own is not run."""
    injected = page_of().replace("</body>", "<script>document.title='!'</script></body>")
    _, console = show(tmp_path, injected, 800)
    assert any("Content Security Policy" in line for line in console)
