// Keys: what each may use, what it has used of that; made, changed and revoked here.

import { ask, poll } from "./api.js";
import { confirmed, openDialog } from "./dialog.js";
import { button, byId, complain, copyButton, el, write } from "./dom.js";
import { count, dollars, percent, short, time } from "./format.js";
import { changesOf, keyForm, limitsOf } from "./key_form.js";
import { me } from "./session.js";
import { makeTable, scrolling } from "./table.js";

const EVERY = 30; // seconds
const SHOWN = 100; // rows: whoever has more searches among them
const COLUMNS = [
  {
    head: "Key",
    kind: "name",
    sign: (key) => `${key.key_name} ${key.prefix}`,
    cell: (key) => [el("span", {}, key.key_name), el("code", { class: "small muted" }, key.prefix)],
  },
  {
    head: "State",
    kind: "state",
    sign: (key) => stateOf(key).join(),
    cell: (key) => el("span", { class: `badge ${stateOf(key)[1]}` }, stateOf(key)[0]),
  },
  { head: "Owner", kind: "wide", cell: (key) => key.email },
  { head: "Limits", kind: "wrap", cell: (key) => limitsOf(key) || "no limits" },
  {
    head: "Spent and left",
    kind: "budgets",
    sign: (key) => JSON.stringify(key.budgets || key.revoked_at),
    cell: budgets,
  },
  {
    head: "Expires",
    kind: "wide",
    sign: (key) => key.expires_at ?? "",
    cell: (key) => (key.expires_at ? time(key.expires_at, true) : "never"),
  },
  {
    head: el("span", { class: "unseen" }, "Actions"),
    kind: "act",
    sign: (key) => `${isAlive(key)} ${key.key_name}`,
    cell: actions,
  },
];

let running = null;
const list = makeTable(COLUMNS, {
  testid: "keys-table",
  caption: "Keys",
  stacked: true,
  rowTestid: (key) => `key-row-${key.id}`,
});
let shownKeys = [];
const revokedHere = new Set();

export const keys = { show, hide };

/** Whether requests may be made with it. */
export const isAlive = (key) => !key.revoked_at && !(key.expires_at && Date.parse(key.expires_at) <= Date.now());

function show() {
  hide();
  running = new AbortController();
  poll(EVERY, load, running.signal, (error) => complain("Keys", error));
}

function hide() {
  running?.abort();
}

byId("keys-search").addEventListener("input", paint);
byId("keys-dead").addEventListener("change", paint);
byId("new-key").addEventListener("click", create);
byId("keys-table").append(scrolling("Keys", list.table));

async function load() {
  const { signal } = running;
  const answer = await ask("/auth/keys", { signal });
  const known = new Map(shownKeys.map((key) => [key.id, key.budgets]));
  shownKeys = answer.keys.map((key) => ({ ...key, key: key.id, budgets: hasBudget(key) && known.get(key.id) }));
  paint();
  for (const key of visible().filter((one) => isAlive(one) && hasBudget(one))) {
    key.budgets = (await ask(`/auth/keys/${key.id}`, { signal })).budgets;
    paint();
  }
}

const hasBudget = (key) => key.tokens_per_day || key.cost_per_day || key.cost_per_month;

function visible() {
  const wanted = byId("keys-search").value.trim().toLowerCase();
  // One that was revoked while somebody looks stays, so that it is seen to be.
  return shownKeys
    .filter((key) => byId("keys-dead").checked || isAlive(key) || revokedHere.has(key.id))
    .filter((key) => !wanted || `${key.key_name} ${key.prefix} ${key.email}`.toLowerCase().includes(wanted))
    .slice(0, SHOWN);
}

function paint() {
  const some = visible();
  list.fill(some);
  byId("keys-none").hidden = shownKeys.length > 0;
  const alive = shownKeys.filter(isAlive).length;
  write(
    byId("keys-note"),
    shownKeys.length
      ? `${count(some.length)} shown; ${count(alive)} in use, ${count(shownKeys.length - alive)} revoked or expired.`
      : "",
  );
}

