"use strict";
// Entropy and reward together, with the band and the alarms; time; and below, whatever else was recorded.

// Draws cards of lines: hides those of which no run has anything, and asks at once for what the others in sight need;
// the rest follow when they come into sight. Returns which have something.
function lineCards(cards) {
  const ask = async (context, runs, some) => {
    const names = [...new Set(some.flatMap((card) => card.names))];
    const data = names.length ? await context.series(names, runs) : {};
    for (const card of some) card.update(context, data);
  };
  return async (context, runs = context.runs) => {
    const details = Object.values(await context.details(runs));
    const known = new Set(details.flatMap((one) => one.metrics));
    const found = cards.map((card) => card.names.some((name) => known.has(name)));
    cards.forEach((card, i) => (card.card.element.hidden = !found[i]));
    const wanted = cards.filter((_, i) => found[i]);
    const near = wanted.filter((card) => card.card.near);
    for (const card of wanted) card.card.later = near.includes(card) ? null : () => ask(context, runs, [card]);
    await ask(context, runs, near);
    return found;
  };
}

const MARKS = 100; // alerts that are marked in a plot

// Where an alert or an evaluation of a step stands on the horizontal axis.
function xOf(context, data, step) {
  return context.axis === "step" ? step : AXES[context.axis].of(data)[nearest(data.step, step)];
}

// limits: values at which the run's own alarm speaks, shown where the plot reaches them.
function alertMarks(alerts, context, data, limits = []) {
  const [low, high] = context.range || [0, Infinity];
  const placed = alerts.map((alert) => ({ xAxis: xOf(context, data, alert.step), title: `step ${alert.step}`, message: `${alert.kind}: ${alert.message}` }));
  const shown = placed.filter((mark) => mark.xAxis >= low && mark.xAxis <= high).slice(-MARKS);
  const ends = [low, Math.min(high, AXES[context.axis].of(data).at(-1) ?? 0)];
  const level = (value) => ends.map((x) => ({ coord: [x, value], symbol: "none", lineStyle: { type: "dashed" }, title: "alarm", message: `limit of the entropy alarm: ${formatNumber(value)} nats` }));
  const levels = limits.filter((value) => isNumber(value) && value > 0).map(level);
  if (!shown.length && !levels.length) return undefined;
  return {
    symbol: ["none", "pin"],
    symbolSize: 16,
    lineStyle: { color: theme.paint("bad"), type: "dotted", width: 1 },
    itemStyle: { color: theme.paint("bad") },
    label: { show: false },
    tooltip: tooltipStyle({ trigger: "item", formatter: ({ data: mark }) => tooltip(mark.title, [{ name: mark.message, value: "" }]) }),
    data: [...shown, ...levels],
  };
}

function heldoutPoints(run, details, context, data) {
  const evals = details.evals.filter((one) => isNumber(one.metrics["heldout/reward"]) && !one.name);
  if (!evals.length || !data.step.length) return [];
  const named = (i) => ({ show: context.runs.length === 1 && (i === 0 || i === evals.length - 1), position: i ? "left" : "right", distance: 8 });
  const points = evals.map((one, i) => ({ value: [xOf(context, data, one.step), one.metrics["heldout/reward"]], label: named(i) }));
  return [
    {
      type: "line", name: "held out", data: points, symbol: "diamond", symbolSize: 10, color: run.color, z: 4,
      lineStyle: { width: 1, type: "dotted", color: run.color },
      tooltip: { show: false },
      label: { color: theme.paint("ink"), formatter: ({ value }) => formatNumber(value[1], 3) },
    },
  ];
}

function statusCard(root) {
  const body = h("div", {});
  root.append(h("section", { class: "card wide", id: "status" }, body));
  return (context, details) => {
    body.replaceChildren(...context.runs.slice(0, 8).map((run) => runStatus(run, details[run.id])));
    if (context.runs.length > 8) body.append(h("p", { class: "note" }, `and ${context.runs.length - 8} more runs`));
  };
}

const openAlerts = new Map(); // by run, as the reader left them

function runStatus(run, details) {
  const facts = [
    h("span", { class: "swatch", style: { borderTopColor: run.color, borderTopStyle: run.dash } }),
    h("b", {}, run.name),
    h("span", { class: `state ${run.status}` }, run.status),
    h("span", {}, "step ", h("b", {}, `${run.last_step}${run.max_steps ? ` / ${run.max_steps}` : ""}`)),
    h("span", {}, h("b", {}, formatCount(run.tokens)), " tokens trained on"),
    h("span", {}, h("b", {}, formatSeconds(run.spent)), " of training"),
    LIVE && isNumber(run.left) ? h("span", {}, "about ", h("b", {}, formatSeconds(run.left)), " to go") : null,
    run.controls.length ? h("span", {}, "controls ", h("b", {}, run.controls.join(", "))) : null,
  ];
  const parts = [h("p", { class: "facts" }, facts)];
  if (run.detail) parts.push(h("p", { class: "note" }, run.detail));
  if (details.error) parts.push(h("p", { class: "note" }, details.error));
  const broken = Object.entries(details.not_finite || {});
  if (broken.length) parts.push(h("p", { class: "note" }, `not finite: ${broken.map(([name, n]) => `${name} in ${n} steps`).join(", ")}`));
  if (details.alerts.length) {
    const list = details.alerts.slice(-50).reverse().map((one) => h("li", {}, h("b", {}, `step ${one.step} · ${one.kind}`), ` ${one.message}`));
    const open = openAlerts.get(run.id) ?? details.alerts.length <= 3;
    const told = details.alerts.length > 50 ? ", the last 50" : "";
    parts.push(h("details", { class: "fold", open, ontoggle: (event) => openAlerts.set(run.id, event.target.open) }, h("summary", {}, `${details.alerts.length} alert${details.alerts.length > 1 ? "s" : ""}, newest first${told}`), h("ul", { class: "alerts" }, list)));
  }
  return h("div", {}, parts);
}

