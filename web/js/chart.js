// @ts-check
/** One chart: an element that draws a curve, or says why there is none. */

import { onceEach } from "./curve.js";
import { PULL_COLOUR, legendOf, nearest, plotOf, stepText } from "./plot.js";

/** @typedef {import("./curve.js").Curve} Curve */

const SVG = "http://www.w3.org/2000/svg";
const LEAST_PLOT = 110;
const LEAST_ROWS = 4; // of two guidances
const PADDING = 8;
const ROW = 17;
const TITLES = { guidance: "score and pull", loss: "loss" };

const STYLE = `
.sdg-chart { box-sizing: border-box; width: 100%; height: 100%; display: flex; flex-direction: column; overflow: hidden;
  padding: 5px 4px 2px; border-radius: 6px; font: 11px/${ROW}px Inter, Arial, sans-serif; user-select: none;
  color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); }
[data-node-id] .sdg-chart { color: var(--component-node-foreground, var(--input-text, #ddd));
  background: var(--component-node-widget-background, var(--comfy-input-bg, #222)); }
.sdg-chart .legend { flex: none; padding: 0 6px; }
.sdg-chart .row { display: flex; gap: 6px; align-items: center; height: ${ROW}px; white-space: nowrap; }
.sdg-chart .title { opacity: 0.75; }
.sdg-chart .swatch { flex: none; width: 10px; height: 3px; border-radius: 2px; }
.sdg-chart .name { flex: 1 1 auto; min-width: 0; overflow: hidden; text-overflow: ellipsis; }
.sdg-chart .value { flex: none; font-variant-numeric: tabular-nums; }
.sdg-chart .plot { flex: 1 1 0; min-height: ${LEAST_PLOT}px; position: relative; }
.sdg-chart svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.sdg-chart text { fill: currentColor; fill-opacity: 0.75; font-size: 10px; }
.sdg-chart path { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.sdg-chart path[stroke="currentColor"] { stroke-opacity: 0.65; }
.sdg-chart line { stroke: currentColor; stroke-opacity: 0.16; }
.sdg-chart line.bound { stroke-opacity: 0.6; stroke-dasharray: 4 3; }
.sdg-chart line.here { stroke-opacity: 0.6; }
.sdg-chart .words { margin: auto; padding: 8px; text-align: center; white-space: pre-line; opacity: 0.8; }
`;

/** Adds the charts' style to the page, once. */
function addStyle() {
  if (document.getElementById("sdg-chart-style")) return;
  const style = document.createElement("style");
  style.id = "sdg-chart-style";
  style.textContent = STYLE;
  document.head.append(style);
}

/**
 * @param {string} tag
 * @param {Record<string, string | number>} attributes
 * @param {string} [text]
 */
function drawn(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  if (text !== undefined) element.textContent = text;
  return element;
}

/**
 * @param {string} className
 * @param {(Node | string)[]} inside
 */
function block(className, ...inside) {
  const element = document.createElement("div");
  element.className = className;
  element.append(...inside);
  return element;
}

/** A box of a few words. */
export class Words {
  constructor() {
    addStyle();
    this.text = block("words");
    this.element = block("sdg-chart", this.text);
    this.element.style.minHeight = `${this.height}px`;
  }

  height = 66;

  /** @param {string} words */
  say(words) {
    this.text.textContent = words;
  }
}

/** Draws what it was last given whenever its size changes: a renderer may move its element, or take it away. */
export class Chart {
  /** @type {Curve | null} */
  curve = null;
  words = "";
  /** @type {number | null} where the pointer is, in the chart's own pixels */
  pointer = null;

  constructor() {
    addStyle();
    this.element = block("sdg-chart");
    this.legend = block("legend");
    this.plot = block("plot");
    this.svg = /** @type {SVGSVGElement} */ (drawn("svg", {}));
    this.plot.append(this.svg);
    this.redraw = onceEach(() => this.draw(), (callback) => requestAnimationFrame(callback));
    this.resized = new ResizeObserver(() => this.redraw());
    this.resized.observe(this.element);
    this.plot.addEventListener("pointermove", (event) => this.point(event.clientX));
    this.plot.addEventListener("pointerleave", () => this.point(null));
  }

  /**
   * @param {Curve | null} curve
   * @param {string} words what stands there where there is no curve
   */
  show(curve, words) {
    Object.assign(this, { curve, words });
    this.redraw();
  }

  /** How much height it wants at least, in pixels. The same with and without a curve, so that nodes keep their size. */
  get height() {
    const rows = this.curve ? legendOf(this.curve, null).length + 1 : 0;
    return PADDING + Math.max(rows, LEAST_ROWS) * ROW + LEAST_PLOT;
  }

  /** @param {number | null} clientX */
  point(clientX) {
    const box = this.plot.getBoundingClientRect();
    // The canvas may be zoomed: then a pixel of the chart isn't one of the screen.
    this.pointer = clientX === null ? null : ((clientX - box.left) * this.plot.clientWidth) / (box.width || 1);
    this.redraw();
  }

  draw() {
    const curve = this.curve;
    if (!curve) {
      this.element.replaceChildren(block("words", this.words));
      return;
    }
    if (!this.plot.isConnected || this.plot.parentElement !== this.element) {
      this.element.replaceChildren(this.legend, this.plot);
    }
    const { clientWidth: width, clientHeight: height } = this.plot;
    const here = this.pointer === null ? null : nearest(curve, width, this.pointer);
    this.drawLegend(curve, here?.index ?? null);
    this.svg.replaceChildren(...(width && height ? plotted(curve, width, height, here?.x ?? null) : []));
  }

  /** @param {Curve} curve @param {number | null} index */
  drawLegend(curve, index) {
    const rows = legendOf(curve, index).map(({ colour, name, value, title }) => {
      const swatch = block("swatch");
      swatch.style.background = colour;
      const row = block("row", swatch, block("name", name), block("value", value));
      row.title = title;
      return row;
    });
    const title = block("row title", block("name", `${TITLES[curve.kind]} by step`), block("value", stepText(curve, index)));
    this.legend.replaceChildren(title, ...rows);
  }

  /** The node is gone. */
  end() {
    this.resized.disconnect();
  }
}

/**
 * The parts of a curve's picture.
 * @param {Curve} curve
 * @param {number} width
 * @param {number} height
 * @param {number | null} here
 */
function plotted(curve, width, height, here) {
  const plot = plotOf(curve, width, height);
  const right = width - 10;
  const parts = plot.panels.flatMap(({ ticks, lines }) => [
    ...ticks.flatMap(({ at, label }) => [
      drawn("line", { x1: 40, x2: right, y1: at, y2: at }),
      drawn("text", { x: 36, y: at + 3.5, "text-anchor": "end" }, label),
    ]),
    ...lines.map(({ path, colour }) => drawn("path", { d: path, stroke: colour })),
  ]);
  const bound = plot.bound === null ? [] : [drawn("line", { class: "bound", x1: 40, x2: right, y1: plot.bound, y2: plot.bound })];
  const marks = plot.marks.map(({ x, y }) => drawn("circle", { cx: x, cy: y, r: 2, fill: PULL_COLOUR }));
  const steps = plot.steps.map(({ at, label }) => drawn("text", { x: at, y: height - 4, "text-anchor": "middle" }, label));
  const cursor = here === null ? [] : [drawn("line", { class: "here", x1: here, x2: here, y1: 0, y2: height - 16 })];
  return [...parts, ...bound, ...marks, ...steps, ...cursor];
}
