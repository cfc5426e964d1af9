// Tables with figures sort by a click on a heading: once falling, again rising. What opens a part of the sidebar gets a name.
const number = cell => parseFloat(cell.textContent.replaceAll(",", ""));

function sort(table, column, button) {
  const rows = [...table.tBodies[0].rows], numeric = rows.some(r => !isNaN(number(r.cells[column])));
  const falling = button.dataset.order !== "falling";
  const value = row => numeric ? (isNaN(number(row.cells[column])) ? -Infinity : number(row.cells[column])) : row.cells[column].textContent;
  const compare = (a, b) => numeric ? value(b) - value(a) : value(b).localeCompare(value(a));
  rows.sort((a, b) => falling ? compare(a, b) : compare(b, a)).forEach(row => table.tBodies[0].append(row));
  table.querySelectorAll("th button").forEach(b => { b.dataset.order = ""; b.closest("th").removeAttribute("aria-sort"); });
  button.dataset.order = falling ? "falling" : "rising";
  button.closest("th").setAttribute("aria-sort", falling ? "descending" : "ascending");
}

function sortable(table) {
  const rows = [...(table.tBodies[0]?.rows ?? [])], heads = [...(table.tHead?.rows[0]?.cells ?? [])];
  if (rows.length < 3 || table.tHead.rows.length > 1 || !heads.some((_, i) => rows.every(r => r.cells[i] && !isNaN(number(r.cells[i]))))) return;
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.title = "sort by this column";
    button.addEventListener("click", () => sort(table, i, button));
    head.append(button);
  });
}

document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".bd-article table").forEach(sortable));
document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".bd-sidebar summary").forEach(o => o.setAttribute("aria-label", "pages below")));
