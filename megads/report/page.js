// The document: built once from the page's data, then charts are drawn one at a time, those in sight
// first, so that a page of many charts answers at once.

const data = JSON.parse(document.getElementById("data").textContent);
const KEY = `megads-report:${location.pathname}`;
const view = {x: "tokens", values: true, range: null, live: true, scroll: 0, charts: {}, ...remembered(sessionStorage, KEY)};
view.whole = Object.fromEntries(Object.keys(X_TITLE).map(x => [x, [0, furthest(x) * 1.01 || 1]]));
const charts = [];
const waiting = new Set();
let drawing = false;
const PLOTLY_OPTIONS = {
  displaylogo: false, displayModeBar: "hover", responsive: true, doubleClick: false,
  modeBarButtons: [["toImage"]],
};

function furthest(x) {
  let most = 0;
  for (const axis of Object.values(data.axes)) for (const value of axis[x]) most = Math.max(most, value);
  return most;
}

function remembered(storage, key) {
  try { return JSON.parse(storage.getItem(key)) || {}; } catch { return {}; }
}

function remember(storage, key, value) {
  try { storage.setItem(key, JSON.stringify(value)); } catch { /* a browser that keeps nothing for files */ }
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null && child !== ""));
  return element;
}

function tokens(value) {
  for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
    if (value >= size) return `${Number((value / size).toPrecision(4))}${letter}`;
  }
  return String(value);
}

// --- The bar: sections and what a reader can choose.

function toggle(label, title, isOn, set) {
  const button = make("button", {type: "button", title, "aria-pressed": isOn(), onclick: () => {
    set(!isOn());
    button.setAttribute("aria-pressed", isOn());
  }}, label);
  return button;
}

function xSwitch() {
  const buttons = Object.entries({tokens: "Tokens", steps: "Steps", hours: "Hours"}).map(([x, label]) =>
    make("button", {type: "button", "data-x": x, title: `Over ${X_TITLE[x]}`, "aria-pressed": view.x === x, onclick: () => {
      view.x = x;
      view.range = null;
      for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.x === x);
      redraw();
    }}, label));
  return make("span", {class: "switch", role: "group", "aria-label": "horizontal axis"}, ...buttons);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function themeButton() {
  const isDark = () => document.documentElement.dataset.theme === "dark";
  return toggle("Dark", "Light or dark colours", isDark, dark => {
    setTheme(dark ? "dark" : "light");
    remember(localStorage, "megads-report-theme", {theme: dark ? "dark" : "light"});
    for (const chart of charts) if (chart.legend) fillLegend(chart);
    redraw();
  });
}

function buildBar(sections) {
  const links = sections.map(({id, title}) => make("a", {href: `#${id}`}, title));
  const live = data.reload_seconds === null ? null : toggle(
    "Live", `Load this page again every ${data.reload_seconds} s`, () => view.live, on => { view.live = on; });
  document.getElementById("bar").append(
    make("span", {class: "name", title: data.header.name}, data.header.name),
    make("nav", {"aria-label": "sections"}, ...links),
    make("span", {class: "controls"}, ...[
      xSwitch(),
      toggle("Values", "The values behind smoothed lines", () => view.values, on => { view.values = on; redraw(); }),
      themeButton(),
      live,
    ].filter(Boolean)),
  );
}

// --- Words and tables.

function buildSummary() {
  const h = data.header;
  const values = h.values.map(({label, value, more, other}) => make("div", {},
    make("dt", {}, label), make("dd", {class: "value"}, value), make("dd", {class: "more"}, more),
    other === null ? "" : make("dd", {class: "other"}, `${other} (${h.other})`)));
  const where = [h.directory, ...h.details, `last record ${h.written}`, `page made ${h.made}`].join(" · ");
  const progress = h.progress === null ? "" : make("div", {
    class: "progress", role: "progressbar", "aria-valuenow": Math.round(100 * h.progress), "aria-label": "tokens done",
  }, make("div", {style: `width:${100 * h.progress}%`}));
  return make("section", {class: "card summary"},
    make("div", {class: "title"},
      make("h1", {}, h.name), make("span", {class: `badge ${h.state}`, title: h.state_means}, h.state),
      h.other === null ? "" : make("span", {class: "quiet"}, `compared with ${h.other} (dashed lines)`)),
    make("div", {class: "quiet"}, where), progress, make("dl", {class: "values"}, ...values),
    ...h.notices.map(text => make("div", {class: "notice"}, text)));
}

