// Draw the curves of a chosen row.
"use strict";

const FEW = 20; // points of which each has its number below a curve

function drawCurve(curve, row, table) {
  const lines = curve.rows[row];
  if (!lines) return null;
  const points = Object.entries(lines).flatMap(([line, each]) => each.map(([x, y]) => ({ line, x, y })));
  if (!points.length) return null;
  const names = Object.keys(lines);
  const last = d3.max(points, (point) => point.x);
  const axis = ({ title, unit, log, ends }) => ({
    label: withUnit(title, unit), labelArrow: "none",
    ...(log ? { type: "log", tickFormat: "~g", ticks: 5 } : { type: "linear" }),
    ...(ends ? { domain: ends } : {}),
  });
  const channels = { x: "x", y: "y", stroke: "line", z: "line" };
  const plot = Plot.plot({
    width: Math.min(420, table.section.clientWidth),
    height: 250,
    style: { fontSize: "12px" },
    marginTop: 30, marginLeft: 56, marginBottom: 42,
    x: { ...axis(curve.x), ticks: last > FEW ? 5 : Math.max(1, Math.min(last - 1, 10)) },
    y: { ...axis(curve.y), grid: true, nice: true },
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
