"use strict";
// Small parts of the page. Text enters it as text nodes alone, so that a completion cannot be more than text.

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function formatNumber(value, digits = 4) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(digits)));
}

function formatCount(value) {
  for (const [size, sign] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(3))}${sign}`;
  }
  return formatNumber(value);
}

// On an axis, where one number has to differ from the next.
function formatTick(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(6))}M`;
  if (size >= 1e4) return value.toLocaleString("en-US");
  const exact = Number(value.toPrecision(6));
  return size > 0 && size < 1e-4 ? exact.toExponential() : String(exact);
}

function formatSeconds(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 2880) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${(seconds / 86400).toFixed(1)} days`;
}

function formatDate(seconds) {
  return isNumber(seconds) ? new Date(seconds * 1000).toLocaleString() : "–";
}

function withUnit(value, unit) {
  if (unit === "fraction" && isNumber(value)) return `${formatNumber(100 * value, 3)} %`;
  return unit && unit !== "1" ? `${formatNumber(value)} ${unit}` : formatNumber(value);
}

// What there is to say of a metric: {unit, meaning, normal}; a control's effect is not in the table.
function metricOf(name) {
  const found = metricsTable.metrics[name];
  if (found) return found;
  if (name.endsWith("/effect")) {
    return { unit: "nats", meaning: `what ${name.split("/")[0]} adds to dynamics/predicted`, normal: "positive" };
  }
  return { unit: "1", meaning: "", normal: null };
}

function explanation(names) {
  const rows = names.flatMap((name) => {
    const { unit, meaning, normal } = metricOf(name);
    const told = `${meaning}${unit === "1" ? "" : ` (${unit})`}.${normal ? ` Usual: ${normal}.` : ""}`;
    return [h("dt", {}, name), h("dd", {}, told)];
  });
  return h("dl", {}, rows);
}

function infoButton(content) {
  const details = h("details", { class: "info" }, h("summary", { "aria-label": "What this shows" }, "?"), h("div", { tabindex: -1 }, content));
  details.addEventListener("focusout", (event) => {
    if (event.relatedTarget && !details.contains(event.relatedTarget)) details.open = false;
  });
  details.addEventListener("keydown", (event) => {
    if (event.key === "Escape") details.open = false;
  });
  return details;
}

// head, rows: of texts, numbers or elements; numbers are set to the right.
function table(head, rows) {
  const cell = (value) =>
    h("td", { class: typeof value === "number" ? "n" : null }, typeof value === "number" ? formatNumber(value) : value);
  const titles = head.map((title, i) => h("th", { class: typeof rows[0]?.[i] === "number" ? "n" : null }, title));
  return h(
    "div",
    { class: "scroll", tabindex: 0 },
    h("table", {}, h("thead", {}, h("tr", {}, titles)), h("tbody", {}, rows.map((row) => h("tr", {}, row.map(cell))))),
  );
}

// Puts new parts into an element; the focus stays on the control that takes the place of the one that had it.
function renew(element, ...parts) {
  const controls = () => [...element.querySelectorAll("a, button, input, select, summary, [tabindex]")];
  const place = controls().indexOf(document.activeElement);
  element.replaceChildren(...parts);
  if (place >= 0) controls()[place]?.focus({ preventScroll: true });
}

function choice(label, options, value, onchange) {
  const select = h("select", { onchange: () => onchange(select.value) });
  for (const [key, text] of options) select.append(h("option", { value: key, selected: key === value }, text));
  return h("label", {}, label, select);
}

function checkbox(label, checked, onchange) {
  const box = h("input", { type: "checkbox", onchange: () => onchange(box.checked) });
  box.checked = checked;
  return h("label", {}, box, label);
}
