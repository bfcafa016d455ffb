"use strict";
// The page's behaviour. Text of strangers is set as text, never as HTML.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SPECS = JSON.parse(document.getElementById("specs").textContent);
const MEASURES = Object.fromEntries(DATA.measures.map((each) => [each.key, each]));
const FIRST_MAPS = 4;
const OUTSIDE = "–";
const state = {
  measure: DATA.first, of: 0, group: "", log: false,
  models: new Set(DATA.models.keys()), maps: new Set([...DATA.models.keys()].slice(0, FIRST_MAPS)),
  modules: new Set(DATA.cells.module), sort: ["name", 0], found: "", rows: 100,
};
const $ = (id) => document.getElementById(id);

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function shown(value, measure) {
  if (value === null || value === undefined) return "–";
  if (measure && measure.percent) return `${(value * 100).toPrecision(3)} %`;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return value.toLocaleString("en");
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}

// The same for columns of a table, with trailing zeros.
function aligned(value, measure) {
  const size = Math.abs(value);
  const plain = value === null || value === undefined || measure.percent || Number.isInteger(value);
  return plain || size >= 1e3 || size < 1e-3 ? shown(value, measure) : value.toPrecision(3);
}

function many(value) {
  for (const [unit, factor] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (value >= factor) return `${Number((value / factor).toPrecision(3))} ${unit}`;
  }
  return String(value);
}

// The number of a pair among all pairs; what is the same both ways is there once.
function pairOf(measure, model, other) {
  const count = DATA.models.length;
  if (measure.of === "order") return model * (count - 1) + other - (other > model ? 1 : 0);
  const [one, two] = model < other ? [model, other] : [other, model];
  return one * count - (one * (one + 1)) / 2 + two - one - 1;
}

// What a map or a line is drawn of: a model, or another model beside the chosen one.
function series(of) {
  const measure = MEASURES[state.measure];
  const chosen = [...of].sort((a, b) => a - b);
  if (measure.of === "model") return chosen.map((model) => ({ label: DATA.models[model], column: model, model }));
  return chosen.filter((other) => other !== state.of).map((other) => ({
    label: `${DATA.models[state.of]} ${measure.of === "order" ? "←" : "·"} ${DATA.models[other]}`,
    column: pairOf(measure, state.of, other), model: state.of,
  }));
}

// Whether there is a number of a model or pair anywhere in a table.
const isTold = (table, measure, each) => (table.values[measure.key][each.column] || []).some((value) => value !== null);

const columnOf = (table, row) => {
  const layer = table.layer[row];
  if (layer === null) return OUTSIDE;
  return table.stack[row] ? `${table.stack[row]} ${layer}` : String(layer);
};

// Several groups as one, as the measure says.
function together(table, rows, measure, column) {
  const values = (key) => table.values[key][column];
  const own = values(measure.key);
  let sum = 0, weight = 0, largest = null;
  for (const row of rows) {
    const value = own[row];
    if (value === null) continue;
    largest = largest === null ? value : Math.max(largest, value);
    if (measure.sums === "relative" || measure.sums === "norm") {
      const norm = measure.sums === "norm" ? value : value * table.base_norm[row];
      sum += norm * norm;
      weight += table.base_norm[row] ** 2;
    } else if (measure.sums === "sum") {
      sum += value;
    } else {
      sum += value * table.elements[row];
      weight += table.elements[row];
    }
  }
  if (largest === null) return null;
  if (measure.sums === "largest") return largest;
  if (measure.sums === "sum") return sum;
  if (measure.sums === "norm") return Math.sqrt(sum);
  if (!weight) return null;
  return measure.sums === "relative" ? Math.sqrt(sum / weight) : sum / weight;
}

function domainOf(values, measure) {
  const there = values.filter((value) => value !== null && isFinite(value));
  if (!there.length) return [0, 1];
  const low = Math.min(...there), high = Math.max(...there);
  if (measure.middle !== null) {
    const far = Math.max(Math.abs(high - measure.middle), Math.abs(low - measure.middle)) || 1;
    return [measure.middle - far, measure.middle + far];
  }
  const begin = state.log ? low : Math.min(0, low);
  return [begin, high > begin ? high : begin + 1];
}

function scaleOf(measure, domain) {
  const log = state.log && measure.middle === null && domain[0] > 0;
  return { scheme: measure.scheme, domain, type: log ? "log" : "linear", ...(log ? { nice: false } : {}) };
}

const axisOf = (measure) => (measure.percent ? { format: ".3~p" } : { format: ".3~g" });

