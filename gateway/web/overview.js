// The first page: is it well, what happens now, what was used and by whom.

import { ask, inTurn, poll, query } from "./api.js";
import { makeChart } from "./charts.js";
import { button, byId, command, complain, el, empty, segments, write, writeNumber } from "./dom.js";
import { clockOf, count, dollars, milliseconds, percent, short } from "./format.js";
import { dependencies, showHealth, showLiveState } from "./health.js";
import { onFigures } from "./live.js";
import { makeTable, scrolling } from "./table.js";

const RANGES = ["1h", "24h", "7d", "30d", "all"];
const TOTALS_EVERY = 5; // seconds
const REST_EVERY = 6; // times that long: charts and the other tables
const HEALTH_EVERY = 10; // seconds
const SHOWN = 5; // rows of a table, before it is opened

const HOUR = 3600;
const DAY = 24 * HOUR;

let range = "24h";
let running = null;
const parts = {};
const keyNames = new Map();

export const overview = { show, hide };

function show() {
  if (!parts.cards) build();
  restart();
}

function hide() {
  running?.abort();
}

/** Asks for everything anew, for the range that is chosen now. */
function restart() {
  hide();
  running = new AbortController();
  const { signal } = running;
  let round = 0;
  poll(
    TOTALS_EVERY,
    () => refresh(signal, round++ % REST_EVERY === 0),
    signal,
    (error) => complain("Figures", error),
  );
  poll(
    HEALTH_EVERY,
    async () => showHealth(await ask("/health", { signal })),
    signal,
    () => showHealth(null),
  );
}

// --- what is asked

async function refresh(signal, all) {
  const stats = (more) => inTurn(() => ask(query("/api/stats", more), { signal }));
  const models = await stats({ range, group_by: "model" });
  showTotals(models);
  fill(parts.models, models, "model");
  const first = !byId("start").hidden && models.totals.requests > 0;
  if (!all && !first) return;
  await showStart(models.totals.requests === 0 && (await stats({ range: "all" })).totals.requests === 0);
  showSeries(await stats(seriesOf(range)));
  showLatency(await inTurn(() => ask(query("/api/latency", { range: range === "all" ? "30d" : range }), { signal })));
  fill(parts.providers, await stats({ range, group_by: "provider" }), "provider");
  fill(parts.apps, await stats({ range, group_by: "app" }), "app");
  const byKey = await stats({ range, group_by: "key" });
  if (byKey.groups.some((group) => !keyNames.has(group.key))) {
    for (const key of (await ask("/auth/keys", { signal })).keys) keyNames.set(key.prefix, key.key_name);
  }
  fill(parts.keys, byKey, "key");
}

/** An hour is too short for sums by the hour: then the day that it ends. */
const seriesOf = (name) => ({
  range: name === "1h" ? "24h" : name,
  group_by: name === "30d" || name === "all" ? "day" : "hour",
});

const spaced = (name) => name.replace(/[hd]$/, " $&"); // 24 h

// --- totals

const CARDS = [
  {
    name: "requests",
    head: "Requests",
    value: (all) => all.requests,
    say: count,
    more: (all, hour) => `${count(hour.requests)} in the last hour`,
  },
  {
    name: "tokens",
    head: "Tokens",
    value: (all) => all.total_tokens,
    say: count,
    more: (all) => `${count(all.prompt_tokens)} in, ${count(all.completion_tokens)} out`,
  },
  {
    name: "cost",
    head: "Cost",
    value: (all) => all.cost_micros,
    say: dollars,
    more: (all) =>
      all.unpriced
        ? `and ${count(all.unpriced)} requests without a price`
        : all.requests
          ? "every request priced"
          : "\u00a0",
  },
  {
    name: "error-rate",
    head: "Error rate",
    value: (all) => all.error_rate,
    say: percent,
    more: (all) => `${count(all.errors)} failed, ${count(all.client_aborts)} left by clients`,
  },
  {
    name: "cache-rate",
    head: "Prompt cache",
    value: (all) => all.cache_hit_rate,
    say: percent,
    more: (all) => `${short(all.cached_tokens)} tokens from it`,
  },
  {
    name: "saved",
    head: "Saved",
    value: (all) => all.saved_micros,
    say: dollars,
    more: (all) => `${count(all.remembered)} remembered, ${short(all.saved_tokens)} tokens`,
  },
];