const lines = (...names) => names.map((name) => (Array.isArray(name) ? { name: name[0], label: name[1] } : { name, label: name.split("/")[1].replaceAll("_", " ") }));

const OVERVIEW = [
  ["Seconds of a step by phase", [{ unit: "s", stack: true, zero: true, lines: lines("time/rollout", "time/sync_weights", "time/old_logps", "time/verify", "time/critic", "time/update") }], { note: "Of the first chosen run." }],
  ["Throughput", [{ unit: "tokens/s", zero: true, lines: lines(["time/rollout_tokens_per_s", "rollout"], ["time/update_tokens_per_s", "update"]) }]],
  ["Pass rate in training", [{ unit: "fraction", lines: lines(["reward/pass_at_1", "pass@1"], ["reward/pass_at_4", "pass@4"], ["reward/pass_at_8", "pass@8"], ["reward/pass_at_16", "pass@16"]) }]],
  ["Groups without a gradient", [{ unit: "fraction", lines: lines("reward/zero_variance_groups") }], { note: "All completions of a prompt got the same reward: nothing is learned from them." }],
  ["Length of completions", [{ unit: "tokens", lines: lines(["rollout/completion_length", "mean"], ["rollout/completion_length_max", "longest"]) }]],
  ["Cut off at the length limit", [{ unit: "fraction", lines: lines("rollout/truncated") }]],
  ["Gradient norm", [{ unit: "1", lines: lines("optim/grad_norm", ["critic/grad_norm", "critic's"]) }]],
  ["Where the entropy is", [{ unit: "fraction", lines: lines(["entropy/share_top_20pct", "top 20 % of the tokens"], ["entropy/share_top_5pct", "top 5 %"], ["entropy/share_top_1pct", "top 1 %"]) }], { note: "Share of all entropy in the tokens that have most of it: few forking tokens carry it when these are high." }],
  ["Critic", [{ unit: "fraction", linear: true, lines: lines("critic/explained_variance") }]],
  ["Verifier", [{ unit: "fraction", linear: true, lines: lines("reward/unscored", "reward/verifier_errors", "reward/verifier_timeouts") }]],
];

const overviewView = {
  id: "overview",
  title: "Overview",
  lines: true,
  build(root, context) {
    let details = {};
    let data = {};
    const showStatus = statusCard(root);
    const main = new LineCard(
      root,
      "Entropy and reward",
      [
        {
          unit: "nats",
          lines: lines(["entropy/mean", "entropy"]),
          band: (run) => details[run.id].band,
          marks: (run, at) => alertMarks(details[run.id].alerts, at, data[run.id], Object.values(details[run.id].alarm)),
        },
        { unit: "reward", linear: true, lines: lines(["reward/mean", "reward"]), extra: (run, at, series) => heldoutPoints(run, details[run.id], at, series) },
      ],
      { wide: true, note: "Shaded: the band that the thermostat holds. Dotted: alerts; dashed: the limits of the entropy alarm. Diamonds: reward on held-out prompts." },
    );
    const cards = OVERVIEW.map(([title, panels, options]) => new LineCard(root, title, panels, options));
    const draw = lineCards(cards);
    const shown = new Set([...main.names, ...cards.flatMap((card) => card.names)]);
    const more = everythingElse(root, context, shown);
    return async () => {
      [details, data] = await Promise.all([context.details(), context.series(main.names)]);
      showStatus(context, details);
      if (!main.update(context, data)) {
        main.card.element.hidden = false;
        main.card.say("No optimizer step has been recorded yet.");
      }
      await draw(context);
      await more(details);
    };
  },
};

// Every metric that no card above shows, once somebody asks for them.
function everythingElse(root, context, shown) {
  const fold = h("details", { class: "fold wide" }, h("summary", {}, "All other metrics"));
  root.append(fold);
  let draw = null;
  const build = async (details) => {
    const names = [...new Set(Object.values(details).flatMap((one) => one.metrics))].filter((name) => !shown.has(name)).sort();
    fold.hidden = !names.length;
    if (!fold.open || !names.length) return;
    if (!draw) {
      const grid = h("div", { class: "sides" });
      fold.append(grid);
      draw = lineCards(names.map((name) => new LineCard(grid, name, [{ unit: metricOf(name).unit, lines: [{ name, label: name }] }], { height: 190 })));
    }
    await draw(context);
  };
  fold.addEventListener("toggle", () => inTurn(async () => build(await context.details())));
  return build;
}
