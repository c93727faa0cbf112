// Charts over time, drawn by uPlot (its released file, beside this one). Colours are the style sheet's, read when
// something is drawn.

import { el, write } from "./dom.js";
import { clockOf, dayOf, short } from "./format.js";

const HEIGHT = 168; // pixels; style.css reserves as many
const FONT = "11px system-ui, sans-serif";

const probe = document.body.appendChild(el("i", { class: "unseen", "aria-hidden": "true" }));

/** What a variable of the style sheet is in the theme of now; a canvas knows no variables. */
const colour = (name) => () => {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
};

/**
 * A figure with a title, a legend that tells the figures under the pointer, and a chart.
 *
 * `series`: [{ label, colour: "c1" … }]; `kind`: "bars" or "lines"; bars stand on each other, the first one lowest.
 * `say(value)` words a value, `mark(value)` does on the axis; `sum(values)` is what the legend tells of a series while
 * nothing is pointed at, `nothing` what there is to say without a value.
 */
export function makeChart({ title, series, kind, say, mark = short, sum, testid, nothing = "Nothing in this range." }) {
  const figures = series.map(() => el("b", {}, "–"));
  const legend = series.map((one, i) => el("span", { class: `key ${one.colour}` }, `${one.label} `, figures[i]));
  const note = el("span", { class: "muted small" });
  const plot = el("div", { class: "plot", role: "img", "aria-label": title });
  const none = el("p", { class: "empty muted" }, nothing);
  const figure = el(
    "figure",
    { class: "panel chart", test: testid },
    el("figcaption", {}, el("h3", {}, title, " ", note), el("div", { class: "keys small" }, legend)),
    plot,
    none,
  );
  let drawn = null;
  let told = null;

  function tell(index) {
    series.forEach((one, i) => {
      const value = index === null ? sum(told.values[i].filter((each) => each !== null)) : told.values[i][index];
      write(figures[i], value === null || value === undefined ? "–" : say(value));
    });
  }

  /** `times` in epoch seconds, `values` a list for each series; the axis goes `from` … `to`, whatever there is. */
  function show({ times, values, from, to, words }) {
    told = { values, from, to };
    write(note, words);
    const nothing = values.every((list) => list.every((value) => !value));
    none.hidden = !nothing;
    plot.classList.toggle("faded", nothing);
    tell(null);
    const spoken = series.map((one, i) => `${one.label} ${figures[i].textContent}`).join(", ");
    plot.setAttribute("aria-label", `${title}, ${words}: ${spoken}`);
    const data = [times, ...(kind === "bars" ? stacked(values) : values)];
    if (drawn) drawn.setData(data);
    else
      drawn = draw(plot, data, {
        series: kind === "bars" ? bars(series) : lines(series),
        range: () => [told.from, told.to],
        mark,
        tell,
      });
  }

  return { figure, show };
}

function draw(place, data, { series, range, mark, tell }) {
  const chart = new window.uPlot(
    {
      width: place.clientWidth || 300,
      height: HEIGHT,
      legend: { show: false },
      padding: [8, 8, 0, 0],
      cursor: { drag: { x: false, y: false }, y: false, points: { size: 6 }, sync: { key: "range" } },
      scales: { x: { range }, y: { range: (_, low, high) => [0, high > 0 ? high * 1.12 : 1] } },
      axes: [
        axis({ values: timesOf, space: 64, size: 22 }),
        axis({ values: (_, splits) => splits.map(mark), space: 34, size: 48, side: 3, grid: true }),
      ],
      series: [{}, ...series],
      hooks: { setCursor: [(self) => tell(self.cursor.idx ?? null)] },
    },
    data,
    place,
  );
  followSize(chart, place);
  return chart;
}

export function followSize(chart, place) {
  new ResizeObserver(
    () => place.clientWidth && chart.setSize({ width: place.clientWidth, height: chart.height }),
  ).observe(place);
  document.addEventListener("theme", () => chart.redraw());
}

export const axis = ({ grid = false, ...more }) => ({
  stroke: colour("--muted"),
  font: FONT,
  gap: 4,
  ticks: { show: false },
  grid: { show: grid, stroke: colour("--line"), width: 1 },
  ...more,
});

/** Days by their date; within a day the hour, and the date at midnight. */
function timesOf(_, splits, __, ___, step) {
  return splits.map((at) => (step >= 86_400 || (step >= 3600 && clockOf(at) === "00:00") ? dayOf(at) : clockOf(at)));
}

/** Drawn from the highest to the lowest, each over the one before: sums of this series and all that stand below it. */
function stacked(values) {
  const sums = [];
  values.forEach((list, i) => sums.push(list.map((value, at) => (value ?? 0) + (i ? sums[i - 1][at] : 0))));
  return sums.reverse();
}

function bars(series) {
  // A bar is as wide as its hour or day, less a gap.
  const size = [0.82, 48, 1];
  const paths = window.uPlot.paths.bars({ size, align: 1, gap: 1 });
  return [...series].reverse().map((one) => ({
    fill: colour(`--${one.colour}`),
    stroke: colour(`--${one.colour}`),
    width: 0,
    paths,
    points: { show: false },
  }));
}

export const lines = (series) =>
  series.map((one) => ({
    stroke: colour(`--${one.colour}`),
    fill: one.filled ? colour(`--${one.colour}-fill`) : undefined,
    width: 1.75,
    points: one.filled === undefined ? { size: 4, fill: colour(`--${one.colour}`) } : { show: false },
  }));
