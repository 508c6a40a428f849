// @ts-check
/** Where the parts of a chart go: scales, ticks, paths, words. Numbers in, numbers and strings out. */

/** @typedef {import("./curve.js").Curve} Curve */
/** @typedef {{ from: number, to: number }} Range */
/** @typedef {{ at: number, label: string }} Tick */

/**
 * @typedef {object} Panel
 * @property {number} top
 * @property {number} bottom
 * @property {Tick[]} ticks
 * @property {{ path: string, colour: string }[]} lines
 */

/**
 * A chart of `width` x `height` pixels. `bound`: where the cap is; `marks`: points at which it bound something.
 * @typedef {object} Plot
 * @property {Panel[]} panels
 * @property {Tick[]} steps
 * @property {number | null} bound
 * @property {{ x: number, y: number }[]} marks
 */

/** In the order of Guidance Report's plot, told apart on a dark and on a light ground; then they begin anew. */
export const COLOURS = ["#3d8fd6", "#e07b39", "#2fa36f", "#d9536f", "#a974d6", "#a3764f", "#d06fb0", "#8a8f2a"];
/** Of the pull: that of the text beside it. */
export const PULL_COLOUR = "currentColor";

const LEFT = 40;
const RIGHT = 10;
const TOP = 7;
const FOOT = 16;
const BETWEEN = 14;
const PULL_SHARE = 0.34;
const LEAST_SPAN = 0.01;

/** @param {number} number */
export const colourOf = (number) => COLOURS[number % COLOURS.length];

/**
 * Of all finite values; 0 to 1 where there are none, and never narrower than a hundredth.
 * @param {(number | null | undefined)[]} values
 * @returns {Range}
 */
export function rangeOf(values) {
  const known = values.filter((value) => typeof value === "number");
  if (!known.length) return { from: 0, to: 1 };
  const [low, high] = known.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
  const more = Math.max(0, LEAST_SPAN - (high - low)) / 2;
  return { from: low - more, to: high + more };
}

/**
 * Two to five round numbers in a range, apart by 1, 2 or 5 times a power of ten.
 * @param {Range} range
 * @returns {number[]}
 */
export function ticksIn({ from, to }) {
  const rough = (to - from) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const apart = power * ([1, 2, 5].find((times) => times * power >= rough) ?? 10);
  const first = Math.ceil(from / apart - 1e-9);
  const count = Math.floor(to / apart + 1e-9) - first + 1;
  return Array.from({ length: count }, (_, i) => Number(((first + i) * apart).toPrecision(12)));
}

/**
 * A number in few characters; a dash for none.
 * @param {number | null | undefined} value
 */
export function shown(value) {
  if (typeof value !== "number") return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 100000)) return value.toExponential(1);
  return String(Number(value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 3))).replace("-", "−");
}

/**
 * The path of a line through points that are known, with gaps where they are not.
 * @param {({ x: number, y: number } | null)[]} points
 */
export function pathThrough(points) {
  let pen = false;
  const parts = points.map((point) => {
    if (!point) {
      pen = false;
      return "";
    }
    const part = `${pen ? "L" : "M"}${point.x.toFixed(1)} ${point.y.toFixed(1)}`;
    pen = true;
    return part;
  });
  return parts.join("");
}

/**
 * Maps a range to pixels.
 * @param {Range} range
 * @param {number} start
 * @param {number} end
 * @returns {(value: number) => number}
 */
const scaled = (range, start, end) => (value) =>
  start + ((value - range.from) / (range.to - range.from || 1)) * (end - start);

/** @param {Curve} curve @param {number} width */
const acrossOf = (curve, width) => scaled({ from: 0, to: Math.max(curve.steps, 1) }, LEFT, width - RIGHT);

/**
 * @param {Curve} curve
 * @param {number} width
 * @param {number} height
 * @returns {Plot}
 */
export function plotOf(curve, width, height) {
  const across = acrossOf(curve, width);
  const room = height - TOP - FOOT;
  const withPull = curve.kind === "guidance";
  const bottom = TOP + (withPull ? room * (1 - PULL_SHARE) - BETWEEN : room);
  const columns = curve.lines.map((_, k) => curve.points.map((point) => point[3 + k]));
  const scores = panelOf(rangeOf(columns.flat()), TOP, bottom, curve, columns, across, colourOf);
  const steps = ticksIn({ from: 0, to: Math.max(curve.steps, 1) })
    .filter(Number.isInteger)
    .map((step) => ({ at: across(step), label: String(step) }));
  if (!withPull) return { panels: [scores], steps, bound: null, marks: [] };
  return { steps, ...pullOf(curve, bottom + BETWEEN, height - FOOT, across, scores) };
}

