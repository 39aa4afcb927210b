"use strict";
// One card of the page with a picture in it, drawn by ECharts once it is in sight.

const COLORS = {
  light: ["#0072B2", "#D55E00", "#008a65", "#b5558a", "#946600", "#332288", "#6b7280"],
  dark: ["#56B4E9", "#E69F00", "#2BBF95", "#CC79A7", "#F0E442", "#D55E00", "#9aa3af"],
};
const DASHES = ["solid", "dashed", "dotted"];
// cividis, which looks alike to all color vision; the end that vanishes on the paper is left out.
const RAMP = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];

const theme = {
  get name() {
    return document.documentElement.dataset.theme;
  },
  color(index) {
    return COLORS[this.name][index % COLORS.light.length];
  },
  dash(index) {
    return DASHES[Math.floor(index / COLORS.light.length) % DASHES.length];
  },
  // Light paper: more is darker. Dark paper: more is lighter.
  get ramp() {
    return this.name === "dark" ? RAMP.slice(2) : RAMP.slice(0, 8).reverse();
  },
  paint(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  },
};

const drawn = new Set(); // cards of the view at hand

function forgetCards() {
  for (const card of drawn) card.dispose();
  drawn.clear();
}

const MARGIN = 300; // pixels around the window that count as in sight
const inSight = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      target.card.visible = isIntersecting;
      if (isIntersecting) target.card.flush();
      if (isIntersecting && target.card.later) inTurn(() => target.card.load());
    }
  },
  { rootMargin: `${MARGIN}px` },
);
const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => target.card.chart?.resize()));

class Card {
  // info: names of metrics to be explained.   about: a text that explains the rest.   wide: over all columns.   height: pixels.
  constructor(root, title, { info = [], about = "", note = "", wide = false, height = 270 } = {}) {
    this.title = title;
    this.box = h("div", { class: "chart", role: "img", "aria-label": title, style: { height: `${height}px` } });
    this.box.card = this;
    this.box.addEventListener("mouseleave", () => this.visible && this.flush());
    this.message = h("p", { class: "empty", hidden: true });
    this.note = h("p", { class: "note" }, note);
    this.numbers = h("details", { class: "numbers", ontoggle: () => this.fillNumbers() }, h("summary", {}, "numbers"));
    this.save = h("button", { type: "button", onclick: () => this.download(), "aria-label": `Save ${title} as PNG` }, "png");
    this.head = h("header", {}, h("h3", {}, title), this.save, info.length || about ? infoButton([about ? h("p", {}, about) : null, explanation(info)]) : null);
    this.kinds = h("p", { class: "facts note" });
    this.element = h("section", { class: wide ? "card wide" : "card" }, this.head, this.kinds, this.box, this.message, this.note, this.numbers);
    root.append(this.element);
    this.pending = null;
    this.visible = false;
    this.later = null; // gets and draws the numbers, for a card that is not in sight
    inSight.observe(this.box);
    resized.observe(this.box);
    drawn.add(this);
  }

  // label: what the picture shows, in words.   numbers: () => [head, rows] of its table.   events: by name of ECharts.
  draw(option, { label = this.title, numbers = null, events = {} } = {}) {
    this.box.hidden = this.save.hidden = false;
    this.message.hidden = true;
    this.box.setAttribute("aria-label", label);
    this.table = numbers;
    this.numbers.hidden = numbers === null;
    this.fillNumbers();
    this.pending = option;
    this.events = events;
    const looking = refreshing && this.box.matches(":hover"); // a reader's pointer is not to be disturbed
    if (this.visible && !looking) this.flush();
  }

  flush() {
    if (this.pending === null) return;
    if (!this.chart) {
      this.chart = echarts.init(this.box, null, { renderer: "canvas" });
      for (const [name, act] of Object.entries(this.events)) this.chart.on(name, act);
    }
    const draggable = (active) => {
      if (this.events.datazoom) this.chart.dispatchAction({ type: "takeGlobalCursor", key: "dataZoomSelect", dataZoomSelectActive: active });
    };
    draggable(false); // a cursor that is taken twice zooms twice, and is kept for ever
    this.chart.setOption({ ...frame(), ...this.pending }, { notMerge: true });
    draggable(true);
    this.pending = null;
  }

  get near() {
    const { top, bottom } = this.box.getBoundingClientRect();
    return top < innerHeight + MARGIN && bottom > -MARGIN;
  }