// Pictures are drawn in turn; one that was asked for while another is drawn replaces it.
const views = new Map();
let drawing = Promise.resolve();
function draw(target, spec, listen) {
  const options = { renderer: "svg", tooltip: true, logLevel: 1, config: SPECS.config,
    actions: { export: true, source: false, compiled: false, editor: false }, downloadFileName: `modelfuse-${target.id}` };
  drawing = drawing.then(() => {
    if (views.has(target.id)) views.get(target.id).finalize();
    return vegaEmbed(target, spec, options).then((result) => {
      views.set(target.id, result);
      if (listen) listen(result.view);
    });
  }).catch((error) => { document.body.dataset.error = String(error); target.textContent = String(error); });
  return drawing;
}

// Columns of a legend, so that it fits the width of its chart.
const legendColumns = (place, labels) => Math.max(1, Math.floor(
  (place.clientWidth - 60) / (40 + 6.5 * Math.max(...labels.map((label) => label.length), 1))));

const copyOf = (name) => JSON.parse(JSON.stringify(SPECS[name]));

function drawMaps() {
  const measure = MEASURES[state.measure], table = DATA.cells, place = $("maps");
  const wanted = series(state.maps).filter((each) => isTold(table, measure, each));
  const rows = [...table.module.keys()].filter((row) => state.modules.has(table.module[row]));
  const values = wanted.flatMap((each) => rows.map((row) => table.values[measure.key][each.column][row]));
  const domain = domainOf(values, measure);
  const modules = [...new Set(rows.map((row) => table.module[row]))];
  const columns = [...new Set(rows.map((row) => columnOf(table, row)))];
  const order = [OUTSIDE, ...columns.filter((each) => each !== OUTSIDE)].filter((each) => columns.includes(each));
  place.replaceChildren();
  for (const [number, each] of wanted.entries()) {
    const target = element("div", null, { class: "chart", id: `map-${number}` });
    place.append(target);
    const spec = copyOf("map");
    spec.title = each.label;
    spec.width = "container";
    spec.height = { step: 15 };
    spec.encoding.x.sort = order;
    if (number < wanted.length - 1) spec.encoding.x.title = null;
    spec.encoding.y.sort = modules;
    spec.encoding.color.scale = scaleOf(measure, domain);
    spec.encoding.color.title = measure.title;
    spec.encoding.color.legend = number === 0 ? { ...spec.encoding.color.legend, ...axisOf(measure) } : null;
    spec.data = { values: rows.map((row) => {
      const value = table.values[measure.key][each.column][row];
      return { column: columnOf(table, row), module: table.module[row], value, series: each.label,
        shown: shown(value, measure), elements: table.elements[row], more: table.name[row] };
    }) };
    draw(target, spec);
  }
  if (!wanted.length) place.append(element("p", "Choose a model.", { class: "soft" }));
}

function drawLines() {
  const measure = MEASURES[state.measure], all = state.modules.size === new Set(DATA.cells.module).size;
  const table = all ? DATA.layers : DATA.cells;
  const rowsOf = new Map();
  for (const row of table.layer.keys()) {
    if (table.layer[row] === null || (!all && !state.modules.has(table.module[row]))) continue;
    const column = columnOf(table, row);
    rowsOf.set(column, [...(rowsOf.get(column) || []), row]);
  }
  const spec = copyOf("lines");
  spec.width = "container";
  spec.encoding.x.sort = [...rowsOf.keys()];
  spec.encoding.y.title = measure.title;
  spec.encoding.y.axis = axisOf(measure);
  const values = series(state.models).filter((each) => isTold(table, measure, each)).flatMap((each) => [...rowsOf].map(([column, rows]) => {
    const value = rows.length === 1 ? table.values[measure.key][each.column][rows[0]]
      : together(table, rows, measure, each.column);
    return { column, value, series: each.label, shown: shown(value, measure) };
  }));
  const positive = values.every((each) => each.value === null || each.value > 0);
  if (state.log && positive && measure.middle === null) spec.encoding.y.scale.type = "log";
  spec.data = { values };
  spec.encoding.color.legend.columns = legendColumns($("lines"), values.map((each) => each.series));
  draw($("lines"), spec);
  const several = !all && state.modules.size > 1 && measure.sums === "mean";
  $("lines-note").textContent = several ? "Of several modules: the mean, weighted by elements." : "";
}

