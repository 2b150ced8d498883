// Draw the curves of a chosen row.
"use strict";

function drawCurve(curve, row, table) {
  const lines = curve.rows[row];
  if (!lines) return null;
  const points = Object.entries(lines).flatMap(([line, each]) => each.map(([x, y]) => ({ line, x, y })));
  if (!points.length) return null;
  const names = Object.keys(lines);
  const axis = ({ title, unit, log }) => ({ label: withUnit(title, unit), type: log ? "log" : "linear", labelArrow: "none" });
  const channels = { x: "x", y: "y", stroke: "line", z: "line" };
  const plot = Plot.plot({
    width: Math.min(420, table.section.clientWidth),
    height: 250,
    style: { fontSize: "12px" },
    marginLeft: 56,
    marginBottom: 38,
    x: { ...axis(curve.x), ...(curve.x.log ? { tickFormat: "~s", ticks: 5 } : {}) },
    y: { ...axis(curve.y), grid: true, nice: true, ...(curve.y.log ? { ticks: 5, tickFormat: ".0e" } : {}) },
    color: { domain: names, range: CATEGORIES },
    marks: [
      Plot.line(points, channels),
      Plot.dot(points, { ...channels, fill: "line", r: 2 }),
      Plot.tip(points, Plot.pointer({ x: "x", y: "y", ariaHidden: "true" })),
    ],
  });
  for (const group of plot.querySelectorAll("g[aria-label]")) group.removeAttribute("aria-label"); // one is enough
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `${curve.title} of ${table.names[row]}: ${points.length} points`);
  const figure = element("figure", {}, element("h3", {}, curve.title));
  if (names.length > 1) figure.append(Plot.legend({ color: { domain: names, range: CATEGORIES } }));
  figure.append(plot);
  return figure;
}
