/** A curve for tests: of one guidance, ten steps, no points yet. */
export const curve = (changes) => ({
  node: "7", workflow: "w", run: "1", kind: "guidance", lines: ["text"], steps: 10, cap: 1, relative: false,
  done: false, remark: null, start: 0, points: [], ...changes,
});
