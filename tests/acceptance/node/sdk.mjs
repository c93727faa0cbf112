// The official npm SDK against a running gateway, for one model. Prints one JSON object a check; the Python test reads them.
// GATEWAY_BASE_URL and GATEWAY_API_KEY as in .gateway/dev.env; MODEL may hold directions for the mock provider.
import OpenAI from "openai";

const { GATEWAY_BASE_URL: baseURL, GATEWAY_API_KEY: apiKey, MODEL: model } = process.env;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello." }];
const weather = {
  type: "function",
  function: { name: "get_weather", parameters: { type: "object", properties: { city: { type: "string" } } } },
};
const time = { type: "function", function: { name: "get_time", parameters: { type: "object", properties: {} } } };
const pixel =
  "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg==";

const create = (query, more = {}) =>
  client.chat.completions.create({ model: query ? `${model}?${query}` : model, messages, ...more });

const checks = {
  async stream() {
    const chunks = [];
    for await (const chunk of await create("", { stream: true, stream_options: { include_usage: true } })) chunks.push(chunk);
    const whole = await create("");
    const text = chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? "").join("");
    return {
      same_text: text === whole.choices[0].message.content && text.length > 10,
      finish: chunks.map((chunk) => chunk.choices[0]?.finish_reason).filter(Boolean),
      same_usage: chunks.at(-1).usage.total_tokens === whole.usage.total_tokens,
      many_chunks: chunks.length > 5,
    };
  },
  async tools() {
    const runner = client.chat.completions.stream({
      model, tools: [weather], messages: [{ role: "user", content: "Use the tool for Paris." }],
    });
    const { message, finish_reason } = (await runner.finalChatCompletion()).choices[0];
    const [call] = message.tool_calls;
    const answer = await client.chat.completions.create({
      model, tools: [weather],
      messages: [
        { role: "user", content: "Use the tool for Paris." },
        { role: "assistant", tool_calls: message.tool_calls },
        { role: "tool", tool_call_id: call.id, content: "18 degrees and rain" },
      ],
    });
    return {
      finish_reason, calls: message.tool_calls.length, name: call.function.name,
      city: typeof JSON.parse(call.function.arguments).city,
      used: answer.choices[0].message.content.includes("18 degrees and rain"),
    };
  },
  async parallel_tools() {
    const runner = client.chat.completions.stream({
      model: `${model}?case=parallel_tools`, tools: [weather, time], messages,
    });
    const { message } = (await runner.finalChatCompletion()).choices[0];
    return {
      names: message.tool_calls.map((call) => call.function.name),
      ids: new Set(message.tool_calls.map((call) => call.id)).size,
    };
  },
  async structured_output() {
    const schema = { type: "object", properties: { name: { type: "string" }, count: { type: "integer" } }, required: ["name", "count"], additionalProperties: false };
    const answer = await create("", { response_format: { type: "json_schema", json_schema: { name: "answer", strict: true, schema } } });
    const parsed = JSON.parse(answer.choices[0].message.content);
    return { name: typeof parsed.name, count: Number.isInteger(parsed.count) };
  },
  async image() {
    const content = [{ type: "text", text: "What is this?" }, { type: "image_url", image_url: { url: pixel } }];
    const answer = await client.chat.completions.create({ model, messages: [{ role: "user", content }] });
    return { seen: answer.choices[0].message.content.includes("1 image") };
  },
  async early_break() {
    let seen = 0;
    for await (const _ of await create("case=long&pace_ms=10", { stream: true })) if (++seen === 5) break;
    return { seen };
  },
  async broken_stream() {
    try {
      for await (const _ of await create("fault=cut&after=3", { stream: true }));
      return { raised: false };
    } catch (error) {
      return { raised: error instanceof OpenAI.APIError, code: error.code };
    }
  },
  async errors() {
    const raised = {};
    const note = async (name, call) => {
      try {
        await call();
        raised[name] = "nothing";
      } catch (error) {
        raised[name] = `${error.constructor.name} ${error.status}`;
      }
    };
    for (const status of [400, 404, 429, 500, 503]) await note(status, () => create(`status=${status}`, { stream: true }));
    const stranger = new OpenAI({ baseURL, apiKey: "aig_wrong", maxRetries: 0 });
    await note(401, () => stranger.chat.completions.create({ model, messages }));
    return raised;
  },
};

for (const [name, check] of Object.entries(checks)) {
  let result;
  try {
    result = await check();
  } catch (error) {
    result = { failed: String(error) };
  }
  console.log(JSON.stringify({ check: name, ...result }));
}
