// Tools with the official client for Node: node tools.mjs URL MODEL. Prints a line of JSON.
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const ask = (content) => [{ role: "user", content }];
const tools = [
  { type: "function", function: { name: "get_weather", parameters: { type: "object", properties: {} } } },
  { type: "function", function: { name: "get_time" } },
];
const found = {};

const answer = await client.chat.completions.create({ model, messages: ask("weather"), tools });
const called = answer.choices[0].message.tool_calls[0].function;
found.whole = {
  name: called.name, arguments: JSON.parse(called.arguments), reason: answer.choices[0].finish_reason,
};

const stream = client.chat.completions.stream({ model, messages: ask("two"), tools });
const last = await stream.finalChatCompletion();
found.streamed = last.choices[0].message.tool_calls.map((c) => `${c.function.name} ${c.function.arguments}`);

// The client's own loop: it calls the function and sends the result back, until there is an answer.
found.ran = [];
const runner = client.chat.completions.runTools({
  model,
  messages: ask("weather"),
  stream: true,
  tools: [{
    type: "function",
    function: {
      name: "get_weather",
      parse: JSON.parse,
      function: ({ city }) => { found.ran.push(city); return "21"; },
      parameters: { type: "object", properties: { city: { type: "string" } } },
    },
  }],
});
found.ran.push(await runner.finalContent());
console.log(JSON.stringify(found));
