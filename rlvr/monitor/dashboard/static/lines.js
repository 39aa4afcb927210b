"use strict";
// Cards of lines over the training: one or several panels, one or several runs.

// Centered mean over at most `window` records, an odd number of points; missing ones count for nothing.
function smoothed(values, window, perPoint) {
  const half = Math.floor((window / perPoint - 1) / 2);
  if (half < 1) return values;
  const sums = [0];
  const counts = [0];
  values.forEach((value, i) => {
    sums.push(sums[i] + (isNumber(value) ? value : 0));
    counts.push(counts[i] + (isNumber(value) ? 1 : 0));
  });
  return values.map((value, i) => {
    const [from, to] = [Math.max(0, i - half), Math.min(values.length, i + half + 1)];
    return isNumber(value) ? (sums[to] - sums[from]) / (counts[to] - counts[from]) : null;
  });
}

const AXES = {
  step: { name: "step", of: (data) => data.step, told: (x) => `step ${formatNumber(x, 6)}` },
  tokens: { name: "tokens trained on", of: (data) => data.tokens, told: (x) => `${formatCount(x)} tokens` },
  time: { name: "hours", of: (data) => data.seconds.map((x) => x / 3600), told: (x) => `after ${formatSeconds(x * 3600)}` },
};

class LineCard {
  // panels: [{unit, lines: [{name, label}], band, marks, zero}] one above the other, of the same x axis.
  // A panel's `extra(run, x)` gives more ECharts series of a run; `stack`: areas one upon the other, of the first run.
  constructor(root, title, panels, options = {}) {
    this.panels = panels;
    this.names = panels.flatMap((panel) => panel.lines.map((line) => line.name));
    this.named = options.named; // whether a single line, too, is named
    const height = options.height || (panels.length > 1 ? 190 * panels.length + 60 : 270);
    this.card = new Card(root, title, { info: this.names, ...options, height });
  }

  // data: by run.id what `source.series` answered.
  update(context, data) {
    const runs = context.runs.filter((run) => data[run.id]);
    const found = runs.some((run) => this.names.some((name) => name in data[run.id].series));
    this.card.element.hidden = !found;
    if (!found) return false;
    const shown = this.lines(context, runs, data);
    if (!shown.some((line) => line.mean.some(isNumber))) {
      this.card.say("There is no finite number here.");
      return true;
    }
    this.card.draw(this.option(context, runs, data, shown), {
      label: this.words(shown),
      numbers: () => this.numbers(shown),
      events: { datazoom: (event) => zoomed(event, context) },
    });
    return true;
  }

  // What is to be drawn: one entry for each metric of each run that has it.
  lines(context, runs, data) {
    const single = runs.length === 1;
    const many = runs.length > COLORS.light.length; // then colors alone do not tell runs apart, and dashes have to
    const entries = [];
    let above = 0; // lines of the panels above, whose colors are taken
    this.panels.forEach((panel, index) => {
      for (const run of panel.stack ? runs.slice(0, 1) : runs) {
        panel.lines.forEach((line, place) => {
          const values = data[run.id].series[line.name];
          if (!values || (many && place > 0 && !panel.stack)) return;
          entries.push({
            ...line,
            run,
            panel: index,
            stack: panel.stack,
            unit: metricOf(line.name).unit,
            title: single || panel.stack ? line.label || line.name : panel.lines.length > 1 && !many ? `${run.name} · ${line.label}` : run.name,
            color: single || panel.stack ? theme.color(line.color ?? above + place) : run.color,
            dash: single || panel.stack ? theme.dash(line.color ?? above + place) : panel.lines.length > 1 && !many ? DASHES[place % 3] : run.dash,
            x: AXES[context.axis].of(data[run.id]),
            perPoint: data[run.id].per_point,
            period: panel.stack ? periodOf(data[run.id].series[panel.lines[0].name]?.mean) : 1,
            ...values,
          });
        });
      }
      above += panel.lines.length;
    });
    return entries;
  }

