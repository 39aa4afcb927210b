"use strict";
// What each control, the clip and the thermostat did to the tokens.

const controlsView = {
  id: "controls",
  title: "Controls",
  lines: true,
  build(root, context) {
    let cards = null;
    let known = ""; // the metrics that the cards are for
    let details = {};
    const empty = h("p", { class: "empty wide", hidden: true }, "These runs recorded no control, no clip and no thermostat.");
    root.append(empty);
    return async () => {
      details = await context.details();
      const names = [...new Set(Object.values(details).flatMap((one) => one.metrics))];
      if (known !== names.toSorted().join()) {
        known = names.toSorted().join();
        forgetCards();
        root.replaceChildren(empty);
        cards = controlCards(root, names, () => details, context);
      }
      const found = await lineCards(cards.lines)(context);
      const histograms = await source.of(context.focus, "histograms");
      drawHistogram(cards.weights, histograms, "weight");
      drawHistogram(cards.advantages, histograms, "advantage");
      empty.hidden = found.some(Boolean);
    };
  },
};

function controlCards(root, names, details, context) {
  const touching = names.filter((name) => metricOf(name).touches && !name.startsWith("clip/"));
  const of = (prefix) => names.filter((name) => name.startsWith(prefix) && !name.endsWith("/effect")).map((name) => ({ name, label: name.split("/")[1].replaceAll("_", " ") }));
  const found = [];
  const add = (title, panels, options) => panels.every((panel) => panel.lines.length) && found.push(new LineCard(root, title, panels, options));
  add("Tokens that controls changed", [{ unit: "fraction", lines: touching.map((name) => ({ name, label: name.split("/")[0] })) }], { wide: touching.length > 3 });
  add("Clipped by the surrogate", [{ unit: "fraction", lines: lines(["clip/high", "upper bound, A > 0"], ["clip/low", "lower bound, A < 0"], ["clip/dual", "dual clip"]) }]);
  add(
    "Thermostat",
    [
      { unit: "nats", linear: true, lines: lines(["entropy/mean", "entropy"]), band: (run) => details()[run.id].band },
      { unit: "1", lines: [{ name: "thermostat/value", label: "lever" }] },
      { unit: "steps", linear: true, lines: [{ name: "thermostat/outside", label: "steps outside the band" }] },
    ].slice(0, names.includes("thermostat/value") ? 3 : 0),
    { wide: true },
  );
  const weights = new Card(root, "Weights on the tokens", { wide: true, height: 300, about: metricsTable.histograms.weight?.meaning, note: `Share of the tokens at each weight; 0 for those taken out of the loss. Of ${context.focus.name}.` });
  const advantages = new Card(root, "Advantages of the tokens", { wide: true, height: 300, about: metricsTable.histograms.advantage?.meaning, note: `Share of the tokens at each advantage. Of ${context.focus.name}.` });
  const own = [...new Set(names.map((name) => name.split("/")[0]))].filter((area) => isControl(area) && of(`${area}/`).length);
  for (const area of own) add(area, byUnit(of(`${area}/`)));
  add("How far the update moved the policy", [{ unit: "nats", lines: lines(["policy/kl_old", "KL from the rollout's policy"]) }, { unit: "ratio", linear: true, lines: lines(["policy/ratio", "importance ratio"]) }]);
  return { lines: found, weights, advantages };
}

// One panel for each unit.
function byUnit(all) {
  const units = [...new Set(all.map((line) => metricOf(line.name).unit))];
  return units.map((unit) => ({ unit, lines: all.filter((line) => metricOf(line.name).unit === unit) }));
}

// A control is what can have an effect of its own.
function isControl(area) {
  return `${area}/effect` in metricsTable.metrics;
}