function showTotals(found) {
  for (const { name, value, say, more } of CARDS) {
    const { figure, words } = parts.cards[name];
    writeNumber(figure, say(value(found.totals)), value(found.totals));
    write(words, more(found.totals, found.last_hour));
  }
  parts.cards["error-rate"].figure.classList.toggle("bad", found.totals.error_rate > 0.01);
  const waiting = found.queued ? `, ${count(found.queued)} on their way` : "";
  write(
    byId("totals-of"),
    `${range === "all" ? "of all time" : `of the last ${spaced(range)}`}, as of ${clockOf(Date.parse(found.as_of) / 1000)}${waiting}`,
  );
}

function card({ name, head }) {
  const figure = el("b", { class: "figure", test: `total-${name}` }, "–");
  const words = el("span", { class: "small muted" }, "\u00a0");
  parts.cards[name] = { figure, words };
  return el("div", { class: "panel card" }, el("span", { class: "label" }, head), figure, words);
}

// --- charts

const total = (values) => values.reduce((sum, value) => sum + value, 0);
const latest = (values) => values.at(-1);
const PERCENTILES = [
  { label: "p50", colour: "c1" },
  { label: "p95", colour: "c2" },
  { label: "p99", colour: "c3" },
];

function buildCharts() {
  const bars = { kind: "bars", sum: total };
  const lines = {
    kind: "lines",
    sum: latest,
    say: milliseconds,
    mark: (ms) => (ms < 1000 ? `${ms} ms` : `${ms / 1000} s`),
    series: PERCENTILES,
  };
  parts.charts = {
    tokens: makeChart({
      ...bars,
      title: "Tokens",
      say: short,
      testid: "chart-tokens",
      series: [
        { label: "prompt", colour: "c2" },
        { label: "cached", colour: "c4" },
        { label: "completion", colour: "c1" },
      ],
    }),
    requests: makeChart({
      ...bars,
      title: "Requests",
      say: count,
      testid: "chart-requests",
      series: [
        { label: "failed", colour: "c5" },
        { label: "answered", colour: "c1" },
      ],
    }),
    cost: makeChart({
      ...bars,
      title: "Cost",
      say: (amount) => dollars(amount * 1e6),
      mark: (amount) => `$${amount < 1000 ? Number(amount.toPrecision(2)) : short(amount)}`,
      testid: "chart-cost",
      nothing: "Nothing that has a price in this range.",
      series: [{ label: "US dollars", colour: "c3" }],
    }),
    latency: makeChart({ ...lines, title: "Latency", testid: "chart-latency" }),
    ttft: makeChart({ ...lines, title: "Time to first token", testid: "chart-ttft" }),
  };
  return Object.values(parts.charts).map((chart) => chart.figure);
}

function showSeries(found) {
  const span = found.group_by === "day" ? DAY : HOUR;
  const end = Date.parse(found.as_of) / 1000;
  const groups = new Map(found.groups.map((group) => [Date.parse(group[found.group_by]) / 1000, group]));
  const first = found.since ? Date.parse(found.since) / 1000 : Math.min(...groups.keys(), end - 30 * DAY);
  const times = [];
  for (let at = Math.floor(first / span) * span; at <= end; at += span) times.push(at);
  const of = (figure) => times.map((at) => (groups.has(at) ? figure(groups.get(at)) : 0));
  const words = found.group_by === "day" ? "by day (UTC)" : range === "1h" ? "by hour, the last 24 h" : "by hour";
  const at = { times, from: times[0], to: times.at(-1) + span, words };
  parts.charts.tokens.show({
    ...at,
    values: [
      of((one) => one.prompt_tokens - one.cached_tokens),
      of((one) => one.cached_tokens),
      of((one) => one.completion_tokens),
    ],
  });
  parts.charts.requests.show({ ...at, values: [of((one) => one.errors), of((one) => one.requests - one.errors)] });
  parts.charts.cost.show({ ...at, values: [of((one) => one.cost_micros / 1e6)] });
}

function showLatency(found) {
  const times = found.points.map((point) => Date.parse(point.start) / 1000);
  const at = {
    times,
    from: Date.parse(found.since) / 1000,
    to: Date.parse(found.until) / 1000,
  };
  const words = `${range === "all" ? "the last 30 d" : `the last ${spaced(range)}`}, the latest value${found.sampled ? ", from a sample" : ""}`;
  for (const [chart, name] of [
    ["latency", "latency_ms"],
    ["ttft", "ttft_ms"],
  ]) {
    parts.charts[chart].show({
      ...at,
      words,
      values: PERCENTILES.map(({ label }) => found.points.map((point) => point[name]?.[label] ?? null)),
    });
  }
}

