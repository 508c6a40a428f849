// @ts-check
/** Curves as the server tells them, and whose they are. No DOM, no frontend. */

/**
 * A point: step, pull, share of pictures in which the cap bound, then the value of each line; null where unknown.
 * @typedef {(number | null)[]} Point
 */

/**
 * The latest run of a node. `start` says at which point a message begins; a whole curve begins at 0.
 * @typedef {object} Curve
 * @property {string} node
 * @property {string | null} workflow
 * @property {string} run
 * @property {"guidance" | "loss"} kind
 * @property {string[]} lines
 * @property {number} steps
 * @property {number | null} cap
 * @property {boolean} relative
 * @property {boolean} done
 * @property {{ name: string, value: string, title: string } | null} remark what is said of the whole run, at its end
 * @property {number} start
 * @property {Point[]} points
 */

/**
 * What a graph must have for its nodes to be found: a part of the frontend's graph and node.
 * @typedef {object} Graph
 * @property {string} id
 * @property {GraphNode[]} nodes
 */

/**
 * @typedef {object} GraphNode
 * @property {string | number} id
 * @property {Graph} [subgraph]
 */

/**
 * A curve and the message that goes on with it, as one; null where something between the two was missed.
 * @param {Curve | undefined} curve
 * @param {Curve} message
 * @returns {Curve | null}
 */
export function merged(curve, message) {
  if (message.start === 0) return isOlder(message, curve) ? (curve ?? null) : message;
  if (!curve || curve.run !== message.run || curve.points.length < message.start) return null;
  return { ...message, start: 0, points: [...curve.points.slice(0, message.start), ...message.points] };
}

/**
 * Whether a whole curve was told before what is known of its run already: answers and events overtake each other.
 * @param {Curve} whole
 * @param {Curve | undefined} known
 */
function isOlder(whole, known) {
  if (!known || known.run !== whole.run) return false;
  if (known.done !== whole.done) return known.done;
  const last = (/** @type {Curve} */ curve) => curve.points.at(-1)?.[0] ?? -1;
  return last(whole) < last(known);
}

/**
 * Where a curve is kept.
 * @param {string | null} workflow
 * @param {string} node
 */
export const keyOf = (workflow, node) => `${workflow}/${node}`;

/**
 * The ids under which the server runs a node: one, or "7:3" for node 3 of the subgraph that node 7 is; more where a
 * subgraph is used more than once.
 * @param {Graph} graph
 * @param {object} node
 * @param {string} prefix
 * @returns {string[]}
 */
export function executionIds(graph, node, prefix = "") {
  return graph.nodes.flatMap((one) => {
    const id = `${prefix}${one.id}`;
    return [...(one === node ? [id] : []), ...(one.subgraph ? executionIds(one.subgraph, node, `${id}:`) : [])];
  });
}

/**
 * All nodes of a graph and of the subgraphs in it.
 * @param {Graph} graph
 * @returns {GraphNode[]}
 */
export function nodesIn(graph) {
  return graph.nodes.flatMap((node) => [node, ...(node.subgraph ? nodesIn(node.subgraph) : [])]);
}

/**
 * A function that calls `draw` at most once for each time that `schedule` calls back.
 * @param {() => void} draw
 * @param {(callback: () => void) => void} schedule
 */
export function onceEach(draw, schedule) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    schedule(() => {
      waiting = false;
      draw();
    });
  };
}
