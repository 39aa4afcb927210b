"use strict";
// The page as a whole: which runs, which view, how lines are drawn; asks again every few seconds where a server answers.

const ASK_EVERY = 2000; // milliseconds
const SMOOTHING = [1, 5, 11, 25, 51, 101, 501]; // steps
const FIRST_CHOICE = 6; // runs that are shown until somebody chooses
const VIEWS = [overviewView, lawView, dynamicsView, controlsView, tokensView, positionsView, promptsView, engineView, routerView, runView];

let metricsTable = { metrics: {}, histograms: {} };
let allRuns = []; // newest first
let writtenAt = null; // Unix seconds of the numbers
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
  if (Object.hasOwn(AXES, words.get("axis"))) state.axis = words.get("axis");
  state.smooth = SMOOTHING.includes(Number(words.get("smooth"))) ? Number(words.get("smooth")) : 1;
  state.log = words.get("log") === "1";
  state.focus = words.get("focus");
}

function writeAddress() {
  const words = new URLSearchParams({ view: state.view, axis: state.axis, smooth: state.smooth, log: state.log ? "1" : "0" });
  if (state.focus) words.set("focus", state.focus);
  if (state.byHand) for (const id of state.chosen.size ? state.chosen : [""]) words.append("run", id);
  history.replaceState(null, "", `#${words}`);
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
  return inTurn(async () => {
    await update();
    document.querySelector(".complaint")?.remove();
  });
}

function complain(error) {
  const root = document.getElementById("view");
  root.querySelector(".complaint")?.remove();
  root.prepend(h("p", { class: "complaint wide", role: "alert" }, `This view cannot be drawn: ${error.message}`));
}

async function ask() {
  const answer = await source.get("runs");
  const before = new Map(allRuns.map((run) => [run.id, run.version + run.status + run.detail]));
  const shownBefore = context.runs.map((run) => run.id).join("\n");
  writtenAt = answer.now;
  allRuns = answer.runs.toSorted((a, b) => (b.started || 0) - (a.started || 0));
  const told = answer.problems.map(({ id, error }) => `${id}: ${error}`).join("\n");
  document.getElementById("problems").textContent = told;
  if (!state.byHand) state.chosen = new Set(allRuns.slice(0, FIRST_CHOICE).map((run) => run.id));
  const changed = context.runs.some((run) => before.get(run.id) !== run.version + run.status + run.detail);
  return { others: context.runs.map((run) => run.id).join("\n") !== shownBefore, changed };
}

async function follow() {
  const foot = document.getElementById("foot");
  if (!document.hidden) {
    try {
      const { others, changed } = await ask();
      showRuns();
      refreshing = true;
      if (others) showTools();
      if (others) await rebuild();
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
  addEventListener("hashchange", returnTo);
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
  else document.getElementById("foot").textContent = `Written ${formatDate(writtenAt)} by rlvr ${metricsTable.version}.`;
}

// The address was changed by hand, or by the browser's back.
function returnTo() {
  readAddress();
  if (!state.byHand) state.chosen = new Set(allRuns.slice(0, FIRST_CHOICE).map((run) => run.id));
  showTabs();
  showRuns();
  showTools();
  rebuild();
}

start().catch((error) => complain(error));
