"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const css = name => getComputedStyle(root).getPropertyValue(name).trim();
// plotly reads tags, entities and %{...} in what it writes; a name has none of them
const plain = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/%\{/g, "&#37;{");
const faded = (colour, share) => colour + Math.round(255 * share).toString(16).padStart(2, "0");
const pen = document.createElement("canvas").getContext("2d");
// as much of a text as has room, without its middle: names often differ in their ends
function cut(text, room, weight = "") {
  pen.font = weight + " 12px " + getComputedStyle(document.body).fontFamily;
  let shown = text;
  for (let kept = text.length - 1; kept > 1 && pen.measureText(shown).width > room; kept--)
    shown = text.slice(0, Math.ceil(kept / 2)) + "…" + text.slice(text.length - Math.floor(kept / 2));
  return {text: plain(shown), width: pen.measureText(shown).width};
}

// ------------------------------------------------------------------------------- which recipes are shown
const hidden = new Set();
const box = document.getElementById("filter");
const wanted = () => box.value.toLowerCase().split(",").map(part => part.trim()).filter(Boolean);
const matches = name => { const parts = wanted(); return !parts.length || parts.some(part => name.toLowerCase().includes(part)); };
const visible = recipe => matches(recipe.label) && !hidden.has(recipe.label);

function filter() {
  all("[data-recipe]").forEach(row => { row.hidden = !matches(row.dataset.recipe); });
  all("[data-key]").forEach(button => { button.parentElement.hidden = !matches(button.dataset.key); });
  const rows = all("#leaderboard tbody tr");
  document.getElementById("count").textContent =
    wanted().length ? rows.filter(row => !row.hidden).length + " of " + rows.length : "";
  draw();
}

// ---------------------------------------------------------------------------------------------- charts
const charts = [];   // {place, paint}: where it is drawn, and what makes its traces and layout
const chart = (id, paint) => { const place = document.getElementById(id); if (place) charts.push({place, paint}); };
const hover = matchMedia("(hover: hover) and (pointer: fine)").matches;

function drawOne({place, paint}) {
  if (place.closest("details:not([open])")) return;   // drawn when it opens
  const width = place.clientWidth;
  if (!width) return;
  const found = paint(width);
  const axis = {gridcolor: css("--grid"), zeroline: false, linecolor: css("--line"), automargin: true, ticks: "",
    fixedrange: !hover, tickfont: {color: css("--soft")}, title: {standoff: 10, font: {size: 12}}};
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: {l: 6, r: 12, t: 6, b: 44}, showlegend: false,
    font: {color: css("--soft"), size: 12, family: getComputedStyle(document.body).fontFamily},
    hoverlabel: {font: {size: 12}}, dragmode: hover ? "zoom" : false, ...found.layout, width,
  };
  const merge = own => ({...axis, ...own, title: {...axis.title, ...(own || {}).title}});
  layout.xaxis = merge(found.layout.xaxis);
  layout.yaxis = merge(found.layout.yaxis);
  Plotly.react(place, found.traces, layout, {displayModeBar: false, displaylogo: false});
}
const draw = () => charts.forEach(drawOne);

const paper = () => root.classList.contains("paper");
const pitch = () => paper() ? 38 : 46;
// rows with the name above each, so that long names and narrow screens get on
function inRows(recipes, width, words, more) {
  const room = width - 30;
  return {
    height: pitch() * recipes.length + 62 + (more.above || 0), margin: {l: 8, r: 12, t: 6 + (more.above || 0), b: 44},
    annotations: recipes.map((recipe, row) => {
      const [value, verdict] = words(recipe);
      const name = cut(recipe.label, 0.6 * room, "bold"), rest = cut(value + (verdict ? ", " + verdict : ""), room - name.width - 8);
      return {xref: "paper", x: 0, xanchor: "left", yref: "y", y: row, yanchor: "bottom", yshift: 9, showarrow: false,
        text: "<b>" + name.text + "</b>  " + rest.text, font: {size: 12, color: css("--ink")}};
    }).concat(more.annotations || []),
    yaxis: {range: [recipes.length - 0.55, -0.85], showgrid: false, showticklabels: false, fixedrange: true},
  };
}
const errors = (recipe, mean) => recipe.low === null ? undefined
  : {type: "data", symmetric: false, array: [recipe.high - mean], arrayminus: [mean - recipe.low]};
