// Draws avatars whose every attribute is chosen here, so that labels and captions are exact.
// usage: node avatars.mjs SALT START COUNT HATS   -> one JSON line {label..., svg} per avatar on stdout;
// HATS is how many of the drawings that can wear a hat wear one (0..1)
import { createHash } from "node:crypto";
import { createAvatar } from "@dicebear/core";
import * as styles from "@dicebear/collection";

const BACKGROUNDS = { white: "f7f7f7", gray: "8e9399", red: "d8342c", orange: "f28a1e", yellow: "f9d835", green: "3fa34d",
                      blue: "2f6fd6", purple: "7d3fb2", pink: "f59ac1" };
const HAIRS = { black: "17130f", brown: "6b3f1d", blond: "ecc766", red: "c0391b", gray: "b4b4b8", blue: "2b7fc4",
                green: "2f9e58", pink: "ee6fa8" };
const SKINS = ["ffdbb4", "edb98a", "d08b5b", "ae5d29", "694d3d"];
const range = (prefix, from, to) =>
  Array.from({ length: to - from + 1 }, (_, i) => prefix + String(from + i).padStart(2, "0"));

// 64 bits of SHA-256 per draw: sequential seeds of the library itself are correlated.
function dice(key) {
  let n = 0;
  const uniform = () => {
    const digest = createHash("sha256").update(`${key}/${n++}`).digest();
    return digest.readUIntBE(0, 6) / 2 ** 48;
  };
  return {
    uniform,
    chance: (p) => uniform() < p,
    pick: (list) => list[Math.floor(uniform() * list.length)],
  };
}

const on = (flag) => (flag ? 100 : 0);

