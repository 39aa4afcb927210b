"use strict";
// What a run was: its settings, beside those of another one, and the software that it ran on.

const runWish = { other: "", all: false, find: "" };

const runView = {
  id: "run",
  title: "Run",
  single: true,
  build(root, context) {
    const about = h("section", { class: "card wide" });
    const settings = h("section", { class: "card wide" });
    root.append(about, settings);
    const draw = async () => {
      const run = context.focus;
      const others = allRuns.filter((one) => one.id !== run.id);
      const other = others.find((one) => one.id === runWish.other) || null;
      const [mine, theirs] = await Promise.all([source.of(run, "run"), other ? source.of(other, "run") : null]);
      about.replaceChildren(...aboutRun(run, mine));
      if (refreshing && settings.contains(document.activeElement)) return; // somebody is typing
      renew(settings, ...settingsOf(mine, theirs, others, other, () => inTurn(draw)));
    };
    return draw;
  },
};

function aboutRun(run, details) {
  const rows = [
    ["status", `${run.status}${details.detail ? `: ${details.detail}` : ""}`],
    ["started", formatDate(details.started)],
    ["ended", details.finished ? formatDate(details.finished) : "–"],
    ["model", run.model || "–"],
    ["controls", run.controls.join(", ") || "none"],
    ["commit", details.commit || "unknown"],
    ...Object.entries(details.versions || {}).map(([name, version]) => [name, version]),
  ];
  if (details.error) rows.splice(1, 0, ["error", details.error]);
  const resumed = (details.resumed || []).map((one) => [one.step, formatDate(one.time), one.dropped_records ?? "–", flat(one.changed_config || {}).map(([key, value]) => `${key}: ${value}`).join("; ") || "nothing"]);
  const parts = [h("header", {}, h("h3", {}, run.name)), table(["", ""], rows)];
  if (resumed.length) parts.push(h("h2", {}, "Resumed"), table(["from step", "at", "records made again", "settings changed"], resumed.map((row) => [String(row[0]), ...row.slice(1).map(String)])));
  const evals = details.evals || [];
  if (evals.length) {
    const names = [...new Set(evals.flatMap((one) => Object.keys(one.metrics)))];
    parts.push(h("h2", {}, "Evaluations"), table(["step", "of", ...names], evals.map((one) => [one.step, one.name || "held-out prompts", ...names.map((name) => one.metrics[name] ?? "–")])));
  }
  return parts;
}

function flat(value, prefix = "") {
  return Object.entries(value).flatMap(([key, entry]) =>
    entry !== null && typeof entry === "object" && !Array.isArray(entry) && Object.keys(entry).length ? flat(entry, `${prefix}${key}.`) : [[prefix + key, typeof entry === "string" ? entry : JSON.stringify(entry)]],
  );
}

function settingsOf(mine, theirs, others, other, again) {
  const own = new Map(flat(mine.settings || {}));
  const foreign = new Map(theirs ? flat(theirs.settings || {}) : []);
  const keys = [...new Set([...own.keys(), ...foreign.keys()])].sort();
  const differing = keys.filter((key) => theirs && own.get(key) !== foreign.get(key));
  const isSet = (key) => [own.get(key), foreign.get(key)].some((value) => value !== undefined && value !== "null");
  const wanted = theirs && !runWish.all ? differing : keys.filter((key) => runWish.all || isSet(key));
  const found = wanted.filter((key) => key.includes(runWish.find));
  const tools = h(
    "div",
    { class: "tools" },
    others.length ? choice("compare with", [["", "no other run"], ...others.map((one) => [one.id, one.name])], other ? other.id : "", (id) => ((runWish.other = id), again())) : null,
    checkbox(theirs ? "also what is equal" : "also what is not set", runWish.all, (all) => ((runWish.all = all), again())),
    h("label", {}, "setting", h("input", { type: "search", value: runWish.find, onchange: (event) => ((runWish.find = event.target.value.trim()), again()) })),
  );
  const rows = found.map((key) => {
    const differs = differing.includes(key);
    const cells = [key, own.get(key) ?? "(not set)", ...(theirs ? [foreign.get(key) ?? "(not set)"] : [])];
    return h("tr", { class: differs ? "differs" : null }, cells.map((cell, i) => h("td", { class: i ? "value" : null }, cell)));
  });
  const head = h("tr", {}, ["setting", mine.name, ...(theirs ? [theirs.name] : [])].map((text) => h("th", {}, text)));
  const told = theirs ? `${differing.length} of ${keys.length} settings differ.` : `${keys.length} settings, defaults included.`;
  return [h("header", {}, h("h3", {}, "Settings")), tools, h("p", { class: "note" }, told), h("div", { class: "scroll", tabindex: 0, style: { maxHeight: "none" } }, h("table", {}, head, rows))];
}