const colour = recipe => css(recipe.colour);

function differences(one, width) {
  const shown = one.entries.filter(entry => entry.difference && visible(entry));
  const traces = shown.map((entry, row) => {
    const d = entry.difference, bars = errors(d, d.mean);
    return {x: [d.mean], y: [row], mode: "markers", marker: {color: colour(entry), symbol: entry.symbol, size: 11},
      error_x: bars && {...bars, thickness: 2.5, width: 6, color: colour(entry)},
      hovertemplate: d.text + " " + d.interval + "<br>" + plain(d.verdict) + "<extra>" + plain(entry.label) + "</extra>"};
  });
  // the number of seeds stands above
  const words = entry => [entry.difference.text, entry.difference.verdict.replace(/ that \d+ seeds? can show/, " shown")];
  const better = one.direction === "max" ? "better →" : "← better";
  const layout = inRows(shown, width, words, {});
  layout.shapes = [
    {type: "rect", xref: "x", yref: "paper", x0: -one.band, x1: one.band, y0: 0, y1: 1, fillcolor: css("--shade"), line: {width: 0}, layer: "below"},
    {type: "line", xref: "x", yref: "paper", x0: 0, x1: 0, y0: 0, y1: 1, line: {color: css("--edge"), width: 1.5}, layer: "below"},
  ];
  // zero belongs to the picture
  const ends = shown.flatMap(entry => [entry.difference.low ?? entry.difference.mean, entry.difference.high ?? entry.difference.mean]).concat([0, -one.band, one.band]);
  const low = Math.min(...ends), high = Math.max(...ends), pad = 0.06 * (high - low) || 1;
  layout.xaxis = {range: [low - pad, high + pad], title: {text: "difference in test " + plain(one.title) + "  (" + better + ")"}, tickformat: ".3~g"};
  return {traces, layout};
}

function seeds(one, width) {
  const shown = one.entries.filter(visible), traces = [];
  shown.forEach((entry, row) => {
    const own = Object.keys(entry.seeds), values = own.map(seed => entry.seeds[seed]);
    // a fixed spread by seed keeps equal values apart, and one seed at one height
    const spread = own.map(seed => row + ((Number(seed) * 0.381966) % 1 - 0.5) * 0.26);
    traces.push({x: values, y: spread, text: own, mode: "markers", marker: {color: colour(entry), symbol: entry.symbol, size: 9, line: {width: 0.6, color: css("--card")}},
      hovertemplate: "seed %{text}: %{x:.5g}<extra>" + plain(entry.label) + "</extra>"});
    traces.push({x: [entry.mean], y: [row], mode: "markers", marker: {symbol: "line-ns", size: 22, line: {width: 3, color: css("--ink")}},
      hovertemplate: "mean %{x:.5g}<extra>" + plain(entry.label) + "</extra>"});
  });
  const outside = one.reference, more = {};
  if (outside) {
    more.above = 22;
    const all = one.entries.flatMap(entry => Object.values(entry.seeds)).concat(outside.mean);
    const right = outside.mean > (Math.min(...all) + Math.max(...all)) / 2;
    more.annotations = [{xref: "x", x: outside.mean, yref: "paper", y: 1, yanchor: "bottom", xanchor: right ? "right" : "left", showarrow: false,
      text: cut(outside.label, 0.7 * width).text + " " + outside.text, font: {size: 12, color: css("--ink")}}];
    traces.push({x: [outside.mean, outside.mean], y: [-0.85, shown.length - 0.55], mode: "lines", line: {color: css("--ink"), width: 1.5, dash: "dash"}, hoverinfo: "skip"});
  }
  const layout = inRows(shown, width, entry => [entry.text], more);
  layout.xaxis = {title: {text: "test " + plain(one.title)}};
  return {traces, layout};
}

const wide = width => paper() ? 270 : Math.round(Math.min(400, Math.max(290, width * 0.72)));

