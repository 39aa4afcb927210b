"use strict";
// What stands around a view: its tabs, how lines are drawn, the list of runs.

function showTabs() {
  const bar = document.getElementById("views");
  renew(
    bar,
    ...VIEWS.map((view) => h("button", { type: "button", role: "tab", id: `tab-${view.id}`, "aria-controls": "view", "aria-selected": String(view.id === state.view), tabindex: view.id === state.view ? 0 : -1, onclick: () => go(view.id) }, view.title)),
  );
  document.getElementById("view").setAttribute("aria-labelledby", `tab-${state.view}`);
}

function go(id, focus = false) {
  if (id !== state.view) history.pushState(null, "", location.hash); // so that the browser's back returns
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
      choice("smoothing", SMOOTHING.map((n) => [String(n), n === 1 ? "none" : `${n} steps`]), String(state.smooth), (n) => change({ smooth: Number(n) })),
      checkbox("log scale", state.log, (log) => change({ log })),
    );
    parts.push(zoomField("from", 0), zoomField("to", 1));
    if (state.range) parts.push(h("button", { type: "button", onclick: () => context.zoom(null) }, "reset zoom (Esc)"));
    else parts.push(h("span", { class: "note" }, "or drag over a plot"));
  }
  if (view.single && context.runs.length > 1) {
    parts.push(choice("run", context.runs.map((run) => [run.id, run.name]), context.focus.id, (focus) => change({ focus })));
  }
  parts.push(h("button", { type: "button", id: "theme", style: { marginLeft: "auto" }, onclick: changeTheme }, theme.name === "dark" ? "light" : "dark"));
  renew(tools, ...parts);
}

// One end of the zoom, 0 or 1, in the units of the x axis.
function zoomField(label, end) {
  const input = h("input", { type: "number", min: 0, step: "any", style: { width: "5.5rem" }, "aria-label": `zoom ${label}` });
  input.value = state.range ? Number(state.range[end].toPrecision(6)) : "";
  input.addEventListener("change", () => {
    const range = [...(state.range || [0, 1e18])];
    range[end] = input.value === "" ? [0, 1e18][end] : Number(input.value);
    if (range[0] < range[1]) context.zoom(range[0] === 0 && range[1] === 1e18 ? null : range);
  });
  return h("label", {}, label, input);
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
  const look = JSON.stringify([wanted, theme.name, [...state.chosen], allRuns]);
  if (list.dataset.look === look) return;
  list.dataset.look = look;
  const some = h("div", { class: "tools" }, h("button", { type: "button", onclick: () => choose(listed.map((run) => run.id)) }, "all"), h("button", { type: "button", onclick: () => choose([]) }, "none"));
  renew(list, ...(allRuns.length > 1 ? [some] : []), ...listed.map(runEntry));
  if (!allRuns.length) list.append(h("p", { class: "empty" }, "No run yet. This page shows one as soon as it begins."));
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
