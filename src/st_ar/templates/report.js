"use strict";
// A click on a column head sorts the table: ascending, descending, original order. Figures and pictures open in a full-window dialog.
function valueOf(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replace(/,/g, ""));
  return Number.isNaN(number) ? text : number;
}

function compare(a, b) {
  const numbers = (typeof a === "number") - (typeof b === "number"); // text and empty cells sort after numbers
  if (numbers) return -numbers;
  return typeof a === "number" ? a - b : a.localeCompare(b);
}

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], given = [...body.rows];
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    head.title = "sort by this column";
    const sort = () => {
      const next = { ascending: "descending", descending: null }[head.getAttribute("aria-sort")];
      const order = next === undefined ? "ascending" : next;
      for (const other of heads) other.removeAttribute("aria-sort");
      const rows = [...given];
      if (order) {
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        rows.sort((x, y) => sign * compare(valueOf(x, column), valueOf(y, column)));
      }
      body.append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}

const dialog = document.body.appendChild(document.createElement("dialog"));
dialog.addEventListener("click", () => dialog.close());
for (const picture of document.querySelectorAll("figure > svg, .gallery img")) {
  const open = () => { dialog.replaceChildren(picture.cloneNode(true)); dialog.showModal(); };
  picture.setAttribute("tabindex", "0");
  picture.addEventListener("click", open);
  picture.addEventListener("keydown", event => { if (event.key === "Enter") open(); });
}