function table(title, remark, head, rows, classOf = () => null) {
  const cells = (row, tag) => row.map((cell, i) => make(tag, {class: head[i].kind || null}, cell ?? "-"));
  return make("div", {class: "card"}, make("h3", {}, title), remark ? make("p", {}, remark) : "",
    make("div", {class: "table", tabindex: 0}, make("table", {},
      make("thead", {}, make("tr", {}, ...cells(head.map(({name}) => name), "th"))),
      make("tbody", {}, ...rows.map((row, i) => make("tr", {class: classOf(i)}, ...cells(row, "td")))))));
}

const number = name => ({name, kind: "number"});
const plain = name => ({name});
const mono = name => ({name, kind: "mono"});
const leftOut = count => count ? `The last of them; ${count.toLocaleString("en")} earlier ones are in metrics.jsonl.` : "";

function eventTables() {
  const {rows: events, left_out: fewerEvents} = data.events;
  const {rows: evaluations, left_out: fewerEvaluations} = data.evaluations;
  const digits = value => value === null ? null : Number(value.toPrecision(5)).toString();
  return [
    table("Events", leftOut(fewerEvents), [number("Step"), number("Tokens"), plain("Event"), plain("Details")],
      events.map(row => [row.step.toLocaleString("en"), tokens(row.tokens), row.event + (row.superseded ? " (superseded)" : ""), row.text]),
      i => events[i].superseded ? "superseded" : null),
    evaluations.length ? table("Evaluations", leftOut(fewerEvaluations),
      [number("Step"), number("Tokens"), number("Loss"), number("Perplexity"), plain("")],
      evaluations.map(row => [row.step.toLocaleString("en"), tokens(row.tokens), digits(row.loss), digits(row.perplexity), row.best ? "best" : ""]),
      i => evaluations[i].best ? "best" : null) : null,
  ].filter(Boolean);
}

function configurationTables() {
  const {non_defaults, differences, provenance} = data.configuration;
  const h = data.header;
  const none = [["none", ""]];
  return [
    differences === null ? null : table(`Differences from ${h.other}`, "", [mono("Setting"), mono(h.name), mono(h.other)],
      differences.length ? differences : [["none", "", ""]]),
    table("Settings that differ from their defaults", "", [mono("Setting"), mono("Value")], non_defaults.length ? non_defaults : none),
    table("Code and packages", "", [mono("Name"), mono("Version")], provenance.length ? provenance : none),
  ].filter(Boolean);
}

// --- Charts.

// Marks of the legend, as plotly.js draws them; in a box of 18 x 12.
const PATHS = {
  "triangle-up": "M9 2 13 10 5 10Z", x: "M5 2 13 10M13 2 5 10", diamond: "M9 1 14 6 9 11 4 6Z",
  "circle-open": "M5 6a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z", "square-open": "M5 2H13V10H5Z", star: "M9 1 10.5 5 14 5 11 7 12 11 9 8.5 6 11 7 7 4 5 7.5 5Z",
};

function fillLegend(chart) {
  const theme = colors();
  const items = new Map();
  for (const series of chart.series) items.set(seriesName(series, data.header), {...paint(series.color, theme), ...(series.run ? {dash: "dash"} : {})});
  if (chart.level) items.set(chart.level.name, {color: theme.quiet, dash: "dash"});
  if (chart.marks) for (const mark of data.marks) items.set(mark.event, {color: theme.warn, mark: true, ...markTrace(mark, chart, view, theme).marker});
  chart.legend.replaceChildren(...(items.size < 2 ? [] : [...items].map(([name, item]) => legendItem(chart, name, item))));
}

function legendItem(chart, name, {color, dash, mark, symbol}) {
  const svg = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const picture = svg("svg", {width: 18, height: 12, "aria-hidden": "true"});
  const dashes = {solid: "none", dot: "2 2"}[dash] || "5 3";
  picture.append(mark
    ? svg("path", {d: PATHS[symbol] || PATHS.star, stroke: color, "stroke-width": 1.8, fill: symbol.endsWith("open") ? "none" : color})
    : svg("line", {x1: 0, y1: 6, x2: 18, y2: 6, stroke: color, "stroke-width": 3, "stroke-dasharray": dashes}));
  const button = toggle("", "Show or hide", () => !chart.hidden.has(name), on => {
    on ? chart.hidden.delete(name) : chart.hidden.add(name);
    redraw([chart]);
  });
  button.append(picture, name);
  return button;
}

