// Dialogs: the browser's own <dialog> keeps the focus inside, closes on Escape and gives the focus back.

import { button, el } from "./dom.js";

let last = 0;

/** Opens one; resolves when it is closed. `make(close)` gives its content; Escape does not close what is `kept`. */
export function openDialog(title, make, { wide = false, kept = false } = {}) {
  last += 1;
  const label = `dialog-${last}`;
  return new Promise((resolve) => {
    const dialog = el("dialog", { "aria-labelledby": label, class: wide ? "wide" : null });
    const close = (result) => {
      dialog.result = result;
      dialog.close();
    };
    dialog.append(el("h2", { id: label }, title), ...[make(close)].flat());
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.result);
    });
    dialog.addEventListener("keydown", (event) => kept && event.key === "Escape" && event.preventDefault());
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Asks before something that cannot be undone; true when the answer is yes. */
export async function confirmed(title, words, action) {
  const answer = await openDialog(title, (close) => [
    el("p", {}, words),
    el(
      "div",
      { class: "actions" },
      button("Cancel", () => close(false), { test: "cancel", autofocus: true }),
      button(action, () => close(true), { test: "confirm", class: "danger" }),
    ),
  ]);
  return answer === true;
}
