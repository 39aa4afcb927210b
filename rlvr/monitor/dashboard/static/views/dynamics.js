"use strict";
// Why entropy moves: which covariances, which tokens, which controls; and whether theory foresees it.

const CLASSES = ["rewarded_likely", "rewarded_unlikely", "punished_likely", "punished_unlikely"];
const ESTIMATORS = ["discriminator", "covariance", "single_logit", "steer", "steer_released"];

const dynamicsView = {
  id: "dynamics",
  title: "Dynamics",
  lines: true,
  single: true,
  build(root, context) {
    const distribution = new Card(root, "Covariance of log-prob and advantage", { wide: true, height: 330, about: metricsTable.histograms.covariance?.meaning, note: "Share of the step's tokens in each range of (A − mean A)(logp − mean logp). Tokens at the top, likely and rewarded or unlikely and punished, drive entropy down." });
    const tails = new LineCard(root, "Largest covariances", [{ unit: "nats", lines: lines(["covariance/mean", "mean"], ["covariance/top_2_in_10", "top 20 %"], ["covariance/top_2_in_100", "top 2 %"], ["covariance/top_2_in_1000", "top 0.2 %"], ["covariance/top_2_in_10000", "top 0.02 %"]) }], { note: "At the first step of a 7B model: 0.35, 1.39, 3.11 and 5.65 for the four tops." });
    const both = new LineCard(root, "Entropy change of a step", [{ unit: "nats", linear: true, lines: lines(["dynamics/measured", "measured"]) }, { unit: "nats", linear: true, lines: lines(["dynamics/predicted", "predicted (SGD)"]) }]);
    const cloud = new Card(root, "Measured against predicted, by step", { about: "Mean entropy change of the probe's tokens: dynamics/measured against dynamics/predicted. The line is fitted to all watched steps.", note: "Each point is a watched step. The prediction is first-order and for an SGD step of the same learning rate: with Adam its size is another, and R² says how far to trust its sign and order." });
    const slope = new LineCard(root, "Agreement over tokens, by estimator", [{ unit: "fraction", linear: true, lines: ESTIMATORS.map((name) => ({ name: `dynamics/${name}_r2`, label: name.replaceAll("_", " ") })) }, { unit: "1", linear: true, lines: ESTIMATORS.map((name, i) => ({ name: `dynamics/${name}_slope`, label: name.replaceAll("_", " "), color: i })) }], { note: "Above R², below the slope, of measured on predicted change over the tokens of a step." });
    const classes = new LineCard(root, "Entropy change by class of tokens", [{ unit: "nats", linear: true, lines: CLASSES.map((name) => ({ name: `dynamics/measured_${name}`, label: name.replace("_", ", ") })) }, { unit: "nats", linear: true, lines: CLASSES.map((name, i) => ({ name: `dynamics/predicted_${name}`, label: name.replace("_", ", "), color: i })) }], { wide: true, note: "Above measured, below predicted. Likely: p > exp(−H)." });
    const effects = h("div", { class: "sides" });
    root.append(effects);
    let effectCard = null;
    const draw = lineCards([tails, both, slope, classes]);
    return async () => {
      const run = context.focus;
      const [details, histograms] = await Promise.all([source.of(run, "run"), source.of(run, "histograms")]);
      drawHistogram(distribution, histograms, "covariance");
      const found = await draw(context, [run]);
      if (!found[1]) {
        both.card.element.hidden = false;
        both.card.say("No step was watched. Set probe_sequences to predict and measure the entropy change of each step.");
      }
      drawAgreement(cloud, await source.of(run, "agreement"));
      const names = details.metrics.filter((name) => name.endsWith("/effect"));
      if (names.length) {
        effectCard ??= new LineCard(effects, "What each control adds to the predicted change", [{ unit: "nats", linear: true, lines: names.map((name) => ({ name, label: name.split("/")[0] })) }], { named: true });
        await lineCards([effectCard])(context, [run]);
      }
    };
  },
};

// Shares of a step's tokens by bin, over the steps.
function drawHistogram(card, { step, counts }, name) {
  const columns = counts?.[name];
  card.element.hidden = !columns?.length;
  if (!columns?.length) return;
  const { edges, unit, meaning } = metricsTable.histograms[name];
  const labels = binLabels(edges);
  const cells = [];
  const shares = columns.map((bins) => {
    const total = bins.reduce((a, b) => a + b, 0);
    return bins.map((count) => (total ? count / total : 0));
  });
  shares.forEach((bins, column) => bins.forEach((share, row) => share > 0 && cells.push([column, row, share])));
  const most = range(cells.map((cell) => cell[2]))[1];
  card.draw(
    heatmap(step, labels, cells.map(([x, y, share]) => [x, y, Math.log10(share)]), { unit: "", low: Math.max(-5, range(cells.map((cell) => Math.log10(cell[2])))[0]), high: Math.log10(most), yName: unit === "1" ? name : unit, told: (x) => `${formatNumber(100 * 10 ** x, 2)} %` }),
    { label: `${card.title}: ${meaning}, over ${step.length} times`, numbers: () => [["step", ...labels], step.map((at, i) => [at, ...shares[i].map((share) => `${formatNumber(100 * share, 2)} %`)])] },
  );
}

function binLabels(edges) {
  const told = edges.map((edge) => formatNumber(edge, 3));
  return [`< ${told[0]}`, ...told.slice(0, -1).map((low, i) => `${low} to ${told[i + 1]}`), `≥ ${told.at(-1)}`];
}

function drawAgreement(card, { points, slope, intercept, r2 }) {
  card.element.hidden = !points.length;
  if (!points.length) return;
  const ends = range(points.map((point) => point[0]));
  const fitted = isNumber(slope) ? `slope ${formatNumber(slope, 3)}, R² ${formatNumber(r2, 3)}` : "too few steps for a line";
  card.draw(
    {
      title: { text: fitted, right: 10, top: 0, textStyle: { fontSize: 12, fontWeight: "normal", color: theme.paint("soft") } },
      grid: { left: 66, right: 90, top: 34, bottom: 44 },
      xAxis: axis("predicted, nats", { nameLocation: "middle", nameGap: 26, axisLabel: { color: theme.paint("soft"), hideOverlap: true, formatter: (x) => formatNumber(x, 2) } }),
      yAxis: axis("measured, nats", { axisLabel: { color: theme.paint("soft"), formatter: (x) => formatNumber(x, 2) } }),
      tooltip: tooltipStyle({ formatter: ({ value }) => tooltip(`step ${value[2]}`, [{ name: "predicted", value: formatNumber(value[0]) }, { name: "measured", value: formatNumber(value[1]) }]) }),
      visualMap: { seriesIndex: 0, dimension: 2, min: points[0][2], max: points.at(-1)[2], right: 0, top: "middle", itemHeight: 90, itemWidth: 12, calculable: true, text: ["last", "first"], textStyle: { color: theme.paint("soft") }, inRange: { color: theme.ramp } },
      series: [
        { type: "scatter", data: points, symbolSize: 6 },
        { type: "line", silent: true, showSymbol: false, color: theme.paint("ink"), lineStyle: { width: 1.4, color: theme.paint("ink") }, data: isNumber(slope) ? ends.map((x) => [x, intercept + slope * x]) : [] },
      ],
    },
    { label: `Measured against predicted entropy change: ${fitted}`, numbers: () => [["step", "predicted", "measured"], points.slice(-200).map(([x, y, step]) => [step, x, y])] },
  );
}
