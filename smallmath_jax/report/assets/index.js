"use strict";
// The index of search trees: sort by a column, keep the rows that hold all words.
(() => {
  const body = document.querySelector("tbody"), rows = [...body.rows];
  const words = rows.map((row) => row.textContent.toLowerCase());
  const input = document.getElementById("filter"), left = document.getElementById("left");
  function filter() {
    const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, place) => {
      row.hidden = !wanted.every((word) => words[place].includes(word));
      count += !row.hidden;
    });
    left.textContent = wanted.length ? `${count} of ${rows.length}` : "";
  }
  const heads = [...document.querySelectorAll("thead th")];
  heads.forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const by = (row) => row.cells[column].dataset.by;
      const numbers = rows.every((row) => by(row) === "" || !Number.isNaN(Number(by(row))));
      const order = numbers ? (a, b) => Number(by(a)) - Number(by(b)) : (a, b) => by(a).localeCompare(by(b));
      body.append(...[...rows].sort(down ? (a, b) => order(b, a) : order));
    });
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target === input) return;
    event.preventDefault();
    input.focus();
  });
  input.addEventListener("input", filter);
})();