function drawMatrix() {
  const place = $("matrix-section");
  const usable = DATA.measures.filter((each) => each.of !== "model");
  place.hidden = DATA.models.length < 2 || !usable.length;
  if (place.hidden) return;
  const measure = MEASURES[$("matrix-measure").value];
  const table = DATA.whole, chosen = [...state.models].sort((a, b) => a - b), rows = [];
  for (const model of chosen) {
    for (const other of chosen) {
      if (model === other) continue;
      const value = table.values[measure.key][pairOf(measure, model, other)][0];
      const text = shown(value, measure);
      rows.push({ model: DATA.models[model], other: DATA.models[other], value, shown: text, text, one: model, two: other,
        error: measure.of === "order" ? shown(DATA.errors[pairOf(measure, model, other)]) : "–" });
    }
  }
  const domain = domainOf(rows.map((row) => row.value), measure);
  for (const row of rows) {
    const share = row.value === null ? 0 : (row.value - domain[0]) / (domain[1] - domain[0]);
    row.bright = measure.middle === null ? share > 0.6 : Math.abs(share - 0.5) < 0.3;
    if (row.value === null) row.bright = false;
  }
  const spec = copyOf("matrix"), names = chosen.map((model) => DATA.models[model]);
  const beside = 40 + 7 * Math.min(26, Math.max(...names.map((name) => name.length)));
  const size = Math.max(26, Math.min(64, ($("matrix").clientWidth - beside - 30) / Math.max(1, chosen.length)));
  spec.layer[1].mark.fontSize = size < 40 ? 9 : 11;
  if (size < 40) for (const row of rows) if (row.value !== null) row.text = String(Number(row.value.toPrecision(2)));
  spec.width = { step: size };
  spec.height = { step: Math.max(24, size * 0.6) };
  spec.encoding.x.title = measure.of === "order" ? "disturbed by" : null;
  spec.encoding.x.scale = { domain: names };
  spec.encoding.y.scale = { domain: names };
  spec.layer[0].encoding.color.scale = { ...scaleOf({ ...measure }, domain), type: "linear" };
  spec.data = { values: rows };
  $("matrix-note").textContent = measure.about;
  draw($("matrix"), spec, (view) => view.addEventListener("click", (_, item) => {
    if (!item || !item.datum || item.datum.one === undefined) return;
    state.of = item.datum.one;
    state.measure = measure.key;
    state.maps = new Set([item.datum.two]);
    update();
    $("maps").scrollIntoView({ behavior: "smooth", block: "center" });
  }));
}

function drawKept() {
  const rows = DATA.kept.flatMap((points, model) => (state.models.has(model) ? points : [])
    .filter(([, value]) => value !== null)
    .map(([density, value]) => ({ density, value, series: DATA.models[model] })));
  $("kept-section").hidden = !rows.length;
  if (!rows.length) return;
  const spec = copyOf("kept");
  spec.width = "container";
  spec.layer[1].data = { values: rows };
  spec.layer[1].encoding.color.legend.columns = legendColumns($("kept"), rows.map((each) => each.series));
  draw($("kept"), spec);
}

function drawPlaces() {
  $("places-section").hidden = DATA.places === null;
  if (DATA.places === null) return;
  draw($("places"), DATA.places);
  const labels = DATA.places.layer[1].data.values.length, points = DATA.places.data.values.length;
  $("places-note").textContent = `Distances between models as far as a plane shows them: ${(DATA.places_share * 100).toPrecision(3)} % of their squares.`
    + (labels < points ? " Points without a label have their name in a tooltip." : "");
}

// A table whose columns can be sorted; cells are [value, text, class].
function table(place, titles, rows, sorted, onSort) {
  const head = element("tr"), body = element("tbody");
  for (const [number, title] of titles.entries()) {
    const cell = element("th", title.text, { class: title.left ? "text" : "", title: title.about || "", scope: "col", tabindex: "0" });
    if (sorted[0] === number && sorted[1]) cell.setAttribute("aria-sort", sorted[1] > 0 ? "ascending" : "descending");
    const act = () => onSort(number, sorted[0] === number ? -sorted[1] || -1 : title.left ? 1 : -1);
    cell.addEventListener("click", act);
    cell.addEventListener("keydown", (event) => { if (event.key === "Enter") act(); });
    head.append(cell);
  }
  for (const row of rows) {
    const line = element("tr");
    for (const [, text, kind] of row) line.append(element("td", text, { class: kind || "" }));
    body.append(line);
  }
  const made = element("table"), top = element("thead");
  top.append(head);
  made.append(top, body);
  place.replaceChildren(made);
}

function bySort(rows, [column, direction]) {
  if (!direction) return rows;
  const rank = (value) => (value === null || value === undefined ? -Infinity : value);
  return [...rows].sort((one, two) => {
    const a = rank(one[column][0]), b = rank(two[column][0]);
    return direction * (typeof a === "string" || typeof b === "string" ? String(a).localeCompare(String(b), "en", { numeric: true }) : a - b);
  });
}

let modelSort = [0, 0];
function drawModels() {
  const measures = DATA.measures.filter((each) => each.of === "model");
  const titles = [{ text: "model", left: true }, ...measures.map((each) => ({ text: each.short, about: `${each.title}. ${each.about}` }))];
  const rows = DATA.models.map((label, model) => [[label, label, "text name"], ...measures.map((measure) => {
    const value = DATA.whole.values[measure.key][model][0];
    return [value, aligned(value, measure), measure.key === "nonfinite" && value ? "bad" : ""];
  })]);
  table($("models"), titles, bySort(rows, modelSort), modelSort, (...sort) => { modelSort = sort; drawModels(); });
}

