"use strict";
// Sampled completions as text, each token shaded by what was measured of it. All of it is text nodes: a completion is
// whatever a model came to write.

// sign: the scale has two sides.   of: (row, index) -> number.
const SHADES = {
  entropy: { label: "entropy", unit: "nats", of: (row, i) => row.entropy?.[i], least: 0.5 },
  predicted: { label: "predicted entropy change", unit: "nats", sign: true, of: (row, i) => row.predicted?.[i] },
  covariance: { label: "covariance", unit: "nats", sign: true, of: (row, i) => row.covariance?.[i] },
  advantage: { label: "advantage", unit: "reward", sign: true, of: (row, i) => row.advantages?.[i] ?? row.advantage },
  weight: { label: "distance of the weight from 1", unit: "1", sign: true, of: (row, i) => (row.keep?.[i] === false ? -1 : isNumber(row.weight?.[i]) ? row.weight[i] - 1 : undefined) },
  drift: { label: "KL penalty", unit: "1", of: (row, i) => row.drift?.[i] },
  mismatch: { label: "|trainer − engine log-prob|", unit: "nats", of: (row, i) => (isNumber(row.rollout_logps?.[i]) ? Math.abs(row.old_logps[i] - row.rollout_logps[i]) : undefined) },
  surprise: { label: "−log-prob", unit: "nats", of: (row, i) => (isNumber(row.logps?.[i]) ? -row.logps[i] : undefined) },
  value: { label: "critic's value", unit: "reward", sign: true, of: (row, i) => row.values?.[i] },
};
const NUMBERS = ["entropy", "logps", "old_logps", "rollout_logps", "advantages", "weight", "drift", "covariance", "predicted", "values"];
const AT_FIRST = 6; // completions of a side

const tokenWish = { shade: "entropy", control: "", forks: false, prompt: "", low: "", high: "", steps: new Map() };

const tokensView = {
  id: "tokens",
  title: "Tokens",
  single: true,
  build(root, context) {
    const tools = h("section", { class: "card wide" });
    const sides = h("div", { class: "sides" });
    root.append(tools, sides);
    let offered = 0; // steps in the menus
    const draw = async () => {
      const run = context.focus;
      const { steps } = await source.of(run, "tokens");
      if (!steps.length) {
        tools.replaceChildren(h("p", { class: "empty" }, "No tokens were recorded. Set record_sequences to keep a few completions of each rollout."));
        return sides.replaceChildren();
      }
      const wished = tokenWish.steps.get(run.id) || [steps[0], steps.length > 1 ? steps.at(-1) : null];
      const chosen = wished.map((step) => (step === null || steps.includes(step) ? step : steps.at(-1)));
      const shown = chosen.filter((step) => step !== null);
      const answers = await Promise.all(shown.map((step) => Promise.all([source.of(run, "tokens", { step }), source.of(run, "forks", { step })])));
      const rows = answers.flatMap(([one]) => one.rows);
      renew(tools, tokenTools(run, steps, chosen, rows, () => inTurn(draw)));
      offered = steps.length;
      const scale = scaleOf(rows);
      sides.replaceChildren(...answers.map(([one, forks]) => tokenSide(one, forks, scale)));
    };
    return async () => {
      // Somebody reads: a new step changes the menus alone.
      const { steps } = await source.of(context.focus, "tokens");
      if (refreshing && sides.childElementCount && (steps.length === offered || tools.contains(document.activeElement))) return;
      await draw();
    };
  },
};

function tokenTools(run, steps, chosen, rows, redrawTokens) {
  const set = (name) => (value) => {
    tokenWish[name] = value;
    redrawTokens();
  };
  const pick = (place) => (value) => {
    const next = [...chosen];
    next[place] = value === "" ? null : Number(value);
    tokenWish.steps.set(run.id, next);
    redrawTokens();
  };
  const options = steps.map((step) => [String(step), `step ${step}`]);
  const shades = Object.entries(SHADES).filter(([, shade]) => rows.some((row) => isNumber(shade.of(row, 0)))).map(([key, shade]) => [key, shade.label]);
  if (!shades.some(([key]) => key === tokenWish.shade)) tokenWish.shade = shades[0]?.[0] || "entropy";
  const controls = [...new Set(rows.flatMap((row) => Object.keys(row.controls || {})))];
  const field = (label, name, type) => h("label", {}, label, h("input", { type, value: tokenWish[name], step: "any", style: { width: type === "number" ? "5rem" : "12rem" }, onchange: (event) => set(name)(event.target.value) }));
  const { label, unit, sign } = SHADES[tokenWish.shade];
  const scale = scaleOf(rows);
  const ramp = h("span", { class: "ramp", "aria-hidden": "true", style: { background: sign ? `linear-gradient(to right, ${shadeColor(-1)}, transparent, ${shadeColor(1)})` : `linear-gradient(to right, transparent, ${shadeColor(1)})` } });
  return h(
    "div",
    {},
    h(
      "div",
      { class: "tools" },
      choice("left", options, String(chosen[0]), pick(0)),
      choice("right", [["", "nothing"], ...options], chosen[1] === null ? "" : String(chosen[1]), pick(1)),
      choice("shade", shades, tokenWish.shade, set("shade")),
      controls.length ? choice("outline what was touched by", [["", "no control"], ...controls.map((name) => [name, name])], tokenWish.control, set("control")) : null,
      checkbox("underline forking tokens", tokenWish.forks, set("forks")),
      field("reward from", "low", "number"),
      field("to", "high", "number"),
      field("prompt contains", "prompt", "search"),
    ),
    h("p", { class: "note" }, `Shade: ${label}, `, sign ? `${formatNumber(-scale, 2)} ` : "0 ", ramp, ` ${formatNumber(scale, 2)} ${unit === "1" ? "" : unit}. Point at a token, or put the focus on a completion and use the arrow keys, for its numbers.`),
  );
}

