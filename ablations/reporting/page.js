// A click on a heading sorts its table: the first column as text, others by the first number in a cell.
const number = text => parseFloat((text.replace(/\u2212/g, "-").replace(/[,>+]/g, "").match(/-?\d[\d.]*/) || [])[0]);
for (const table of document.querySelectorAll("table")) table.querySelectorAll("th").forEach((head, column) => {
  const sort = () => {
    const body = table.tBodies[0], rows = [...body.rows], up = head.ariaSort !== "ascending";
    const text = row => row.cells[column].textContent;
    const named = column === 0 || rows.every(row => isNaN(number(text(row))));
    const value = row => { const x = number(text(row)); return isNaN(x) ? Infinity : x; };
    rows.sort((a, b) => named ? text(a).localeCompare(text(b), "en", { numeric: true }) : value(a) - value(b) || 0);
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.ariaSort = up ? "ascending" : "descending";
    body.append(...(up ? rows : rows.reverse()));
  };
  head.tabIndex = 0;
  head.title = "sort by this column";
  head.onclick = sort;
  head.onkeydown = event => { if (event.key === "Enter") sort(); };
});