  option(context, runs, data, shown) {
    const count = this.panels.length;
    const labels = [...new Set(shown.map((line) => line.title))];
    const named = (labels.length > 1 || this.named) && (runs.length === 1 || this.panels[0].stack === true);
    this.card.legend(runs.length > 1 && !named ? dashes(this.panels, shown, runs.length) : [], coarse(context, shown));
    const [top, bottom, between] = [named ? 46 : 26, 40, 34];
    const room = (this.card.box.clientHeight || parseInt(this.card.box.style.height)) - top - bottom - between * (count - 1);
    const [low, high] = context.range || [0, range(shown.map((line) => line.x.at(-1)))[1]];
    const series = shown.flatMap((line) => this.seriesOf(context, line, runs.length));
    this.panels.forEach((panel, index) => {
      for (const run of runs) {
        const more = panel.extra ? panel.extra(run, context, data[run.id]) : [];
        series.push(...more.map((one) => ({ xAxisIndex: index, yAxisIndex: index, ...one })));
      }
    });
    return {
      grid: this.panels.map((_, i) => ({ left: 62, right: 18, top: top + i * (room / count + between), height: room / count })),
      legend: { show: named, type: "scroll", top: 0, left: 0, right: 0, itemWidth: 18, itemHeight: 12, textStyle: { color: theme.paint("ink"), fontSize: 11 }, data: labels, pageTextStyle: { color: theme.paint("soft") } },
      axisPointer: { link: [{ xAxisIndex: "all" }] },
      tooltip: tooltipStyle({ trigger: "axis", formatter: (items) => told(context, items, shown) }),
      xAxis: this.panels.map((_, i) => axis(i === count - 1 ? AXES[context.axis].name : "", { gridIndex: i, min: low, max: high, nameLocation: "middle", nameGap: 24, splitLine: { show: false }, axisLabel: { color: theme.paint("soft"), show: i === count - 1, hideOverlap: true, formatter: formatTick } })),
      yAxis: this.panels.map((panel, i) => axis(this.axisName(panel), { gridIndex: i, nameGap: 8, nameTextStyle: { color: theme.paint("soft"), align: "left" }, ...(panel.zero ? { min: 0 } : {}), ...logAxis(context, panel, shown.filter((line) => line.panel === i)) })),
      toolbox: { itemSize: 0, showTitle: false, feature: { dataZoom: { yAxisIndex: "none", title: { zoom: "", back: "" } } } },
      series,
    };
  }

  axisName(panel) {
    const unit = panel.unit === "1" ? "" : panel.unit;
    const label = this.panels.length > 1 && panel.lines.length === 1 ? panel.lines[0].label : "";
    return (label.includes(unit) ? [label || unit] : [label, unit]).filter(Boolean).join(", ");
  }

  seriesOf(context, line, numRuns) {
    const place = { xAxisIndex: line.panel, yAxisIndex: line.panel };
    const positive = logs(context, this.panels[line.panel], [line]);
    const drop = positive || this.panels[line.panel].positive; // what is not above 0
    const point = (value, i) => [line.x[i], drop && !(value > 0) ? null : value];
    const stroke = { color: line.color, width: 1.7, type: line.dash };
    const base = { type: "line", symbol: line.mean.filter(isNumber).length === 1 ? "circle" : "none", symbolSize: 5, connectNulls: true, ...place, color: line.color };
    if (line.stack) {
      return [{ ...base, name: line.title, data: (line.blocks = blocks(line, line.period)), stack: "all", areaStyle: { color: line.color, opacity: 0.75 }, lineStyle: { width: 0 }, emphasis: { disabled: true } }];
    }
    const smooth = context.smooth > 1 ? smoothed(line.mean, context.smooth, line.perPoint) : line.mean;
    line.smooth = smooth;
    const main = { ...base, name: line.title, data: smooth.map(point), lineStyle: stroke, z: 3, emphasis: { disabled: true } };
    const result = [main];
    if (smooth !== line.mean) result.push({ ...base, name: line.title, data: line.mean.map(point), lineStyle: { ...stroke, width: 1, opacity: 0.25, type: "solid" }, silent: true, tooltip: { show: false } });
    if (line.min && numRuns <= FEW) result.push(ribbon(line, place, positive));
    const { band, marks } = this.panels[line.panel];
    if (band) main.markArea = bandArea(band(line.run));
    if (marks) main.markLine = marks(line.run, context);
    return result;
  }

  words(shown) {
    const said = shown.slice(0, 6).map((line) => `${line.title} ${withUnit(line.last ?? lastOf(line.mean), line.unit)}`);
    return `${this.card.title}: last ${said.join(", ")}${shown.length > 6 ? ` and ${shown.length - 6} more` : ""}`;
  }

  numbers(shown) {
    const rows = shown.map((line) => {
      const values = line.mean.filter(isNumber);
      const { first = values[0], last = values.at(-1), least = range(values)[0], most = range(values)[1] } = line;
      return [line.title, line.name, first, last, least, most];
    });
    return [["line", "metric", "first", "last", "lowest", "highest"], rows];
  }
}

// What the kinds of lines mean where colors tell the runs apart; of more runs than there are colors, only the first kind.
function dashes(panels, shown, numRuns) {
  const names = new Set(shown.map((line) => line.name));
  const several = panels.filter((panel) => panel.lines.length > 1);
  if (numRuns > COLORS.light.length) return several.map((panel) => ["none", `only ${panel.lines[0].label}, of so many runs`]);
  return several.flatMap((panel) => panel.lines.map((line, i) => [DASHES[i % 3], line.label, line.name])).filter(([, , name]) => names.has(name));
}

