"use strict";
// The page as a whole: which runs, which view, how lines are drawn; asks again every few seconds where a server answers.

const ASK_EVERY = 2000; // milliseconds
const FIRST_CHOICE = 6; // runs that are shown until somebody chooses
const VIEWS = [overviewView, lawView, dynamicsView, controlsView, tokensView, positionsView, promptsView, engineView, routerView, runView];

let metricsTable = { metrics: {}, histograms: {} };
let allRuns = []; // newest first
let update = async () => {}; // draws the numbers of the view at hand
let refreshing = false; // the numbers have changed, not the reader's wishes
let drawing = Promise.resolve();

const state = { view: "overview", chosen: new Set(), byHand: false, focus: null, axis: "step", smooth: 1, log: false, range: null, places: new Map() };

const context = {
  get runs() {
    return allRuns.filter((run) => state.chosen.has(run.id)).map(withColor);
  },
  // The run that views of one run show.
  get focus() {
    return this.runs.find((run) => run.id === state.focus) || this.runs[0];
  },
  get axis() {
    return state.axis;
  },
  get smooth() {
    return state.smooth;
  },
  get log() {
    return state.log;
  },
  get range() {
    return state.range;
  },
  zoom(range) {
    state.range = range;
    showTools();
    redraw();
  },
  // Names of metrics -> what `source.series` answers for each chosen run, by its id.
  async series(names, runs = this.runs) {
    const range = state.axis === "step" ? state.range : null;
    const found = await Promise.all(runs.map((run) => source.series(run, names, range, runs.length)));
    return Object.fromEntries(runs.map((run, i) => [run.id, found[i]]));
  },
  async details(runs = this.runs) {
    const found = await Promise.all(runs.map((run) => source.of(run, "run")));
    return Object.fromEntries(runs.map((run, i) => [run.id, found[i]]));
  },
};

function withColor(run) {
  if (!state.places.has(run.id)) {
    const taken = new Set(state.places.values());
    let place = 0;
    while (taken.has(place)) place += 1;
    state.places.set(run.id, place);
  }
  const place = state.places.get(run.id);
  return { ...run, color: theme.color(place), dash: theme.dash(place) };
}

// ---------------------------------------------------------------------------------------------- the address

function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  if (VIEWS.some((view) => view.id === words.get("view"))) state.view = words.get("view");
  state.byHand = words.has("run");
  state.chosen = new Set(words.getAll("run"));
  if (words.get("axis") in AXES) state.axis = words.get("axis");
  state.smooth = Number(words.get("smooth")) || 1;
  state.log = words.get("log") === "1";
  state.focus = words.get("focus");
}

function writeAddress() {
  const words = new URLSearchParams({ view: state.view, axis: state.axis, smooth: state.smooth, log: state.log ? "1" : "0" });
  if (state.focus) words.set("focus", state.focus);
  if (state.byHand) for (const id of state.chosen) words.append("run", id);
  history.replaceState(null, "", `#${words}`);
}

// ---------------------------------------------------------------------------------------------- parts around the view

function showTabs() {
  const bar = document.getElementById("views");
  bar.replaceChildren(
    ...VIEWS.map((view) => h("button", { type: "button", role: "tab", id: `tab-${view.id}`, "aria-controls": "view", "aria-selected": String(view.id === state.view), tabindex: view.id === state.view ? 0 : -1, onclick: () => go(view.id) }, view.title)),
  );
  document.getElementById("view").setAttribute("aria-labelledby", `tab-${state.view}`);
}

function go(id, focus = false) {
  state.view = id;
  showTabs();
  showTools();
  if (focus) document.getElementById(`tab-${id}`).focus();
  return rebuild();
}

function showTools() {
  const view = VIEWS.find((one) => one.id === state.view);
  const tools = document.getElementById("tools");
  const parts = [];
  if (view.lines) {
    parts.push(
      choice("x axis", [["step", "optimizer steps"], ["tokens", "tokens"], ["time", "time"]], state.axis, (axis) => change({ axis, range: null })),
      choice("smoothing", [["1", "none"], ["5", "5 steps"], ["10", "10 steps"], ["25", "25 steps"], ["50", "50 steps"], ["100", "100 steps"], ["500", "500 steps"]], String(state.smooth), (n) => change({ smooth: Number(n) })),
      checkbox("log scale", state.log, (log) => change({ log })),
    );
    if (state.range) parts.push(h("button", { type: "button", onclick: () => context.zoom(null) }, "reset zoom (Esc)"));
    else parts.push(h("span", { class: "note" }, "drag over a plot to zoom"));
  }
  if (view.single && context.runs.length > 1) {
    parts.push(choice("run", context.runs.map((run) => [run.id, run.name]), context.focus.id, (focus) => change({ focus })));
  }
  parts.push(h("button", { type: "button", id: "theme", style: { marginLeft: "auto" }, onclick: changeTheme }, theme.name === "dark" ? "light" : "dark"));
  tools.replaceChildren(...parts);
}

function change(wishes) {
  Object.assign(state, wishes);
  showTools();
  redraw();
}

function changeTheme() {
  document.documentElement.dataset.theme = theme.name === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("rlvr-theme", theme.name);
  } catch {
    // a page of a file may have no storage: the choice lasts as long as the page
  }
  showTools();
  showRuns();
  rebuild();
}