function buildChart(spec) {
  const kept = view.charts[spec.id] || {};
  const chart = {...spec, log: Boolean(kept.log), hidden: new Set(kept.hidden || [])};
  const layers = chart.kind === "lines" ? 0 : (chart.z || chart.frames[0].z).length;
  chart.height = layers ? Math.min(430, Math.max(230, 6 * layers + 90)) : chart.wide ? 380 : 240;
  chart.plot = make("div", {class: "plot", style: `height:${chart.height}px`});
  const parts = [];
  if (chart.kind === "lines") {
    chart.legend = make("div", {class: "legend"});
    fillLegend(chart);
    parts.push(chart.legend);
  }
  if (chart.kind === "load") {
    chart.frame = chart.frames.length - 1;
    parts.push(slider(chart));
  }
  const log = chart.kind !== "lines" || chart.series[0].style === "stacked" ? "" : toggle("log", "Logarithmic vertical axis", () => chart.log, on => { chart.log = on; redraw([chart]); });
  charts.push(chart);
  return make("figure", {class: chart.wide ? "card chart wide" : "card chart", id: spec.id, style: "margin:0"},
    make("div", {class: "head"}, make("h3", {}, chart.title), make("span", {class: "unit"}, chart.unit || ""), log),
    chart.about ? make("div", {class: "about"}, chart.about) : "", ...parts, chart.plot);
}

function slider(chart) {
  const say = () => `step ${chart.frames[chart.frame].step.toLocaleString("en")}, ${tokens(chart.frames[chart.frame].tokens)} tokens`;
  const text = make("span", {class: "quiet"}, say());
  const input = make("input", {type: "range", min: 0, max: chart.frames.length - 1, value: chart.frame, "aria-label": "time", oninput: () => {
    chart.frame = Number(input.value);
    text.textContent = say();
    redraw([chart]);
  }});
  return make("div", {class: "slider"}, input, text);
}

function redraw(some = charts) {
  for (const chart of some) waiting.add(chart);
  delete document.documentElement.dataset.drawn;
  if (!drawing) setTimeout(drawNext);
  drawing = true;
}

function inSight(chart) {
  const box = chart.plot.getBoundingClientRect();
  return box.bottom > -200 && box.top < innerHeight + 200;
}

async function drawNext() {
  const chart = [...waiting].find(inSight) || waiting.values().next().value;
  if (chart) {
    waiting.delete(chart);
    await draw(chart);
  }
  drawing = waiting.size > 0;
  if (drawing) setTimeout(drawNext);
  else document.documentElement.dataset.drawn = charts.length;
}

async function draw(chart) {
  const {traces, layout} = FIGURES[chart.kind](chart, data, view, colors());
  const isNew = !chart.plot.classList.contains("js-plotly-plot");
  await Plotly.react(chart.plot, traces, layout, PLOTLY_OPTIONS);
  if (!isNew || chart.kind === "load") return;
  chart.plot.on("plotly_relayout", change => {
    if ("xaxis.range[0]" in change) zoom([change["xaxis.range[0]"], change["xaxis.range[1]"]]);
  });
  chart.plot.on("plotly_doubleclick", () => zoom(null));
}

// A zoom into one chart is a zoom into all of them.
function zoom(range) {
  view.range = range;
  redraw();
}

// --- All of it.

function section(id, title, ...children) {
  return make("section", {id}, make("h2", {}, title), ...children);
}

function build() {
  const sections = data.groups.map(group => {
    const constants = group.constants.map(({title, value, unit}) => make("span", {}, `${title} `, make("b", {}, value), unit ? ` ${unit}` : ""));
    return section(group.title.toLowerCase(), group.title,
      constants.length ? make("div", {class: "card constants"}, make("span", {class: "quiet"}, "Constant:"), ...constants) : "",
      make("div", {class: "charts"}, ...group.charts.map(buildChart)));
  });
  sections.push(section("events", "Events", make("div", {class: "tables"}, ...eventTables())));
  sections.push(section("configuration", "Configuration", make("div", {class: "tables"}, ...configurationTables())));
  buildBar(sections.map(({id, firstChild}) => ({id, title: firstChild.textContent})));
  document.getElementById("main").append(buildSummary(), ...sections,
    make("footer", {}, "Drag over a chart to zoom all of them, double-click to see all again; click a name to hide its line. Drawn with plotly.js."));
}

// Not before all is drawn: a slow machine would never get there.
function reloadLater() {
  setTimeout(() => {
    if (view.live && !document.hidden && !drawing) location.reload();
    else reloadLater();
  }, 1000 * data.reload_seconds);
}

function keep() {
  view.charts = Object.fromEntries(charts.map(({id, log, hidden}) => [id, {log, hidden: [...hidden]}]));
  remember(sessionStorage, KEY, {...view, scroll: scrollY});
}

setTheme(remembered(localStorage, "megads-report-theme").theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
build();
if (view.scroll) scrollTo(0, view.scroll);
addEventListener("pagehide", keep);
redraw();
if (data.reload_seconds !== null) reloadLater();
