// @ts-check
/** How nodes look when they are new, and what they say where something is missing. No DOM, no frontend. */

/** @typedef {{ color: string, bgcolor: string }} Colours */

/** Of ComfyUI's own palette, so that they fit its themes and its menu of colours. @type {Record<string, Colours>} */
const COLOURS = {
  loader: { color: "#2a363b", bgcolor: "#3f5159" },
  guidance: { color: "#232", bgcolor: "#353" },
  modifier: { color: "#223", bgcolor: "#335" },
  sampler: { color: "#323", bgcolor: "#535" },
};

/** @type {Record<string, string[]>} */
const KINDS = {
  loader: [
    "SDGLoadNoisyCLIP", "SDGLoadCLIP", "SDGEncoderCrossfade", "SDGLoadADM", "SDGLoadAutoencoder", "SDGLoadClassifier",
    "SDGLoadPreset", "SDGEmptyPixelLatent",
  ],
  guidance: [
    "SDGTextGuidance", "SDGContentGuidance", "SDGStructureGuidance", "SDGStyleGuidance", "SDGDirectionGuidance",
    "SDGClassifierGuidance",
  ],
  modifier: [
    "SDGCombineGuidance", "SDGGuidanceFrames", "SDGGuidanceSchedule", "SDGGuidanceSpeed", "SDGGuidanceMask",
    "SDGGuidanceTarget", "SDGGuidanceAway", "SDGGuidanceReferences", "SDGGuidanceAugment", "SDGGuidanceBudget",
    "SDGSavePreset", "SDGGuidanceXY",
  ],
  sampler: [
    "SDGGuidedKSampler", "SDGApplyGuidance", "SDGPaperSampler", "SDGGuidanceReport", "SDGILVRReference", "SDGXYGrid",
    "SDGFinetuneNoisyCLIP", "SDGSaveNoisyCLIP",
  ],
};

/** Nodes whose texts are longer than ComfyUI's own width. @type {Record<string, number>} */
const WIDTHS = { SDGGuidedKSampler: 320, SDGApplyGuidance: 320, SDGFinetuneNoisyCLIP: 340, SDGLoadNoisyCLIP: 320 };
const WIDTH = 280;

/**
 * Inputs that a node needs or does little without, the first that is missing first: [input, what to say].
 * @type {Record<string, [string, string][]>}
 */
const WANTED = {
  SDGGuidedKSampler: [
    ["model", "No model: connect Load ADM or Load Checkpoint."],
    ["latent_image", "No latent: connect Empty Pixel Latent."],
    ["guidance", "No guidance: a plain KSampler."],
  ],
  SDGApplyGuidance: [
    ["model", "No model: connect Load ADM or Load Checkpoint."],
    ["guidance", "No guidance: connect a guidance node."],
  ],
  SDGFinetuneNoisyCLIP: [["clip", "No CLIP to start from: connect Load CLIP."]],
};

/** @type {Record<string, string>} */
const BEFORE = {
  SDGGuidedKSampler: "Scores of the run show here.",
  SDGApplyGuidance: "Scores show here while a sampler\nruns this model.",
  SDGFinetuneNoisyCLIP: "The loss shows here while it learns.",
};

/** Nodes with a chart. */
export const CHARTED = Object.keys(WANTED);

/**
 * The colours of a new node of ours, null for others.
 * @param {string} type
 * @returns {Colours | null}
 */
export function coloursOf(type) {
  const kind = Object.keys(KINDS).find((one) => KINDS[one].includes(type));
  return kind ? COLOURS[kind] : null;
}

/** @param {string} type */
export const widthOf = (type) => WIDTHS[type] ?? WIDTH;

/**
 * What stands in the place of a chart; null where the curve should.
 * @param {string} type
 * @param {(input: string) => boolean} connected
 * @param {{ points: unknown[], done: boolean } | null} curve
 * @returns {string | null}
 */
export function wordsFor(type, connected, curve) {
  const missing = (WANTED[type] ?? []).find(([input]) => !connected(input));
  if (missing) return missing[1];
  if (!curve) return BEFORE[type] ?? "";
  if (curve.points.length) return null;
  return curve.done ? "No guidance acted in the last run." : "No guidance has acted yet.";
}

/**
 * What a noisy CLIP's file is for and how well it reads noise, in two lines.
 * @param {{ view?: string, size?: number, text?: boolean, published?: boolean, error?: string, retrieval?: number[][] }} about
 */
export function noisyClipWords(about) {
  if (about.error) return about.error;
  if (about.published || !about.view) return "A published checkpoint, for models of pixels.\nNot measured under noise.";
  const latents = about.view.startsWith("linear:") ? about.view.slice("linear:".length) : null;
  const side = `${about.size} × ${about.size}`;
  const what = latents ? `For ${latents} latents, ${side}.` : `For models of pixels, ${side}.`;
  return [`${what}${about.text ? "" : " No text tower."}`, ...retrievalWords(about.retrieval ?? [])].join("\n");
}

/** @param {number[][]} rows */
function retrievalWords(rows) {
  const few = rows.filter(([t]) => [300, 500, 700].includes(t));
  if (!few.length) return ["Not measured under noise."];
  const percent = (/** @type {number} */ part) => `${Math.round(100 * part)}%`;
  const parts = few.map(([t, noisy, clean]) => `${t}: ${percent(noisy)} (${percent(clean)})`);
  return ["Knows noisy pictures again (a clean CLIP does),", `at noise t ${parts.join(", ")}`];
}
