"use strict";
// Whether the engine that samples and the trainer that learns are the same policy.

const engineView = {
  id: "engine",
  title: "Engine",
  lines: true,
  build(root, context) {
    let details = {};
    let data = {};
    const alarms = h("div", {});
    root.append(h("section", { class: "card wide" }, h("header", {}, h("h3", {}, "Engine against trainer")), alarms));
    const marks = (run, at) => alertMarks(details[run.id].alerts.filter((one) => one.kind === "mismatch"), at, data[run.id]);
    const kl = new LineCard(root, "KL from the sampler to the trainer", [{ unit: "nats", lines: lines(["mismatch/kl", "KL"]), marks }]);
    const cards = [
      new LineCard(root, "|trainer log-prob − engine log-prob|", [{ unit: "nats", lines: lines(["mismatch/abs_logp_mean", "mean"], ["mismatch/abs_logp_max", "largest"]) }], { note: "One token of another kind than the rest shows in the largest, a systematic difference in the mean." }),
      new LineCard(root, "Probability ratio of a token", [{ unit: "ratio", lines: lines(["mismatch/ratio_mean", "mean"], ["mismatch/ratio_max", "largest"], ["mismatch/ratio_min", "smallest"]) }]),
      new LineCard(root, "Rollout", [{ unit: "tokens/s", zero: true, lines: lines(["time/rollout_tokens_per_s", "tokens per second"]) }, { unit: "s", zero: true, positive: true, lines: lines(["time/rollout", "generating"], ["time/sync_weights", "sending the weights"]) }]),
    ];
    const distribution = new Card(root, "Mismatch of the tokens", { wide: true, height: 300, about: metricsTable.histograms.mismatch?.meaning, note: `Share of the rollout's tokens in each range. Of ${context.focus.name}.` });
    return async () => {
      [details, data] = await Promise.all([context.details(), context.series(kl.names)]);
      showEngineAlarms(alarms, context.runs, details);
      kl.update(context, data);
      await lineCards(cards)(context);
      drawHistogram(distribution, await source.of(context.focus, "histograms"), "mismatch");
    };
  },
};

function showEngineAlarms(root, runs, details) {
  const parts = runs.map((run) => {
    const { alerts, metrics, config } = details[run.id];
    const found = alerts.filter((one) => one.kind === "mismatch" || one.kind === "stall");
    const measured = metrics.some((name) => name.startsWith("mismatch/"));
    const engine = config?.use_vllm ? `vLLM, ${config.vllm_mode || "colocate"}` : measured ? "an engine" : "the trainer's own model";
    const told = !measured ? "no mismatch to measure: the trainer itself samples" : found.length ? `${found.length} alerts, the last at step ${found.at(-1).step}: ${found.at(-1).message}` : "no alert";
    return [run.name, engine, told];
  });
  root.replaceChildren(table(["run", "sampled by", "alerts"], parts));
}
