"use strict";
// Where the numbers come from: a server that reads run directories, or a report that holds them. Both answer the same
// names with the same JSON. Nothing of it is ever put into the page as HTML.

const EMBEDDED = (() => {
  const element = document.getElementById("embedded");
  return element === null ? null : JSON.parse(element.textContent);
})();
const LIVE = EMBEDDED === null;
const POINTS = 600; // of a line
const FEW = 3; // runs whose lines show the extremes that a point stands for

const source = {
  kept: new Map(), // answers of the last requests, with the version of the run that they are of

  early: new Map(), // answers asked for before the page needs them

  async get(name, parameters = {}) {
    if (this.early.has(name)) {
      const answer = this.early.get(name);
      this.early.delete(name);
      return answer;
    }
    if (!LIVE) {
      const words = Object.entries(parameters).map(([key, value]) => `${key}=${value}`);
      const key = words.length ? `${name}?${words.join("&")}` : name;
      if (key in EMBEDDED) return EMBEDDED[key];
      throw new Error(`this report does not hold ${key}`);
    }
    const query = new URLSearchParams(parameters).toString();
    const response = await fetch(`api/${name}${query ? "?" + query : ""}`);
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error || `the server answered ${response.status}`);
    return answer;
  },

  // The same, once for each version of the run.
  async of(run, name, parameters = {}) {
    const asked = { run: run.id, ...parameters };
    const key = name + JSON.stringify(asked);
    const found = this.kept.get(key);
    if (found && found.version === run.version) return found.answer;
    const answer = this.get(name, asked);
    this.kept.set(key, { version: run.version, answer });
    answer.catch(() => this.kept.delete(key));
    if (this.kept.size > 300 + 20 * allRuns.length) this.kept.delete(this.kept.keys().next().value);
    return answer;
  },

  // Lines of some metrics, one of `total` runs': {step, tokens, seconds, per_point, series}.
  async series(run, names, range, total = 1) {
    if (LIVE) {
      const parameters = { names: names.join(","), points: total <= FEW ? POINTS : Math.max(POINTS / 3, Math.round((FEW * POINTS) / total)) };
      if (total > FEW) parameters.extremes = 0;
      if (range) Object.assign(parameters, { from: Math.floor(range[0]), to: Math.ceil(range[1]) });
      return this.of(run, "series", parameters);
    }
    const all = await this.get("series", { run: run.id });
    const series = Object.fromEntries(names.filter((name) => name in all.series).map((name) => [name, all.series[name]]));
    return { ...all, series };
  },
};

if (LIVE) for (const name of ["metrics", "runs"]) source.early.set(name, source.get(name));
