// The playground: a request with one of the visitor's own keys, its answer as it comes, and what it cost.

import { ask, inTurn, poll, query, refusal, send, sleep } from "./api.js";
import { byId, complain, el, write } from "./dom.js";
import { count, dollars, milliseconds, rate } from "./format.js";
import { isAlive } from "./keys.js";
import { me } from "./session.js";
import { readEvents } from "./sse.js";

const EVERY = 3; // seconds, doubled with each failure
const ROW_TRIES = 8; // times that the row is looked for: it comes a moment after the end
const ROW_PAUSE = 500; // milliseconds between them

const form = byId("play");
const { key: keyList, model: modelList } = form.elements;
const stop = byId("play-stop");
const problem = byId("play-problem");
let sending = null;

let filling = null;

export const playground = { show, hide };

/** Asks for the keys and models until there is an answer: a gateway that was away must not leave the form empty. */
function show() {
  hide();
  filling = new AbortController();
  poll(EVERY, () => fill().then(hide), filling.signal, (error) => complain("Playground", error));
}

function hide() {
  filling?.abort();
}

async function fill() {
  const { keys } = await ask("/auth/keys");
  choose(
    keyList,
    keys
      .filter((key) => isAlive(key) && key.user_id === me().user_id)
      .map((key) => [key.id, `${key.key_name} (${key.prefix})`]),
  );
  byId("play-none").hidden = keyList.options.length > 0;
  byId("play-send").disabled = !keyList.options.length || sending !== null;
  await listModels();
}

async function listModels() {
  if (!keyList.value) return;
  const { data } = await ask("/v1/models", { headers: asKey() });
  choose(
    modelList,
    data.map((model) => [model.id, model.id]),
  );
  if (!data.length) write(problem, "This key may use no model that is there.");
}

/** Its options anew; what was chosen stays chosen. */
function choose(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, words]) => el("option", { value }, words)));
  if (options.some(([value]) => value === before)) select.value = before;
}

const asKey = () => ({ "X-Gateway-Key": keyList.value });

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!sending && keyList.value) run(); // Ctrl+Enter comes here with Send disabled, too
});
form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
form.elements.key.addEventListener("change", () => listModels().catch((error) => write(problem, error.message)));
stop.addEventListener("click", () => sending?.abort());

const FACTS = ["first", "pace", "in", "out", "cost", "id"];

const fact = (name, words) => write(byId(`play-${name}`), words);

// --- one request

function body() {
  const system = form.elements.system.value.trim();
  const messages = [
    ...(system ? [{ role: "system", content: system }] : []),
    { role: "user", content: form.elements.prompt.value },
  ];
  const more = {};
  if (form.elements.temperature.value) more.temperature = Number(form.elements.temperature.value);
  if (form.elements.most.value) more.max_tokens = Number(form.elements.most.value);
  return { model: modelList.value, messages, stream: true, stream_options: { include_usage: true }, ...more };
}

async function run() {
  sending = new AbortController();
  byId("play-send").disabled = true;
  stop.disabled = false;
  byId("play-answer").replaceChildren();
  write(problem, "");
  for (const name of FACTS) fact(name, "–");
  const began = performance.now();
  const exchange = { began, first: 0, pieces: 0, id: "", answered: false, thoughts: null, text: null };
  try {
    await receive(exchange, sending.signal);
  } catch (error) {
    if (!sending.signal.aborted)
      write(problem, error.requestId ? `${error.message} (request ${error.requestId})` : error.message);
    else write(problem, "Stopped. What came by then is billed.");
  }
  sending = null;
  byId("play-send").disabled = false;
  stop.disabled = true;
  if (exchange.answered) showRow(exchange.id).catch(() => undefined);
}

async function receive(exchange, signal) {
  const response = await send("/v1/chat/completions", {
    method: "POST",
    body: body(),
    headers: asKey(),
    signal,
    patience: 0,
  });
  exchange.id = response.headers.get("X-Request-Id") ?? "";
  fact("id", exchange.id || "–");
  if (!response.ok) throw await refusal(response);
  exchange.answered = true; // what was refused has no row
  let whole = false;
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") whole = true;
    else take(exchange, JSON.parse(data));
  }
  if (!whole) throw new Error("the answer broke off: what is shown is not all of it");
}

/** One chunk (https://platform.openai.com/docs/api-reference/chat/streaming) or an error in mid-stream. */
function take(exchange, chunk) {
  if (chunk.error) throw new Error(chunk.error.message);
  const delta = chunk.choices?.[0]?.delta ?? {};
  const text = delta.content ?? delta.refusal ?? "";
  if (text || delta.reasoning_content) {
    const now = performance.now();
    if (!exchange.first) {
      exchange.first = now;
      fact("first", milliseconds(now - exchange.began));
    }
    exchange.pieces += 1;
    if (delta.reasoning_content) append(exchange, "thoughts", delta.reasoning_content);
    if (text) append(exchange, "text", text);
    pace(exchange, exchange.pieces, "about ");
  }
  if (chunk.usage) {
    fact("in", count(chunk.usage.prompt_tokens));
    fact("out", count(chunk.usage.completion_tokens));
    pace(exchange, chunk.usage.completion_tokens, "");
  }
}

/** A text node that grows: what is there already is not laid out again, and stays selected. */
function append(exchange, kind, text) {
  if (!exchange[kind]) {
    exchange[kind] = document.createTextNode("");
    byId("play-answer").append(el("div", { class: kind }, exchange[kind]));
  }
  exchange[kind].appendData(text);
}

/** Until the provider has said how many tokens there were, a piece is taken for one. */
function pace(exchange, tokens, about) {
  const seconds = (performance.now() - exchange.first) / 1000;
  if (seconds > 0.2 && tokens > 1) fact("pace", `${about}${rate(tokens / seconds)}`);
  if (about) fact("out", `${about}${count(tokens)}`);
}

/** The row has the cost. It is looked for in the list: asked for by its id it would be an error until it is there. */
async function showRow(id) {
  for (let tries = 0; tries < ROW_TRIES; tries += 1) {
    await sleep(ROW_PAUSE);
    const rows = await inTurn(() => ask(query("/api/usage", { range: "1h", limit: 10, key: keyList.value })));
    const row = rows.data.find((one) => one.request_id === id);
    if (row) {
      fact("in", count(row.prompt_tokens));
      fact("out", count(row.completion_tokens));
      fact("cost", dollars(row.cost_micros));
      return;
    }
  }
}
