// Figures for plotly.js out of the page's data. Which x they are over, and the rest of what a reader
// chooses, is in `view`; nothing here touches the document but to read its colours.

const PALETTE = {
  // Okabe and Ito's colours for all kinds of colour vision, darker or lighter as the ground needs it.
  light: ["#0b69ae", "#c94f0a", "#0a8a64", "#a8488a", "#8a6a00", "#2f9fd8", "#6b4fbf", "#7a3b2e"],
  dark: ["#62b0f0", "#ff9356", "#3fcf9f", "#e796c6", "#e6c229", "#8fd6ff", "#ab97ff", "#d99a84"],
};
const DASHES = ["solid", "dot", "dashdot"];
const SYMBOLS = {resume: "triangle-up", spike: "x", rollback: "diamond", skip: "circle-open", health: "square-open"};
const X_TITLE = {tokens: "training tokens", steps: "steps", hours: "hours of training"};

function colors() {
  const style = getComputedStyle(document.documentElement);
  const of = name => style.getPropertyValue(name).trim();
  return {
    dark: document.documentElement.dataset.theme === "dark",
    page: of("--page"), card: of("--card"), line: of("--line"), grid: of("--grid"), text: of("--text"),
    quiet: of("--quiet"), accent: of("--accent"), bad: of("--bad"), warn: of("--warn"),
  };
}

function paint(index, theme) {
  if (index < 0) return {color: theme.quiet, dash: "dot"};
  const palette = PALETTE[theme.dark ? "dark" : "light"];
  return {color: palette[index % palette.length], dash: DASHES[Math.floor(index / palette.length) % DASHES.length]};
}

function seriesName(series, header) {
  return series.run ? `${series.name} (${header.other})` : series.name;
}

function seriesTrace(series, chart, data, view, theme) {
  const {color, dash} = paint(series.color, theme);
  const name = seriesName(series, data.header);
  const trace = {
    type: "scatter", mode: "lines", name, x: data.axes[series.axis][view.x], y: series.y,
    line: {color, width: 2, dash: series.run ? "4px,3px" : dash},
    connectgaps: series.color >= 0, visible: !chart.hidden.has(name), opacity: series.run ? 0.85 : 1,
    hovertemplate: chart.percent ? "%{y:.2%}" : "%{y:.5~g}",
  };
  if (series.style === "values") {
    Object.assign(trace, {hoverinfo: "skip", hovertemplate: null, opacity: 0.32});
    trace.line.width = 1;
    trace.visible = trace.visible && view.values;
  } else if (series.style === "points") {
    trace.mode = "lines+markers";
    trace.marker = {size: series.y.length > 80 ? 3 : 6, color, line: {width: 0}};
    trace.line.width = 1.5;
  } else if (series.style === "stacked") {
    Object.assign(trace, {stackgroup: "all", fillcolor: color, connectgaps: undefined});
    trace.line = {color: theme.card, width: 0.7};
  } else if (series.color < 0) {
    trace.line.width = 1.2;
  }
  return trace;
}

function markTrace(mark, chart, view, theme) {
  const color = {resume: theme.accent, rollback: theme.bad, spike: theme.bad}[mark.event] || theme.warn;
  const symbol = SYMBOLS[mark.event] || "star";
  return {
    type: "scatter", mode: "markers", name: mark.event, x: mark[view.x], y: mark.y, text: mark.texts.map(wrap),
    marker: {size: 13, symbol, color, line: {color: symbol.endsWith("open") ? color : theme.card, width: 1.5}},
    visible: !chart.hidden.has(mark.event), hovertemplate: "%{text}",
  };
}

// For a hover label: lines of a bearable length, and nothing that plotly would take for markup.
function wrap(text) {
  const plain = text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  return plain.replace(/(.{50,70}?)\s/g, "$1<br>");
}

function levelTrace(chart, traces, theme) {
  let [low, high] = [Infinity, -Infinity];
  for (const trace of traces) for (const x of trace.x) if (x !== null) [low, high] = [Math.min(low, x), Math.max(high, x)];
  return {
    type: "scatter", mode: "lines", name: chart.level.name, x: [low, high], y: [chart.level.value, chart.level.value],
    line: {color: theme.quiet, width: 1.2, dash: "dash"}, hoverinfo: "skip", visible: !chart.hidden.has(chart.level.name),
  };
}

function xAxis(view, theme) {
  return {
    title: {text: X_TITLE[view.x], font: {size: 11.5, color: theme.quiet}, standoff: 6},
    exponentformat: "B", showgrid: false, zeroline: false, linecolor: theme.line, ticks: "outside", ticklen: 4,
    tickcolor: theme.line, tickfont: {color: theme.quiet}, nticks: 8,
    range: [...(view.range || view.whole[view.x])],  // a copy: plotly.js writes into it
    autorange: false, hoverformat: view.x === "hours" ? ".2f" : ",d",
  };
}

