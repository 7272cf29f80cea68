// What the server has counted, and what was added between two looks at it.

// One answer as series: name, labels and engine to value (or to a histogram's counts).
export function read(answer, now) {
  const series = new Map();
  for (const { labels, metrics } of answer.sources) {
    const source = labels.engine ?? labels.ingress;
    for (const metric of metrics) {
      for (const sample of metric.samples) {
        const tags = Object.fromEntries(metric.labels.map((name, i) => [name, sample.labels[i]]));
        series.set([source, metric.name, ...sample.labels].join("|"),
          { source, name: metric.name, tags, value: sample.value, counts: sample.counts, bounds: metric.bounds });
      }
    }
  }
  return { time: now, series, answer };
}

const matches = (one, name, source, tags) => one.name === name && (!source || one.source === source)
  && Object.entries(tags).every(([key, value]) => value instanceof RegExp ? value.test(one.tags[key]) : one.tags[key] === value);

export function sum(now, name, source = null, tags = {}) {
  let total = null;
  for (const one of now.series.values()) if (matches(one, name, source, tags)) total = (total ?? 0) + one.value;
  return total;
}

// What was added since ``then``; a source that began anew, or is new, began at nothing.
export function added(now, then, name, source = null, tags = {}) {
  let total = null;
  for (const [key, one] of now.series) {
    if (!matches(one, name, source, tags)) continue;
    const before = then.series.get(key)?.value ?? 0;
    total = (total ?? 0) + (one.value >= before ? one.value - before : one.value);
  }
  return total;
}

export const rate = (now, then, ...what) => {
  const change = added(now, then, ...what);
  return change === null || now.time <= then.time ? null : change / (now.time - then.time);
};

export function quantile(now, then, q, name, source = null) {
  let counts = null, bounds = [];
  for (const [key, one] of now.series) {
    if (!matches(one, name, source, {})) continue;
    const before = then.series.get(key)?.counts ?? [];
    bounds = one.bounds;
    counts ??= new Array(one.counts.length).fill(0);
    one.counts.forEach((value, i) => { counts[i] += Math.max(0, value - (before[i] ?? 0)); });
  }
  const all = counts?.reduce((a, b) => a + b, 0) ?? 0;
  if (!all) return null;
  let left = q * all;
  for (let i = 0; i < bounds.length; i++) {
    if (counts[i] >= left) {
      const low = i ? bounds[i - 1] : 0;
      return low + (bounds[i] - low) * (counts[i] ? left / counts[i] : 1);
    }
    left -= counts[i];
  }
  return bounds[bounds.length - 1];
}

export const share = (part, whole) => (whole ? part / whole : null);
