import assert from "node:assert/strict";
import { test } from "node:test";

import { COLOURS, colourOf, legendOf, nearest, pathThrough, plotOf, rangeOf, shown, stepText, ticksIn } from "../../web/js/plot.js";
import { curve } from "./curves.js";

const points = [[0, 0.5, 0, -0.2], [1, 1, 1, 0.1], [2, null, null, null], [3, 0.25, 0, 0.4]];
const numbers = (path) => path.match(/-?[\d.]+/g).map(Number);

test("ticks are round, inside, evenly apart, and two to five", () => {
  for (const [from, to] of [[0, 1], [-0.93, -0.27], [0.0654, 0.753], [0, 30], [-3000, 41], [0.5, 0.51], [0, 1e-6]]) {
    const ticks = ticksIn({ from, to });
    assert.ok(ticks.length >= 2 && ticks.length <= 5, `${from}..${to}: ${ticks}`);
    assert.ok(ticks.every((tick) => tick >= from - 1e-9 && tick <= to + 1e-9));
    const apart = ticks[1] - ticks[0];
    ticks.slice(1).forEach((tick, i) => assert.ok(Math.abs(tick - ticks[i] - apart) < 1e-9 * Math.max(1, apart)));
    assert.match(apart.toExponential(3), /^[125]\.000e/);
  }
});

test("a range holds all that is known, is never empty, and is 0 to 1 without anything", () => {
  assert.deepEqual(rangeOf([3, null, -1, undefined]), { from: -1, to: 3 });
  assert.deepEqual(rangeOf([null]), { from: 0, to: 1 });
  const flat = rangeOf([0.5, 0.5]);
  assert.ok(flat.from < 0.5 && flat.to > 0.5);
});

test("numbers are short", () => {
  assert.deepEqual([0, 0.12345, 12.345, 123.45, -0.5, 0.00001, null].map(shown), ["0", "0.123", "12.3", "123", "−0.5", "1.0e-5", "–"]);
});

test("a line breaks where its value is not known", () => {
  assert.equal(pathThrough([{ x: 0, y: 1 }, { x: 2, y: 3 }, null, { x: 4, y: 5 }]), "M0.0 1.0L2.0 3.0M4.0 5.0");
});

test("everything is drawn inside the chart, at every size", () => {
  const many = curve({ lines: ["a", "b"], points: points.map((point) => [...point, 100 * (point[3] ?? 0)]) });
  for (const [width, height] of [[240, 118], [320, 200], [900, 600]]) {
    const plot = plotOf(many, width, height);
    const inside = ({ x, y }) => x >= 0 && x <= width && y >= 0 && y <= height;
    for (const panel of plot.panels) {
      assert.ok(panel.top < panel.bottom && panel.bottom <= height);
      for (const { at } of panel.ticks) assert.ok(at >= panel.top - 1e-6 && at <= panel.bottom + 1e-6);
      for (const { path } of panel.lines) {
        const flat = numbers(path);
        for (let i = 0; i < flat.length; i += 2) assert.ok(inside({ x: flat[i], y: flat[i + 1] }));
      }
    }
    assert.ok(plot.panels[0].bottom < plot.panels[1].top);
    assert.ok(plot.marks.every(inside));
    assert.ok(plot.steps.every(({ at }) => at >= 0 && at <= width));
  }
});

test("higher scores are drawn higher, later steps further right, colours by guidance", () => {
  const [scores] = plotOf(curve({ points: points.slice(0, 2) }), 300, 150).panels;
  const [x0, y0, x1, y1] = numbers(scores.lines[0].path);
  assert.ok(x1 > x0 && y1 < y0);
  const { panels } = plotOf(curve({ lines: ["a", "b"], points: [[0, 0, 0, 1, 2]] }), 300, 150);
  assert.deepEqual(panels[0].lines.map(({ colour }) => colour), COLOURS.slice(0, 2));
  assert.equal(colourOf(COLOURS.length), COLOURS[0]);
});

test("marks are where the cap bound, on the line of the pull; the bound is drawn where it is near", () => {
  const plot = plotOf(curve({ points }), 300, 150);
  assert.equal(plot.marks.length, 1);
  assert.ok(Math.abs(plot.marks[0].y - plot.bound) < 1e-6);
  assert.equal(plotOf(curve({ points, cap: 9 }), 300, 150).bound, null);
  assert.equal(plotOf(curve({ points, cap: null }), 300, 150).bound, null);
});

test("a loss has one panel", () => {
  const loss = curve({ kind: "loss", lines: ["loss"], steps: 1000, points: [[1, null, null, 2.5], [2, null, null, 2.1]] });
  assert.equal(plotOf(loss, 300, 150).panels.length, 1);
  assert.deepEqual(legendOf(loss, null).map(({ value }) => value), ["2.5 → 2.1"]);
});

test("the pointer finds the nearest point", () => {
  const some = curve({ points });
  assert.deepEqual([0, 65, 115, 300].map((x) => nearest(some, 300, x).index), [0, 1, 3, 3]);
  assert.equal(nearest(some, 300, -50).index, 0);
  assert.equal(nearest(some, 300, 500).index, 3);
  const { index, x } = nearest(some, 300, 65);
  assert.equal(nearest(some, 300, x).index, index);
  assert.equal(nearest(curve(), 300, 10), null);
});

test("the legend says how lines went, or what they are at a point", () => {
  const rows = legendOf(curve({ points }), null);
  assert.deepEqual(rows.map(({ value }) => value), ["−0.2 → 0.4", "cap 1, bound 1 of 4"]);
  assert.deepEqual(legendOf(curve({ points }), 1).map(({ value }) => value), ["0.1", "1, capped"]);
  assert.deepEqual(legendOf(curve({ points }), 2).map(({ value }) => value), ["–", "–"]);
  assert.equal(legendOf(curve({ cap: null }), null)[1].value, "no cap");
  assert.equal(legendOf(curve({ cap: 0.25, relative: true }), null)[1].value, "relative 0.25");
});

test("what is said of the whole run stands below, and makes no room where nothing is", () => {
  const remark = { name: "budget 20 %", value: "one every 3 steps", title: "Why" };
  const rows = legendOf(curve({ points, remark }), null);
  assert.equal(rows.length, legendOf(curve({ points }), null).length + 1);
  assert.deepEqual(rows.at(-1), { colour: "transparent", ...remark });
});

test("the step is said in words", () => {
  assert.equal(stepText(curve({ points }), null), "step 3 of 10");
  assert.equal(stepText(curve({ points, done: true }), null), "10 steps");
  assert.equal(stepText(curve({ points }), 1), "at step 1 of 10");
  assert.equal(stepText(curve({ kind: "loss", points, done: true }), null), "ended at step 3 of 10");
});
