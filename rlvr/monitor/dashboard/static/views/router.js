"use strict";
// A mixture of LoRA experts: how sure its routers are, and how even the load is.

const routerView = {
  id: "router",
  title: "Router",
  lines: true,
  single: true,
  build(root, context) {
    const empty = h("p", { class: "empty wide", hidden: true }, "This run trains no mixture of LoRA experts.");
    root.append(empty);
    const cards = [
      new LineCard(root, "Tsallis entropy of the routers", [{ unit: "1", linear: true, lines: lines(["router/entropy", "entropy"]) }, { unit: "fraction", linear: true, lines: lines(["router/soft", "tokens sent to all experts"]) }]),
      new LineCard(root, "Load of the experts", [{ unit: "1", linear: true, lines: lines(["router/load_max", "largest load"], ["router/balance", "balance"]) }, { unit: "fraction", linear: true, lines: lines(["router/dead", "dead experts"]) }]),
      new LineCard(root, "Experts of a token", [{ unit: "experts", linear: true, lines: lines(["router/experts", "mean"]) }]),
      new LineCard(root, "Losses of the routers", [{ unit: "1", lines: lines(["router/aux_loss", "auxiliary"], ["router/z", "z"]) }]),
      new LineCard(root, "Routes taken by the rollout's policy and now", [{ unit: "fraction", linear: true, lines: lines(["router/drift", "total variation"]) }]),
    ];
    const entropy = new Card(root, "Entropy by layer", { wide: true, height: 340, info: ["router/entropy"] });
    const load = new Card(root, "Load by layer and expert, at the last step", { wide: true, height: 340, info: ["router/load_max"], note: "In even shares of a layer's tokens: 1 is even." });
    const position = new Card(root, "Entropy by position in the text, at the last step", { info: ["router/entropy"] });
    return async () => {
      const run = context.focus;
      const found = await lineCards(cards)(context, [run]);
      const routers = await source.of(run, "router");
      empty.hidden = found.some(Boolean);
      const layers = (routers.layers || []).map(shortLayer);
      for (const card of [entropy, load]) card.element.hidden = !layers.length;
      position.element.hidden = !routers.position?.position_edges;
      if (!layers.length) return;
      drawLayers(entropy, routers.step, layers, routers.entropy);
      drawLoad(load, layers, routers.load_last || routers.load.at(-1));
      if (routers.position?.position_edges) drawRouterPosition(position, routers.position);
    };
  },
};

// `model.layers.28.mlp.down_proj` as `28 mlp.down_proj`.
function shortLayer(name) {
  return name.replace(/^.*?(\d+)\./, "$1 ");
}

function drawLayers(card, steps, layers, columns) {
  const cells = columns.flatMap((values, column) => values.map((value, row) => [column, row, value]).filter((cell) => isNumber(cell[2])));
  const [least, most] = range(cells.map((cell) => cell[2]));
  card.draw(
    heatmap(steps, layers, cells, { unit: "", low: least, high: Math.max(least + 1e-9, most), yName: "layer" }),
    { label: `Entropy of ${layers.length} routers over ${steps.length} times`, numbers: () => [["step", ...layers], steps.map((step, i) => [step, ...columns[i]])] },
  );
}

function drawLoad(card, layers, loads) {
  const experts = Math.max(...loads.map((row) => row.length));
  const cells = loads.flatMap((row, layer) => {
    const total = row.reduce((a, b) => a + b, 0);
    return row.map((value, expert) => [expert, layer, total ? (value / total) * row.length : 0]);
  });
  const names = Array.from({ length: experts }, (_, i) => i);
  const picture = heatmap(names, layers, cells, { unit: "even shares", low: 0, high: Math.max(1, range(cells.map((cell) => cell[2]))[1]), yName: "layer", xName: "expert" });
  card.draw(picture, { label: `Load of ${experts} experts in ${layers.length} layers`, numbers: () => [["layer", ...names.map((i) => `expert ${i}`)], loads.map((row, i) => [layers[i], ...row])] });
}

function drawRouterPosition(card, { position_edges: edges, position_entropy: entropy }) {
  card.draw(
    {
      grid: { left: 56, right: 16, top: 24, bottom: 42 },
      tooltip: tooltipStyle({ trigger: "axis", formatter: (items) => tooltip(`position ${items[0].name}`, [{ name: "entropy", value: formatNumber(items[0].value) }]) }),
      xAxis: axis("position in the text", { type: "category", data: binRanges(edges), nameLocation: "middle", nameGap: 26, axisLabel: { color: theme.paint("soft"), hideOverlap: true } }),
      yAxis: axis("entropy"),
      series: [{ type: "line", data: entropy, color: theme.color(0), lineStyle: { width: 2 } }],
    },
    { label: card.title, numbers: () => [["position", "entropy"], binRanges(edges).map((range, i) => [range, entropy[i]])] },
  );
}
