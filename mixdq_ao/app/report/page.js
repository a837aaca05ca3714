"use strict";
// Two pictures with a slider between them. Everything on the page is readable without the script.
(() => {
  const box = document.getElementById("compare");
  const table = document.querySelector("table.pictures");
  if (!box || !table) return;
  const part = (name) => document.getElementById(`compare-${name}`);
  const [stage, at, row, left, right] = ["stage", "at", "row", "left", "right"].map(part);
  const pictures = ["left", "right"].map((side) => {
    const image = document.createElement("img");
    image.className = side;
    image.draggable = false;
    image.onload = () => image.classList.toggle("pixels", image.naturalWidth < 200);
    return image;
  });
  stage.append(...pictures);

  const cell = (side) => table.tBodies[0].rows[Number(row.value)].cells[Number(side.value) + 1];
  const show = () => {
    [left, right].forEach((side, i) => {
      const shown = cell(side).firstElementChild;
      pictures[i].src = shown.src;
      pictures[i].alt = shown.alt;
    });
    const name = (side) => side.selectedOptions[0].textContent;
    const decibel = cell(right).dataset.psnr;
    const first = left.options[0].textContent;
    part("said").textContent = `${name(left)} | ${name(right)}` +
      (decibel ? `: PSNR ${decibel} dB against ${first.toLowerCase()}` : `: the same picture as ${first.toLowerCase()}`);
  };
  const slide = () => stage.style.setProperty("--at", `${at.value}%`);
  const drag = (event) => {
    const area = stage.getBoundingClientRect();
    at.value = String(Math.round((100 * (event.clientX - area.left)) / area.width));
    slide();
  };
  stage.onpointerdown = (event) => {
    stage.setPointerCapture(event.pointerId);
    drag(event);
  };
  stage.onpointermove = (event) => event.buttons && drag(event);
  at.oninput = slide;
  row.onchange = left.onchange = right.onchange = show;
  part("difference").onchange = (event) => stage.classList.toggle("difference", event.target.checked);
  table.onclick = (event) => {
    const chosen = event.target.closest("td");
    if (!chosen) return;
    row.value = String(chosen.parentElement.sectionRowIndex);
    right.value = String(chosen.cellIndex - 1);
    show();
    box.scrollIntoView({ block: "nearest" });
  };
  box.hidden = false;
  show();
  slide();
})();

// Sorting and filtering of the layer table.
(() => {
  const table = document.getElementById("layer-table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];

  const visible = (cell) => {
    const plan = document.querySelector("input[name=plan]:checked");
    return (plan && cell.querySelector(`.p${plan.id.slice("plan-".length)}`)) || cell;
  };
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
