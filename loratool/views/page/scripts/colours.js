// Choose colours that readers of any colour vision tell apart: viridis, purple to orange around 0, Okabe's and Ito's.
"use strict";

const CATEGORIES = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#808080"]; // Okabe and Ito

// Return a scale of Plot's for the values of a column
function colourOf(column, values, log) {
  const label = withUnit(column.title, column.unit);
  if (!column.isNumber) {
    const domain = [...new Set(values)];
    const range = domain.map((word, i) => column.colours.get(word) ?? CATEGORIES[i]);
    return { type: "ordinal", domain, range, label };
  }
  const known = values.filter((value) => value !== null);
  if (column.ends?.[0] < 0) return { type: "diverging", scheme: "PuOr", domain: column.ends, pivot: 0, clamp: true, label };
  const [low, high] = column.ends ?? [d3.min(known) ?? 0, d3.max(known) ?? 1];
  if (low === high) return { type: "ordinal", domain: [low], range: CATEGORIES, label, tickFormat: written(high) };
  const form = { scheme: "viridis", label, domain: [low, high] };
  // a logarithmic scale names the ticks that have room, if it makes the words itself
  return log ? { ...form, type: "log", tickFormat: "~g" } : { ...form, type: "linear", tickFormat: written(high) };
}

// How numbers up to the highest are written: 12,000,000 as 12M
const written = (high) => d3.format(high < 10000 ? "~g" : "~s");

// Whether equal factors tell more than equal steps
function isWide(column, values) {
  const known = values.filter((value) => value !== null);
  return column.isNumber && !column.ends && d3.min(known) > 0 && d3.max(known) >= 10 * d3.min(known);
}

// Colour the cells of a heatmap, with letters that stand out
function paintHeatmap(section) {
  const cells = [...section.querySelectorAll("td[data-v]")].filter((cell) => cell.dataset.v !== "");
  const values = cells.map((cell) => Number(cell.dataset.v));
  const ends = section.dataset.ends?.split(" ").map(Number);
  const scale = Plot.scale({ color: colourOf({ title: "", isNumber: true, ends }, values) });
  cells.forEach((cell, i) => {
    const colour = d3.color(scale.apply(values[i]));
    const [r, g, b] = [colour.r, colour.g, colour.b].map((part) => {
      const c = part / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    cell.style.background = colour.formatHex();
    cell.style.color = 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff"; // WCAG's relative luminance
  });
}
