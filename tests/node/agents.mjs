// Agents' protocols with their clients for Node: node agents.mjs URL MODEL. Prints a line of JSON.
import Anthropic from "@anthropic-ai/sdk";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
globalThis.AI_SDK_LOG_WARNINGS = false; // they would be lines before ours
const found = {};

// ---- OpenAI's Responses ----

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const functions = [{ type: "function", name: "look_up", parameters: { type: "object" }, strict: false }];
const response = await openai.responses.create({ model, input: "ponder", tools: functions });
found.items = response.output.map((item) => item.type);
const stream = openai.responses.stream({ model, input: "ponder", tools: functions });
found.events = 0;
for await (const event of stream) {
  found.events += event.sequence_number === found.events ? 1 : 1000;
}
found.streamedItems = (await stream.finalResponse()).output.map((item) => item.type);

// ---- Anthropic's Messages ----

const anthropic = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const asked = {
  model, max_tokens: 500, messages: [{ role: "user", content: "ponder" }],
  tools: [{ name: "look_up", input_schema: { type: "object" } }],
};
const message = await anthropic.messages.create(asked);
found.blocks = message.content.map((block) => block.type);
const streamed = await anthropic.messages.stream(asked).finalMessage();
found.streamedBlocks = streamed.content.map((block) => block.type);
found.input = streamed.content.at(-1).input;
found.stopReason = streamed.stop_reason;
try {
  await anthropic.messages.create({ ...asked, model: "nobody" });
} catch (error) {
  found.error = [error.constructor.name, error.status, error.error.error.type];
}

// ---- Vercel's AI SDK, over Responses and over chats ----

const ran = [];
const tools = {
  look_up: tool({
    inputSchema: z.object({ at: z.string() }),
    execute: async ({ at }) => { ran.push(at); return "21"; },
  }),
};
const responses = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" })(model);
const chats = createOpenAICompatible({ name: "manta", baseURL: `${url}/v1`, apiKey: "none" })(model);
found.texts = [];
for (const provider of [responses, chats]) {
  const options = {
    model: provider, prompt: "ponder", tools, stopWhen: stepCountIs(3), maxRetries: 0,
    providerOptions: { openai: { store: false } }, // else it refers to items by their ids
  };
  found.texts.push((await generateText(options)).text);
  const result = streamText(options);
  found.texts.push(await result.text);
}
found.ran = ran;

console.log(JSON.stringify(found));