// The value that gets the full shade: the 98th percentile of its size.
function scaleOf(rows) {
  const { of, least = 0 } = SHADES[tokenWish.shade];
  const sizes = rows.flatMap((row) => row.tokens.map((_, i) => Math.abs(of(row, i)))).filter(isNumber).sort((a, b) => a - b);
  return Math.max(least, sizes[Math.floor(0.98 * (sizes.length - 1))] || 0) || 1;
}

function shadeColor(share) {
  const strength = Math.round((theme.name === "dark" ? 48 : 70) * Math.min(1, Math.abs(share))); // text stays readable
  return `color-mix(in srgb, ${share < 0 ? "#0072B2" : "#E69F00"} ${strength}%, transparent)`;
}

function tokenSide({ step, rows, recorded }, forks, scale) {
  const [low, high] = [tokenWish.low, tokenWish.high].map((text) => (text === "" ? null : Number(text)));
  const words = tokenWish.prompt.toLowerCase();
  const wanted = rows.filter((row) => (low === null || row.reward >= low) && (high === null || row.reward <= high) && (!words || (row.prompt || "").toLowerCase().includes(words)));
  const sorted = wanted.toSorted((a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity));
  const articles = sorted.slice(0, AT_FIRST).map((row) => completion(row, scale, forks.threshold));
  const rest = sorted.slice(AT_FIRST);
  const more = rest.length ? h("button", { type: "button", onclick: () => more.replaceWith(...rest.map((row) => completion(row, scale, forks.threshold))) }, `${rest.length} more`) : null;
  return h(
    "section",
    { class: "card" },
    h("header", {}, h("h3", {}, `Step ${step}`), h("span", { class: "note" }, `${wanted.length} of ${recorded ?? rows.length} recorded completions`)),
    forkTable(forks.tokens),
    wanted.length ? articles : h("p", { class: "empty" }, "No completion passes the filter."),
    more,
  );
}

function forkTable(tokens) {
  if (!tokens.length) return null;
  const rows = tokens.map((one) => [visible(one.token), one.count, one.mean_entropy, `${formatNumber(100 * one.share_forking, 3)} %`]);
  return h("details", { class: "fold" }, h("summary", {}, "forking tokens of this step"), table(["token", "times seen", "mean entropy, nats", "among the top 20 %"], rows));
}

// Signs that reorder the text around them, or show nothing at all, are made visible; joiners, which scripts and emoji
// need, are left.
function visible(text) {
  return (text ?? "").replace(/(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}]/gu, "\ufffd").replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t");
}

function completion(row, scale, threshold) {
  const { of } = SHADES[tokenWish.shade];
  const entropies = (row.entropy || []).filter(isNumber);
  const fork = tokenWish.forks ? threshold ?? Infinity : Infinity;
  const touched = row.controls?.[tokenWish.control];
  const spans = row.tokens.map((token, i) => {
    const value = of(row, i);
    const classes = `token${row.entropy?.[i] >= fork ? " fork" : ""}${touched?.[i] ? " chosen" : ""}`;
    return h("span", { class: classes, style: isNumber(value) ? { background: shadeColor(value / scale) } : {} }, visible(token));
  });
  const facts = [`reward ${formatNumber(row.reward)}`, `advantage ${formatNumber(row.advantage)}`, `${row.length} tokens`];
  if (entropies.length) facts.push(`mean entropy ${formatNumber(entropies.reduce((a, b) => a + b, 0) / entropies.length)} nats`);
  const said = h("p", { class: "note", "aria-live": "polite" }, "\u00a0");
  const text = h("div", { class: "text", tabindex: 0, role: "group", "aria-label": `completion ${row.sequence}` }, spans);
  if (row.omitted) text.append(h("span", { class: "note" }, ` … and ${row.omitted} more tokens`));
  followTokens(text, spans, row, said);
  return h("article", {}, h("p", { class: "facts note" }, facts.join(" · ")), h("details", { class: "fold" }, h("summary", {}, `prompt ${row.prompt_index ?? ""}`), h("div", { class: "text" }, visible(row.prompt))), text, said, h("details", { class: "fold" }, h("summary", {}, "as one text"), h("div", { class: "text" }, visible(row.completion))));
}

// Numbers of the token under the pointer, or of the one to which the arrow keys have moved.
function followTokens(text, spans, row, said) {
  let at = -1;
  const tell = (i) => {
    if (at >= 0) spans[at].style.outline = "";
    at = i;
    spans[i].style.outline = `2px solid ${theme.paint("accent")}`;
    const numbers = NUMBERS.filter((name) => isNumber(row[name]?.[i])).map((name) => `${name === "predicted" && row.estimator ? `predicted (${row.estimator})` : name} ${formatNumber(row[name][i])}`);
    const by = Object.entries(row.controls || {}).filter(([, list]) => list[i]).map(([name]) => name);
    said.textContent = `token ${i} “${visible(row.tokens[i]).trim()}” · ${numbers.join(" · ")}${row.keep?.[i] === false ? " · not in the loss" : ""}${by.length ? ` · touched by ${by.join(", ")}` : ""}`;
  };
  text.addEventListener("mouseover", (event) => {
    const i = spans.indexOf(event.target);
    if (i >= 0) tell(i);
  });
  text.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move || !spans.length) return;
    event.preventDefault();
    tell(Math.min(spans.length - 1, Math.max(0, at + move)));
  });
}
