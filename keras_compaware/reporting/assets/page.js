(() => {
  "use strict";
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");
  const touch = matchMedia("(pointer: coarse)");

  // Colours are named after CSS variables; all else is taken over as it is.
  const coloured = (value, style, key) => {
    if (Array.isArray(value)) return value.map((item) => coloured(item, style, key));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(
        Object.entries(value).map(([name, item]) => [name, coloured(item, style, name)])
      );
    }
    const named = key === "color" && typeof value === "string" && value.startsWith("--");
    return named ? style.getPropertyValue(value).trim() : value;
  };

  const draw = (node) => {
    const chosen = document.querySelector(`select[data-for="${node.id}"]`);
    const chart = charts[node.id][chosen ? Number(chosen.value) : 0];
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const { data, layout } = coloured(chart, style);
    const axis = {
      gridcolor: colour("--grid"),
      linecolor: colour("--line"),
      zerolinecolor: colour("--line"),
      tickfont: { color: colour("--muted"), size: narrow.matches ? 11 : 12 },
      automargin: true,
    };
    for (const name of ["xaxis", "yaxis", "yaxis2"]) {
      if (layout[name]) layout[name] = { ...axis, ...layout[name] };
      if (layout[name] && layout[name].title) {
        layout[name].title = { ...layout[name].title, standoff: 8, font: { color: colour("--muted"), size: 12 } };
      }
    }
    // Labels beside points need room that a phone does not have; a tap shows them.
    for (const trace of data) {
      if (narrow.matches && trace.mode === "markers+text") trace.mode = "markers";
    }
    Object.assign(layout, {
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
      margin: { l: 48, r: 12, t: 8, b: 40 },
      hoverlabel: {
        bgcolor: colour("--card"),
        bordercolor: colour("--muted"),
        font: { color: colour("--ink") },
        align: "left",
      },
      dragmode: touch.matches ? false : "zoom",
      legend: {
        orientation: "h",
        x: 0,
        xanchor: "left",
        y: 1.02,
        yanchor: "bottom",
        bgcolor: "rgba(0,0,0,0)",
        ...layout.legend,
      },
    });
    return Plotly.react(node, data, layout, {
      displayModeBar: false,
      responsive: true,
      showTips: false,
    });
  };

  const all = () => [...document.querySelectorAll(".plot")].map(draw);
  for (const chosen of document.querySelectorAll("select[data-for]")) {
    chosen.addEventListener("change", () => draw(document.getElementById(chosen.dataset.for)));
  }
  dark.addEventListener("change", all);
  narrow.addEventListener("change", all);
  Promise.all(all()).then(() => document.documentElement.setAttribute("data-drawn", "true"));
})();
