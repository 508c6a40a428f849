import assert from "node:assert/strict";
import { test } from "node:test";

import { executionIds, merged, nodesIn, onceEach } from "../../web/js/curve.js";
import { curve } from "./curves.js";

test("messages in order make the whole curve, however they are cut", () => {
  const whole = curve({ points: Array.from({ length: 9 }, (_, i) => [i, i / 10, 0, i * i]) });
  for (const cuts of [[0, 9], [0, 1, 9], [0, 3, 4, 8, 9]]) {
    let known;
    for (let i = 1; i < cuts.length; i++) {
      const points = whole.points.slice(cuts[i - 1], cuts[i]);
      known = merged(known, { ...whole, start: cuts[i - 1], points, done: i === cuts.length - 1 });
    }
    assert.deepEqual(known, { ...whole, done: true });
  }
});

test("a missed message is noticed, one that comes twice does nothing", () => {
  const first = curve({ points: [[0, 0, 0, 1], [1, 0, 0, 2]] });
  assert.equal(merged(first, { ...first, start: 3, points: [[3, 0, 0, 4]] }), null);
  assert.equal(merged(undefined, { ...first, start: 1 }), null);
  assert.equal(merged(first, { ...first, run: "another", start: 1 }), null);
  assert.deepEqual(merged(first, { ...first, start: 1, points: [[1, 0, 0, 2]] }), first);
});

test("a new run takes the place of the last one", () => {
  const last = curve({ run: "1", done: true, points: [[29, 0, 0, 1]] });
  const next = curve({ run: "2", points: [] });
  assert.deepEqual(merged(last, next), next);
});

test("an answer that was overtaken by events changes nothing, a thinned curve does", () => {
  const known = curve({ points: [[0, 0, 0, 1], [1, 0, 0, 2], [2, 0, 0, 3]] });
  assert.equal(merged(known, curve({ points: known.points.slice(0, 2) })), known);
  assert.equal(merged({ ...known, done: true }, known).done, true);
  const thinned = curve({ points: [[0, 0, 0, 1], [2, 0, 0, 3], [4, 0, 0, 5]] });
  assert.equal(merged(known, thinned), thinned);
});

test("nodes in subgraphs are found by the server's ids, each use of a subgraph by its own", () => {
  const inner = { id: 3 };
  const subgraph = { id: "s", nodes: [{ id: 1 }, inner] };
  const outer = { id: 7 };
  const graph = { id: "g", nodes: [outer, { id: 8, subgraph }, { id: 9, subgraph }] };
  assert.deepEqual(executionIds(graph, outer), ["7"]);
  assert.deepEqual(executionIds(graph, inner), ["8:3", "9:3"]);
  assert.deepEqual(executionIds(graph, { id: 7 }), []);
});

test("nodes of a graph are those of its subgraphs too", () => {
  const subgraph = { id: "s", nodes: [{ id: 1 }, { id: 2, subgraph: { id: "t", nodes: [{ id: 5 }] } }] };
  const graph = { id: "g", nodes: [{ id: 7 }, { id: 8, subgraph }] };
  assert.deepEqual(nodesIn(graph).map((node) => node.id), [7, 8, 1, 2, 5]);
});

test("many calls draw once a frame", () => {
  const frames = [];
  let drawn = 0;
  const redraw = onceEach(() => drawn++, (callback) => frames.push(callback));
  for (let i = 0; i < 100; i++) redraw();
  assert.equal(frames.length, 1);
  frames.pop()();
  assert.equal(drawn, 1);
  redraw();
  assert.equal(frames.length, 1);
});