function curves(one, width) {
  const choice = document.getElementById(one.id + "-metric"), traces = [];
  one.entries.filter(visible).forEach(entry => {
    const curve = entry.curves[choice.value];
    if (!curve) return;
    const paint = colour(entry), back = values => values.slice().reverse();
    traces.push({x: curve.epoch.concat(back(curve.epoch)), y: curve.high.concat(back(curve.low)), fill: "toself", fillcolor: faded(paint, .1), line: {width: 0}, hoverinfo: "skip", mode: "lines"});
    traces.push({x: curve.epoch, y: curve.mean, mode: "lines+markers", line: {color: paint, width: 2, dash: entry.dash},
      marker: {symbol: entry.symbol, size: 8, color: paint, maxdisplayed: 6}, hovertemplate: "epoch %{x}: %{y:.5g}<extra>" + plain(entry.label) + "</extra>"});
  });
  return {traces, layout: {height: wide(width), xaxis: {title: {text: "epoch"}}, yaxis: {title: {text: plain(choice.selectedOptions[0].textContent)}}}};
}

function time(one, width) {
  const traces = one.entries.filter(visible).map(entry => ({x: [entry.seconds], y: [entry.mean], mode: "markers",
    marker: {color: colour(entry), symbol: entry.symbol, size: 12},
    error_y: entry.low === null ? undefined : {...errors(entry, entry.mean), thickness: 1.5, width: 0, color: colour(entry)},
    hovertemplate: "%{y:.5g} after %{x:.3g} s<extra>" + plain(entry.label) + "</extra>"}));
  return {traces, layout: {height: wide(width), xaxis: {title: {text: "seconds a run"}, rangemode: "tozero"}, yaxis: {title: {text: "test " + plain(one.title)}}}};
}

function tuning(one, width) {
  const traces = one.entries.filter(visible).map(entry => {
    const own = entry.trials.filter(trial => trial.score !== null && trial.rate > 0);
    return {x: own.map(t => t.rate), y: own.map(t => t.score), mode: "markers",
      text: own.map(t => "trial " + t.trial + (t.chosen ? ", chosen" : t.state === "stopped" ? ", stopped after " + t.seeds + (t.seeds === 1 ? " seed" : " seeds") : "") + "<br>" + plain(t.settings)),
      marker: {color: colour(entry), symbol: own.map(t => entry.symbol + (t.state === "stopped" ? "-open" : "")), size: own.map(t => t.chosen ? 15 : 8), opacity: 1,
        line: {width: own.map(t => t.chosen ? 2.5 : t.state === "stopped" ? 1.5 : 0), color: own.map(t => t.chosen ? css("--ink") : colour(entry))}},
      hovertemplate: "%{y:.5g}, %{text}<extra>" + plain(entry.label) + "</extra>"};
  });
  return {traces, layout: {height: wide(width), xaxis: {type: "log", title: {text: "learning rate"}, dtick: 1, exponentformat: "power"}, yaxis: {title: {text: "validation " + plain(one.title)}}}};
}

// a ruler of the critical difference, a dot for every recipe, and below them bars over those not told apart
function ranks(suite, width) {
  const shown = suite.recipes.filter(visible), count = shown.length;
  const traces = shown.map((recipe, row) => ({x: [recipe.rank], y: [row], mode: "markers", marker: {color: colour(recipe), symbol: recipe.symbol, size: 12},
    hovertemplate: "mean rank %{x:.2f}<extra>" + plain(recipe.label) + "</extra>"}));
  const ink = css("--ink"), place = Object.fromEntries(suite.recipes.map(recipe => [recipe.label, recipe.rank]));
  const seen = new Set(shown.map(recipe => recipe.label));
  const groups = suite.groups.map(group => group.filter(name => seen.has(name))).filter(group => group.length > 1);
  groups.forEach((group, level) => traces.push({x: [place[group[0]], place[group[group.length - 1]]], y: Array(2).fill(count - 0.3 + 0.4 * level), mode: "lines",
    line: {color: ink, width: 6}, hovertemplate: "not told apart: " + group.map(plain).join(", ") + "<extra></extra>"}));
  const layout = inRows(shown, width, recipe => [recipe.rank.toFixed(2)], {}), last = count - 0.1 + 0.4 * groups.length;
  traces.push({x: [1, 1 + suite.distance], y: [-1.05, -1.05], mode: "lines+markers", line: {color: ink, width: 2}, marker: {symbol: "line-ns", size: 10, line: {width: 2, color: ink}}, hoverinfo: "skip"});
  layout.annotations.push({x: 1, y: -1.05, xanchor: "left", yanchor: "bottom", yshift: 4, showarrow: false, text: "critical difference " + suite.distance.toFixed(2), font: {size: 12, color: ink}});
  layout.height = pitch() * (last + 1.9) + 62;
  layout.yaxis.range = [last + 0.1, -1.8];
  const end = Math.max(suite.recipes.length, 1 + suite.distance);
  layout.xaxis = {range: [0.85, end + 0.15], dtick: 1, title: {text: "mean rank  (← first)"}};
  return {traces, layout};
}