// --- tables

const FIGURES = [
  { head: "Requests", kind: "number", cell: (row) => count(row.requests) },
  { head: "Tokens in", kind: "number wide", cell: (row) => short(row.prompt_tokens) },
  { head: "Tokens out", kind: "number", cell: (row) => short(row.completion_tokens) },
  {
    head: "Cost",
    kind: "number",
    cell: (row) => (row.unpriced === row.requests ? "no price" : dollars(row.cost_micros)),
  },
  { head: "Errors", kind: "number", cell: (row) => percent(row.error_rate) },
  { head: "First token", kind: "number wide", cell: (row) => milliseconds(row.average_ttft_ms) },
];

function group({ name, head, title, words = () => undefined }) {
  const link = (row) =>
    row.name
      ? [
          el("a", { href: query("#usage", { range, [name]: row.name }) }, words(row) ?? row.name),
          words(row) && el("code", { class: "small muted" }, row.name),
        ]
      : el("span", { class: "muted" }, "(none)");
  const { table, fill: fillRows } = makeTable(
    [{ head, kind: "name", sign: (row) => `${range} ${words(row)}`, cell: link }, ...FIGURES],
    { testid: name === "key" ? "by-key-table" : `${name}s-table`, caption: title },
  );
  const none = empty(name === "key" ? "by-key" : `${name}s`, "Nothing in this range. Choose a longer one above.");
  const turn = () => {
    part.open = !part.open;
    paint(part);
  };
  const more = button("", turn, { class: "quiet small", hidden: true });
  const part = { fillRows, none, more, open: false, rows: [] };
  part.panel = el("section", { class: "panel" }, el("h3", {}, title), scrolling(title, table), none, more);
  return part;
}

function fill(part, found, name) {
  part.rows = found.groups
    .map((figures) => ({ ...figures, name: figures[name], key: figures[name] }))
    .sort((one, other) => other.requests - one.requests);
  paint(part);
}

function paint(part) {
  part.fillRows(part.open ? part.rows : part.rows.slice(0, SHOWN));
  part.none.hidden = part.rows.length > 0;
  part.more.hidden = part.rows.length <= SHOWN;
  write(part.more, part.open ? "Show fewer" : `Show all ${count(part.rows.length)}`);
}

// --- built once

function build() {
  parts.cards = {};
  byId("totals").append(...CARDS.map(card));
  segments(byId("ranges"), RANGES, range, (chosen) => {
    range = chosen;
    restart();
  });
  byId("charts").append(...buildCharts());
  parts.models = group({ name: "model", head: "Model", title: "By model" });
  parts.providers = group({ name: "provider", head: "Provider", title: "By provider" });
  parts.apps = group({ name: "app", head: "App", title: "By app" });
  parts.keys = group({ name: "key", head: "Key", title: "By key", words: (row) => keyNames.get(row.name) });
  byId("groups").append(...[parts.models, parts.providers, parts.apps, parts.keys].map((part) => part.panel));
  byId("state").append(...dependencies());
  onFigures(showLiveState);
}

/** While there was no request ever, how to make one stands where the charts and tables will be. */
async function showStart(nothing) {
  const start = byId("start");
  if (nothing && !start.childElementCount) start.append(...firstSteps((await ask("/health")).providers));
  start.hidden = !nothing;
  byId("charts").hidden = byId("groups").hidden = nothing;
}

function firstSteps(providers) {
  const model = providers["mock-openai"]?.enabled ? "mock-gpt" : providers.openai?.enabled ? "gpt-4o" : "MODEL";
  const request = `curl -N ${location.origin}/v1/chat/completions \\
  -H "Authorization: Bearer $AIG_KEY" -H "Content-Type: application/json" \\
  -d '{"model": "${model}", "stream": true, "messages": [{"role": "user", "content": "Say hello."}]}'`;
  return [
    el("h3", {}, "No request yet"),
    el(
      "p",
      {},
      "Make a key under ",
      el("a", { href: "#keys" }, "Keys"),
      ", put it into AIG_KEY, and send the first request; or try it in the ",
      el("a", { href: "#playground" }, "Playground"),
      ".",
    ),
    command(request),
  ];
}
