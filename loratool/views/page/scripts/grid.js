// Draw a grid of a table's rows, which tells the value of a cell that is pointed at or has the focus, and lets one be chosen.
"use strict";

const LETTER = 8; // pixels of a letter beside a grid, at most
const LONGEST = 34; // letters of a label beside a grid

// cut in the middle: names differ at both ends
const shorten = (text, longest = LONGEST) =>
  text.length <= longest ? text : `${text.slice(0, longest / 2 - 1)}…${text.slice(1 - longest / 2)}`;

// Draw cells in a width of so many pixels, or in more if there are too many columns
function plotGrid(grid, cells, colour, room) {
  const labels = grid.rows.map((name) => shorten(name, room < 500 ? 20 : LONGEST));
  const ofRows = grid.y === "kind" ? null : grid.y; // kinds speak for themselves
  const left = (ofRows ? 34 : 14) + LETTER * (d3.max(labels, (label) => label.length) ?? 0);
  const step = Math.max(7, Math.min(34, (room - left - 20) / grid.columns.length));
  const { height } = grid;
  const place = { x: "x", y: "y" };
  const band = { type: "band", tickSize: 0 };
  const between = grid.x === "block" ? 70 : 28; // pixels between two labels of columns
  const plot = Plot.plot({
    width: Math.ceil(left + step * grid.columns.length + 20),
    height: height * grid.rows.length + 48,
    marginLeft: left, marginRight: 20, marginTop: 6, marginBottom: 42,
    padding: step < 10 || height < 10 ? 0.06 : 0.1,
    style: { fontSize: "12px" },
    x: {
      ...band,
      label: grid.x || null, labelAnchor: "center", labelArrow: "none", labelOffset: 36,
      domain: d3.range(grid.columns.length),
      ticks: d3.range(0, grid.columns.length, Math.ceil(between / step)),
      tickFormat: (i) => grid.columns[i],
    },
    y: {
      ...band,
      label: ofRows, labelAnchor: "center", labelArrow: "none",
      domain: d3.range(grid.rows.length),
      ticks: d3.range(0, grid.rows.length, Math.ceil(12 / height)),
      tickFormat: (i) => labels[i],
    },
    color: { ...colour, unknown: "var(--none)" },
    marks: [
      Plot.cell(cells, { ...place, fill: "value", ariaLabel: (cell) => `${cell.name}: ${cell.told}` }),
      Plot.dot(cells, {
        ...place,
        filter: "flawed",
        r: Math.min(3.5, step / 3, height / 3),
        fill: "#fff", stroke: "#000", ariaHidden: "true", pointerEvents: "none",
      }),
    ],
  });
  plot.setAttribute("role", "group");
  return plot;
}

class Drawing {
  constructor(table, drawn) {
    this.table = table;
    this.drawn = drawn;
    this.part = 0;
    this.picked = null;
    this.teller = null; // the cell that is told
    this.at = table.section.querySelector(".grid");
    this.reading = table.section.querySelector(".reading");
    this.colour = table.section.querySelector(".colour");
    this.log = table.section.querySelector(".log");
  }

  start() {
    const { section } = this.table;
    const part = section.querySelector(".part");
    this.colour.addEventListener("change", () => this.draw());
    this.log.addEventListener("change", () => this.draw());
    part?.addEventListener("change", () => {
      this.part = Number(part.value);
      this.draw();
    });
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
    const { section } = this.table;
    if (!section.clientWidth) return; // in a frame that is not shown yet
    this.column = Number(this.colour.value) + 1;
    this.grid = this.drawn.grids[this.part];
    this.cellsOf = d3.rollup(this.grid.cells, (cells) => cells.length, ([row]) => row);
    const about = this.table.columns[this.column];
    const values = this.table.rows.map((_, row) => this.table.value(row, this.column));
    const wide = isWide(about, values);
    this.log.parentElement.classList.toggle("narrow", !wide);
    const colour = colourOf(about, values, wide && this.log.checked);
    const cells = this.grid.cells.map(([row, x, y]) => ({
      row, x, y, value: values[row],
      flawed: this.table.rows[row].classList.contains("flaw"),
      name: this.nameOf(row, this.grid.columns[x]),
      told: this.told(row),
    }));
    const plot = plotGrid(this.grid, cells, colour, section.clientWidth);
    plot.setAttribute("aria-label", `${colour.label} by ${this.grid.x || "name"} and ${this.grid.y}`);
    this.at.style.setProperty("--rows", `${this.grid.height * this.grid.rows.length}px`);
    this.tell(null);
    this.at.replaceChildren(plot);
    this.mark(plot, cells);
    const legend = plot.legend("color", {
      width: Math.max(100, Math.min(360, section.clientWidth - 20)),
      style: { fontSize: "12px" },
    });
    section.querySelector(".legend").replaceChildren(...(legend ? [legend] : []));
    section.querySelector(".meaning").textContent = `${about.title}: ${about.meaning}`;
  }

  // Let the cells take the focus, the first one by Tab and the others by arrows
  mark(plot, cells) {
    this.cells = cells;
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
  }

  nameOf(row, column) {
    const name = this.table.names[row];
    return this.cellsOf.get(row) > 1 ? `${name}, ${this.grid.x} ${column}` : name;
  }

  told(row) {
    const reason = this.table.rows[row].querySelector(".reason");
    const value = `${this.table.columns[this.column].title} ${this.table.text(row, this.column)}`;
    return reason ? `${value}, ${reason.textContent}` : value;
  }

  listen() {
    const rectOf = (event) => event.target.closest("rect[data-row]");
    const tell = (event) => {
      const rect = rectOf(event);
      if (rect) this.tell(rect);
    };
    const hush = () => this.tell(null);
    this.at.addEventListener("pointerover", tell);
    this.at.addEventListener("pointerleave", hush);
    this.at.addEventListener("focusin", tell);
    this.at.addEventListener("focusout", hush);
    addEventListener("scroll", () => this.place(), { passive: true, capture: true });
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

  // Say what a cell is beside it, or nothing
  tell(rect) {
    this.teller = rect;
    this.reading.classList.toggle("told", rect !== null);
    if (!rect) return;
    const { name, told } = this.cells[this.rects.indexOf(rect)];
    this.reading.replaceChildren(element("b", {}, name), told);
    this.place();
  }

  place() {
    if (!this.teller) return;
    const cell = this.teller.getBoundingClientRect();
    const own = this.reading.getBoundingClientRect();
    const below = cell.bottom + 6 + own.height < innerHeight;
    this.reading.style.left = `${Math.max(8, Math.min(cell.left, innerWidth - own.width - 8))}px`;
    this.reading.style.top = `${below ? cell.bottom + 6 : cell.top - own.height - 6}px`;
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
