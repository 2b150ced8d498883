// Bring the parts of a page to life.
"use strict";

for (const section of document.querySelectorAll(".heatmap")) paintHeatmap(section);
for (const section of document.querySelectorAll(".sheet")) {
  const table = new Table(section);
  makeSortable(table);
  makeFilter(table);
  makeCopy(table);
  if (section.querySelector(".drawing")) new Drawing(table, JSON.parse(section.querySelector(".drawn").textContent)).start();
}