/**
 * The lower panel: the pull, its bound where that is near, and where it bound.
 * @param {Curve} curve
 * @param {number} top
 * @param {number} bottom
 * @param {(step: number) => number} across
 * @param {Panel} scores
 */
function pullOf(curve, top, bottom, across, scores) {
  const pulls = curve.points.map((point) => point[1]);
  const most = Math.max(rangeOf([0, ...pulls]).to, 1e-6);
  const near = curve.cap !== null && curve.cap <= 2 * most;
  const range = { from: 0, to: 1.08 * Math.max(most, near ? (curve.cap ?? 0) : 0) };
  const panel = panelOf(range, top, bottom, curve, [pulls], across, () => PULL_COLOUR);
  const up = scaled(range, bottom, top);
  panel.ticks = [0, near ? (curve.cap ?? most) : most].map((value) => ({ at: up(value), label: shown(value) }));
  const marks = curve.points
    .filter((point) => point[2] && point[1] !== null)
    .map((point) => ({ x: across(point[0] ?? 0), y: up(point[1] ?? 0) }));
  return { panels: [scores, panel], bound: near ? up(curve.cap ?? 0) : null, marks };
}

/**
 * @param {Range} range
 * @param {number} top
 * @param {number} bottom
 * @param {Curve} curve
 * @param {(number | null)[][]} columns
 * @param {(step: number) => number} across
 * @param {(line: number) => string} colour
 * @returns {Panel}
 */
function panelOf(range, top, bottom, curve, columns, across, colour) {
  const up = scaled(range, bottom, top);
  const place = (/** @type {number | null} */ value, /** @type {number} */ i) =>
    typeof value === "number" ? { x: across(curve.points[i][0] ?? 0), y: up(value) } : null;
  return {
    top,
    bottom,
    ticks: ticksIn(range).map((value) => ({ at: up(value), label: shown(value) })),
    lines: columns.map((column, k) => ({ path: pathThrough(column.map(place)), colour: colour(k) })),
  };
}

/**
 * The number of the point nearest to a place across a chart, and where it is; null without points.
 * @param {Curve} curve
 * @param {number} width
 * @param {number} x
 */
export function nearest(curve, width, x) {
  const across = acrossOf(curve, width);
  const places = curve.points.map((point) => across(point[0] ?? 0));
  if (!places.length) return null;
  const index = places.reduce((best, place, i) => (Math.abs(place - x) < Math.abs(places[best] - x) ? i : best), 0);
  return { index, x: places[index] };
}

/**
 * What stands beside the chart: a row for each line, then the pull, then what is said of the whole run. Values are those
 * of point `index`, or how each line went, first to last, for none.
 * @param {Curve} curve
 * @param {number | null} index
 * @returns {{ colour: string, name: string, value: string, title: string }[]}
 */
export function legendOf(curve, index) {
  const value = (/** @type {number} */ column) => {
    if (index !== null) return shown(curve.points[index]?.[column]);
    const known = curve.points.map((point) => point[column]).filter((one) => one !== null);
    return known.length > 1 ? `${shown(known[0])} → ${shown(known.at(-1))}` : shown(known[0]);
  };
  const rows = curve.lines.map((name, k) => ({ colour: colourOf(k), name, value: value(3 + k), title: `Score of ${name}` }));
  if (curve.kind === "loss") return rows.map((row) => ({ ...row, title: "What it learns by: lower is better" }));
  const pull = { colour: PULL_COLOUR, name: "pull", value: pullText(curve, index), title: PULL_TITLE };
  return [...rows, pull, ...(curve.remark ? [{ colour: "transparent", ...curve.remark }] : [])];
}

const PULL_TITLE = "Size of the shift over that of the model's own step. Dots: the cap bound it.";

/** @param {Curve} curve @param {number | null} index */
function pullText(curve, index) {
  const bound = curve.cap === null ? "no cap" : curve.relative ? `relative ${shown(curve.cap)}` : `cap ${shown(curve.cap)}`;
  if (index !== null) return `${shown(curve.points[index]?.[1])}${curve.points[index]?.[2] ? ", capped" : ""}`;
  const capped = curve.points.filter((point) => point[2]).length;
  return capped ? `${bound}, bound ${capped} of ${curve.points.length}` : bound;
}

/**
 * The step of a point in words.
 * @param {Curve} curve
 * @param {number | null} index
 */
export function stepText(curve, index) {
  const whole = shown(curve.steps);
  if (index !== null) return `at step ${shown(curve.points[index]?.[0])} of ${whole}`;
  const last = Math.floor(curve.points.at(-1)?.[0] ?? 0);
  if (curve.done && curve.kind === "loss" && last < curve.steps) return `ended at step ${shown(last)} of ${whole}`;
  return curve.done ? `${whole} steps` : `step ${shown(last)} of ${whole}`;
}
