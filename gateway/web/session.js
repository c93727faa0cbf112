// Who is at the page.

import { ask } from "./api.js";

let account = null;

/** { user_id, email, role } of who is signed in. */
export const me = () => account;

/** Who is signed in already, or null. */
export async function remembered() {
  account = await ask("/auth/session").catch((error) => {
    if (error.status !== 401) throw error;
    return null;
  });
  return account;
}

export async function signIn(email, password) {
  account = await ask("/auth/session", { method: "POST", body: { email, password } });
  return account;
}

export async function signOut() {
  await ask("/auth/session", { method: "DELETE" });
  account = null;
}
