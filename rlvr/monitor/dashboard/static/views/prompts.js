"use strict";
// Which prompts are solved, which still teach something, and which never paid a reward.

const promptWish = { state: "", find: "" };

const promptsView = {
  id: "prompts",
  title: "Prompts",
  single: true,
  build(root, context) {
    const shares = new Card(root, "Groups of a rollout", { wide: true, info: ["reward/zero_variance_groups"], note: "Dashed: groups whose completions all got the same reward; nothing is learned from them." });
    const list = h("section", { class: "card wide" });
    root.append(list);
    return async () => {
      const run = context.focus;
      const found = await source.of(run, "prompts");
      if (refreshing && list.contains(document.activeElement)) return; // somebody is typing
      if (!found.total) {
        shares.say("No groups are recorded in this run.");
        return list.replaceChildren();
      }
      drawShares(shares, found);
      showPrompts(list, found);
    };
  },
};

function drawShares(card, found) {
  const parts = [["all passed", found.all_passed, 2], ["some passed", found.some_passed, 0], ["none passed", found.none_passed, 1]];
  card.draw(
    {
      grid: { left: 56, right: 16, top: 46, bottom: 42 },
      legend: { show: true, top: 0, textStyle: { color: theme.paint("ink"), fontSize: 11 } },
      tooltip: tooltipStyle({ trigger: "axis", formatter: (items) => tooltip(`step ${items[0].axisValue}`, items.map((item) => ({ color: item.color, name: item.seriesName, value: `${formatNumber(100 * item.value[1], 3)} %` }))) }),
      xAxis: axis("step", { nameLocation: "middle", nameGap: 26, min: found.step[0], max: found.step.at(-1), splitLine: { show: false } }),
      yAxis: axis("share of the groups", { min: 0, max: 1, nameTextStyle: { color: theme.paint("soft"), align: "left" } }),
      series: [{ type: "line", name: "no gradient", symbol: found.step.length === 1 ? "circle" : "none", z: 5, color: theme.paint("ink"), lineStyle: { width: 1.5, type: "dashed" }, data: found.zero_variance.map((value, i) => [found.step[i], value]) }, ...parts.map(([name, values, color]) => ({ type: "line", name, stack: "all", symbol: found.step.length === 1 ? "circle" : "none", color: theme.color(color), lineStyle: { width: 0 }, areaStyle: { color: theme.color(color), opacity: 0.7 }, emphasis: { disabled: true }, data: values.map((value, i) => [found.step[i], value]) }))],
    },
    { label: "Shares of groups in which all, some or no completions passed", numbers: () => [["step", ...parts.map(([name]) => name), "zero variance"], found.step.map((step, i) => [step, ...parts.map(([, values]) => values[i]), found.zero_variance[i]])] },
  );
}

function percent(share) {
  return isNumber(share) ? `${formatNumber(100 * share, 3)} %` : "–";
}

function showPrompts(list, found) {
  const states = [["", `all ${found.total}`], ["solved", `solved, ${found.solved}`], ["partly", `in part, ${found.partly}`], ["never", `never, ${found.never}`], ...(found.unscored ? [["unscored", `never scored, ${found.unscored}`]] : [])];
  const again = () => showPrompts(list, found);
  const tools = h(
    "div",
    { class: "tools" },
    choice("prompts", states, promptWish.state, (value) => ((promptWish.state = value), again())),
    h("label", {}, "containing", h("input", { type: "search", value: promptWish.find, onchange: (event) => ((promptWish.find = event.target.value), again()) })),
  );
  const wanted = found.prompts.filter((one) => (!promptWish.state || one.state === promptWish.state) && one.text.toLowerCase().includes(promptWish.find.toLowerCase()));
  const rows = wanted.map((one) => [h("span", { class: "text" }, visible(one.text)), one.state, one.seen, percent(one.passed / one.scored), percent(one.points[0]?.[1]), percent(one.points.at(-1)?.[1]), spark(one.points)]);
  const omitted = found.omitted > 0 ? h("p", { class: "note" }, `${found.omitted} more prompts are not listed.`) : "";
  const scrolled = list.querySelector(".scroll")?.scrollTop || 0;
  renew(
    list,
    h("header", {}, h("h3", {}, `Pass rate of ${found.total} prompts`)),
    h("p", { class: "note" }, "Solved: all completions passed when it was seen last. Never: none has passed yet."),
    tools,
    table(["prompt", "state", "rollouts", "passed in all", "at first", "at last", "over the training"], rows),
    omitted,
  );
  list.querySelector(".scroll").scrollTop = scrolled;
}

// A small picture of pass rates: [[step, rate]].
function spark(points) {
  const [width, height] = [120, 26];
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [name, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `pass rates ${points.map(([, rate]) => formatNumber(rate, 2)).join(", ")}` })) svg.setAttribute(name, value);
  if (!points.length) return svg;
  const [first, last] = [points[0][0], points.at(-1)[0]];
  const place = ([step, rate]) => [2 + ((step - first) / (last - first || 1)) * (width - 4), height - 3 - rate * (height - 6)];
  const path = document.createElementNS(svg.namespaceURI, "polyline");
  path.setAttribute("points", points.map((point) => place(point).join(",")).join(" "));
  path.setAttribute("fill", "none");
  path.setAttribute("stroke", theme.color(0));
  path.setAttribute("stroke-width", "1.5");
  svg.append(path);
  for (const point of points) {
    const dot = document.createElementNS(svg.namespaceURI, "circle");
    const [x, y] = place(point);
    for (const [name, value] of Object.entries({ cx: x, cy: y, r: 1.8, fill: theme.color(0) })) dot.setAttribute(name, value);
    svg.append(dot);
  }
  return svg;
}
