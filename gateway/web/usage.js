// The audit trail: every request that reached a provider or was answered without one, newest first.

import { ask, inTurn, query } from "./api.js";
import { openDialog } from "./dialog.js";
import { button, byId, complain, copyButton, el, fields, toast } from "./dom.js";
import { count, dollars, milliseconds, time } from "./format.js";
import { makeTable, scrolling } from "./table.js";

const PAGE = 50; // rows
const CSV_ROWS = 1000; // the most that one answer has
const OUTCOMES = {
  ok: ["ok", "good"],
  client_abort: ["client left", "warn"],
  budget_exhausted: ["budget used up", "warn"],
  upstream_error: ["provider failed", "bad"],
  upstream_timeout: ["provider silent", "bad"],
  rejected: ["provider refused", "bad"],
  interrupted: ["interrupted", "bad"],
  gateway_error: ["gateway failed", "bad"],
};
const SOURCES = {
  cache: "the cache",
  shared: "a request in flight",
  replay: "a request with the same Idempotency-Key",
};
const COLUMNS = [
  {
    head: "Time",
    kind: "name",
    sign: (row) => row.key,
    cell: (row) => button(time(row.started_at), () => detail(row), { class: "link" }),
  },
  { head: "Model", kind: "text", cell: (row) => row.model },
  { head: "Outcome", kind: "state", sign: (row) => row.outcome, cell: outcome },
  { head: "Tokens in", kind: "number wide", cell: (row) => count(row.prompt_tokens) },
  { head: "Tokens out", kind: "number", cell: (row) => count(row.completion_tokens) },
  { head: "Cost", kind: "number", cell: (row) => dollars(row.cost_micros) },
  { head: "First token", kind: "number wide", cell: (row) => milliseconds(row.ttft_ms) },
  { head: "Latency", kind: "number wide", cell: (row) => milliseconds(row.latency_ms) },
  { head: "Provider", kind: "wide text", cell: (row) => row.provider },
  { head: "App, user", kind: "wide text", cell: (row) => [row.app_id, row.user_id].filter(Boolean).join(", ") || "–" },
  { head: "Key", kind: "wide", cell: (row) => row.key_prefix },
];

const form = byId("usage-filters");
const find = byId("usage-find");
const more = byId("usage-more");
const list = makeTable(COLUMNS, { testid: "usage-table", caption: "Requests, newest first", stacked: true });
let following = null; // the cursor of the next page
let rows = [];
let asked = {};

export const usage = { show, hide: () => undefined };

/** `parameters` of the address are the filters. */
function show(parameters) {
  if (parameters.id) open(parameters.id);
  for (const input of form.querySelectorAll("input, select")) input.value = parameters[input.name] ?? "";
  load();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const address = query("#usage", fields(form));
  if (location.hash === address) load();
  else location.hash = address;
});
find.addEventListener("submit", (event) => {
  event.preventDefault();
  open(fields(find).id);
});
more.addEventListener("click", () => load(following));
byId("usage-table").append(scrolling("Requests", list.table));

/** The first page for the filters, or the one behind `cursor`. */
async function load(cursor) {
  if (!cursor) asked = fields(form);
  const filters = asked;
  byId("usage-csv").href = query("/api/usage", { ...filters, limit: CSV_ROWS, format: "csv" });
  more.disabled = true;
  try {
    const page = await inTurn(() => ask(query("/api/usage", { ...filters, limit: PAGE, cursor })));
    if (filters !== asked) return; // others were asked for meanwhile
    const found = page.data.map((row) => ({ ...row, key_prefix: row.key, key: row.request_id }));
    rows = cursor ? [...rows, ...found] : found;
    list.fill(rows);
    following = page.next_cursor;
    byId("usage-none").hidden = rows.length > 0;
    more.hidden = !page.next_cursor;
  } catch (error) {
    complain("Usage", error);
  } finally {
    more.disabled = false;
  }
}

function outcome(row) {
  const [words, mood] = OUTCOMES[row.outcome] ?? [row.outcome, "warn"];
  return el("span", { class: `badge ${mood}`, title: row.error_code || null }, words);
}

/** Of an answer that no provider made for this request. */
const savings = (row) => [
  ["Answered by", SOURCES[row.source] ?? row.source],
  ["Paid by", row.source_id && el("code", {}, row.source_id)],
  ["Saved", `${dollars(row.saved_micros)}, ${count(row.saved_tokens)} tokens`],
];

// --- one request

async function open(id) {
  try {
    const row = await ask(`/api/usage/${encodeURIComponent(id)}`);
    detail({ ...row, key_prefix: row.key });
  } catch (error) {
    if (error.status === 404)
      toast("There is no such request, or it is not yours. A request has a row once it has ended.");
    else complain("Request", error);
  }
}

function detail(row) {
  const lines = [
    ["Request id", [el("code", { test: "detail-id" }, row.request_id), copyButton(() => row.request_id)]],
    ["Client’s own id", row.client_request_id],
    ["Began", time(row.started_at)],
    ["Outcome", [outcome(row), ` HTTP ${row.status}${row.error_code ? `, ${row.error_code}` : ""}`]],
    ["Finish reason", row.finish_reason],
    ["Model", row.model === row.upstream_model ? row.model : `${row.model}, answered by ${row.upstream_model}`],
    ["Provider", row.provider],
    ["Streamed", row.stream ? "yes" : "no"],
    [
      "Prompt tokens",
      `${count(row.prompt_tokens)}, ${count(row.cached_tokens)} from the cache, ${count(row.cache_write_tokens)} written to it`,
    ],
    ["Completion tokens", `${count(row.completion_tokens)}, ${count(row.reasoning_tokens)} of them reasoning`],
    ["Counted by", row.usage_source],
    ["Cost", dollars(row.cost_micros)],
    ...(row.source === "provider" ? [] : savings(row)),
    ["First token", milliseconds(row.ttft_ms)],
    ["Latency", milliseconds(row.latency_ms)],
    ["App", row.app_id],
    ["User", row.user_id],
    ["Key", row.key_prefix],
  ].filter(([, value]) => value !== "" && value !== null);
  const shown = lines.map(([label, value]) => el("div", {}, el("dt", {}, label), el("dd", {}, value)));
  openDialog(
    "One request",
    (close) => [
      el("dl", { class: "facts" }, shown),
      el(
        "div",
        { class: "actions" },
        button("Close", () => close(), { autofocus: true }),
      ),
    ],
    { wide: true },
  );
}
