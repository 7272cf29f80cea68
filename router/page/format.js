// Numbers as people read them.

const none = (value) => value === null || value === undefined || Number.isNaN(value);
export const count = (v) => none(v) ? "–" : v >= 1e6 ? `${(v / 1e6).toFixed(2)}M` : v >= 1e4 ? `${(v / 1e3).toFixed(1)}k`
  : Number.isInteger(v) || v >= 100 ? `${Math.round(v)}` : v >= 10 ? v.toFixed(1) : v.toFixed(2);
export const exact = (v) => none(v) ? "–" : v.toLocaleString("en-US");
export const seconds = (v) => none(v) ? "–" : v >= 10 ? `${v.toFixed(1)} s` : v >= 1 ? `${v.toFixed(2)} s`
  : v >= 0.01 ? `${Math.round(v * 1000)} ms` : `${(v * 1000).toFixed(1)} ms`;
export const percent = (v) => none(v) ? "–" : `${(v * 100).toFixed(v < 0.1 && v > 0 ? 1 : 0)}%`;
