"use strict";
const number = (text) => { const value = parseFloat(text); return Number.isNaN(value) ? null : value; };
function compare(one, other) {
  const [a, b] = [number(one), number(other)];
  return a !== null && b !== null ? a - b : one.localeCompare(other);
}
document.querySelectorAll("table.sortable").forEach((table) => {
  table.querySelectorAll("th").forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => compare(a.cells[column].textContent, b.cells[column].textContent) * (up ? 1 : -1));
    body.append(...rows);
  }));
});
document.querySelectorAll("input[data-entry]").forEach((box) => box.addEventListener("change", () => {
  // Marks in figures are SVG, which has no property of that name: the attribute works for both.
  document.querySelectorAll(`[data-shown="${box.dataset.entry}"]`).forEach((part) => part.toggleAttribute("hidden", !box.checked));
}));
// What does not scroll need not be stopped at by the keyboard, and what is stopped at is not hidden by the bar of sections.
const reachable = new ResizeObserver((seen) => seen.forEach(({ target }) => { target.tabIndex = target.scrollWidth > target.clientWidth ? 0 : -1; }));
document.querySelectorAll(".scroll").forEach((part) => reachable.observe(part));
new ResizeObserver(([bar]) => { document.documentElement.style.scrollPaddingTop = `${bar.target.offsetHeight + 8}px`; }).observe(document.querySelector("nav"));
window.addEventListener("beforeprint", () => document.querySelectorAll("main details").forEach((part) => { part.open = true; }));
