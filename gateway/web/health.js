// Whether it can serve, and what it depends on: GET /health in words, and what admins hear of it each second.

import { byId, el, write } from "./dom.js";
import { age, bytes, count } from "./format.js";
import { me } from "./session.js";
import { makeTable, scrolling } from "./table.js";

// What everybody may know, and what only admins hear of.
const OPEN = [
  "Gateway",
  "Postgres",
  "Redis",
  "Limits kept",
  "Usage rows waiting",
  "Open exchanges",
  "Up for",
  "Version",
];
const LIVE = ["Usage lag", "Journal on disk", "Event loop lag", "Memory"];

const facts = {};
let providers = null;

/** The two panels at the foot of the overview. */
export function dependencies() {
  providers = makeTable(
    [
      { head: "Provider", kind: "name", cell: (row) => row.key },
      { head: "State", kind: "state", sign: (row) => stateOf(row).join(), cell: (row) => badge(...stateOf(row)) },
      { head: "In flight", kind: "number", cell: (row) => count(row.in_flight) },
    ],
    { testid: "provider-states", caption: "Providers that are set up" },
  );
  const names = me().role === "admin" ? [...OPEN, ...LIVE] : OPEN;
  const lines = names.map((name) => el("div", {}, el("dt", {}, name), (facts[name] = el("dd", {}, "–"))));
  return [
    el(
      "section",
      { class: "panel" },
      el("h3", {}, "Providers now"),
      scrolling("Providers now", providers.table),
      (facts.off = el("p", { class: "small muted" })),
    ),
    el(
      "section",
      { class: "panel", test: "dependencies" },
      el("h3", {}, "Dependencies"),
      el("dl", { class: "facts" }, lines),
    ),
  ];
}

/** The answer of GET /health; null: there was none. */
export function showHealth(report) {
  const [words, mood] = report ? condition(report) : ["The gateway does not answer. Trying again.", "bad"];
  write(byId("condition"), words);
  byId("condition").className = `condition ${mood}`;
  if (!report) return;
  fact("Gateway", report.status, report.status === "ok");
  fact("Postgres", report.dependencies.postgres, report.dependencies.postgres === "up");
  fact("Redis", report.dependencies.redis, report.dependencies.redis === "up");
  fact(
    "Limits kept",
    report.limiter === "redis" ? "in Redis, exact" : `by each process (${report.limiter})`,
    report.limiter === "redis",
  );
  fact(
    "Usage rows waiting",
    report.usage_log_full ? `${count(report.usage_rows_waiting)}, disk full` : count(report.usage_rows_waiting),
    report.usage_log_full ? false : undefined,
  );
  fact("Open exchanges", count(report.open_exchanges));
  fact("Up for", age(report.uptime_seconds));
  fact("Version", report.version);
  const all = Object.entries(report.providers).map(([key, provider]) => ({ key, ...provider }));
  providers.fill(all.filter((one) => one.enabled));
  const off = all.filter((one) => !one.enabled).map((one) => one.key);
  write(facts.off, off.length ? `Not set up: ${off.join(", ")}.` : "");
}

/** Of the live figures, what tells how the gateway itself is. */
export function showLiveState(figures) {
  fact("Usage lag", `${figures.usage_lag_seconds.toFixed(1)} s`, figures.usage_lag_seconds > 60 ? false : undefined);
  fact("Journal on disk", bytes(figures.journal_bytes));
  fact(
    "Event loop lag",
    `${(figures.event_loop_lag_seconds * 1000).toFixed(1)} ms`,
    figures.event_loop_lag_seconds > 0.1 ? false : undefined,
  );
  fact("Memory", bytes(figures.resident_bytes));
}

function fact(name, words, good) {
  write(facts[name], words);
  facts[name].className = good === undefined ? "" : good ? "good" : "bad";
}

const badge = (words, mood) => el("span", { class: `badge ${mood}` }, words);

function stateOf(provider) {
  if (provider.state === "open") return [`left alone, ${Math.ceil(provider.left_alone_seconds)} s`, "bad"];
  if (provider.state === "half_open") return ["being tried again", "warn"];
  const cooling = Object.keys(provider.cooling_models ?? {});
  if (cooling.length) return [`asked for patience: ${cooling.slice(0, 3).join(", ")}`, "warn"];
  return provider.reachable === false ? ["not reachable", "bad"] : ["ready", "good"];
}

/** One sentence, the worst first. */
function condition(report) {
  if (report.status === "draining") return ["Shutting down: open streams finish, new requests go elsewhere.", "warn"];
  if (report.usage_log_full) return ["No room for usage on disk: requests are refused.", "bad"];
  if (report.dependencies.postgres !== "up")
    return ["Postgres is down: known keys are served, usage waits on disk.", "bad"];
  if (report.dependencies.redis !== "up") return ["Redis is down: each process keeps the limits by itself.", "warn"];
  const enabled = Object.entries(report.providers).filter(([, provider]) => provider.enabled);
  const troubled = enabled.filter(([, provider]) => stateOf(provider)[1] !== "good").map(([name]) => name);
  if (!enabled.length) return ["No provider is set up: give it the key of one, such as OPENAI_API_KEY.", "warn"];
  if (troubled.length)
    return [
      `${troubled.join(", ")}: ${troubled.length === 1 ? "has" : "have"} trouble; ${enabled.length - troubled.length} of ${enabled.length} providers ready.`,
      "warn",
    ];
  return [`All well: Postgres and Redis up, ${enabled.length} of ${enabled.length} providers ready.`, "good"];
}
