// Draw the grids and curves of a page, and sort, filter and copy its tables. All numbers are read from the page.
"use strict";

const FIRST = 300; // rows of a table that are shown at once
const CATEGORIES = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#808080"]; // Okabe and Ito
const LETTER = 7; // pixels of a letter beside a grid, about
const LONGEST = 34; // letters of a label beside a grid

const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};

// cut in the middle: names differ at both ends
const shorten = (text, longest = LONGEST) =>
  text.length <= longest ? text : `${text.slice(0, longest / 2 - 1)}…${text.slice(1 - longest / 2)}`;

const withUnit = (title, unit) => (unit ? `${title} (${unit})` : title);

class Table {
  constructor(section) {
    this.section = section;
    this.table = section.querySelector(".tall table");
    this.rows = [...this.table.tBodies[0].rows];
    this.columns = [...this.table.tHead.rows[0].cells].map((cell) => ({
      title: cell.textContent.trim(),
      meaning: cell.title,
      unit: cell.dataset.unit ?? "",
      isNumber: "number" in cell.dataset,
      ends: cell.dataset.ends?.split(" ").map(Number),
    }));
    this.names = this.rows.map((row) => row.cells[0].querySelector("bdi").textContent);
  }

  text(row, column) {
    return this.rows[row].cells[column].textContent;
  }

  // the number behind a cell; null where there is none
  number(row, column) {
    const value = this.rows[row].cells[column].dataset.v;
    return value === undefined || value === "" ? null : Number(value);
  }

  // what a cell is drawn, sorted and copied by
  value(row, column) {
    if (column === 0) return this.names[row];
    return this.columns[column].isNumber ? this.number(row, column) : this.text(row, column);
  }
}

function makeSortable(table) {
  const heads = [...table.table.tHead.rows[0].cells];
  const by = new Intl.Collator("en", { numeric: true });
  heads.forEach((head, column) => {
    const button = element("button", { type: "button" });
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const way = head.getAttribute("aria-sort") === (table.columns[column].isNumber ? "descending" : "ascending") ? -1 : 1;
      const down = table.columns[column].isNumber ? -way : way;
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
      const keyed = table.rows.map((row, i) => [table.value(i, column), i]);
      keyed.sort(([a, i], [b, j]) => {
        if (a === null || b === null) return (a === null) - (b === null) || i - j;
        return down * (typeof a === "number" ? a - b : by.compare(a, b)) || i - j;
      });
      table.table.tBodies[0].append(...keyed.map(([, i]) => table.rows[i]));
      showFirst(table);
    });
  });
}

// Show as many rows as a browser lays out at once, in the order in which they stand
function showFirst(table) {
  const more = table.section.querySelector(".more");
  let shown = 0;
  for (const row of table.table.tBodies[0].rows) {
    if (row.classList.contains("filtered")) continue;
    row.classList.toggle("later", !table.all && shown >= FIRST);
    shown += 1;
  }
  const hidden = table.all ? 0 : Math.max(0, shown - FIRST);
  more.hidden = !hidden;
  more.textContent = `show ${hidden.toLocaleString("en")} more`;
  table.section.querySelector(".count").textContent =
    shown === table.rows.length ? "" : `${shown.toLocaleString("en")} of ${table.rows.length.toLocaleString("en")}`;
}

// A pattern: a part of a name, or with * of the whole name
function matcher(pattern) {
  if (!pattern.includes("*")) return (name) => name.includes(pattern);
  const parts = pattern.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&"));
  const whole = new RegExp(`^${parts.join(".*")}$`, "s");
  return (name) => whole.test(name);
}

function makeFilter(table) {
  const filter = table.section.querySelector(".filter");
  const flawed = table.section.querySelector(".flawed");
  const apply = () => {
    const patterns = filter.value.split(",").map((each) => each.trim()).filter(Boolean).map(matcher);
    table.rows.forEach((row, i) => {
      const found = !patterns.length || patterns.some((matches) => matches(table.names[i]));
      row.classList.toggle("filtered", !found || Boolean(flawed?.checked && !row.classList.contains("flaw")));
      row.classList.remove("later");
    });
    showFirst(table);
  };
  filter.addEventListener("input", apply);
  flawed?.addEventListener("change", apply);
  table.section.querySelector(".more").addEventListener("click", () => {
    table.all = true;
    showFirst(table);
  });
  showFirst(table);
}

