"use strict";
// Where in a completion the policy is uncertain, and where engine and trainer disagree, over the training.

const positionsView = {
  id: "positions",
  title: "Positions",
  single: true,
  build(root, context) {
    const entropy = new Card(root, "Entropy by position in the completion", { wide: true, height: 320, info: ["entropy/mean"] });
    const profile = new Card(root, "The same, as profiles", { info: ["entropy/mean"], note: "Mean entropy at each range of positions, at five times of the training." });
    const mismatch = new Card(root, "Mismatch of engine and trainer by position", { wide: true, height: 320, info: ["mismatch/abs_logp_mean"], note: "Mean |trainer log-prob − engine log-prob|. It grows along the completion where caches or precision differ." });
    return async () => {
      const found = await source.of(context.focus, "positions");
      if (!found.step.length) {
        mismatch.element.hidden = profile.element.hidden = true;
        return entropy.say("Not recorded: diagnostics are off in this run, or it has no step yet.");
      }
      const labels = binRanges(found.edges);
      drawPositions(entropy, found.step, labels, found.entropy, false);
      drawProfiles(profile, found.step, labels, found.entropy);
      mismatch.element.hidden = !found.mismatch.length;
      if (found.mismatch.length) drawPositions(mismatch, found.step, labels, found.mismatch, true);
    };
  },
};

function binRanges(edges) {
  return edges.map((edge, i) => (i + 1 < edges.length ? `${edge}–${edges[i + 1] - 1}` : `${edge}+`));
}

function drawPositions(card, steps, labels, columns, log) {
  const value = (x) => (log ? Math.log10(x) : x);
  const cells = columns.flatMap((bins, column) => bins.map((x, row) => [column, row, x]).filter(([, , x]) => isNumber(x) && (!log || x > 0)));
  if (!cells.length) return card.say("No engine but the trainer itself made these completions.");
  const [low, high] = range(cells.map((cell) => value(cell[2])));
  card.draw(
    heatmap(steps, labels, cells.map(([x, y, v]) => [x, y, value(v)]), { unit: "nats", low: log ? low : 0, high: high > low ? high : low + 1e-9, yName: "position", told: (x) => formatNumber(log ? 10 ** x : x, 3) }),
    { label: `${card.title}, over ${steps.length} times`, numbers: () => [["step", ...labels], steps.map((step, i) => [step, ...columns[i].map((x) => (isNumber(x) ? x : "–"))])] },
  );
}

function drawProfiles(card, steps, labels, columns) {
  const last = steps.length - 1;
  const chosen = [...new Set([0, 0.25, 0.5, 0.75, 1].map((share) => Math.round(share * last)))];
  const ramp = theme.ramp;
  const series = chosen.map((column, i) => {
    const color = ramp[Math.round(((i + 1) / chosen.length) * (ramp.length - 1))];
    return { type: "line", name: `step ${steps[column]}`, data: columns[column], color, lineStyle: { width: 2, color }, symbolSize: 5, connectNulls: true };
  });
  card.draw(
    {
      grid: { left: 56, right: 16, top: 46, bottom: 42 },
      legend: { show: true, type: "scroll", top: 0, textStyle: { color: theme.paint("ink"), fontSize: 11 } },
      tooltip: tooltipStyle({ trigger: "axis", formatter: (items) => tooltip(`position ${items[0].name}`, items.map((item) => ({ color: item.color, name: item.seriesName, value: `${formatNumber(item.value)} nats` }))) }),
      xAxis: axis("position in the completion", { type: "category", data: labels, nameLocation: "middle", nameGap: 26, axisLabel: { color: theme.paint("soft"), hideOverlap: true } }),
      yAxis: axis("nats", { min: 0 }),
      series,
    },
    { label: card.title, numbers: () => [["position", ...series.map((one) => one.name)], labels.map((range, i) => [range, ...series.map((one) => one.data[i] ?? "–")])] },
  );
}
