// Server-sent events out of a response: https://html.spec.whatwg.org/multipage/server-sent-events.html
// (EventSource cannot send a body.)

/** The `data` of each event, as it is complete. */
export async function* readEvents(body) {
  let rest = "";
  let data = [];
  for await (const text of decoded(body)) {
    const lines = (rest + text).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      } else if (line.startsWith("data:")) {
        data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
  }
  if (rest === "\r" && data.length) yield data.join("\n"); // it might have been half of a line's end
}

/** Not every browser can iterate over a stream. */
async function* decoded(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => undefined); // whoever stopped reading wants no more
  }
}
