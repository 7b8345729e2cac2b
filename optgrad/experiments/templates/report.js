"use strict";
// Draws the numbers in #data; every label is made plain text before Plotly sees it.
const data = JSON.parse(document.getElementById("data").textContent);
const narrow = window.matchMedia("(max-width: 700px)");
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const redraw = [];  // one function for each picture

const plain = (text) =>
  text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function lineOf(label) {
  const look = data.looks[label];
  // Black would not be seen on a dark page.
  return { color: look.color === "#000000" ? css("--ink") : look.color, dash: look.dash, width: 2 };
}

function translucent(colour) {
  const n = parseInt(colour.slice(1), 16);
  return `rgba(${n >> 16}, ${(n >> 8) & 255}, ${n & 255}, 0.2)`;
}

function axis(title, isLog, more = {}) {
  return {
    title: { text: title }, type: isLog ? "log" : "linear", automargin: true, zeroline: false,
    gridcolor: css("--line"), linecolor: css("--line"), exponentformat: "power",
    ...more,
  };
}

function draw(place, traces, xaxis, yaxis, shapes = []) {
  const below = { orientation: "h", x: 0, xanchor: "left", y: -0.25, yanchor: "top" };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: css("--ink"), size: 13 },
    hoverlabel: { bgcolor: css("--paper"), font: { color: css("--ink") }, namelength: -1 },
    legend: narrow.matches ? below : { x: 1.02, y: 1 },
    margin: { l: 10, r: 10, t: 30, b: 10 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--faint"), activecolor: css("--ink") },
    showlegend: true, uirevision: "legend", xaxis, yaxis, shapes,
  };
  const config = {
    responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
    showSendToCloud: false, plotlyServerURL: "",  // nothing leaves the page
  };
  Plotly.react(place, traces, layout, config);
}

// The range of a percentage; the first evaluation, before training, says little.
function rangeOf(lines) {
  const after = lines.flatMap((line) => (line.y.length > 1 ? line.y.slice(1) : line.y));
  if (!after.length) return null;
  const [low, high] = [Math.min(...after), Math.max(...after)];
  const margin = 0.1 * (high - low) + 1;
  return [Math.max(0, low - margin), Math.min(101, high + margin)];
}

// The shade of mean ± sd as one closed outline; below zero a logarithmic axis has no place.
function shade(line, isLog) {
  const floor = Math.min(...line.y.filter((y) => y > 0)) / 10;
  const low = line.y.map((y, i) => (isLog ? Math.max(y - line.sd[i], floor) : y - line.sd[i]));
  const high = line.y.map((y, i) => y + line.sd[i]);
  return {
    x: [...line.x, ...[...line.x].reverse()], y: [...high, ...low.reverse()],
    fill: "toself", fillcolor: translucent(lineOf(line.label).color), line: { width: 0 },
    mode: "lines", hoverinfo: "skip", showlegend: false, legendgroup: line.label,
  };
}

function curvesOf(study, root) {
  const place = root.querySelector("[data-plot=curves]");
  const control = (name) => root.querySelector(`[data-control=${name}]`);
  const choose = (name, pairs) =>
    control(name).replaceChildren(...pairs.map(([key, title]) => new Option(title, key)));
  choose("metric", study.metrics.map((one) => [one.key, one.title]));
  choose("stage", Object.keys(study.stages).map((name) => [name, name]));

  const isPercent = () => control("metric").selectedOptions[0].text.endsWith("[%]");
  const lines = () => study.stages[control("stage").value][control("metric").value];
  const suggestScale = () => {
    control("logy").checked = !isPercent() && lines().every((line) => line.y.every((y) => y > 0));
  };
  const show = () => {
    const [logx, logy] = [control("logx").checked, control("logy").checked];
    const isFinal = control("stage").selectedIndex === 0;
    const named = new Set();
    const traces = lines().flatMap((line) => {
      const isFirst = !named.has(line.label);
      named.add(line.label);
      const value = line.name ? ` (${line.name})` : "";
      const look = lineOf(line.label);
      const trace = {
        x: line.x, y: line.y, customdata: line.sd, mode: "lines+markers",
        line: { ...look, width: line.chosen ? 2.5 : 1 }, marker: { size: line.chosen ? 5 : 3, color: look.color },
        name: plain(line.label + (isFinal ? value : "")),
        legendgroup: line.label, showlegend: isFirst,
        hovertemplate: `${plain(line.label + value)}<br>step %{x}: %{y:.4g} ± %{customdata:.2g}` +
          `<br>runs: ${line.runs}<extra></extra>`,
      };
      const hasShade = control("bands").checked && line.runs > 1 && line.x.length;
      return hasShade ? [shade(line, logy), trace] : [trace];
    });
    const isScore = control("metric").value === study.score;
    const target = { type: "line", xref: "paper", x0: 0, x1: 1, y0: study.target, y1: study.target,
      line: { color: css("--faint"), dash: "dot", width: 1 },
      label: { text: "target", textposition: "start", font: { color: css("--faint"), size: 11 } } };
    // A new choice is shown whole; within one, what the reader has zoomed to stays.
    const shown = [control("metric").value, control("stage").value, logy].join();
    const range = isPercent() && !logy ? rangeOf(lines()) : null;
    draw(place, traces, axis("training step", logx, { uirevision: logx }),
      axis(control("metric").selectedOptions[0].text, logy,
        { uirevision: shown, ...(range ? { range } : {}) }),
      isScore && (!logy || study.target > 0) ? [target] : []);
  };
  for (const name of ["metric", "stage"]) {
    control(name).addEventListener("change", () => { suggestScale(); show(); });
  }
  for (const name of ["logx", "logy", "bands"]) control(name).addEventListener("change", show);
  suggestScale();
  redraw.push(show);
}