function makeCopy(table) {
  const button = table.section.querySelector(".copy");
  const said = button.textContent;
  const clean = (value) => (value === null ? "" : String(value).replace(/[\t\r\n]+/g, " "));
  button.addEventListener("click", async () => {
    const order = new Map(table.rows.map((row, i) => [row, i]));
    const lines = [table.columns.map((column) => withUnit(column.title, column.unit))];
    for (const row of table.table.tBodies[0].rows) {
      if (row.classList.contains("filtered")) continue;
      lines.push(table.columns.map((_, column) => clean(table.value(order.get(row), column))));
    }
    const copied = await copyText(lines.map((line) => line.join("\t")).join("\n") + "\n");
    button.textContent = copied ? `copied ${(lines.length - 1).toLocaleString("en")} rows` : "the browser refuses to copy";
    setTimeout(() => (button.textContent = said), 2500);
  });
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = element("textarea", { class: "away", "aria-hidden": "true" }); // in a frame that may not
    area.value = text;
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

// Colours that readers with any colour vision tell apart: viridis, purple to orange around 0, Okabe's and Ito's
function colourOf(column, values, log) {
  const label = withUnit(column.title, column.unit);
  if (!column.isNumber) {
    const domain = [...new Set(values)];
    const range = domain.map((_, i) => CATEGORIES[Math.min(i, CATEGORIES.length - 1)]);
    return { type: "ordinal", domain, range, label };
  }
  const known = values.filter((value) => value !== null);
  if (column.ends) return { type: "diverging", scheme: "PuOr", domain: column.ends, pivot: 0, label };
  const [low, high] = [d3.min(known) ?? 0, d3.max(known) ?? 1];
  if (log) return { type: "log", scheme: "viridis", domain: [low, high], label, tickFormat: "~g" };
  return { type: "linear", scheme: "viridis", domain: low < high ? [low, high] : [low - 1, high + 1], label };
}

// Whether equal factors tell more than equal steps
function isWide(column, values) {
  const known = values.filter((value) => value !== null);
  return column.isNumber && !column.ends && d3.min(known) > 0 && d3.max(known) >= 10 * d3.min(known);
}

class Drawing {
  constructor(table, drawn) {
    this.table = table;
    this.drawn = drawn;
    this.part = 0;
    this.picked = null;
    this.at = table.section.querySelector(".grid");
    this.reading = table.section.querySelector(".reading");
    const choices = this.choices();
    this.column = drawn.first === null ? choices.find((each) => table.columns[each].isNumber) ?? choices[0] : drawn.first + 1;
  }

  // the columns that tell rows apart by colours: numbers, and a few words
  choices() {
    return d3.range(1, this.table.columns.length).filter((column) => {
      if (this.table.columns[column].isNumber) return true;
      return new Set(this.table.rows.map((_, row) => this.table.text(row, column))).size <= CATEGORIES.length;
    });
  }

  start() {
    const section = this.table.section;
    const choices = this.choices();
    if (this.column === undefined || this.table.rows.length < 2) return;
    const colour = section.querySelector(".colour");
    for (const option of [...colour.options]) if (!choices.includes(Number(option.value) + 1)) option.remove();
    colour.value = String(this.column - 1);
    colour.addEventListener("change", () => {
      this.column = Number(colour.value) + 1;
      this.draw();
    });
    section.querySelector(".log").addEventListener("change", () => this.draw());
    const part = section.querySelector(".part");
    if (this.drawn.grids.length === 1) section.querySelector(".parts").remove();
    this.drawn.grids.forEach((grid, i) => part.append(element("option", { value: i }, grid.label || "layers")));
    part.addEventListener("change", () => {
      this.part = Number(part.value);
      this.draw();
    });
    section.querySelector(".drawing").hidden = false;
    this.draw();
    let width = section.clientWidth;
    addEventListener("resize", () => {
      if (section.clientWidth === width) return;
      width = section.clientWidth;
      this.draw();
    });
    this.listen();
  }

  draw() {
    const { table, column } = this;
    if (!table.section.clientWidth) return; // in a frame that is not shown yet
    const grid = this.drawn.grids[this.part];
    this.grid = grid;
    this.cellsOf = d3.rollup(grid.cells, (cells) => cells.length, ([row]) => row);
    const about = table.columns[column];
    const values = table.rows.map((_, row) => table.value(row, column));
    const logs = table.section.querySelector(".logs");
    logs.hidden = !isWide(about, values);
    const colour = colourOf(about, values, !logs.hidden && logs.firstElementChild.checked);
    const cells = grid.cells.map(([row, x, y]) => ({ row, x, y, value: values[row] }));
    const room = this.table.section.clientWidth;
    const labels = grid.rows.map((name) => shorten(name, room < 500 ? 20 : LONGEST));
    const left = 14 + LETTER * (d3.max(labels, (label) => label.length) ?? 0);
    const step = Math.max(7, Math.min(34, (room - left - 20) / grid.columns.length));
    const height = grid.rows.length <= 40 ? 20 : 8;
    const [every, down] = [Math.ceil(28 / step), Math.ceil(12 / height)];
    const plot = Plot.plot({
      width: Math.ceil(left + step * grid.columns.length + 20),
      height: height * grid.rows.length + 44,
      marginLeft: left,
      marginRight: 20,
      marginTop: 6,
      marginBottom: 38,
      padding: step < 10 || height < 10 ? 0.06 : 0.1,
      x: {
        type: "band",
        domain: d3.range(grid.columns.length),
        label: grid.x || null,
        labelAnchor: "center",
        labelArrow: "none",
        tickSize: 0,
        ticks: d3.range(0, grid.columns.length, grid.x === "block" ? Math.ceil(70 / step) : every),
        tickFormat: (i) => grid.columns[i],
      },
      y: {
        type: "band",
        domain: d3.range(grid.rows.length),
        label: null,
        tickSize: 0,
        ticks: d3.range(0, grid.rows.length, down),
        tickFormat: (i) => labels[i],
      },
      color: { ...colour, unknown: "var(--none)" },
      style: { fontSize: "12px" },
      marks: [
        Plot.cell(cells, { x: "x", y: "y", fill: "value", ariaLabel: (cell) => this.sentence(cell.row, grid.columns[cell.x]) }),
        Plot.dot(cells, {
          filter: (cell) => step >= 10 && table.rows[cell.row].classList.contains("flaw"),
          ...{ x: "x", y: "y", r: 3.5, fill: "#fff", stroke: "#000", ariaHidden: "true", pointerEvents: "none" },
        }),
      ],
    });
    plot.setAttribute("role", "group");
    plot.setAttribute("aria-label", `${withUnit(about.title, about.unit)} by ${grid.x || "name"} and ${grid.y}`);
    this.rects = [...plot.querySelectorAll("g[aria-label=cell] rect")];
    this.places = new Map();
    this.rects.forEach((rect, i) => {
      const { row, x, y } = cells[i];
      Object.assign(rect.dataset, { row, x, y });
      rect.setAttribute("role", "button");
      rect.setAttribute("tabindex", i === 0 ? 0 : -1);
      rect.classList.toggle("picked", row === this.picked);
      this.places.set(`${x} ${y}`, rect);
    });
    this.at.style.setProperty("--height", `${height * grid.rows.length + 44}px`);
    this.at.replaceChildren(plot);
    const legend = plot.legend("color", { width: Math.min(320, room - 20) });
    this.table.section.querySelector(".legend").replaceChildren(...(legend ? [legend] : []));
    this.table.section.querySelector(".meaning").textContent = `${about.title}: ${about.meaning}`;
  }

  sentence(row, column) {
    const { table } = this;
    const reason = table.rows[row].querySelector(".reason");
    const name = this.cellsOf.get(row) > 1 ? `${table.names[row]}, ${this.grid.x} ${column}` : table.names[row];
    return `${name}: ${table.columns[this.column].title} ${table.text(row, this.column)}${reason ? `, ${reason.textContent}` : ""}`;
  }

  listen() {
    const rectOf = (event) => event.target.closest("rect[data-row]");
    const tell = (event) => {
      const rect = rectOf(event);
      if (!rect) return;
      const [name, ...rest] = rect.getAttribute("aria-label").split(/: (?=[^:]*$)/);
      this.reading.replaceChildren(element("b", {}, name), rest.join(": "));
      this.reading.classList.add("told");
      const cell = rect.getBoundingClientRect();
      const own = this.reading.getBoundingClientRect();
      const below = cell.bottom + 6 + own.height < innerHeight;
      this.reading.style.left = `${Math.max(8, Math.min(cell.left, innerWidth - own.width - 8))}px`;
      this.reading.style.top = `${below ? cell.bottom + 6 : Math.max(4, cell.top - own.height - 6)}px`;
    };
    const hush = () => this.reading.classList.remove("told");
    this.at.addEventListener("pointerover", tell);
    this.at.addEventListener("pointerleave", hush);
    this.at.addEventListener("focusin", tell);
    this.at.addEventListener("focusout", hush);
    addEventListener("scroll", hush, { passive: true, capture: true });
    this.at.addEventListener("click", (event) => rectOf(event) && this.pick(Number(rectOf(event).dataset.row)));
    this.at.addEventListener("keydown", (event) => {
      const rect = rectOf(event);
      if (!rect) return;
      if (event.key === "Enter" || event.key === " ") this.pick(Number(rect.dataset.row));
      else if (event.key === "Escape") hush();
      else if (!this.move(rect, event.key)) return;
      event.preventDefault();
    });
  }

  // Move the focus to the next cell on the way; rows and columns may have gaps
  move(rect, key) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    if (!way) return false;
    let [x, y] = [Number(rect.dataset.x) + way[0], Number(rect.dataset.y) + way[1]];
    while (x >= 0 && y >= 0 && x < this.grid.columns.length && y < this.grid.rows.length) {
      const next = this.places.get(`${x} ${y}`);
      if (next) {
        rect.setAttribute("tabindex", -1);
        next.setAttribute("tabindex", 0);
        next.focus();
        break;
      }
      [x, y] = [x + way[0], y + way[1]];
    }
    return true;
  }

  pick(row) {
    const { table } = this;
    this.picked = row;
    for (const rect of this.rects) rect.classList.toggle("picked", Number(rect.dataset.row) === row);
    for (const each of table.rows) each.classList.toggle("picked", Number(each.dataset.row) === row);
    const list = element("dl");
    table.columns.forEach((column, i) => {
      if (i) list.append(element("div", {}, element("dt", {}, column.title), element("dd", {}, table.text(row, i))));
    });
    const reason = table.rows[row].querySelector(".reason");
    const name = element("p", {}, element("b", {}, element("bdi", {}, table.names[row])));
    if (reason) name.append(" ", reason.cloneNode(true));
    table.section.querySelector(".chosen").replaceChildren(name, list);
    const figures = this.drawn.curves.map((curve) => drawCurve(curve, row, table)).filter(Boolean);
    table.section.querySelector(".curves").replaceChildren(...figures);
  }
}