  async load() {
    const later = this.later;
    this.later = null;
    if (later && drawn.has(this)) await later();
  }

  // entries: [dash, label] of kinds of lines.
  legend(entries, remark = "") {
    const swatch = (dash) => h("span", { class: "swatch", style: { borderTopStyle: dash, borderTopWidth: "2px" } });
    this.kinds.replaceChildren(...entries.map(([dash, label]) => h("span", {}, dash === "none" ? null : swatch(dash), " ", label)), remark);
  }

  say(text) {
    this.message.textContent = text;
    this.message.hidden = false;
    this.box.hidden = this.numbers.hidden = this.save.hidden = true;
    this.pending = null;
  }

  fillNumbers() {
    if (!this.numbers.open || !this.table) return;
    this.numbers.lastElementChild.tagName === "DIV" && this.numbers.lastElementChild.remove();
    this.numbers.append(table(...this.table()));
  }

  download() {
    const url = this.chart.getDataURL({ pixelRatio: 2, backgroundColor: theme.paint("card") });
    h("a", { href: url, download: `${this.title.replace(/\W+/g, "_")}.png` }).click();
  }

  dispose() {
    inSight.unobserve(this.box);
    resized.unobserve(this.box);
    this.chart?.dispose();
  }
}

// What all pictures have in common.
function frame() {
  return {
    animation: false,
    textStyle: { color: theme.paint("ink"), fontFamily: "system-ui, sans-serif" },
    legend: { show: false },
  };
}

function axis(name, more = {}) {
  const soft = theme.paint("soft");
  const line = theme.paint("line");
  return {
    type: "value",
    name,
    nameTextStyle: { color: soft },
    scale: true,
    axisLine: { lineStyle: { color: line } },
    axisLabel: { color: soft, hideOverlap: true, formatter: formatTick },
    splitLine: { lineStyle: { color: line, opacity: 0.6 } },
    minorTick: { show: false },
    ...more,
  };
}

// A box of lines that follows the pointer. rows: [{color, dash, name, value}]; names are text, never HTML.
function tooltip(title, rows, omitted = 0) {
  const lines = rows.map(({ color, dash, name, value }) =>
    h("div", {}, color ? h("span", { class: "swatch", style: { borderTopColor: color, borderTopStyle: dash || "solid" } }) : null, name, h("b", {}, value)),
  );
  return h("div", { class: "tooltip" }, h("strong", {}, title), lines, omitted ? h("div", {}, `and ${omitted} more`) : null);
}

function tooltipStyle(more) {
  return {
    confine: true,
    backgroundColor: theme.paint("card"),
    borderColor: theme.paint("line"),
    textStyle: { color: theme.paint("ink"), fontSize: 12 },
    ...more,
  };
}

// A picture of numbers by step (columns) and bin (rows). cells: [[column, row, value]].
function heatmap(steps, rows, cells, { unit, low, high, yName, told = (value) => formatNumber(value), xName = "step", height = 250 }) {
  const line = theme.paint("line");
  const labels = { color: theme.paint("soft"), hideOverlap: true };
  const widest = Math.max(...rows.map((row) => String(row).length));
  return {
    grid: { left: Math.min(150, 20 + 6.6 * widest), right: 100, top: 26, bottom: 40 },
    tooltip: tooltipStyle({
      formatter: ({ value: [column, row, value] }) =>
        tooltip(`${xName} ${steps[column]}`, [{ name: `${yName} ${rows[row]}`, value: `${told(value)}${unit ? " " + unit : ""}` }]),
    }),
    xAxis: { type: "category", data: steps, name: xName, nameLocation: "middle", nameGap: 24, nameTextStyle: labels, axisLabel: labels, axisLine: { lineStyle: { color: line } } },
    yAxis: { type: "category", data: rows, name: yName, nameTextStyle: labels, axisLabel: { ...labels, interval: Math.ceil((15 * rows.length) / height) - 1 }, axisLine: { lineStyle: { color: line } } },
    visualMap: {
      min: low,
      max: high,
      calculable: true,
      right: 0,
      top: "middle",
      itemHeight: 110,
      itemWidth: 12,
      formatter: (value) => told(value),
      textStyle: labels,
      inRange: { color: theme.ramp },
    },
    series: [{ type: "heatmap", data: cells, progressive: 0, emphasis: { disabled: true } }],
  };
}
