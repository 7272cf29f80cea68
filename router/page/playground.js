// The playground: a chat with the model, streamed, with the probability of each token.
import { ask, post, problem } from "./api.js";
import { by, element } from "./dom.js";

const form = by("sampling"), messages = by("messages"), hover = by("hover");
const said = []; // the chat so far, as the API has it
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty"];
const ALTERNATIVES = 5;
let running = null; // what stops the answer that is being written
let opened = false;

export async function open() {
  by("text").focus();
  if (opened) return;
  opened = true;
  try {
    const answer = await ask("v1/models");
    if (!answer.ok) throw new Error(answer.status);
    for (const model of (await answer.json()).data) element("option", form.elements.model, model.id).value = model.id;
  } catch { opened = false; }
}

function request() {
  const body = { messages: [...said], stream: true, stream_options: { include_usage: true } };
  const fields = form.elements;
  if (fields.model.value) body.model = fields.model.value;
  if (fields.system.value.trim()) body.messages.unshift({ role: "system", content: fields.system.value });
  for (const name of NUMBERS) if (fields[name].value !== "") body[name] = Number(fields[name].value);
  if (fields.stop.value) body.stop = [fields.stop.value];
  if (fields.logprobs.checked) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  return body;
}

// ---- the answer as it comes ----

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

class Shown {
  constructor(started) {
    this.box = element("div", messages, "", "message assistant");
    this.body = element("div", this.box, "", "body");
    this.facts = element("div", this.box, "", "facts");
    this.started = started;
    this.first = this.last = null;
    this.text = "";
    this.calls = [];
    this.usage = null;
    this.reason = "";
  }

  take(event) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) this.usage = event.usage;
    for (const choice of event.choices ?? []) {
      const { content, reasoning_content: thinking, reasoning, tool_calls: calls } = choice.delta;
      if (thinking ?? reasoning) this.think(thinking ?? reasoning);
      if (calls) this.call(calls);
      if (content) this.write(content, choice.logprobs?.content ?? []);
      if (content || thinking || reasoning || calls) {
        this.last = performance.now();
        this.first ??= this.last;
      }
      this.reason = choice.finish_reason ?? this.reason;
    }
    this.tell();
  }

  write(content, tokens) {
    this.text += content;
    const whole = tokens.map((one) => one.token).join("") === content;
    for (const token of whole ? tokens : []) mark(element("span", this.body, token.token, "token"), token);
    if (whole) return;
    const span = element("span", this.body, content);
    if (tokens.length) { span.className = "token"; mark(span, tokens[0]); }
  }

  think(text) {
    if (!this.thoughts) {
      const box = document.createElement("details");
      box.open = true;
      element("summary", box, "Thinking");
      this.thoughts = element("span", box);
      this.box.insertBefore(box, this.body);
    }
    this.thoughts.append(text);
  }

  call(calls) {
    for (const one of calls) {
      const known = (this.calls[one.index] ??= { name: "", text: "", place: element("pre", null) });
      if (!known.place.parentNode) this.box.insertBefore(known.place, this.facts);
      known.name += one.function?.name ?? "";
      known.text += one.function?.arguments ?? "";
      known.place.textContent = `${known.name}(${known.text})`;
    }
  }

  tell() {
    const facts = [];
    if (this.first !== null) facts.push(`first token ${Math.round(this.first - this.started)} ms`);
    if (this.usage) {
      const tokens = this.usage.completion_tokens;
      if (tokens > 1 && this.last > this.first) facts.push(`${((tokens - 1) / (this.last - this.first) * 1000).toFixed(1)} tokens/s`);
      facts.push(`${tokens} tokens`, `${this.usage.prompt_tokens} of prompt`);
    }
    if (this.reason) facts.push(this.reason);
    this.facts.textContent = facts.join(" · ");
  }
}

// ---- probabilities ----

function mark(span, token) {
  const likely = Math.exp(token.logprob);
  if (likely < 0.9) span.classList.add(likely > 0.5 ? "p1" : likely > 0.1 ? "p2" : "p3");
  span.tabIndex = -1;
  span.probabilities = token;
}

function explain(event) {
  const span = event.target.closest?.(".token");
  hover.hidden = !span;
  if (!span) return;
  const token = span.probabilities, rows = [...(token.top_logprobs ?? [])];
  if (!rows.some((one) => one.token === token.token)) rows.push(token);
  hover.replaceChildren();
  const list = element("div", hover);
  for (const one of rows) {
    const kind = one.token === token.token ? "chosen" : "";
    element("code", list, JSON.stringify(one.token).slice(1, -1), kind);
    element("span", list, `${(Math.exp(one.logprob) * 100).toFixed(1)}%`, kind);
    element("progress", list).value = Math.exp(one.logprob);
  }
  const box = span.getBoundingClientRect(), size = hover.getBoundingClientRect();
  const below = box.bottom + 6 + size.height < innerHeight;
  hover.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 8))}px`;
  hover.style.top = `${below ? box.bottom + 6 : Math.max(8, box.top - size.height - 6)}px`;
}
messages.addEventListener("pointerover", explain);
messages.addEventListener("pointerleave", () => { hover.hidden = true; });
messages.addEventListener("focusin", explain);
messages.addEventListener("scroll", () => { hover.hidden = true; });

// ---- asking ----

async function answer() {
  const stop = new AbortController(), shown = new Shown(performance.now());
  running = stop;
  by("stop").hidden = false;
  by("send").hidden = true;
  try {
    const reply = await post("v1/chat/completions", request(), stop.signal);
    if (!reply.ok) throw new Error(await problem(reply));
    for await (const event of events(reply.body)) {
      const atEnd = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 60;
      shown.take(event);
      if (atEnd) messages.scrollTop = messages.scrollHeight;
    }
  } catch (error) {
    if (stop.signal.aborted) shown.facts.textContent += " · stopped";
    else element("div", shown.box, error.message, "error");
  }
  if (!shown.box.isConnected) said.length = 0; // it was cleared meanwhile
  else if (shown.text) said.push({ role: "assistant", content: shown.text });
  else said.pop(); // so that the question can be asked again
  running = null;
  by("stop").hidden = true;
  by("send").hidden = false;
}

by("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = by("text").value;
  if (!text.trim() || running) return;
  by("text").value = "";
  said.push({ role: "user", content: text });
  element("div", element("div", messages, "", "message user"), text, "body");
  messages.scrollTop = messages.scrollHeight;
  answer();
});
by("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); by("ask").requestSubmit(); }
});
by("stop").addEventListener("click", () => running?.abort());
by("clear").addEventListener("click", () => { running?.abort(); said.length = 0; messages.replaceChildren(); });