function drawCurve(curve, row, table) {
  const lines = curve.rows[row];
  if (!lines) return null;
  const points = Object.entries(lines).flatMap(([line, each]) => each.map(([x, y]) => ({ line, x, y })));
  if (!points.length) return null;
  const names = Object.keys(lines);
  const axis = ({ title, unit, log }) => ({ label: withUnit(title, unit), type: log ? "log" : "linear", labelArrow: "none" });
  const channels = { x: "x", y: "y", stroke: "line" };
  const plot = Plot.plot({
    width: Math.min(420, table.section.clientWidth),
    height: 250,
    marginLeft: 56,
    marginBottom: 38,
    x: { ...axis(curve.x), ...(curve.x.log ? { tickFormat: "~s", ticks: 5 } : {}) },
    y: { ...axis(curve.y), grid: true, nice: true, ...(curve.y.log ? { ticks: 5, tickFormat: ".0e" } : {}) },
    color: { domain: names, range: CATEGORIES },
    marks: [
      Plot.line(points, channels),
      Plot.dot(points, { ...channels, fill: "line", r: 2 }),
      Plot.tip(points, Plot.pointer({ x: "x", y: "y" })),
    ],
  });
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `${curve.title} of ${table.names[row]}: ${points.length} points`);
  const figure = element("figure", {}, element("h3", {}, curve.title));
  if (names.length > 1) figure.append(Plot.legend({ color: { domain: names, range: CATEGORIES } }));
  figure.append(plot);
  return figure;
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

for (const section of document.querySelectorAll(".heatmap")) paintHeatmap(section);
for (const section of document.querySelectorAll(".sheet")) {
  const table = new Table(section);
  makeSortable(table);
  makeFilter(table);
  makeCopy(table);
  section.querySelector(".table-tools").hidden = false;
  new Drawing(table, JSON.parse(section.querySelector(".drawn").textContent)).start();
}
