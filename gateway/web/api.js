// All that the page asks of the gateway. The visitor's session is a cookie that no script can read.

const PATIENCE = 20_000; // milliseconds for an answer that is not a stream
const AGAIN = 2; // times that a read is repeated when the gateway says that it is busy

/** What the gateway refused, in its own words. `status` 0: it did not answer. */
export class Refused extends Error {
  constructor(status, message, code = "", requestId = "") {
    super(message);
    Object.assign(this, { status, code, requestId });
  }
}

/** The answer's JSON, or null when it has none. Raises Refused; a 401 also tells the page that nobody is signed in. */
export async function ask(path, { method = "GET", body, signal, headers = {} } = {}) {
  for (let tries = 0; ; tries += 1) {
    const response = await send(path, { method, body, signal, headers });
    if (response.ok) return response.status === 204 ? null : response.json();
    const wait = Number(response.headers.get("Retry-After") ?? 1);
    if (response.status !== 503 || method !== "GET" || tries >= AGAIN || wait > 5)
      throw await refusal(response, { signingIn: path === "/auth/session" && method === "POST" });
    await sleep(wait * 1000, signal);
  }
}

/** The response itself, whatever its status; for streams. */
export async function send(path, { method = "GET", body, signal, headers = {}, patience = PATIENCE } = {}) {
  const bounds = [signal, patience ? AbortSignal.timeout(patience) : null].filter(Boolean);
  try {
    return await fetch(path, {
      method,
      headers: body === undefined ? headers : { "Content-Type": "application/json", ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: AbortSignal.any(bounds),
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refused(0, "the gateway does not answer");
  }
}

/** The error of a response. Who signs in gets a 401 for a wrong password: then nobody was signed out by it. */
export async function refusal(response, { signingIn = false } = {}) {
  const said = await response.json().catch(() => ({}));
  // A key that ended while it was being answered signs nobody out.
  const signedOut = response.status === 401 && !signingIn && said.error?.code !== "key_ended";
  if (signedOut) document.dispatchEvent(new Event("signed-out"));
  const message = said.error?.message ?? `the gateway answered ${response.status}`;
  return new Refused(response.status, message, said.error?.code ?? "", response.headers.get("X-Request-Id") ?? "");
}

/** A path with a query; what is empty is left out. */
export function query(path, parameters) {
  const given = Object.entries(parameters).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return given.length ? `${path}?${new URLSearchParams(given)}` : path;
}

let before = Promise.resolve();

/** Questions about usage one after the other: the gateway answers one of an account at a time. */
export function inTurn(question) {
  const answer = before.then(question);
  before = answer.catch(() => undefined);
  return answer;
}

/** Resolves after so long, when the page is looked at again, or at once when `signal` says that it is over. */
export function sleep(ms, signal) {
  return new Promise((resolve) => {
    const over = new AbortController();
    const done = () => {
      over.abort();
      clearTimeout(timer);
      resolve();
    };
    const timer = setTimeout(done, signal?.aborted ? 0 : ms);
    document.addEventListener("visibilitychange", () => document.hidden || done(), { signal: over.signal });
    signal?.addEventListener("abort", done, { signal: over.signal });
  });
}

/** Does `work` every so many seconds while the page is looked at, less often while it fails; until `signal`. */
export async function poll(seconds, work, signal, failed = () => undefined) {
  let pause = seconds;
  while (!signal.aborted) {
    try {
      if (!document.hidden) await work(signal);
      pause = seconds;
    } catch (error) {
      if (signal.aborted) return;
      pause = Math.min(pause * 2, 60);
      failed(error);
    }
    await sleep(pause * 1000, signal);
  }
}