// Why smoothing does not show.
function coarse(context, shown) {
  const per = Math.max(...shown.map((line) => line.perPoint));
  return context.smooth > 1 && context.smooth < 3 * per ? `A point is the mean of ${per} steps already; zoom in, or smooth over more.` : "";
}

// Records from one that has something to the next, as a phase has that comes every few steps.
function periodOf(values = []) {
  const some = values.filter((value) => value > 0).length;
  return some ? Math.max(1, Math.round(values.length / some)) : 1;
}

// Means over blocks of whole periods, at most 60 of them, each at the middle of its block.
function blocks(line, period) {
  const size = period * Math.ceil(line.mean.length / (60 * period));
  const points = [];
  for (let start = 0; start < line.mean.length; start += size) {
    const end = Math.min(start + size, line.mean.length);
    const values = line.mean.slice(start, end).filter(isNumber);
    if (end - start < size && points.length) break; // a part of a period would mislead
    points.push([(line.x[start] + line.x[end - 1]) / 2, values.length ? values.reduce((a, b) => a + b) / values.length : 0]);
  }
  return points;
}

function lastOf(values) {
  return values.findLast(isNumber) ?? null;
}

function range(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (!isNumber(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low > high ? [0, 1] : [low, high];
}

// Whether a panel is drawn on a logarithmic axis: where the reader wants it and something is positive.
function logs(context, panel, lines) {
  return context.log && !panel.stack && !panel.linear && lines.some((line) => line.mean.some((value) => value > 0));
}

function logAxis(context, panel, lines) {
  return logs(context, panel, lines) ? { type: "log", min: "dataMin", max: "dataMax", axisLabel: { color: theme.paint("soft"), hideOverlap: true, formatter: (x) => formatNumber(x, 2) } } : {};
}

// From the smallest to the largest value that a point stands for.
function ribbon(line, place, positive) {
  const ok = line.x.map((x, i) => [x, line.min[i], line.max[i]]).filter(([, low, high]) => isNumber(low) && isNumber(high) && (!positive || low > 0));
  const [low, high] = [range(ok.map((p) => p[1]))[0], range(ok.map((p) => p[2]))[1]];
  return {
    type: "custom", ...place, silent: true, z: 1, clip: true, tooltip: { show: false },
    data: ok.length ? [[ok[0][0], ok.at(-1)[0], low, high]] : [],
    encode: { x: [0, 1], y: [2, 3] },
    renderItem: (_, api) => ({
      type: "polygon",
      shape: { points: [...ok.map(([x, , top]) => api.coord([x, top])), ...ok.toReversed().map(([x, bottom]) => api.coord([x, bottom]))] },
      style: { fill: line.color, opacity: 0.16 },
    }),
  };
}

function bandArea(band) {
  if (!band) return undefined;
  return { silent: true, itemStyle: { color: theme.paint("mark"), opacity: 0.13 }, data: [[{ yAxis: band.low }, { yAxis: band.high ?? "max" }]] };
}

function told(context, items, shown) {
  if (!items.length) return "";
  const x = items[0].axisValue;
  const reach = shown.filter((line) => x >= line.x[0] - gap(line) && x <= line.x.at(-1) + gap(line));
  const rows = reach.map((line) => {
    const at = nearest(line.x, x);
    if (line.blocks) {
      const block = line.blocks[nearest(line.blocks.map(([place]) => place), x)];
      return { color: line.color, name: line.title, number: block[1], value: withUnit(block[1], line.unit) };
    }
    const raw = line.smooth !== line.mean && isNumber(line.mean[at]) ? `, unsmoothed ${formatNumber(line.mean[at], 3)}` : "";
    const spread = line.min && isNumber(line.min[at]) ? ` [${formatNumber(line.min[at], 3)}, ${formatNumber(line.max[at], 3)}]` : "";
    return { color: line.color, dash: line.dash, name: line.title, number: line.smooth[at], value: withUnit(line.smooth[at], line.unit) + raw + spread };
  });
  const listed = rows.filter((row) => isNumber(row.number));
  if (context.runs.length > 1) listed.sort((a, b) => b.number - a.number);
  const per = Math.max(...shown.map((line) => line.perPoint));
  const title = AXES[context.axis].told(x) + (per > 1 ? ` · mean [least, most] of ${per} steps` : "");
  return tooltip(title, listed.slice(0, 14), Math.max(0, listed.length - 14));
}

// Between two points of a line.
function gap(line) {
  return line.x.length > 1 ? (line.x.at(-1) - line.x[0]) / (line.x.length - 1) : 1;
}

function nearest(sorted, x) {
  let [low, high] = [0, sorted.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - sorted[low - 1] < sorted[low] - x ? low - 1 : low;
}

function zoomed(event, context) {
  const part = event.batch?.[0] || event;
  if (isNumber(part.startValue) && isNumber(part.endValue) && part.endValue > part.startValue) {
    context.zoom([part.startValue, part.endValue]);
  }
}