// Each style: label wishes -> [library options, what the drawing then shows]. null = the style cannot show it.
const STYLES = {
  ink: [styles.lorelei, (w) => [
    { hairColor: [HAIRS[w.hair]], skinColor: [w.skin], glassesProbability: on(w.glasses), beardProbability: on(w.beard),
      hair: w.length === "long" ? ["variant03", "variant08", "variant11", "variant12", "variant15", "variant18", "variant24",
                                   "variant26", "variant30", "variant37", "variant40", "variant48"] : range("variant", 1, 48),
      earringsProbability: 0, frecklesProbability: 0, hairAccessoriesProbability: 0,
      mouth: w.expression === "happy" ? range("happy", 1, 18) : range("sad", 1, 9) },
    { ...w, length: null, hat: false }]],
  pixel: [styles.pixelArt, (w) => [
    { hairColor: [HAIRS[w.hair]], skinColor: [w.skin], glassesProbability: on(w.glasses), beardProbability: on(w.beard),
      hatProbability: on(w.hat), accessoriesProbability: 0,
      hair: w.length === "long" ? range("long", 1, 21) : range("short", 1, 24),
      mouth: w.expression === "happy" ? range("happy", 1, 13) : range("sad", 1, 10) },
    w]],
  sketch: [styles.openPeeps, (w) => {
    const coloured = w.length === "long" ? ["bangs", "grayMedium"] : ["short4", "mohawk", "grayShort"];
    return [
      { head: w.hat ? ["hatBeanie", "hatHip"] : coloured, headContrastColor: [HAIRS[w.hair]], skinColor: [w.skin],
        accessories: ["glasses", "glasses2", "glasses3", "glasses4", "sunglasses"], accessoriesProbability: on(w.glasses),
        facialHairProbability: on(w.beard), facialHair: ["full", "full2", "full3", "full4", "chin"], maskProbability: 0,
        face: w.expression === "happy" ? ["smile", "smileBig", "smileLOL", "lovingGrin1", "smileTeethGap", "cute"]
                                       : ["angryWithFang", "veryAngry", "rage", "concerned", "fear", "solemn"] },
      w.hat ? { ...w, hair: null, length: null } : w];
  }],
  blob: [styles.thumbs, (w, d) => [
    { shapeColor: [d.pick(Object.values(HAIRS))], backgroundRotation: [0],
      mouth: w.expression === "happy" ? ["variant2", "variant1"] : ["variant4", "variant5"] },
    { ...w, hair: null, length: null, expression: null, glasses: false, beard: false, hat: false }]],
  flat: [styles.micah, (w) => [
    { hairColor: [HAIRS[w.hair]], baseColor: [w.skin], glassesProbability: on(w.glasses), glassesColor: ["000000"],
      facialHairProbability: on(w.beard), facialHair: ["beard"], facialHairColor: [HAIRS[w.hair]], earringsProbability: 0,
      hair: w.hat ? ["turban"] : ["fonze", "dannyPhantom", "full", "pixie"],
      mouth: w.expression === "happy" ? ["laughing", "smile", "smirk"] : ["sad", "frown", "nervous"] },
    { ...w, length: null, hair: w.hat ? null : w.hair }]],
  grin: [styles.bigSmile, (w) => [
    { hairColor: [HAIRS[w.hair]], skinColor: [w.skin], accessories: ["glasses", "sunglasses"],
      accessoriesProbability: on(w.glasses),
      hair: w.length === "long" ? ["wavyBob", "straightHair", "braids", "curlyBob"]
                                : ["shortHair", "mohawk", "curlyShortHair", "bowlCutHair"],
      mouth: w.expression === "happy" ? ["openedSmile", "gapSmile", "teethSmile", "kawaii"]
                                      : ["unimpressed", "openSad"] },
    { ...w, beard: false, hat: false }]],
  toon: [styles.toonHead, (w) => [
    { hairColor: [HAIRS[w.hair]], skinColor: [w.skin], beardProbability: on(w.beard),
      beard: ["fullBeard", "chinMoustache", "longBeard"], rearHairProbability: on(w.length === "long"),
      mouth: w.expression === "happy" ? ["laugh", "smile"] : ["angry", "sad"] },
    { ...w, glasses: false, hat: false }]],
  icon: [styles.personas, (w) => [
    { hairColor: [HAIRS[w.hair]], skinColor: [w.skin], eyes: w.glasses ? ["glasses", "sunglasses"] : ["open", "happy"],
      facialHairProbability: on(w.beard), facialHair: ["beardMustache", "walrus", "goatee"],
      hair: w.hat ? ["cap", "beanie"] : w.length === "long" ? ["long", "bobCut", "pigtails", "extraLong", "bobBangs"]
                                      : ["sideShave", "shortCombover", "curlyHighTop", "fade", "mohawk"],
      mouth: w.expression === "happy" ? ["smile", "bigSmile", "smirk"] : ["frown"] },
    w.hat ? { ...w, hair: null, length: null } : w]],
};

function avatar(key, hats) {
  const d = dice(key);
  const style = d.pick(Object.keys(STYLES));
  const wish = {
    background: d.pick(Object.keys(BACKGROUNDS)), hair: d.pick(Object.keys(HAIRS)), skin: d.pick(SKINS),
    length: d.pick(["short", "long"]), expression: d.pick(["happy", "sad"]),
    glasses: d.chance(0.4), beard: d.chance(0.3), hat: d.chance(hats),
  };
  const [library, options] = STYLES[style];
  const [chosen, shown] = options(wish, d);
  const svg = createAvatar(library, {
    ...chosen, seed: key, backgroundColor: [BACKGROUNDS[wish.background]], backgroundType: ["solid"], size: 64,
  }).toString();
  return { style, background: shown.background, hair: shown.hair, length: shown.length, expression: shown.expression,
           glasses: shown.glasses, beard: shown.beard, hat: shown.hat, svg };
}

const [salt, start, count, hats] = [process.argv[2], ...process.argv.slice(3).map(Number)];
for (let i = start; i < start + count; i++) process.stdout.write(JSON.stringify(avatar(`${salt}-${i}`, hats)) + "\n");