function profiles(suite, width) {
  const traces = suite.recipes.filter(visible).map(recipe => ({x: recipe.tau, y: recipe.share, mode: "lines+markers", line: {shape: "hv", width: 2, color: colour(recipe), dash: recipe.dash},
    marker: {symbol: recipe.symbol, size: 8, color: colour(recipe), maxdisplayed: 6}, hovertemplate: "within %{x:.3g} times: %{y:.0%}<extra>" + plain(recipe.label) + "</extra>"}));
  return {traces, layout: {height: wide(width), xaxis: {title: {text: "epochs, relative to the fastest"}}, yaxis: {title: {text: "share of data sets"}, range: [-0.03, 1.05], tickformat: ".0%"}}};
}

if (data.suite) {
  chart("suite-ranks", width => ranks(data.suite, width));
  chart("suite-profiles", width => profiles(data.suite, width));
}
data.comparisons.forEach(one => {
  const choice = document.getElementById(one.id + "-metric");
  if (choice) {
    one.curve_metrics.filter(([name]) => one.entries.some(entry => entry.curves[name])).forEach(([name, text]) => choice.add(new Option(text, name)));
    choice.addEventListener("change", draw);
  }
  for (const [name, paint] of Object.entries({difference: differences, seeds, curves, time, tuning})) chart(one.id + "-" + name, width => paint(one, width));
});
draw();

// ------------------------------------------------------------------------------------ tables and controls
all(".sortable thead button").forEach(button => button.addEventListener("click", () => {
  const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
  const down = head.ariaSort === "ascending";
  all("th[aria-sort]", head.parentElement).forEach(other => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");   // what has no number stays below
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return down ? -order : order;
  };
  [...body.rows].sort(compare).forEach(row => body.append(row));
}));
if (box) box.addEventListener("input", filter);
all("[data-key]").forEach(button => button.addEventListener("click", () => {
  const name = button.dataset.key;
  if (!hidden.delete(name)) hidden.add(name);
  all("[data-key]").filter(other => other.dataset.key === name).forEach(other => other.setAttribute("aria-pressed", !hidden.has(name)));
  draw();
}));
all("details").forEach(part => part.addEventListener("toggle", () => {
  if (part.open) charts.filter(({place}) => part.contains(place)).forEach(drawOne);
}));
all(".copy").forEach(button => button.addEventListener("click", async () => {
  const text = button.parentElement.querySelector("code");
  try { await navigator.clipboard.writeText(text.textContent); button.textContent = "Copied"; }
  catch { getSelection().selectAllChildren(text); }
}));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
let pending;
addEventListener("resize", () => { clearTimeout(pending); pending = setTimeout(draw, 120); });

// paper is white and as wide as paper, and nothing on it can be opened
let opened = [];
addEventListener("beforeprint", () => {
  opened = all("details:not([open])");
  opened.forEach(part => { part.open = true; });
  root.classList.add("paper");
  draw();
});
addEventListener("afterprint", () => {
  opened.forEach(part => { part.open = false; });
  root.classList.remove("paper");
  draw();
});
