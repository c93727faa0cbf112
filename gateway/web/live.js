// What happens now: an event a second from /api/live, shown as it comes. For admins.

import { ask } from "./api.js";
import { axis, followSize, lines } from "./charts.js";
import { byId, write, writeNumber } from "./dom.js";
import { count, rate } from "./format.js";

const KEPT = 300; // seconds of the chart
const SPOKEN = 30; // seconds between two sentences for screen readers: one a second nobody could follow
const MODELS = 4;
const PAUSES = [1, 2, 5, 10, 30]; // seconds, when the browser has given up reconnecting by itself

let source = null;
let again = 0;
let failures = 0;
let chart = null;
let spoken = 0;
const history = { times: [], completion: [], prompt: [] };
const hearers = new Set();

/** Who wants the figures as well; called once a second. */
export const onFigures = (hear) => hearers.add(hear);

/** Begins to listen, and listens whenever the page is looked at: a tab in the background holds no connection. */
export function startLive() {
  byId("live").hidden = false;
  stopLive();
  if (!document.hidden) listen();
  document.addEventListener("visibilitychange", turn);
}

export function stopLive() {
  document.removeEventListener("visibilitychange", turn);
  close();
}

function turn() {
  if (document.hidden) close();
  else if (!source) listen();
}

function close() {
  clearTimeout(again);
  source?.close();
  source = null;
}

function listen() {
  say(failures ? "reconnecting" : "connecting");
  source = new EventSource("/api/live");
  source.addEventListener("figures", (event) => {
    failures = 0;
    say("live");
    show(JSON.parse(event.data));
  });
  source.addEventListener("error", lost);
}

function lost() {
  say("reconnecting");
  if (source.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
  close();
  // Refused, perhaps because nobody is signed in any more: asking tells the page.
  ask("/auth/session").catch(() => undefined);
  again = setTimeout(listen, PAUSES[Math.min(failures, PAUSES.length - 1)] * 1000);
  failures += 1;
}

function say(state) {
  const badge = byId("live-state");
  write(badge, state);
  badge.className = `badge ${state === "live" ? "good" : "warn"}`;
}

function show(figures) {
  const { completion, prompt } = figures.tokens_per_second;
  writeNumber(byId("live-completion-rate"), rate(completion), completion);
  writeNumber(byId("live-prompt-rate"), rate(prompt), prompt);
  writeNumber(byId("live-streams"), count(figures.streams_open), figures.streams_open);
  writeNumber(byId("live-requests-rate"), rate(figures.requests_per_second), figures.requests_per_second);
  writeNumber(byId("live-errors-rate"), rate(figures.errors_per_second), figures.errors_per_second);
  byId("live-errors-rate").classList.toggle("bad", figures.errors_per_second > 0);
  const busiest = figures.models.filter((one) => one.completion_tokens_per_second > 0).slice(0, MODELS);
  const words = busiest.map((one) => `${one.model} ${rate(one.completion_tokens_per_second)} tokens/s`).join(" · ");
  write(byId("live-models"), words || "no tokens at the moment");
  remember(figures.at, completion, prompt);
  if (figures.at - spoken >= SPOKEN) {
    spoken = figures.at;
    write(
      byId("live-spoken"),
      `${rate(completion)} completion tokens per second, ${count(figures.streams_open)} open streams.`,
    );
  }
  for (const hear of hearers) hear(figures);
}

function remember(at, completion, prompt) {
  const last = history.times.at(-1);
  if (last !== undefined && at <= last) return;
  if (last !== undefined && at - last > 5) push(last + 1, null, null); // not heard is not nothing
  push(at, completion, prompt);
  while (history.times[0] < at - KEPT - 2) for (const list of Object.values(history)) list.shift();
  const data = [history.times, history.completion, history.prompt];
  if (chart) chart.setData(data);
  else if (byId("live-plot").clientWidth) chart = draw(byId("live-plot"), data);
}

function push(at, completion, prompt) {
  history.times.push(at);
  history.completion.push(completion);
  history.prompt.push(prompt);
}

function draw(place, data) {
  const now = () => history.times.at(-1);
  const minutes = [4, 3, 2, 1, 0];
  const drawn = new window.uPlot(
    {
      width: place.clientWidth,
      height: place.clientHeight,
      legend: { show: false },
      cursor: { show: false },
      scales: {
        x: { range: () => [now() - KEPT, now()] },
        y: { range: (_, low, high) => [0, high > 0 ? high * 1.15 : 1] },
      },
      axes: [
        axis({
          splits: () => minutes.map((ago) => now() - ago * 60),
          values: () => minutes.map((ago) => (ago ? `−${ago} min` : "")),
          size: 20,
        }),
        axis({
          values: (_, splits) => splits.map(count),
          space: 30,
          size: 44,
          grid: true,
          incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5],
        }),
      ],
      series: [
        {},
        ...lines([
          { colour: "c1", filled: true },
          { colour: "c2", filled: false },
        ]),
      ],
    },
    data,
    place,
  );
  followSize(drawn, place);
  return drawn;
}
