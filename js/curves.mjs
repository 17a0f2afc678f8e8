// The curves of a run on a canvas: the loss, its running mean, and what monitors measured, each in a panel of its own.
import { t } from "./texts.mjs";

const COLORS = { mean: "#3d8fe8", fixed: "#e8842c", ratio: "#2fa37c", score: "#b069d6", stop: "#e0524d",
  identity: "#3d8fe8", text: "#2fa37c" };
const KEYS = ["ratio", "score", "identity", "text"]; // measurements of monitors: each has a panel
const LIMITS = { ratio: "stops below", score: "improves above", identity: "floor", text: "floor" };

function measured({ entries }, monitor, key) { // [step, value], including measurements before a stage's first step
  const found = entries.flatMap(({ step, start, measures }) => [[step - 1, start], [step, measures]]);
  return found.map(([step, all]) => [step, all?.[monitor]?.[key]]).filter(([, value]) => value !== undefined);
}

export function monitors({ entries }) { // those with curves: [name, the key that has a threshold or a floor]
  const found = new Map();
  for (const [name, values] of entries.flatMap((entry) => Object.entries(entry.measures ?? {}))) {
    for (const key of KEYS) if (key in values) found.set(`${name} ${key}`, [name, key]);
  }
  return [...found.values()];
}

function mean(entries) { // running mean over a twentieth of the steps, never across stages
  const length = Math.max(8, Math.round(entries.length / 20));
  let sum = 0, from = 0;
  return entries.map(({ step, stage, loss }, i) => {
    if (stage !== entries[from].stage) [sum, from] = [0, i];
    sum += loss;
    if (i - from >= length) sum -= entries[from++].loss;
    return [step, sum / (i - from + 1)];
  });
}

function panels(run) {
  const raw = run.entries.map(({ step, loss }) => [step, loss]);
  const lines = [
    { name: t("loss"), alpha: 0.35, width: 0.9, points: raw, rough: true },
    { name: t("mean"), color: COLORS.mean, width: 1.7, points: mean(run.entries) },
  ];
  const others = monitors(run).map(([monitor, key]) => {
    const fixed = measured(run, monitor, "fixed_loss");
    const name = `${monitor.replace(/ Early Stopping|Pick by Score/, "")} ${key}`.trim();
    if (fixed.length) lines.push({ name: t("fixed batch"), color: COLORS.fixed, width: 1.7, points: fixed });
    const value = { name, color: COLORS[key], width: 1.7, points: measured(run, monitor, key) };
    const limit = { name: t(LIMITS[key]), color: COLORS.stop, dash: [5, 4] };
    limit.points = measured(run, monitor, LIMITS[key] === "floor" ? `${key}_floor` : "threshold");
    if (limit.points.length === 1) limit.points.push([run.entries.at(-1).step, limit.points[0][1]]); // a floor is constant
    return { share: 1, lines: [value, limit].filter(({ points }) => points.length) };
  });
  return [{ share: 2, lines }, ...others];
}

function range(lines) { // of all values, without the rare peaks of a rough line
  const values = lines.flatMap(({ points, rough }) => {
    const sorted = points.map(([, y]) => y).sort((a, b) => a - b);
    const rare = rough ? Math.floor(points.length / 50) : 0;
    return [sorted[rare], sorted[sorted.length - 1 - rare]];
  });
  const low = Math.min(...values), high = Math.max(...values), pad = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low - pad, high + pad];
}

function ticks(low, high, count) {
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough), found = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(Number((k * step).toPrecision(6)));
  return found;
}

export function plot(context, width, height, run, color) {
  const write = (words, x, y, { align = "left", alpha = 0.75, fill = color } = {}) => {
    Object.assign(context, { textAlign: align, globalAlpha: alpha, fillStyle: fill });
    context.fillText(words, x, y);
  };
  const stroke = (points, line = {}) => {
    context.strokeStyle = line.color ?? color;
    context.globalAlpha = line.alpha ?? 1;
    context.lineWidth = line.width ?? 1;
    context.setLineDash(line.dash ?? []);
    context.beginPath();
    points.forEach(([x, y]) => context.lineTo(x, y));
    context.stroke();
  };
  const legend = (lines, x, y) => { // each with its last value, as far as they fit
    for (const { name, color: fill, points } of lines) {
      const words = `${name} ${Number(points.at(-1)[1].toPrecision(3))}`;
      const next = x + context.measureText(words).width + 26;
      if (next - 12 > width) return;
      write("●", x, y, { fill, alpha: fill ? 1 : 0.4 });
      write(words, x + 12, y, { alpha: 0.9 });
      x = next;
    }
  };
  const left = 38, right = width - 6, end = Math.max(run.steps ?? 0, run.entries.at(-1).step, 2);
  const x = (step) => left + (step / end) * (right - left), all = panels(run);
  const unit = (height - 16) / all.reduce((sum, { share }) => sum + share, 0);
  const begins = run.entries.filter(({ stage }, i, entries) => i && stage !== entries[i - 1].stage);
  let top = 0;
  for (const { share, lines } of all) {
    const high = top + 18, low = top + unit * share - 4, [least, most] = range(lines);
    const y = (value) => low - ((value - least) / (most - least)) * (low - high);
    const upright = (step) => [[x(step), high], [x(step), low]];
    for (const value of ticks(least, most, Math.max(2, (low - high) / 34))) {
      stroke([[left, y(value)], [right, y(value)]], { alpha: 0.12 });
      write(String(value), left - 5, y(value) + 3.5, { align: "right" });
    }
    for (const { step } of begins) stroke(upright(step - 1), { alpha: 0.45, dash: [2, 3] });
    context.save();
    context.beginPath();
    context.rect(left, high - 1, right - left + 1, low - high + 2);
    context.clip();
    for (const line of lines) stroke(line.points.map(([step, value]) => [x(step), y(value)]), line);
    context.restore();
    for (const { step, acted } of run.stops) stroke(upright(step), { color: COLORS.stop, dash: acted ? [] : [1, 3] });
    legend(lines, left, top + 11);
    top += unit * share;
  }
  for (const step of ticks(0, end, Math.max(2, width / 90)).filter(Number.isInteger)) {
    write(String(step), x(step), height - 3, { align: x(step) > right - 12 ? "right" : "center" });
  }
}
