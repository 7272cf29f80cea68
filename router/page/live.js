// The live view: asks for the counters every two seconds, and plots what happened between.
import { ask } from "./api.js";
import { added, quantile, rate, read, share, sum } from "./counters.js";
import { by, element } from "./dom.js";
import { count, exact, percent, seconds } from "./format.js";

const EVERY = 2000, WINDOW = 10, MOST = 1800;

// ---- plots ----

const PLOTS = [
  { title: "Tokens a second", show: count, names: ["generated", "prompt", "cached"],
    take: (n, t) => [rate(n, t, "generation_tokens"), rate(n, t, "prompt_tokens"), rate(n, t, "prompt_tokens_cached")] },
  { title: "Time to first token", show: seconds, names: ["p50", "p99"], wide: true,
    take: (n, t) => [0.5, 0.99].map((q) => quantile(n, t, q, "time_to_first_token_seconds")) },
  { title: "Time between tokens", show: seconds, names: ["p50", "p99"], wide: true,
    take: (n, t) => [0.5, 0.99].map((q) => quantile(n, t, q, "inter_token_latency_seconds")) },
  { title: "Sequences", show: count, names: ["running", "waiting"],
    take: (n) => [sum(n, "num_requests_running"), sum(n, "num_requests_waiting")] },
  { title: "KV blocks in use", show: percent, names: ["device", "CPU"], most: 1,
    take: (n) => [share(sum(n, "kv_blocks_used"), sum(n, "kv_blocks")), share(sum(n, "cpu_kv_blocks_used"), sum(n, "cpu_kv_blocks"))] },
  { title: "Prefix cache hits", show: percent, names: ["of prompt tokens"], most: 1, wide: true,
    take: (n, t) => [share(added(n, t, "prefix_cache_hits"), added(n, t, "prefix_cache_queries"))] },
  { title: "Requests set aside, a second", show: count, names: ["swapped", "recomputed", "moved"],
    take: (n, t) => [rate(n, t, "preemptions_by_kind", null, { kind: "swap" }),
      rate(n, t, "preemptions_by_kind", null, { kind: "recompute" }), rate(n, t, "requests_moved")] },
  { title: "Time of a step", show: seconds, names: ["p50", "p99"], wide: true,
    take: (n, t) => [0.5, 0.99].map((q) => quantile(n, t, q, "step_time_seconds")) },
  { title: "Answers a second", show: count, names: ["2xx", "4xx", "5xx"],
    take: (n, t) => [/^2/, /^4/, /^5/].map((status) => rate(n, t, "http_requests", null, { handler: /^\/v1\/.*completions/, status }) ?? 0) },
];
const COLOURS = ["--a", "--b", "--c"];
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const times = [];

function prepare() {
  for (const plot of PLOTS) {
    const card = element("article", by("plots"), "", "plot");
    element("h3", card, plot.title);
    const legend = element("div", card, "", "legend");
    plot.values = plot.names.map((name, i) => {
      const item = element("span", legend);
      element("i", item, "", `i${i}`);
      item.append(name);
      return element("b", item, "–");
    });
    plot.place = element("div", card);
    plot.data = plot.names.map(() => []);
  }
}

function draw(plot) {
  const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
  const line = (label, i) => ({ label, stroke: colour(COLOURS[i]), width: 1.6, points: { show: false },
    fill: i ? undefined : `${colour(COLOURS[i])}1c`, spanGaps: false });
  plot.chart?.destroy();
  plot.chart = new uPlot({
    width: plot.place.clientWidth || 380, height: 150, legend: { show: false }, padding: [10, 6, 0, 0],
    cursor: { sync: { key: "manta" }, y: false, points: { size: 6 } },
    scales: { x: { time: true, range: () => range() }, y: { range: (_, low, high) => [0, plot.most ?? Math.max(high * 1.15, plot.show === seconds ? 1e-3 : 1)] } },
    axes: [{ ...axis, size: 26, space: 70, values: (_, ticks) => ticks.map(clock) }, { ...axis, size: 52, values: (_, ticks) => ticks.map(plot.show) }],
    series: [{}, ...plot.names.map(line)],
    hooks: { setCursor: [(chart) => tell(plot, chart.cursor.idx)] },
  }, [times, ...plot.data], plot.place);
}

// The time that was chosen, or what there is of it.
function range() {
  const end = times[times.length - 1] ?? Date.now() / 1000;
  return [Math.max(end - Number(by("span").value), Math.min(times[0] ?? end, end - 60)), end];
}
const clock = (t) => new Date(t * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: range()[0] > Date.now() / 1000 - 240 ? "2-digit" : undefined, hour12: false });

function tell(plot, index) {
  plot.data.forEach((values, i) => { plot.values[i].textContent = plot.show(values[index ?? values.length - 1]); });
}

export function redraw(anew = false) {
  if (by("live").hidden || !window.uPlot) return;
  for (const plot of PLOTS) {
    const width = plot.place.clientWidth;
    if (!plot.chart || anew) draw(plot);
    else if (plot.chart.width !== width) plot.chart.setSize({ width, height: 150 });
    else plot.chart.setData([times, ...plot.data]);
    tell(plot, plot.chart.cursor.idx);
  }
}

// ---- numbers ----

