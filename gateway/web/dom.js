// Elements without markup: what is put in is text or an element, so nothing that a client chose becomes a tag.

/**
 * An element. A function is a listener (`click: …`), null and false are left out, true is an attribute without value,
 * and `test` is the name that tests know it by.
 */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(key, value);
    else element.setAttribute(key === "test" ? "data-testid" : key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A button that submits nothing. */
export const button = (words, click, attributes = {}) => el("button", { type: "button", click, ...attributes }, words);

export const byId = (id) => document.getElementById(id);

/** Writes only what changed: screen readers, selections and layout are left alone by the rest. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A number as people read it, and for programs as it is. */
export function writeNumber(element, text, value) {
  write(element, text);
  element.dataset.value = value ?? "";
}

let fading = 0;

/** A sentence at the foot of the page: read aloud, and gone after `seconds`; 0: it stays until the next. */
export function toast(text, seconds = 6) {
  const place = byId("toast");
  clearTimeout(fading);
  write(place, text);
  if (text && seconds) fading = setTimeout(() => write(place, ""), seconds * 1000);
}

/** A problem in a sentence; but not that nobody is signed in any more (that is seen), nor what was given up. */
export function complain(what, error) {
  if (error.status !== 401 && error.name !== "AbortError") toast(`${what}: ${error.message}`);
}

/** A button that copies what `text()` says, and says that it did. */
export function copyButton(text, attributes = {}) {
  const copy = async ({ target }) => {
    write(target, (await copied(text())) ? "Copied" : "Select and copy it");
    setTimeout(() => write(target, "Copy"), 2000);
  };
  return button("Copy", copy, { class: "quiet", ...attributes });
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text); // only where the page came by https or from this machine
    return true;
  } catch {
    return false;
  }
}

/** A command to be pasted. */
export const command = (text) =>
  el(
    "div",
    { class: "command" },
    el("pre", { tabindex: "0" }, el("code", {}, text)),
    copyButton(() => text),
  );

/** Says what is not there, and what to do about it. */
export const empty = (section, ...words) => el("p", { class: "empty muted", test: `empty-${section}` }, ...words);

/** One of several ranges, as buttons; `chosen` is told. */
export function segments(place, names, current, chosen) {
  const buttons = names.map((name) => button(name, () => choose(name), { test: `range-${name}` }));
  const mark = (name) => buttons.forEach((one, i) => one.setAttribute("aria-pressed", String(names[i] === name)));
  const choose = (name) => (mark(name), chosen(name));
  mark(current);
  place.replaceChildren(...buttons);
}

/** What a form holds, trimmed, without what was left empty. */
export function fields(form) {
  const given = [...new FormData(form)].map(([name, value]) => [name, value.trim()]);
  return Object.fromEntries(given.filter(([, value]) => value !== ""));
}