function baseLayout(chart, view, theme) {
  return {
    height: chart.height, margin: {l: 50, r: 14, t: 22, b: 38}, showlegend: false, autosize: true,
    paper_bgcolor: theme.card, plot_bgcolor: theme.card, hovermode: "x unified", dragmode: "zoom",
    font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: theme.text},
    hoverlabel: {bgcolor: theme.card, bordercolor: theme.line, font: {color: theme.text, size: 12}, align: "left", namelength: 40},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: theme.quiet, activecolor: theme.accent},
    xaxis: xAxis(view, theme),
    yaxis: {
      exponentformat: "power", gridcolor: theme.grid, zeroline: false, automargin: true, fixedrange: true,
      tickfont: {color: theme.quiet}, tickformat: chart.percent ? "~%" : undefined, nticks: 7,
      type: chart.log ? "log" : "linear", hoverformat: ".5~g",
    },
  };
}

// The y range of what is inside the x range: plotly keeps that of all data.
function fitY(traces, range, log) {
  let [low, high] = [Infinity, -Infinity];
  for (const {x, y, visible, stackgroup} of traces) {
    if (!visible || stackgroup) continue;
    for (let i = 0; i < x.length; i++) {
      if (y[i] === null || x[i] < range[0] || x[i] > range[1] || (log && y[i] <= 0)) continue;
      [low, high] = [Math.min(low, y[i]), Math.max(high, y[i])];
    }
  }
  if (low > high) return undefined;
  if (log) [low, high] = [Math.log10(low), Math.log10(high)];
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
  return [low - margin, high + margin];
}

function linesFigure(chart, data, view, theme) {
  const traces = chart.series.map(series => seriesTrace(series, chart, data, view, theme));
  const layout = baseLayout(chart, view, theme);
  if (chart.series[0].style === "stacked") layout.yaxis.rangemode = "tozero";
  if (chart.series.some(({y}) => y.some(value => value >= 1000))) layout.yaxis.exponentformat = "B";
  if (view.range) layout.yaxis.range = fitY(traces, view.range, chart.log);
  if (chart.level) traces.push(levelTrace(chart, traces, theme));
  if (chart.marks) traces.push(...data.marks.map(mark => markTrace(mark, chart, view, theme)));
  layout.shapes = data.borders.map(border => ({
    type: "line", x0: border[view.x], x1: border[view.x], yref: "paper", y0: 0, y1: 1,
    line: {color: theme.quiet, width: 1, dash: "dot"},
  }));
  if (chart.wide) {
    layout.annotations = data.borders.map(border => ({
      x: border[view.x], y: 1, yref: "paper", xanchor: "left", yanchor: "bottom", text: wrap(border.name),
      showarrow: false, font: {size: 11, color: theme.quiet},
    }));
  }
  return {traces, layout};
}

function colorbar(theme) {
  return {thickness: 10, outlinewidth: 0, tickfont: {color: theme.quiet, size: 11}, nticks: 6, xpad: 8};
}

function heatFigure(chart, data, view, theme) {
  const layout = baseLayout(chart, view, theme);
  Object.assign(layout, {hovermode: "closest"});
  Object.assign(layout.yaxis, {title: {text: "MoE layer", font: {size: 11.5, color: theme.quiet}}, showgrid: false, tickformat: "d", dtick: layerTicks(chart.z.length)});
  const trace = {
    type: "heatmap", x: data.axes[chart.axis][view.x], z: chart.z, zmin: chart.range[0], zmax: chart.range[1],
    colorscale: "Cividis", colorbar: colorbar(theme),
    hovertemplate: `layer %{y}<br>${X_TITLE[view.x]} %{x}<br>%{z:.3~g}<extra></extra>`,
  };
  return {traces: [trace], layout};
}

function loadFigure(chart, data, view, theme) {
  const layout = baseLayout(chart, {...view, range: null}, theme);
  const frame = chart.frames[chart.frame];
  Object.assign(layout, {hovermode: "closest"});
  Object.assign(layout.xaxis, {title: {text: "expert", font: layout.xaxis.title.font, standoff: 6}, exponentformat: "none", autorange: true, tickformat: "d", fixedrange: true});
  Object.assign(layout.yaxis, {title: {text: "MoE layer", font: layout.xaxis.title.font}, showgrid: false, tickformat: "d", dtick: layerTicks(frame.z.length)});
  const even = theme.dark ? "#2a323d" : "#f1f3f5";
  const [few, many] = theme.dark ? ["#e9a03b", "#58b2ff"] : ["#c45a00", "#0b5fa5"];
  const trace = {
    type: "heatmap", z: frame.z, zmin: 0, zmax: 2, colorscale: [[0, few], [0.5, even], [1, many]],
    colorbar: {...colorbar(theme), tickvals: [0, 0.5, 1, 1.5, 2], ticktext: ["0", "0.5", "1", "1.5", "2+"]},
    hovertemplate: "layer %{y}, expert %{x}<br>%{z:.2f} times an even share<extra></extra>",
  };
  return {traces: [trace], layout};
}

function layerTicks(layers) {
  return Math.max(1, Math.ceil(layers / 8));
}

const FIGURES = {lines: linesFigure, heat: heatFigure, load: loadFigure};
