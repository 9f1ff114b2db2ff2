"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const make = (tag, text = "", attributes = {}) => {
  const part = Object.assign(document.createElement(tag), { textContent: text });
  Object.entries(attributes).forEach(([name, value]) => part.setAttribute(name, value));
  return part;
};
const option = (value, text) => make("option", text, { value });
const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");
const state = { metric: Object.keys(data.metrics)[0], level: "slice", threshold: 50, hidden: new Set(), patient: 0 };
const tint = Object.fromEntries(data.entries.map(({ name, colour }) => [name, colour]));
const shown = (row) => row.level === state.level && !state.hidden.has(row.entry);
const views = {};

// The confusion matrix of an entry at the threshold, and what follows from it; the rare class is the first.
function judged(each) {
  const size = each.classes.length, cells = each.matrices[state.threshold];
  const sum = (keep) => cells.reduce((total, count, place) => total + (keep(Math.floor(place / size), place % size) ? count : 0), 0);
  const [hit, missed] = [sum((t, p) => t === 0 && p === 0), sum((t, p) => t === 0 && p > 0)];
  const [alarm, clear] = [sum((t, p) => t > 0 && p === 0), sum((t, p) => t > 0 && p > 0)];
  return { hit, missed, alarm, clear, size, cells };
}

function card(each) {
  const { hit, missed, alarm, clear, size, cells } = judged(each);
  const box = make("section", "", { class: "card", "aria-label": `${each.entry} at this threshold` });
  const title = make("h3", each.entry);
  title.prepend(make("span", "", { class: "swatch", style: `background:${tint[each.entry]}` }), " ");
  const table = make("table");
  table.append(make("caption", `Confusion matrix of ${each.entry}`, { class: "unseen" }));
  const head = table.createTHead().insertRow();
  head.append(make("td"), ...each.classes.map((name) => make("th", name, { scope: "col" })));
  const body = table.createTBody();
  each.classes.forEach((name, place) => {
    const row = body.insertRow(), own = cells.slice(place * size, (place + 1) * size), all = own.reduce((a, b) => a + b, 0);
    row.append(make("th", name, { scope: "row" }));
    own.forEach((count) => row.append(make("td", count, { class: "number", style: `--share:${all ? Math.round((100 * count) / all) : 0}%`, title: `${percent(count, all)} of ${name}` })));
  });
  const list = make("dl");
  [["Sensitivity", hit, hit + missed], ["Specificity", clear, clear + alarm], ["Positive predictive value", hit, hit + alarm], ["Negative predictive value", clear, clear + missed]]
    .forEach(([name, part, whole]) => { const line = make("div"); line.append(make("dt", name), make("dd", percent(part, whole))); list.append(line); });
  box.append(title, table, list);
  return box;
}

function showThreshold() {
  const value = (state.threshold / 100).toFixed(2);
  at("threshold-value").textContent = value;
  at("threshold").setAttribute("aria-valuetext", `probability ${value}`);
  const kept = data.counts.filter(shown);
  at("cards").replaceChildren(...kept.map(card));
  const points = kept.map((each) => {
    const { hit, missed, alarm, clear } = judged(each);
    return { entry: each.entry, recall: hit / Math.max(hit + missed, 1), fpr: alarm / Math.max(alarm + clear, 1), precision: hit + alarm ? hit / (hit + alarm) : null };
  });
  ["roc", "precision_recall"].forEach((name) => views[name]?.data("points", points.filter((row) => name === "roc" || row.precision !== null)).runAsync());
  const one = kept.find((each) => each.entry === data.first) ?? kept[0];
  if (!one) { at("threshold-reading").textContent = "No entry is shown."; return; }
  const { hit, missed, alarm } = judged(one), what = state.level === "slice" ? "slices" : "patients";
  at("threshold-reading").textContent = `From ${value}, ${one.entry} finds ${hit} of ${hit + missed} ${data.rare} ${what} and raises ${alarm} false alarms.`;
}

function showScores() {
  const rows = data.runs.filter((row) => shown(row) && row.metric === state.metric);
  views.runs?.data("runs", rows).runAsync();
  const means = [...new Set(rows.map((row) => row.entry))].map((entry) => {
    const own = rows.filter((row) => row.entry === entry).map((row) => row.value);
    return [entry, own.reduce((a, b) => a + b, 0) / own.length];
  }).sort((a, b) => b[1] - a[1]);
  at("scores-title").textContent = `${data.metrics[state.metric]} by ${state.level}`;
  at("scores-reading").textContent = means.length ? `Highest mean: ${means[0][0]}, ${means[0][1].toFixed(2)}.` : "Nothing is defined here.";
}

function scored(rows, caption) {
  const table = make("table", "", { class: "bars" });
  table.append(make("caption", caption));
  rows.filter(([entry, score]) => score !== null && !state.hidden.has(entry)).forEach(([entry, score]) => {
    const row = table.insertRow(), bar = make("td", "", { class: "bar-cell" });
    bar.append(make("span", "", { style: `width:${100 * score}%;background:${tint[entry]}` }));
    row.append(make("th", entry, { scope: "row" }), bar, make("td", score.toFixed(2), { class: "number" }));
  });
  return table;
}