function showRuns() {
  const wanted = document.getElementById("find").value.toLowerCase();
  const list = document.getElementById("runs");
  const listed = allRuns.filter((run) => run.name.toLowerCase().includes(wanted));
  const focused = document.activeElement?.dataset?.run;
  const some = h("div", { class: "tools" }, h("button", { type: "button", onclick: () => choose(listed.map((run) => run.id)) }, "all"), h("button", { type: "button", onclick: () => choose([]) }, "none"));
  list.replaceChildren(...(allRuns.length > 1 ? [some] : []), ...listed.map(runEntry));
  if (!allRuns.length) list.append(h("p", { class: "empty" }, "No run yet. This page shows one as soon as it begins."));
  if (focused) list.querySelector(`[data-run="${CSS.escape(focused)}"]`)?.focus();
}

function runEntry(run) {
  const chosen = state.chosen.has(run.id);
  const look = chosen ? withColor(run) : { color: "transparent", dash: "solid" };
  const box = h("input", { type: "checkbox", "data-run": run.id, onchange: () => choose(box.checked ? [...state.chosen, run.id] : [...state.chosen].filter((id) => id !== run.id)) });
  box.checked = chosen;
  const facts = [`step ${run.last_step}${run.max_steps ? ` of ${run.max_steps}` : ""}`];
  if (isNumber(run.entropy)) facts.push(`H ${formatNumber(run.entropy, 3)}`);
  if (isNumber(run.reward)) facts.push(`R ${formatNumber(run.reward, 3)}`);
  if (run.alerts) facts.push(`${run.alerts} alert${run.alerts > 1 ? "s" : ""}`);
  if (run.read < 1) facts.push(`reading, ${Math.round(100 * run.read)} %`);
  return h(
    "label",
    { class: "run", title: run.detail || null },
    box,
    h("span", { class: "swatch", style: { borderTopColor: look.color, borderTopStyle: look.dash } }),
    h("span", { class: "name" }, run.name),
    h("span", { class: "about" }, h("span", { class: `state ${run.status}` }, run.status), ` · ${facts.join(" · ")}`),
  );
}

function choose(ids) {
  state.chosen = new Set(ids);
  state.byHand = true;
  for (const id of state.places.keys()) if (!state.chosen.has(id)) state.places.delete(id);
  state.range = null;
  showRuns();
  showTools();
  rebuild();
}

// ---------------------------------------------------------------------------------------------- drawing

// One after the other: what was asked for last is drawn last.
function inTurn(work) {
  drawing = drawing.then(work).catch(complain);
  return drawing;
}

function rebuild() {
  return inTurn(async () => {
    writeAddress();
    forgetCards();
    const root = document.getElementById("view");
    root.replaceChildren();
    update = async () => {};
    if (!context.runs.length) {
      root.append(h("p", { class: "empty wide" }, allRuns.length ? "Choose a run on the left." : "Waiting for a run to begin."));
      return;
    }
    const view = VIEWS.find((one) => one.id === state.view);
    update = view.build(root, context);
    await update();
  });
}

function redraw() {
  writeAddress();
  return inTurn(() => update());
}

function complain(error) {
  const root = document.getElementById("view");
  root.querySelector(".complaint")?.remove();
  root.prepend(h("p", { class: "complaint wide", role: "alert" }, `This view cannot be drawn: ${error.message}`));
}

async function ask() {
  const answer = await source.get("runs");
  const before = new Map(allRuns.map((run) => [run.id, run.version]));
  allRuns = answer.runs.toSorted((a, b) => (b.started || 0) - (a.started || 0));
  const told = answer.problems.map(({ id, error }) => `${id}: ${error}`).join("\n");
  document.getElementById("problems").textContent = told;
  const arrived = allRuns.filter((run) => !before.has(run.id));
  if (!state.byHand) state.chosen = new Set(allRuns.slice(0, FIRST_CHOICE).map((run) => run.id));
  const changed = context.runs.some((run) => before.get(run.id) !== run.version);
  return { arrived: arrived.length > 0 || allRuns.length !== before.size, changed };
}

async function follow() {
  const foot = document.getElementById("foot");
  if (!document.hidden) {
    try {
      const { arrived, changed } = await ask();
      showRuns();
      refreshing = true;
      if (arrived) await rebuild();
      else if (changed) await redraw();
      foot.textContent = "";
    } catch (error) {
      foot.textContent = `The server does not answer (${error.message}); asking again.`;
    }
    refreshing = false;
  }
  setTimeout(follow, ASK_EVERY);
}

function keys(event) {
  if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const at = VIEWS.findIndex((view) => view.id === state.view);
  if (event.target.getAttribute("role") === "tab" && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
    go(VIEWS[(at + (event.key === "ArrowRight" ? 1 : VIEWS.length - 1)) % VIEWS.length].id, true);
  } else if (/^[0-9]$/.test(event.key)) {
    go(VIEWS[(Number(event.key) + 9) % 10].id, true);
  } else if (event.key === "Escape" && state.range) {
    context.zoom(null);
  } else if (event.key === "l" && VIEWS[at].lines) {
    change({ log: !state.log });
  }
}

async function start() {
  let wish = null;
  try {
    wish = localStorage.getItem("rlvr-theme");
  } catch {
    // no storage
  }
  document.documentElement.dataset.theme = wish || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  readAddress();
  document.getElementById("find").addEventListener("input", showRuns);
  document.addEventListener("keydown", keys);
  const [table] = await Promise.all([source.get("metrics"), ask()]);
  metricsTable = table;
  document.title = allRuns.length === 1 ? `${allRuns[0].name} · rlvr` : `${allRuns.length} runs · rlvr`;
  showTabs();
  showRuns();
  showTools();
  await rebuild();
  // Milliseconds from the request of the page until its first view was painted.
  requestAnimationFrame(() => requestAnimationFrame(() => (document.documentElement.dataset.ready = performance.now())));
  if (LIVE) setTimeout(follow, ASK_EVERY);
}

start().catch((error) => complain(error));