const TILES = [
  ["Tokens generated", (n, t) => count(rate(n, t, "generation_tokens")), "/s"],
  ["First token, p50", (n, t) => seconds(quantile(n, t, 0.5, "time_to_first_token_seconds"))],
  ["Between tokens, p50", (n, t) => seconds(quantile(n, t, 0.5, "inter_token_latency_seconds"))],
  ["Running", (n) => count(sum(n, "num_requests_running"))],
  ["Waiting", (n) => count(sum(n, "num_requests_waiting"))],
  ["KV blocks in use", (n) => percent(share(sum(n, "kv_blocks_used"), sum(n, "kv_blocks")))],
  ["Tokens in all", (n) => count(sum(n, "generation_tokens"))],
  ["Completions", (n) => count(sum(n, "request_success"))],
];

function tiles(now, then) {
  const place = by("tiles");
  if (!place.children.length) {
    for (const [name, , unit] of TILES) {
      const tile = element("div", place, "", "tile");
      element("span", tile, name);
      element("b", tile, "–");
      if (unit) element("small", tile, unit);
    }
  }
  TILES.forEach(([, take], i) => { place.children[i].querySelector("b").textContent = take(now, then); });
}

const stateOf = (engine) => (!engine.healthy ? "unhealthy" : engine.draining ? "draining" : engine.recovering ? "recovering" : "healthy");
const blocks = (now, name, id) => [sum(now, `${name}_used`, id), sum(now, name, id)];
const FACTS = [
  ["num_requests_running", "Running", (n, t, id) => exact(sum(n, "num_requests_running", id))],
  ["num_requests_waiting", "Waiting", (n, t, id) => exact(sum(n, "num_requests_waiting", id))],
  ["generation_tokens", "Tokens generated", (n, t, id) => exact(sum(n, "generation_tokens", id))],
  ["prompt_tokens", "Prompt tokens", (n, t, id) => exact(sum(n, "prompt_tokens", id))],
  ["preemptions_by_kind", "Preemptions", (n, t, id) => exact(sum(n, "preemptions_by_kind", id))],
  ["prefix", "Prefix hits, in all", (n, t, id) => percent(share(sum(n, "prefix_cache_hits", id), sum(n, "prefix_cache_queries", id)))],
  ["speed", "Tokens a second", (n, t, id) => count(rate(n, t, "generation_tokens", id))],
  ["step", "Step, p50", (n, t, id) => seconds(quantile(n, t, 0.5, "step_time_seconds", id))],
  ["cpu_kv_blocks", "CPU blocks", (n, t, id) => blocks(n, "cpu_kv_blocks", id).map(exact).join(" / ")],
  ["kv_blocks", "Device blocks", (n, t, id) => blocks(n, "kv_blocks", id).map(exact).join(" / ")],
];

function engines(now, then) {
  const place = by("engines"), known = new Set();
  for (const engine of now.answer.engines) {
    const id = engine.engine_id;
    known.add(`engine-${id}`);
    const card = by(`engine-${id}`) ?? newEngine(place, id);
    const state = card.querySelector(".pill");
    state.textContent = stateOf(engine);
    state.className = `pill ${stateOf(engine) === "healthy" ? "good" : "bad"}`;
    FACTS.forEach(([, , take], i) => { card.querySelectorAll("dd")[i].textContent = take(now, then, id); });
    const [used, all] = blocks(now, "kv_blocks", id);
    card.querySelector("progress").value = share(used, all) ?? 0;
  }
  for (const card of [...place.children]) if (!known.has(card.id)) card.remove();
}

function newEngine(place, id) {
  const card = element("article", place, "", "engine");
  card.id = `engine-${id}`;
  const head = element("h3", card);
  element("code", head, id);
  element("span", head, "", "pill");
  const list = element("dl", card);
  for (const [key, name] of FACTS) {
    element("dt", list, name);
    element("dd", list).dataset.fact = key;
  }
  element("progress", list).max = 1;
  return card;
}

function status(text, good) {
  by("state").textContent = text;
  by("state").className = `pill ${good ? "good" : "bad"}`;
}

// ---- the loop ----

const past = [];

async function look() {
  let answer;
  try {
    answer = await ask("dashboard/data");
    if (!answer.ok) throw new Error(answer.status);
    answer = await answer.json();
  } catch { status("no answer; trying again", false); return; }
  const now = read(answer, performance.now() / 1000);
  past.push(now);
  while (past.length > 1 && now.time - past[0].time > WINDOW + 1) past.shift();
  const then = past[0];
  by("version").textContent = answer.version;
  by("model").textContent = [...new Set(answer.engines.map((engine) => engine.model))].join(", ");
  const well = answer.engines.filter((engine) => stateOf(engine) === "healthy").length;
  status(`${well} of ${answer.engines.length} engine${answer.engines.length === 1 ? "" : "s"} healthy`, well > 0 && well === answer.engines.length);
  times.push(Date.now() / 1000);
  for (const plot of PLOTS) plot.take(now, then).forEach((value, i) => plot.data[i].push(past.length > 1 ? value : null));
  if (times.length > MOST) { times.shift(); for (const plot of PLOTS) plot.data.forEach((values) => values.shift()); }
  tiles(now, then);
  engines(now, then);
  redraw();
}

export async function start() {
  prepare();
  by("span").addEventListener("change", () => redraw());
  addEventListener("resize", () => redraw());
  for (;;) {
    await look();
    await new Promise((done) => setTimeout(done, EVERY));
  }
}
