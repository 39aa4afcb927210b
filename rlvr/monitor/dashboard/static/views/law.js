"use strict";
// The law R = -a exp(H) + b: what reward has been bought with entropy, and what is left to buy.

const lawView = {
  id: "law",
  title: "Law",
  lines: true,
  build(root, context) {
    const verdicts = h("div", {});
    root.append(h("section", { class: "card wide" }, h("header", {}, h("h3", {}, "R = −a exp(H) + b"), infoButton(explanation(["law/a", "law/b", "law/ceiling", "law/r2", "law/r2_linear", "law/holds"]))), verdicts));
    const cloud = new Card(root, "Reward against exp(entropy)", { wide: true, height: 420, about: "R is the mean reward of a rollout, H the entropy of the policy that made it, in nats. Cui et al. 2025, arXiv 2505.22617.", note: "One point for each rollout. Line and shade: the fit and its 95 % interval. Diamond at exp(H) = 1: the reward that the fit predicts when all entropy is spent." });
    const residuals = new Card(root, "What the fit leaves over", { about: "The reward of each rollout less what the fit gives for its entropy.", note: "A trend here means that the law does not hold: the ceiling is then not to be believed." });
    const history = new LineCard(root, "Predicted ceiling while training", [{ unit: "reward", linear: true, lines: lines(["law/ceiling", "ceiling"], ["law/ceiling_low", "lower end"], ["law/ceiling_high", "upper end"]) }], { note: "Fitted to the rollouts until then." });
    const quality = new LineCard(root, "Variance of the reward that is explained", [{ unit: "fraction", linear: true, lines: lines(["law/r2", "law"], ["law/r2_linear", "straight line in H"]) }]);
    const draw = lineCards([history, quality]);
    return async () => {
      const runs = context.runs;
      const laws = await Promise.all(runs.map((run) => source.of(run, "law")));
      const told = runs.map((run, i) => ({ run, ...laws[i] }));
      verdicts.replaceChildren(lawTable(told));
      drawCloud(cloud, told.filter((one) => one.points.length));
      drawResiduals(residuals, told.filter((one) => one.points.length && isNumber(one.fit.a)));
      await draw(context);
    };
  },
};

function lawTable(told) {
  const head = ["run", "verdict", "fit", "R²", "R² of a line in H", "predicted ceiling", "reward now"];
  const rows = told.map(({ run, points, fit, formula, verdict_text }) => {
    const believed = fit?.verdict === "holds";
    const verdict = h("span", { class: `state ${believed ? "running" : fit?.verdict === "does not hold here" ? "dead" : "unknown"}` }, fit?.verdict || "no rollouts");
    const ceiling = believed ? `${formatNumber(fit.ceiling, 3)} [${formatNumber(fit.ceiling_low, 3)}, ${formatNumber(fit.ceiling_high, 3)}]` : "–";
    const recent = points.slice(-10).map((point) => point[2]);
    const now = recent.length ? formatNumber(recent.reduce((a, b) => a + b) / recent.length, 3) : "–";
    return [run.name, h("span", {}, verdict, h("div", { class: "note" }, (verdict_text || "").replace(`${fit?.verdict}: `, ""))), h("span", { class: "soft" }, (formula || "").split(" over ")[0]), formatNumber(fit?.r2, 3), formatNumber(fit?.r2_linear, 3), ceiling, now];
  });
  return table(head, rows);
}

