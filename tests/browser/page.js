/** What tests ask of the page, as `sdg.<name>(...)`. Nodes are named by their class and number, -1 the last. */
window.sdg = {
  node: (kind, number = -1) => app.graph.nodes.filter((node) => node.type === kind).at(number),

  /** Puts a place of the graph into the top left corner. */
  lookAt(x, y, scale) {
    const { ds } = app.canvas;
    ds.scale = scale;
    [ds.offset[0], ds.offset[1]] = [-x, -y];
    app.canvas.setDirty(true, true);
  },

  /** Sets widgets of a node by name. */
  set(kind, number, values) {
    for (const widget of sdg.node(kind, number).widgets) {
      if (widget.name in values) widget.value = values[widget.name];
    }
  },

  /** Where a socket is on the screen. */
  slot(kind, name, isInput) {
    const node = sdg.node(kind);
    const index = (isInput ? node.inputs : node.outputs).findIndex((slot) => slot.name === name);
    const [x, y] = node.getConnectionPos(isInput, index);
    const { scale, offset } = app.canvas.ds;
    const box = app.canvas.canvas.getBoundingClientRect();
    return [(x + offset[0]) * scale + box.left, (y + offset[1]) * scale + box.top];
  },

  element: (kind, number) => sdg.node(kind, number)?.widgets?.find((widget) => widget.name === "sdg_chart")?.element,

  /** What a chart shows: its words, the rows of its legend, and how many points its first line has. */
  chart(kind, number) {
    const element = sdg.element(kind, number);
    if (!element) return null;
    const texts = (row) => [...row.querySelectorAll(".name, .value")].map((part) => part.textContent);
    return {
      words: element.querySelector(".words")?.textContent ?? "",
      rows: [...element.querySelectorAll(".row")].map(texts),
      points: (element.querySelector("path")?.getAttribute("d").match(/[ML]/g) ?? []).length,
    };
  },

  /** The middle of a chart's plot on the screen. */
  middle(kind, number) {
    const box = sdg.element(kind, number).querySelector(".plot").getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  },
};
