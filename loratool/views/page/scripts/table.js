// Read the numbers of a page from its tables, and sort, filter and copy these.
"use strict";

const FIRST = 300; // rows of a table that are shown at once

const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};

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
      colours: new Map(Object.entries(JSON.parse(cell.dataset.colours ?? "{}"))),
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
    const button = element("button", { type: "button" }, head.textContent.trim()); // once, in a saved page too
    head.replaceChildren(button);
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
