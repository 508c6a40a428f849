import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { test } from "node:test";

import { CHARTED, coloursOf, noisyClipWords, widthOf, wordsFor } from "../../web/js/look.js";

const HELP = new URL("../../web/docs/", import.meta.url);
const NODES = readdirSync(HELP).filter((name) => name.endsWith(".md")).map((name) => name.replace(".md", ""));
const all = () => true;

test("every node of the pack has colours, others have none", () => {
  for (const node of NODES) assert.match(coloursOf(node)?.bgcolor ?? node, /^#/);
  assert.equal(coloursOf("KSampler"), null);
});

test("loaders, guidances, modifiers and samplers are told apart", () => {
  const kinds = ["SDGLoadADM", "SDGTextGuidance", "SDGGuidanceMask", "SDGGuidedKSampler"].map((node) => coloursOf(node).bgcolor);
  assert.equal(new Set(kinds).size, 4);
  assert.ok(NODES.every((node) => widthOf(node) >= 200));
});

test("the examples' nodes have the colours of new ones", () => {
  const folder = new URL("../../example_workflows/", import.meta.url);
  for (const name of readdirSync(folder).filter((one) => one.endsWith(".json"))) {
    for (const { type, color, bgcolor } of JSON.parse(readFileSync(new URL(name, folder), "utf8")).nodes) {
      if (type.startsWith("SDG")) assert.deepEqual({ color, bgcolor }, coloursOf(type), `${type} in ${name}`);
    }
  }
});

test("what is missing is said, the first first", () => {
  assert.match(wordsFor("SDGGuidedKSampler", () => false, null), /No model/);
  assert.match(wordsFor("SDGGuidedKSampler", (name) => name === "model", null), /No latent/);
  assert.equal(wordsFor("SDGGuidedKSampler", (name) => name !== "guidance", null), "No guidance: a plain KSampler.");
});

test("a node with all it needs shows its curve, or says why there is none", () => {
  for (const node of CHARTED) assert.ok(wordsFor(node, all, null));
  assert.equal(wordsFor("SDGGuidedKSampler", all, { points: [[0]], done: false }), null);
  assert.match(wordsFor("SDGGuidedKSampler", all, { points: [], done: true }), /No guidance acted/);
});

test("a noisy CLIP says what it is for", () => {
  const about = { view: "linear:avatars", size: 32, text: true, retrieval: [[100, 0.9, 0.6], [300, 0.75, 0.03], [700, 0.05, 0]] };
  const [what, , found] = noisyClipWords(about).split("\n");
  assert.equal(what, "For avatars latents, 32 × 32.");
  assert.equal(found, "at noise t 300: 75% (3%), 700: 5% (0%)");
  assert.match(noisyClipWords({ view: "pixels", size: 256, text: false, retrieval: [] }), /pixels, 256 × 256\. No text tower\.\nNot measured/);
  assert.match(noisyClipWords({ published: true }), /published/);
  assert.equal(noisyClipWords({ error: "There is no file." }), "There is no file.");
});
