// The form of a key: name, limits, models, expiry; for a new one and for one that is changed.

import { button, el, write } from "./dom.js";
import { age, count, dollars, short } from "./format.js";

// Field of the API, label, what an empty one of a new key means, and of another.
const LIMITS = [
  ["requests_per_minute", "Requests per minute", "default"],
  ["concurrent_requests", "Requests at once", "default"],
  ["requests_per_second", "Requests per second", "no limit"],
  ["burst", "Burst of requests", "as per second"],
  ["tokens_per_minute", "Tokens per minute", "no limit"],
  ["tokens_per_day", "Tokens per day", "no limit"],
  ["cost_per_day", "Dollars per day", "no limit"],
  ["cost_per_month", "Dollars per month", "no limit"],
  ["cache_ttl", "Keep answers, seconds", "not kept", "not kept"],
];
const DECIMALS = ["requests_per_second", "cost_per_day", "cost_per_month"];

/** A key's limits in a line. */
export function limitsOf(key) {
  const say = {
    requests_per_minute: (limit) => `${count(limit)} requests/min`,
    requests_per_second: (limit) => `${limit} requests/s`,
    concurrent_requests: (limit) => `${count(limit)} at once`,
    tokens_per_minute: (limit) => `${short(limit)} tokens/min`,
    tokens_per_day: (limit) => `${short(limit)} tokens/day`,
    cost_per_day: (limit) => `${dollars(limit * 1e6)}/day`,
    cost_per_month: (limit) => `${dollars(limit * 1e6)}/month`,
    cache_ttl: (seconds) => `answers kept ${age(seconds)}`,
  };
  const limits = Object.entries(say)
    .filter(([name]) => key[name])
    .map(([name, words]) => words(key[name]));
  return [...limits, ...(key.allowed_models.length ? [`models ${key.allowed_models.join(", ")}`] : [])].join(" · ");
}

/** `key`: the one to change. `owner`: whether its maker may say whose it is. `submit` may raise what it is refused for. */
export function keyForm({ key, action, testid, owner = false, submit, cancel }) {
  const problem = el("p", { class: "bad", role: "alert" });
  const save = el("button", { class: "primary", test: testid }, action);
  const form = el(
    "form",
    { class: "key-form" },
    field("Name", {
      name: "key_name",
      required: true,
      maxlength: 100,
      value: key?.key_name,
      autofocus: true,
      test: "key-name",
    }),
    owner && field("Owner’s email", { name: "email", type: "email", placeholder: "you" }),
    el(
      "div",
      { class: "pairs" },
      LIMITS.map((limit) => number(limit, key)),
    ),
    field("Allowed models", {
      name: "allowed_models",
      placeholder: "all; or gpt-4o*, claude-*",
      value: key?.allowed_models.join(", "),
    }),
    field("Expires", {
      name: "expires_at",
      type: "datetime-local",
      value: key?.expires_at ? local(key.expires_at) : null,
    }),
    problem,
    el("div", { class: "actions" }, button("Cancel", cancel, { test: "cancel" }), save),
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    save.disabled = true;
    write(problem, "");
    try {
      await submit(form);
    } catch (error) {
      write(problem, error.message);
    }
    save.disabled = false;
  });
  return form;
}

const field = (label, attributes) => el("label", {}, label, el("input", attributes));

function number([name, label, missing, none = "no limit"], key) {
  const attributes = { name, type: "number", min: 0, step: DECIMALS.includes(name) ? "any" : 1, inputmode: "decimal" };
  return field(label, { ...attributes, placeholder: key ? none : missing, value: key?.[name] || null });
}

/** What the API is to be told: of a new key what was filled in, of another what differs from it. */
export function changesOf(form, key) {
  const given = new FormData(form);
  const text = (name) => (given.get(name) ?? "").trim();
  const wanted = {
    key_name: text("key_name"),
    allowed_models: text("allowed_models")
      .split(",")
      .map((model) => model.trim())
      .filter(Boolean),
    expires_at: text("expires_at") ? new Date(text("expires_at")).toISOString() : null,
    ...Object.fromEntries(LIMITS.map(([name]) => [name, Number(text(name))])),
  };
  if (!key) {
    const said = Object.entries({ email: text("email"), ...wanted }).filter(
      ([name, value]) => (value?.length ?? value) || text(name) === "0",
    );
    return Object.fromEntries(said);
  }
  const before = { ...key, expires_at: key.expires_at ? new Date(local(key.expires_at)).toISOString() : null };
  return Object.fromEntries(
    Object.entries(wanted).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(before[name])),
  );
}

/** A moment as an input of the reader's zone has it: to the minute. */
function local(iso) {
  const at = new Date(iso);
  return new Date(at.getTime() - at.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
}