function showPatient() {
  const one = data.patients[state.patient], names = data.entries.map((each) => each.name);
  at("patient").value = state.patient;
  at("patient-scores").replaceChildren(scored(one.scores.map((score, place) => [names[place], score]), `Patient ${one.patient}`));
  const table = make("table"), kept = one.entries.map((entry, place) => [entry, place]).filter(([entry]) => !state.hidden.has(entry));
  table.append(make("caption", "Hardest slices"));
  table.createTHead().insertRow().append(make("th", "Slice", { scope: "col" }), ...kept.map(([entry]) => make("th", entry, { scope: "col" })));
  const body = table.createTBody();
  one.slices.slice(0, 6).forEach((slice) => {
    const row = body.insertRow();
    row.append(make("th", slice.sample, { scope: "row" }), ...kept.map(([, place]) => make("td", slice.scores[place] === null ? "–" : slice.scores[place].toFixed(2), { class: "number" })));
  });
  at("patient-slices").replaceChildren(table);
}

function showAll() {
  showScores();
  const curves = data.curves.filter(shown);
  views.roc?.data("curves", curves).runAsync();
  views.precision_recall?.data("curves", curves.filter((row) => row.precision !== null)).runAsync();
  showThreshold();
  if (data.patients.length) showPatient();
}

async function start() {
  at("metric").append(...Object.entries(data.metrics).filter(([key]) => data.runs.some((row) => row.metric === key)).map(([key, name]) => option(key, name)));
  at("level").append(...["slice", "patient"].filter((level) => data.runs.some((row) => row.level === level)).map((level) => option(level, level)));
  for (const [id, name] of [["metric", "metric"], ["level", "level"]]) at(id).addEventListener("change", (event) => { state[name] = event.target.value; showAll(); });
  at("threshold").addEventListener("input", (event) => { state.threshold = Number(event.target.value); showThreshold(); });
  if (data.patients.length) {
    at("patient").append(...data.patients.map((each, place) => option(place, each.patient)));
    at("patient").addEventListener("change", (event) => { state.patient = Number(event.target.value); showPatient(); });
    const move = (by) => () => { state.patient = (state.patient + by + data.patients.length) % data.patients.length; showPatient(); };
    at("patient-before").addEventListener("click", move(-1));
    at("patient-after").addEventListener("click", move(1));
  }
  showAll();
  const tell = (box, values) => values
    ? box.setAttribute("title", Object.entries(values).map(([key, text]) => `${key}: ${text}`).join("\n"))
    : box.removeAttribute("title");
  for (const [name, spec] of Object.entries(data.specs)) {
    const view = new vega.View(vega.parse(vegaLite.compile(spec, { logger: vega.logger(vega.Error) }).spec), { renderer: "svg", container: at(`plot-${name}`), hover: true });
    view.tooltip((handler, event, item, values) => tell(at(`plot-${name}`), values));
    views[name] = view;
    await view.runAsync();
  }
  showAll();
  await Promise.all(Object.values(views).map((view) => view.runAsync()));
  document.documentElement.dataset.drawn = "yes";
}

const number = (cell) => (cell.dataset.value === undefined ? null : parseFloat(cell.dataset.value));
function compare(one, other) {
  const [a, b] = [number(one), number(other)];
  if (a === null || b === null) return one.textContent.localeCompare(other.textContent);
  return Number.isNaN(a) ? (Number.isNaN(b) ? 0 : 1) : Number.isNaN(b) ? -1 : a - b;
}
document.querySelectorAll("table.sortable").forEach((table) => {
  table.querySelectorAll("th").forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column]) * (up ? 1 : -1)));
  }));
});
document.querySelectorAll("input[data-entry]").forEach((box) => box.addEventListener("change", () => {
  // Marks in figures are SVG, which has no property of that name: the attribute works for both.
  document.querySelectorAll(`[data-shown="${box.dataset.entry}"]`).forEach((part) => part.toggleAttribute("hidden", !box.checked));
  const { name } = data.entries[box.dataset.entry];
  box.checked ? state.hidden.delete(name) : state.hidden.add(name);
  if (data.runs.length) showAll();
}));
// What does not scroll need not be stopped at by the keyboard, and what is stopped at is not hidden by the bar of sections.
const reachable = new ResizeObserver((seen) => seen.forEach(({ target }) => { target.tabIndex = target.scrollWidth > target.clientWidth ? 0 : -1; }));
document.querySelectorAll(".scroll").forEach((part) => reachable.observe(part));
new ResizeObserver(([bar]) => { document.documentElement.style.scrollPaddingTop = `${bar.target.offsetHeight + 8}px`; }).observe(document.querySelector(".bar"));
if (at("plot-runs")) start();
