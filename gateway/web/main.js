// Puts the page together: who is there, which section is shown, light or dark.

import { byId, complain, fields, write } from "./dom.js";
import { keys } from "./keys.js";
import { startLive, stopLive } from "./live.js";
import { overview } from "./overview.js";
import { playground } from "./playground.js";
import { me, remembered, signIn, signOut } from "./session.js";
import { usage } from "./usage.js";

const SECTIONS = { overview, keys, usage, playground };

let shown = "";
let owner = ""; // whose view it is

// --- who is there

async function start() {
  byId("sign-in").addEventListener("submit", enter);
  byId("sign-out").addEventListener("click", leave);
  document.addEventListener("signed-out", expired);
  document.addEventListener("visibilitychange", lookWhoIsThere);
  window.addEventListener("focus", lookWhoIsThere);
  window.addEventListener("hashchange", route);
  // As a link it would change the address, which says what section this is.
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    byId("main").focus();
  });
  buildTheme();
  try {
    if (await remembered()) open();
    else askWho("");
  } catch (error) {
    askWho(error.message);
  }
}

async function enter(event) {
  event.preventDefault();
  const form = byId("sign-in");
  const button = form.querySelector("button");
  button.disabled = true;
  write(byId("sign-in-error"), "");
  try {
    const { email } = fields(form);
    await signIn(email, form.elements.password.value); // a password may begin with a space
    form.reset();
    open();
  } catch (error) {
    write(byId("sign-in-error"), error.status === 401 ? "Wrong email or password." : `${error.message}.`);
  }
  button.disabled = false;
}

/** Shows the view; after a session that expired the same one, unless somebody else signed in. */
function open() {
  if (owner && owner !== me().user_id) return location.reload();
  owner = me().user_id;
  write(byId("who"), me().email);
  byId("who").title = `${me().email}, ${me().role}`;
  byId("sign-in").hidden = true;
  byId("app").hidden = false;
  if (me().role === "admin") startLive();
  route();
  return undefined;
}

function askWho(problem) {
  byId("app").hidden = true;
  byId("sign-in").hidden = false;
  write(byId("sign-in-error"), problem);
  byId("sign-in").elements.email.focus();
}

function expired() {
  if (byId("app").hidden) return;
  close();
  write(byId("sign-in-why"), "Your session has ended. Sign in to go on where you were.");
  askWho("");
  byId("sign-in").elements.email.value = byId("who").textContent;
}

/** Another tab may have signed out, or somebody else in: the cookie is one for all tabs. */
async function lookWhoIsThere() {
  if (document.hidden || byId("app").hidden) return;
  const now = await remembered().catch(me); // nobody any more: that is heard as "signed-out"
  if (now && now.user_id !== owner) location.reload();
}

async function leave() {
  try {
    await signOut();
    close();
    location.reload(); // nothing of what was shown stays
  } catch (error) {
    complain("Sign out", error);
  }
}

function close() {
  stopLive();
  SECTIONS[shown]?.hide();
  shown = "";
  for (const dialog of document.querySelectorAll("dialog")) dialog.close();
}

// --- which section

function route() {
  if (byId("app").hidden) return;
  const [asked, parameters] = location.hash.slice(1).split("?");
  const name = Object.hasOwn(SECTIONS, asked) ? asked : "overview";
  if (shown && shown !== name) {
    SECTIONS[shown].hide();
    window.scrollTo(0, 0);
  }
  for (const section of Object.keys(SECTIONS)) {
    byId(`view-${section}`).hidden = section !== name;
    const link = document.querySelector(`nav a[href="#${section}"]`);
    if (section === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${name[0].toUpperCase()}${name.slice(1)} · AI Gateway`;
  shown = name;
  SECTIONS[name].show(Object.fromEntries(new URLSearchParams(parameters)));
}

// --- light or dark

const NEXT = { system: "light", light: "dark", dark: "system" };

function buildTheme() {
  const root = document.documentElement;
  const button = byId("theme");
  const say = () => {
    const chosen = root.dataset.theme ?? "system";
    write(button, { system: "◐", light: "☀", dark: "☾" }[chosen]);
    button.setAttribute("aria-label", `Theme: ${chosen}`);
    button.title = `Theme: ${chosen}`;
  };
  button.addEventListener("click", () => {
    const chosen = NEXT[root.dataset.theme ?? "system"];
    if (chosen === "system") delete root.dataset.theme;
    else root.dataset.theme = chosen;
    try {
      localStorage.setItem("theme", chosen);
    } catch {
      // storage is switched off: it holds until the page is closed
    }
    say();
    document.dispatchEvent(new Event("theme"));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    document.dispatchEvent(new Event("theme")),
  );
  say();
}

start();