function drawCloud(card, told) {
  if (!told.length) return card.say("No rollout has been recorded yet.");
  const alone = told.length === 1;
  const series = [];
  for (const { run, points, band, fit } of told) {
    const color = run.color;
    const data = points.map(([step, entropy, reward]) => [Math.exp(entropy), reward, step, entropy]);
    series.push({ type: "scatter", name: run.name, data, symbolSize: alone ? 7 : 5, itemStyle: alone ? { opacity: 0.85 } : { color, opacity: 0.6 }, large: false });
    if (band.length) {
      series.push({ type: "line", name: run.name, data: band.map(([x, , middle]) => [x, middle]), showSymbol: false, color, lineStyle: { color: alone ? theme.paint("ink") : color, width: 1.5, type: run.dash }, silent: true, tooltip: { show: false } });
      series.push(shade(band, alone ? theme.paint("ink") : color));
    }
    if (fit.verdict === "holds") {
      series.push({ type: "scatter", name: run.name, data: [[1, fit.ceiling]], symbol: "diamond", symbolSize: 14, itemStyle: { color: theme.paint("bad") }, tooltip: tooltipStyle({ formatter: () => tooltip(run.name, [{ name: "predicted ceiling", value: formatNumber(fit.ceiling, 3) }]) }) });
    }
  }
  const steps = range(told[0].points.map((point) => point[0]));
  const numbers = () => [["run", "step", "entropy (nats)", "exp(H)", "reward"], told.flatMap(({ run, points }) => points.slice(-200).map(([step, entropy, reward]) => [run.name, step, entropy, Math.exp(entropy), reward]))];
  card.draw(
    {
      grid: { left: 62, right: alone ? 90 : 20, top: alone ? 34 : 56, bottom: 44 },
      legend: { show: !alone, type: "scroll", top: 0, left: 0, textStyle: { color: theme.paint("ink") } },
      xAxis: axis("exp(H)", { nameLocation: "middle", nameGap: 26, min: 1 }),
      yAxis: axis("reward"),
      tooltip: tooltipStyle({ formatter: ({ seriesName, value }) => tooltip(`${seriesName}, step ${value[2]}`, [{ name: "entropy", value: `${formatNumber(value[3])} nats` }, { name: "exp(H)", value: formatNumber(value[0]) }, { name: "reward", value: formatNumber(value[1]) }]) }),
      visualMap: alone ? { seriesIndex: 0, dimension: 2, min: steps[0], max: steps[1], calculable: true, right: 0, top: "middle", itemHeight: 120, itemWidth: 12, text: ["last step", "first"], textStyle: { color: theme.paint("soft") }, inRange: { color: theme.ramp } } : undefined,
      series,
    },
    { label: `Reward against exp of entropy: ${told.map((one) => `${one.run.name}, ${one.points.length} rollouts, ${one.formula || ""}`).join("; ")}`, numbers },
  );
}

// band: [[x, low, middle, high]].
function shade(band, color) {
  const [low, high] = [range(band.map((p) => p[1]))[0], range(band.map((p) => p[3]))[1]];
  return {
    type: "custom", silent: true, z: 1, clip: true, tooltip: { show: false },
    data: [[band[0][0], band.at(-1)[0], low, high]],
    encode: { x: [0, 1], y: [] },
    renderItem: (_, api) => ({
      type: "polygon",
      shape: { points: [...band.map(([x, , , top]) => api.coord([x, top])), ...band.toReversed().map(([x, bottom]) => api.coord([x, bottom]))] },
      style: { fill: color, opacity: 0.12 },
    }),
  };
}

function drawResiduals(card, told) {
  if (!told.length) return card.say("There is no fit yet.");
  const series = told.map(({ run, points, fit }) => ({
    type: "scatter", name: run.name, symbolSize: 5, itemStyle: { color: run.color, opacity: 0.6 },
    data: points.map(([step, entropy, reward]) => [step, reward - (fit.b - fit.a * Math.exp(entropy))]),
  }));
  card.draw(
    {
      grid: { left: 62, right: 18, top: 24, bottom: 44 },
      xAxis: axis("step", { nameLocation: "middle", nameGap: 26 }),
      yAxis: axis("reward − fit"),
      tooltip: tooltipStyle({ formatter: ({ seriesName, value }) => tooltip(`${seriesName}, step ${value[0]}`, [{ name: "reward above the fit", value: formatNumber(value[1]) }]) }),
      series,
    },
    { label: "Residuals of the law against the step", numbers: () => [["run", "step", "reward − fit"], series.flatMap((one) => one.data.slice(-200).map(([step, rest]) => [one.name, step, rest]))] },
  );
}