let tensorSort = [0, 0];
function drawTensors() {
  const measure = MEASURES[state.measure], data = DATA.tensors, wanted = series(state.models).filter((each) => isTold(DATA.whole, measure, each));
  const titles = [{ text: "tensor", left: true }, { text: "shape" }, { text: "dtype", left: true },
    ...wanted.map((each) => ({ text: each.label }))];
  const find = state.found.toLowerCase();
  let rows = [...data.name.keys()].filter((row) => data.name[row].toLowerCase().includes(find)).map((row) => [
    [data.name[row], data.name[row], "text name"],
    [data.elements[row], data.shape[row].join("×") || "1"],
    [data.dtype[row], data.dtype[row], "text"],
    ...wanted.map((each) => {
      const values = (data.cell[row] === null ? data : DATA.cells).values[measure.key][each.column];
      const value = values[data.cell[row] ?? data.own[row]];
      return [value, aligned(value, measure)];
    }),
  ]);
  const count = rows.length;
  rows = bySort(rows, tensorSort).slice(0, state.rows);
  table($("tensors"), titles, rows, tensorSort, (...sort) => { tensorSort = sort; drawTensors(); });
  const left = data.all > data.name.length ? ` The ${data.name.length} with the largest changes of ${data.all} are here; the JSON has all.` : "";
  $("tensors-note").textContent = `${measure.title}. ${rows.length} of ${count} are shown.${left}`;
  $("more").hidden = rows.length === count;
}

function update() {
  const measure = MEASURES[state.measure];
  $("measure").value = state.measure;
  $("of").value = String(state.of);
  $("of-label").hidden = measure.of === "model";
  $("about").textContent = measure.about;
  for (const box of document.querySelectorAll("input[data-model]")) box.checked = state.models.has(Number(box.dataset.model));
  for (const box of document.querySelectorAll("input[data-map]")) box.checked = state.maps.has(Number(box.dataset.map));
  drawMaps();
  drawLines();
  drawMatrix();
  drawKept();
  drawTensors();
  drawing = drawing.then(() => { document.body.dataset.drawn = String(Number(document.body.dataset.drawn || 0) + 1); });
}

function boxes(place, labels, chosen, name) {
  const all = element("button", "all"), none = element("button", "none");
  const fill = (values) => { chosen.clear(); values.forEach((value) => chosen.add(value)); restore(); update(); };
  const restore = () => place.querySelectorAll("input").forEach((box) => { box.checked = chosen.has(box.value_); });
  all.addEventListener("click", () => fill(labels.map(([value]) => value)));
  none.addEventListener("click", () => fill([]));
  place.append(all, " ", none);
  for (const [value, text] of labels) {
    const label = element("label"), box = element("input", null, { type: "checkbox", [`data-${name}`]: value });
    box.value_ = value;
    box.checked = chosen.has(value);
    box.addEventListener("change", () => { chosen[box.checked ? "add" : "delete"](value); update(); });
    label.append(box, ` ${text}`);
    place.append(label);
  }
}

function begin() {
  const groups = [["Each model", "model"], ["Two models", "pair"]];
  for (const [title, kind] of groups) {
    const group = element("optgroup", null, { label: title });
    for (const each of DATA.measures) {
      if ((each.of === "model") === (kind === "model")) group.append(element("option", each.title, { value: each.key }));
    }
    if (group.children.length) $("measure").append(group);
  }
  for (const each of DATA.measures) {
    if (each.of !== "model") $("matrix-measure").append(element("option", each.title, { value: each.key }));
  }
  DATA.models.forEach((label, model) => $("of").append(element("option", label, { value: model })));
  const models = DATA.models.map((label, model) => [model, label]);
  boxes($("choose-models"), models, state.models, "model");
  boxes($("choose-maps"), models, state.maps, "map");
  boxes($("choose-modules"), [...new Set(DATA.cells.module)].map((name) => [name, name ?? OUTSIDE]), state.modules, "module");
  $("measure").addEventListener("change", (event) => { state.measure = event.target.value; update(); });
  $("of").addEventListener("change", (event) => { state.of = Number(event.target.value); update(); });
  $("log").addEventListener("change", (event) => { state.log = event.target.checked; update(); });
  $("matrix-measure").addEventListener("change", drawMatrix);
  $("find").addEventListener("input", (event) => { state.found = event.target.value; state.rows = 100; drawTensors(); });
  $("more").addEventListener("click", () => { state.rows += 400; drawTensors(); });
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const theme = (name) => { document.documentElement.dataset.theme = name; };
  theme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
  $("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  drawModels();
  drawPlaces();
  update();
}
begin();