function sensitivityOf(study, root) {
  const place = root.querySelector("[data-plot=sensitivity]");
  const { lines, title, log } = study.sensitivity;
  if (!lines.length) {
    place.remove();
    root.querySelector("[data-heading=sensitivity]").remove();
    return;
  }
  const logy = log && lines.every((line) => line.y.every((y) => y > 0));
  redraw.push(() => {
    const traces = lines.flatMap((line) => {
      const look = lineOf(line.label);
      const trace = {
        x: line.x, y: line.y, customdata: line.sd, mode: "lines+markers", line: look,
        marker: {
          color: look.color, size: line.x.map((x) => (x === line.best ? 13 : 6)),
          symbol: line.x.map((x) => (x === line.best ? "circle-open" : "circle")),
          line: { color: look.color, width: 2 },
        },
        name: plain(line.label), legendgroup: line.label,
        hovertemplate: `${plain(line.label)}<br>%{x:.3g}: %{y:.4g} ± %{customdata:.2g}` +
          `<br>seeds: ${line.runs}<extra></extra>`,
      };
      return line.runs > 1 ? [shade(line, logy), trace] : [trace];
    });
    draw(place, traces, axis("learning rate, or what the method tunes", true, { dtick: 1 }),
      axis(title, logy));
  });
}

function profileOf(profile, place) {
  const last = Math.max(2, ...profile.lines.map((line) => line.x[line.x.length - 1]));
  redraw.push(() => {
    const traces = profile.lines.map((line) => ({
      x: [...line.x, 1.1 * last], y: [...line.y, line.y[line.y.length - 1]],
      mode: "lines", line: { ...lineOf(line.label), shape: "hv" }, name: plain(line.label),
      hovertemplate: `${plain(line.label)}<br>τ = %{x:.3g}: %{y:.0%}<extra></extra>`,
    }));
    draw(place, traces, axis("factor τ of the best", true),
      axis("share of studies × seeds", false, { range: [-0.02, 1.02], tickformat: ".0%" }));
  });
}

// Numbers before words, dashes last; a second click turns the order around.
function makeSortable(table) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const text = (row) => row.cells[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [parseFloat(text(a)), parseFloat(text(b))];
        if (isNaN(x) || isNaN(y)) {
          return isNaN(x) && isNaN(y) ? sign * text(a).localeCompare(text(b)) : isNaN(x) - isNaN(y);
        }
        return sign * (x - y);
      };
      body.replaceChildren(...[...body.rows].sort(compare));
    });
  });
}

document.querySelectorAll("table").forEach(makeSortable);
document.querySelectorAll("[data-profile]").forEach((place) =>
  profileOf(data.profiles[place.dataset.profile], place));
document.querySelectorAll("[data-study]").forEach((root) => {
  curvesOf(data.studies[root.dataset.study], root);
  sensitivityOf(data.studies[root.dataset.study], root);
});
const drawAll = () => redraw.forEach((show) => show());
for (const query of [narrow, dark]) query.addEventListener("change", drawAll);
drawAll();