// --- cells

function stateOf(key) {
  if (key.revoked_at) return ["revoked", "bad"];
  return isAlive(key) ? ["in use", "good"] : ["expired", "warn"];
}

const WHAT = { tokens_per_day: "tokens today", cost_per_day: "today", cost_per_month: "this month" };

function budgets(key) {
  const own = (key.budgets || []).filter((one) => isAlive(key) && one.of === "key");
  return own.length ? own.map(bar) : el("span", { class: "muted" }, "–");
}

/** How much of a budget is spent: words first, the bar says it again. */
export function bar({ what, limit, spent, left, resets_at }) {
  const say = what.startsWith("cost") ? (amount) => dollars(amount * 1e6) : short;
  if (spent === null)
    return el("div", { class: "budget small" }, `${say(limit)} ${WHAT[what]}; what is spent cannot be known now`);
  const share = Math.min(spent / limit, 1);
  const mood = share >= 1 ? "bad" : share >= 0.8 ? "warn" : "good";
  const words = `${say(spent)} of ${say(limit)} ${WHAT[what]}, ${say(left)} left`;
  const meter = el(
    "span",
    { class: `bar ${mood}`, title: `${percent(share)}; begins anew ${new Date(resets_at).toLocaleString()}` },
    el("i"),
  );
  meter.firstChild.style.inlineSize = `${share * 100}%`;
  return el("div", { class: "budget small" }, el("span", {}, words), meter);
}

function actions(key) {
  if (!isAlive(key)) return el("span", { class: "muted" }, "");
  return [
    button("Change", () => change(key.id), {
      class: "quiet",
      test: `key-edit-${key.id}`,
      "aria-label": `Change ${key.key_name}`,
    }),
    button("Revoke", () => revoke(key), {
      class: "quiet bad",
      test: `key-revoke-${key.id}`,
      "aria-label": `Revoke ${key.key_name}`,
    }),
  ];
}

// --- what is done

async function create() {
  const made = await openDialog("New key", (close) =>
    keyForm({
      action: "Create",
      testid: "key-create",
      owner: me().role === "admin",
      submit: async (form) => close(await ask("/auth/keys", { method: "POST", body: changesOf(form, null) })),
      cancel: () => close(),
    }),
  );
  if (!made) return;
  await openDialog("Your new key", (close) => secret(made, close), { kept: true });
  await load();
}

function secret(made, close) {
  const shown = el("code", { class: "secret", tabindex: "0", test: "key-secret" }, made.api_key);
  return [
    el("p", {}, "Keep it now: it is not shown again, and nobody can look it up."),
    shown,
    el(
      "div",
      { class: "actions" },
      copyButton(() => shown.textContent, { test: "key-secret-copy", class: "primary", autofocus: true }),
      button("Done", () => close(), { test: "key-secret-done" }),
    ),
  ];
}

async function change(id) {
  const key = await ask(`/auth/keys/${id}`).catch((error) => complain("Key", error));
  if (!key) return;
  const changed = await openDialog(`Change ${key.key_name}`, (close) => [
    ...(key.budgets ?? []).map((one) =>
      one.of === "account"
        ? el("div", {}, el("span", { class: "small muted" }, "All keys of the account together: "), bar(one))
        : bar(one),
    ),
    keyForm({
      key,
      action: "Save",
      testid: "key-save",
      submit: async (form) => {
        const changes = changesOf(form, key);
        close(Object.keys(changes).length ? await ask(`/auth/keys/${id}`, { method: "PATCH", body: changes }) : key);
      },
      cancel: () => close(),
    }),
  ]);
  if (changed) await load();
}

async function revoke(key) {
  if (
    !(await confirmed(
      `Revoke ${key.key_name}?`,
      `${key.prefix} is refused everywhere within a second, for good, and what is being answered for it is ended.`,
      "Revoke",
    ))
  )
    return;
  try {
    await ask(`/auth/keys/${key.id}`, { method: "DELETE" });
    revokedHere.add(key.id);
    await load();
  } catch (error) {
    complain("Key", error);
  }
}
