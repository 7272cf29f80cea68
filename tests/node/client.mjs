// The official client for Node on a server: node client.mjs URL KEY [busy]. Prints a line of JSON.
import OpenAI from "openai";

const [url, key, busy] = process.argv.slice(2);
const options = { baseURL: `${url}/v1`, maxRetries: 0 };
const client = new OpenAI({ ...options, apiKey: key });
const found = {};

const raised = async (call) => {
  try {
    await call();
  } catch (error) {
    return { type: error.constructor.name, status: error.status, code: error.code, message: error.message };
  }
  return null;
};

if (busy) {
  found.tooMany = await raised(() => client.completions.create({ model: "manta-demo", prompt: "x" }));
  console.log(JSON.stringify(found));
  process.exit(0);
}

found.models = (await client.models.list()).data.map((model) => model.id);
const model = found.models[0];
const messages = [{ role: "user", content: "What is the capital of France?" }];

const chat = await client.chat.completions.create({ model, messages, temperature: 0 });
found.chat = chat.choices[0].message.content;
found.chatUsage = chat.usage;

const stream = await client.chat.completions.create({
  model, messages, temperature: 0, stream: true, stream_options: { include_usage: true },
});
found.streamed = "";
for await (const chunk of stream) {
  found.streamed += chunk.choices[0]?.delta?.content ?? "";
  found.streamUsage = chunk.usage ?? found.streamUsage;
}

const helper = client.chat.completions.stream({ model, messages, temperature: 0 });
found.helper = await helper.finalContent();

const completion = await client.completions.create({
  model, prompt: "The capital of France is", max_tokens: 8, temperature: 0, logprobs: 2, n: 1,
});
found.completion = completion.choices[0].text;
found.logprobs = completion.choices[0].logprobs.tokens.length;
found.completionTokens = completion.usage.completion_tokens;

const stopped = new AbortController();
const endless = await client.completions.create(
  { model, prompt: "Once upon a time", max_tokens: 1500, stream: true },
  { signal: stopped.signal },
);
found.beforeAbort = 0;
for await (const chunk of endless) {
  found.beforeAbort += 1;
  if (found.beforeAbort === 3) stopped.abort();
}

found.unauthorized = await raised(() => new OpenAI({ ...options, apiKey: "wrong" }).models.list());
found.tooLong = await raised(() =>
  client.completions.create({ model, prompt: "word ".repeat(5000), max_tokens: 5 }));
found.noModel = await raised(() => client.completions.create({ model: "nobody", prompt: "x" }));
found.unknownField = await raised(() =>
  client.completions.create({ model, prompt: "x", max_tokenz: 5 }));

console.log(JSON.stringify(found));
