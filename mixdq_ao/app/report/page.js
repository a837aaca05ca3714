"use strict";
// Sorting and filtering of the layer table. Everything on the page is readable without it.
(() => {
  const table = document.getElementById("layer-table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];

  const visible = (cell) =>
    [...cell.querySelectorAll(".plan")].find((e) => getComputedStyle(e).display !== "none") || cell;
  const key = (row, column) => {
    const element = visible(row.cells[column]);
    const value = element.dataset.sort ?? element.textContent;
    return value === "–" ? -Infinity : isNaN(value) ? value : Number(value);
  };
  const compare = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "string" ? 1 : -1);

  const sort = (header) => {
    const direction = header.ariaSort === "ascending" ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.ariaSort = direction > 0 ? "ascending" : "descending";
    const column = header.cellIndex;
    const keyed = rows.map((row) => [key(row, column), row]);
    keyed.sort((a, b) => direction * compare(a[0], b[0]));
    body.append(...keyed.map((pair) => pair[1]));
  };
  for (const header of table.tHead.querySelectorAll("[data-sortable]")) {
    const button = document.createElement("button");
    button.textContent = header.textContent;
    button.title = "sort";
    button.onclick = () => sort(header);
    header.replaceChildren(button);
  }

  const find = document.getElementById("find");
  const group = document.getElementById("group");
  const shown = document.getElementById("shown");
  const filter = () => {
    const text = find.value.trim().toLowerCase();
    let count = 0;
    for (const row of rows) {
      const fits = row.cells[0].textContent.toLowerCase().includes(text) &&
        (!group.value || row.cells[1].textContent === group.value);
      row.hidden = !fits;
      count += fits;
    }
    shown.textContent = `${count} of ${rows.length} layers`;
  };
  find.oninput = group.onchange = filter;
  document.querySelector(".controls").hidden = false;
  filter();
})();
