// @ts-check
/** The pack's part in the frontend: charts on nodes that run, colours, words. Nodes work the same without it. */

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { Chart, Words } from "./chart.js";
import { executionIds, keyOf, merged, nodesIn } from "./curve.js";
import { CHARTED, coloursOf, noisyClipWords, widthOf, wordsFor } from "./look.js";

/** @typedef {import("./curve.js").Curve} Curve */

const ROUTE = "/semantic-diffusion-guidance";
const EVENT = "sdg.curve";

/** As many runs are remembered as the server keeps. */
const KEPT = 64;

/** What is known of runs, by workflow and node, the latest last. @type {Map<string, Curve>} */
const curves = new Map();
/**
 * The charts of nodes. The frontend makes nodes that never come into a graph, and says nothing when one is gone: copies
 * on their way to the clipboard, those inside a subgraph. @type {WeakMap<import("../../../scripts/app.js").Node, Chart>}
 */
const charts = new WeakMap();

const root = () => app.rootGraph ?? app.graph;

/** @param {import("../../../scripts/app.js").Node} node */
function curveOf(node) {
  const known = executionIds(root(), node).map((id) => curves.get(keyOf(root().id, id)));
  return known.find((curve) => curve && !curve.done) ?? known.find((curve) => curve) ?? null;
}

/**
 * Shows a node's curve, or what is missing; grows the node where its chart needs more room.
 * @param {import("../../../scripts/app.js").Node} node
 */
function refresh(node) {
  const chart = charts.get(node);
  if (!chart) return;
  const curve = curveOf(node);
  const connected = (/** @type {string} */ name) => node.inputs?.find((input) => input.name === name)?.link != null;
  const words = wordsFor(node.comfyClass, connected, curve);
  chart.show(words === null ? curve : null, words ?? "");
  chart.element.style.minHeight = `${chart.height}px`;
  const least = node.computeSize()[1];
  if (node.size[1] < least) node.setSize([node.size[0], least]);
}

const refreshAll = () =>
  nodesIn(root()).forEach((node) => refresh(/** @type {import("../../../scripts/app.js").Node} */ (node)));

/** @param {Curve} message */
function hear(message) {
  const key = keyOf(message.workflow, message.node);
  const curve = merged(curves.get(key), message);
  if (!curve) return void ask(message.workflow);
  curves.delete(key);
  curves.set(key, curve);
  for (const old of [...curves.keys()].slice(0, -KEPT)) curves.delete(old);
  if (message.workflow === root().id) refreshAll();
}

/**
 * Asks for the whole curves of a workflow: of runs that began before this page, or whose messages it missed.
 * @param {string | null} workflow
 */
async function ask(workflow) {
  if (workflow === null) return;
  const answer = await get(`curves?workflow=${encodeURIComponent(workflow)}`);
  answer?.curves?.forEach(hear);
}

/**
 * What the server says; null where it says nothing, as while it starts again.
 * @param {string} what
 * @returns {Promise<any>}
 */
async function get(what) {
  try {
    return await (await api.fetchApi(`${ROUTE}/${what}`)).json();
  } catch {
    return null;
  }
}

/** @param {import("../../../scripts/app.js").Node} node */
function addChart(node) {
  const chart = new Chart();
  charts.set(node, chart);
  passToCanvas(chart.element);
  const options = { serialize: false, hideOnZoom: false, getMinHeight: () => chart.height };
  node.addDOMWidget("sdg_chart", "SDG_CHART", chart.element, options).serialize = false;
  after(node, "onConnectionsChange", () => refresh(node));
  after(node, "onRemoved", () => {
    charts.delete(node);
    chart.end();
  });
  refresh(node);
}

/**
 * What a noisy CLIP's file is for, under its name.
 * @param {import("../../../scripts/app.js").Node} node
 */
function addWords(node) {
  const name = node.widgets?.find((widget) => widget.name === "noisy_clip_name");
  if (!name) return;
  const words = new Words();
  passToCanvas(words.element);
  const options = { serialize: false, hideOnZoom: false, getMinHeight: () => words.height };
  node.addDOMWidget("sdg_about", "SDG_ABOUT", words.element, options).serialize = false;
  const tell = async () => {
    const chosen = String(name.value);
    const about = await get(`noisy_clip?name=${encodeURIComponent(chosen)}`);
    if (about && chosen === String(name.value)) words.say(noisyClipWords(about));
  };
  after(name, "callback", tell);
  after(node, "onConfigure", tell);
  tell();
}

/**
 * Zooms and moves the canvas where the pointer is over an element of ours, as over the node itself. Nodes 2.0, whose
 * nodes are elements, does so by itself.
 * @param {HTMLElement} element
 */
function passToCanvas(element) {
  const passed = (/** @type {"processMouseWheel" | "processMouseDown" | "processMouseMove" | "processMouseUp"} */ name) =>
    (/** @type {WheelEvent | PointerEvent} */ event) => {
      const middle = event.type === "wheel" || event.button === 1 || (event.buttons & 4) === 4;
      if (middle && !element.closest("[data-node-id]")) app.canvas[name](event);
    };
  element.addEventListener("wheel", passed("processMouseWheel"));
  element.addEventListener("pointerdown", passed("processMouseDown"));
  element.addEventListener("pointermove", passed("processMouseMove"));
  element.addEventListener("pointerup", passed("processMouseUp"));
}

/**
 * Calls `more` after a method of one object, which may be missing.
 * @param {any} object
 * @param {string} method
 * @param {() => unknown} more
 */
function after(object, method, more) {
  const own = object[method];
  object[method] = function (/** @type {unknown[]} */ ...args) {
    const result = own?.apply(this, args);
    more();
    return result;
  };
}

app.registerExtension({
  name: "sdg.nodes",
  setup() {
    api.addEventListener(EVENT, (event) => hear(event.detail));
    api.addEventListener("reconnected", () => ask(root().id));
  },
  nodeCreated(node) {
    const colours = coloursOf(node.comfyClass);
    if (!colours) return;
    if (CHARTED.includes(node.comfyClass)) addChart(node);
    if (node.comfyClass === "SDGLoadNoisyCLIP") addWords(node);
    if (app.configuringGraph) return; // a saved workflow keeps its own colours and sizes
    Object.assign(node, colours);
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, widthOf(node.comfyClass)), height]);
  },
  afterConfigureGraph() {
    refreshAll();
    ask(root().id);
  },
});
