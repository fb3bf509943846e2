// Drawings in SVG, as wide as there is room: bars by case, lines over a size.

// A hue and a texture of its own for each peer, the same in every result; the others take what is left.
const TONES = { [FUSED]: 0, "torch.nn": 1, cuDNN: 1, "ONNX Runtime": 2, FlashRNN: 2, OpenVINO: 3, haste: 3 };
const FREE_TONES = [4, 5, 6];

function tonesOf(peers) {
  const free = [...FREE_TONES];
  return new Map([FUSED, ...peers].map((peer) => [peer, own(TONES, peer) ?? free.shift() ?? FREE_TONES.at(-1)]));
}

let patterns = 0;

/** Textures for the bars of one drawing; returns what `fill` is set to. */
function textures(svg) {
  const prefix = `texture-${++patterns}`;
  const defs = put(svg, "defs");
  for (const tone of [2, 4, 6]) {
    const pattern = put(defs, "pattern", {
      id: `${prefix}-${tone}`,
      class: `tone-${tone}`,
      width: 4,
      height: 4,
      patternUnits: "userSpaceOnUse",
      patternTransform: `rotate(${tone === 6 ? -45 : 45})`,
    });
    put(pattern, "rect", { width: 4, height: 4, class: "texture-ground" });
    if (tone === 4) put(pattern, "circle", { cx: 2, cy: 2, r: 1, class: "texture-dot" });
    else put(pattern, "rect", { width: 1.5, height: 4, class: "texture-line" });
  }
  return (tone) => ([2, 4, 6].includes(tone) ? `url(#${prefix}-${tone})` : null);
}

function marker(parent, tone, x, y, hollow, r = 3.5) {
  const shape = [
    `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
    `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
    `M${x} ${y - 1.3 * r}l${1.25 * r} ${2.2 * r}h${-2.5 * r}Z`,
    `M${x} ${y - 1.4 * r}l${1.4 * r} ${1.4 * r}l${-1.4 * r} ${1.4 * r}l${-1.4 * r} ${-1.4 * r}Z`,
  ][tone % 4];
  return put(parent, "path", { d: shape, class: `tone-${tone} marker${hollow ? " hollow" : ""}` });
}

function bar(parent, fill, tone, x, y, width, height) {
  return put(parent, "rect", {
    x,
    y,
    width: Math.max(width, 0.5),
    height,
    class: `tone-${tone} bar`,
    style: null,
    fill: fill(tone),
  });
}

function legend(list, items) {
  clear(list);
  for (const { tone, label, kind, hollow } of items) {
    const item = put(list, "li");
    const svg = put(item, "svg", { width: 26, height: 14, "aria-hidden": "true" });
    if (kind === "bar") bar(svg, textures(svg), tone, 1, 3.5, 24, 8);
    if (kind === "line") {
      put(svg, "line", { x1: 0, x2: 26, y1: 7, y2: 7, class: `tone-${tone} line${hollow ? " dashed" : ""}` });
      marker(svg, tone, 13, 7, hollow);
    }
    if (kind === "mark") marker(svg, tone, 13, 7, true);
    if (kind === "floor") put(svg, "line", { x1: 0, x2: 26, y1: 7, y2: 7, class: "line floor" });
    if (kind === "whisker") whisker(svg, 4, 22, 7);
    item.append(label);
  }
}

function whisker(parent, x1, x2, y) {
  put(parent, "path", { d: `M${x1} ${y}H${x2}M${x1} ${y - 2.5}v5M${x2} ${y - 2.5}v5`, class: "whisker" });
}

// ---- axes -----------------------------------------------------------------------------------------------------------

function logScale(low, high, from, to) {
  const [a, b] = [Math.log(low), Math.log(high)];
  return (value) => from + ((Math.log(value) - a) / (b - a || 1)) * (to - from);
}

/** Round numbers between the ends, as many as are `gap` pixels apart. */
function logTicks(low, high, scale, gap) {
  const every = (mantissas) => {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const mantissa of mantissas) {
        const value = Number((mantissa * 10 ** power).toPrecision(2));
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    }
    return found;
  };
  const apart = (values) => values.every((value, i) => !i || Math.abs(scale(value) - scale(values[i - 1])) >= gap);
  return [[1, 1.2, 1.5, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]].map(every).find(apart) ?? every([1]);
}

// ---- marks that a keyboard reaches ----------------------------------------------------------------------------------

/** One stop for Tab in a drawing; arrows go on from there. Marks have a row and a column. */
function reachable(svg, marks) {
  const place = new Map(marks.map((mark) => [mark.element, mark]));
  const focus = (mark) => {
    for (const { element } of marks) element.setAttribute("tabindex", element === mark.element ? "0" : "-1");
    mark.element.focus();
  };
  for (const [i, { element }] of marks.entries()) element.setAttribute("tabindex", i ? "-1" : "0");
  svg.addEventListener("keydown", (event) => {
    const here = place.get(event.target);
    if (!here || event.ctrlKey || event.metaKey || event.altKey) return;
    const nearest = (candidates, distance) =>
      candidates.reduce((best, mark) => (!best || distance(mark) < distance(best) ? mark : best), null);
    const along = (key, sign, other) =>
      nearest(
        marks.filter((mark) => sign * (mark[key] - here[key]) > 0),
        (mark) => 1000 * Math.abs(mark[key] - here[key]) + Math.abs(mark[other] - here[other]),
      );
    const next = {
      ArrowDown: () => along("row", 1, "column"),
      ArrowUp: () => along("row", -1, "column"),
      ArrowRight: () => along("column", 1, "row"),
      ArrowLeft: () => along("column", -1, "row"),
      Home: () => marks[0],
      End: () => marks.at(-1),
      Escape: () => {
        hideTip();
        return here;
      },
    }[event.key];
    if (!next) return;
    event.preventDefault();
    const mark = next();
    if (mark && mark !== here) focus(mark);
  });
}

const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("aria-hidden", "true");
tip.hidden = true;

function hideTip() {
  tip.hidden = true;
  tip.remove();
}

function showTip(plot, element, lines, x = null) {
  clear(tip);
  lines.forEach(([label, value], i) => {
    const line = put(tip, i ? "p" : "h3");
    if (i) put(line, "span", {}, label);
    line.append(i ? value : label);
  });
  tip.hidden = false;
  plot.append(tip);
  const [frame, mark] = [plot.getBoundingClientRect(), element.getBoundingClientRect()];
  const middle = (x ?? mark.left + mark.width / 2) - frame.left;
  tip.style.left = `${Math.max(0, Math.min(middle - tip.offsetWidth / 2, frame.width - tip.offsetWidth))}px`;
  const above = mark.top - frame.top - tip.offsetHeight - 6;
  const fits = mark.top - tip.offsetHeight - 6 > 0;
  tip.style.top = `${fits ? above : mark.bottom - frame.top + 6}px`;
}

/** A mark's rectangle takes pointer and focus, is read out, and shows the same as a note beside it. */
function hit(parent, plot, box, lines) {
  const said = lines.map(([label, value], i) => (i ? `${label} ${value}` : label)).join("; ");
  const element = put(parent, "rect", { ...box, class: "hit", role: "img", "aria-label": said });
  element.addEventListener("pointerenter", () => showTip(plot, element, lines));
  element.addEventListener("pointerleave", hideTip);
  element.addEventListener("focus", () => showTip(plot, element, lines));
  element.addEventListener("blur", hideTip);
  return element;
}

// ---- bars by case ---------------------------------------------------------------------------------------------------

/**
 * Panels of horizontal bars with the same rows: side by side with the rows' names once, or, where that is too narrow, one
 * below the other with each name above its bars.
 *
 * panels: [{ title, cells: Map(row's label -> { values: Map(peer -> spread), extra, side, low, problem, lines }) }]
 * rows: [{ heading } or { label }]
 */
function drawBars(plot, { rows, panels, peers, tones, axis, describe }) {
  const width = Math.max(280, plot.clientWidth);
  const labels = rows.filter((row) => row.label);
  const labelWidth = Math.ceil(Math.max(...labels.map((row) => widthOf(row.label)))) + 14;
  const beside = width - labelWidth >= 150 * panels.length && width >= 560;
  const thick = peers.length > 2 ? 7 : 8;
  const pitch = thick + 2;
  const barsHeight = Math.max(24, peers.length * pitch + 7);
  const above = beside ? 0 : 15;
  const [top, bottom, headingHeight] = [40, 24, 24];
  const side = 36;
  const rowsHeight = rows.reduce((sum, row) => sum + (row.heading ? headingHeight : barsHeight + above), 0);
  const panelHeight = top + rowsHeight + bottom;
  const panelGap = beside ? 18 : 16;
  const panelWidth = beside ? (width - labelWidth - panelGap * (panels.length - 1)) / panels.length : width;
  const height = beside ? panelHeight : panels.length * (panelHeight + panelGap) - panelGap;
  const svg = put(plot, "svg", {
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "group",
    "aria-label": describe,
  });
  const fill = textures(svg);
  const marks = [];
  panels.forEach((panel, p) => {
    const left = beside ? labelWidth + p * (panelWidth + panelGap) : 0;
    const begin = beside ? 0 : p * (panelHeight + panelGap);
    const [x0, x1] = [left + 2, left + panelWidth - side];
    const scale = axis.scale(x0, x1);
    const base = scale(axis.base);
    const [y0, y1] = [begin + top, begin + top + rowsHeight];
    const group = put(svg, "g", { "aria-hidden": "true" });
    put(group, "text", { x: x0, y: begin + 14, class: "panel-title" }, panel.title);
    for (const tick of axis.ticks(scale)) {
      put(group, "line", { x1: scale(tick), x2: scale(tick), y1: y0, y2: y1, class: "grid" });
      put(group, "text", { x: scale(tick), y: y1 + 15, class: "tick", "text-anchor": "middle" }, axis.format(tick));
    }
    if (axis.sides) {
      put(group, "text", { x: base - 5, y: y0 - 7, class: "tick", "text-anchor": "end" }, axis.sides[0]);
      put(group, "text", { x: base + 5, y: y0 - 7, class: "tick" }, axis.sides[1]);
    }
    put(group, "text", { x: left + panelWidth, y: y0 - 7, class: "tick", "text-anchor": "end" }, axis.side);
    let y = y0;
    let number = 0;
    for (const row of rows) {
      if (row.heading) {
        if (!beside || !p) put(group, "text", { x: beside ? 0 : x0, y: y + 17, class: "heading" }, row.heading);
        put(group, "line", {
          x1: beside && !p ? 0 : x0,
          x2: left + panelWidth,
          y1: y + 2.5,
          y2: y + 2.5,
          class: "rule",
        });
        y += headingHeight;
        continue;
      }
      const middle = y + above + barsHeight / 2;
      const found = panel.cells.get(row.label);
      if (!beside) put(group, "text", { x: x0, y: y + 12, class: "label" }, row.label);
      else if (!p)
        put(group, "text", { x: labelWidth - 12, y: middle + 4, class: "label", "text-anchor": "end" }, row.label);
      if (found) {
        const measured = axis.marks ? [FUSED] : peers.filter((peer) => found.values.has(peer));
        const start = middle - (measured.length * pitch) / 2 + 1;
        if (found.problem) put(group, "text", { x: base + 5, y: middle + 4, class: "problem" }, "✕ not timed");
        measured.forEach((peer, i) => {
          const value = found.values.get(peer);
          const [at, tone, line] = [scale(value.median), tones.get(peer), start + i * pitch];
          bar(group, fill, tone, Math.min(base, at), line, Math.abs(at - base), thick);
          whisker(group, scale(value.q1), scale(value.q3), line + thick / 2);
        });
        if (axis.marks) {
          for (const [i, [peer, value]] of [...found.extra].entries())
            marker(group, tones.get(peer), scale(value.median), middle + (i - (found.extra.size - 1) / 2) * 5, true, 3);
        }
        put(
          group,
          "text",
          { x: left + panelWidth, y: middle + 4, class: found.low ? "side low" : "side", "text-anchor": "end" },
          found.side,
        );
        const element = hit(svg, plot, { x: left, y, width: panelWidth, height: barsHeight + above }, found.lines);
        marks.push({ element, row: beside ? number : p * 1000 + number, column: beside ? p : 0 });
      }
      number += 1;
      y += barsHeight + above;
    }
    put(group, "line", { x1: base, x2: base, y1: y0 - 4, y2: y1, class: "base" });
  });
  reachable(svg, marks);
}

/** Rows that entries have in common, with a heading before each group; in the order of the result. */
function rowsOf(entries) {
  const groups = new Map();
  for (const entry of entries) {
    const heading = headingOf(entry);
    if (!groups.has(heading)) groups.set(heading, new Set());
    groups.get(heading).add(labelOf(entry));
  }
  return [...groups].flatMap(([heading, labels]) => [
    { heading },
    ...[...labels].map((label) => ({ label, key: `${heading} ${label}` })),
  ]);
}

function barPanels(entries, cells, make) {
  return cells
    .map((cell) => ({
      title: cellName(cell),
      cells: new Map(entries.filter((entry) => entry.cell === cell).map((entry) => [labelOf(entry), make(entry)])),
    }))
    .filter((panel) => panel.cells.size);
}

function linesOf(entry, peers) {
  const lines = [[`${cellName(entry.cell)} ${labelOf(entry)}, ${entry.mode}`, ""]];
  if (entry.problem) return [...lines, ["", entry.problem]];
  lines.push([`${OWN}`, spreadText(timeText, entry.times.get(FUSED))]);
  for (const peer of peers) {
    if (entry.ratios.has(peer))
      lines.push([
        peer,
        `${timeText(entry.times.get(peer).median)}, ratio ${spreadText(ratioText, entry.ratios.get(peer))}`,
      ]);
  }
  return lines;
}

function drawRatios(plot, view) {
  const entries = view.entries.filter((entry) => entry.part !== "sweeps");
  const shown = entries.filter((entry) => entry.problem || view.peers.some((peer) => entry.ratios.has(peer)));
  if (!shown.length)
    return nothing(
      plot,
      view.model.peers.length ? "No ratio was measured for this choice." : "Nothing was compared with in this result.",
    );
  const all = shown.flatMap((entry) =>
    view.peers.filter((peer) => entry.ratios.has(peer)).map((peer) => entry.ratios.get(peer)),
  );
  const low = Math.min(0.7, ...all.map(({ q1 }) => q1 / 1.05));
  const high = Math.max(2.5, ...all.map(({ q3 }) => q3 * 1.05));
  const axis = {
    base: 1,
    scale: (from, to) => logScale(low, high, from, to),
    ticks: (scale) => logTicks(low, high, scale, 24),
    format: String,
    sides: ["slower", "faster"],
    side: "least",
  };
  for (const mode of view.modes) {
    const mine = shown.filter((entry) => entry.mode === mode);
    const peers = view.peers.filter((peer) => mine.some((entry) => entry.ratios.has(peer)));
    const panels = barPanels(mine, view.cells, (entry) => {
      const least = fastest(entry, view.peers);
      return {
        values: entry.ratios,
        extra: new Map(),
        side: least ? ratioText(least.median) : "",
        low: least && least.median < 1,
        problem: entry.problem,
        lines: linesOf(entry, view.peers),
      };
    });
    if (!panels.length) continue;
    put(plot, "h3", {}, mode);
    drawBars(plot, {
      rows: rowsOf(mine),
      panels,
      peers,
      tones: view.tones,
      axis,
      describe: `Ratio, ${mode}. ${extremes(mine, view)} The table below has every figure; arrow keys go from case to case.`,
    });
  }
}

/** A sentence on each cell: the least and the largest ratio. */
function extremes(entries, view) {
  return view.cells
    .map((cell) => {
      const found = entries
        .filter((entry) => entry.cell === cell)
        .flatMap((entry) =>
          view.peers
            .filter((peer) => entry.ratios.has(peer))
            .map((peer) => [entry.ratios.get(peer).median, `${entry.shape}, ${peer}`]),
        );
      if (!found.length) return "";
      found.sort((a, b) => a[0] - b[0]);
      return `${cellName(cell)}: from ${ratioText(found[0][0])} (${found[0][1]}) to ${ratioText(found.at(-1)[0])} (${found.at(-1)[1]}).`;
    })
    .filter(Boolean)
    .join(" ");
}

function drawShares(plot, view) {
  const entries = view.entries.filter((entry) => entry.shares.has(FUSED));
  if (!entries.length) return nothing(plot, "The peak was not measured for this choice (it is not in sweeps).");
  const most = Math.max(
    1,
    ...entries.flatMap((entry) =>
      [FUSED, ...view.peers].filter((peer) => entry.shares.has(peer)).map((peer) => entry.shares.get(peer).q3),
    ),
  );
  const axis = {
    base: 0,
    scale: (from, to) => (value) => from + (value / most) * (to - from),
    ticks: () => [0, 0.25, 0.5, 0.75, 1],
    format: (value) => String(100 * value),
    side: "%",
    marks: true,
  };
  for (const mode of view.modes) {
    const mine = entries.filter((entry) => entry.mode === mode);
    const panels = barPanels(mine, view.cells, (entry) => ({
      values: new Map([[FUSED, entry.shares.get(FUSED)]]),
      extra: new Map(view.peers.filter((peer) => entry.shares.has(peer)).map((peer) => [peer, entry.shares.get(peer)])),
      side: percent(entry.shares.get(FUSED).median),
      lines: [
        [`${cellName(entry.cell)} ${labelOf(entry)}, ${entry.mode}`, ""],
        ...[FUSED, ...view.peers]
          .filter((peer) => entry.shares.has(peer))
          .map((peer) => [nameOf(peer), spreadText(percentText, entry.shares.get(peer))]),
        ...(typeof entry.peak === "number" ? [["peak", `${Number(entry.peak.toPrecision(3))} GFLOP/s`]] : []),
      ],
    }));
    if (!panels.length) continue;
    const found = mine.map((entry) => [entry.shares.get(FUSED).median, titleOf(entry)]).sort((a, b) => a[0] - b[0]);
    put(plot, "h3", {}, mode);
    drawBars(plot, {
      rows: rowsOf(mine),
      panels,
      peers: [FUSED],
      tones: view.tones,
      axis,
      describe: `Share of the peak, ${mode}: ${OWN} from ${percentText(found[0][0])} (${found[0][1]}) to ${percentText(found.at(-1)[0])} (${found.at(-1)[1]}). The table below has every figure; arrow keys go from case to case.`,
    });
  }
}

// ---- times over a size ----------------------------------------------------------------------------------------------

const SIZES = { T: "steps T", H: "hidden size H", B: "batch size B" };

/** Cases that differ in one size alone, by what they have in common. */
function families(view) {
  const found = new Map();
  for (const entry of view.entries) {
    for (const size of Object.keys(SIZES)) {
      if (view.model.kind === "processor" && (entry.part !== "sweeps" || entry.group[0] !== size)) continue;
      const { B, T, I, H } = entry.sizes;
      const square = I === H;
      const held = {
        B: `B = ${B}`,
        T: `T = ${T}`,
        I: size === "H" ? (square ? "I = H" : `I = ${I}`) : square ? `I = H = ${H}` : `I = ${I}`,
        H: size === "H" || square ? "" : `H = ${H}`,
      };
      delete held[size === "H" ? "H" : size];
      const shape = entry.shape.replace(/[BTIH]\d+ ?/g, "").trim();
      const where = [
        ...Object.values(held).filter(Boolean),
        ...(shape ? [shape] : []),
        ...(view.model.kind === "gpu" ? [`${entry.part} grid`] : []),
      ].join(", ");
      const key = JSON.stringify([size, where]);
      if (!found.has(key)) found.set(key, { size, where, entries: [] });
      found.get(key).entries.push(entry);
    }
  }
  const order = Object.keys(SIZES);
  return [...found.values()]
    .filter((family) => new Set(family.entries.map((entry) => entry.sizes[family.size])).size >= 3)
    .sort((a, b) => order.indexOf(a.size) - order.indexOf(b.size));
}

function drawSweeps(plot, view) {
  const all = families(view);
  if (!all.length) return nothing(plot, "In this choice no size is varied while the others are held.");
  for (const family of all) drawFamily(plot, view, family);
}

function drawFamily(plot, view, { size, where, entries }) {
  const contestants = [FUSED, ...view.peers].filter((peer) => entries.some((entry) => entry.times.has(peer)));
  const sizesOf = (cell) =>
    new Set(entries.filter((entry) => entry.cell === cell && entry.times.size).map((entry) => entry.sizes[size]));
  const cells = view.cells.filter((cell) => sizesOf(cell).size > 1);
  if (!cells.length) return;
  const width = Math.max(280, plot.clientWidth);
  const [axisWidth, gap, top, bottom] = [52, 14, 24, 26];
  const across = Math.max(1, Math.min(cells.length, Math.floor((width - axisWidth) / 190)));
  const panelWidth = Math.min(420, (width - axisWidth - gap * (across - 1)) / across);
  const panelHeight = Math.round(Math.max(170, Math.min(230, panelWidth * 0.72)));
  const lines = Math.ceil(cells.length / across);
  const height = lines * (top + panelHeight + bottom);
  const seconds = entries
    .flatMap((entry) =>
      contestants
        .filter((peer) => entry.times.has(peer))
        .flatMap((peer) => [entry.times.get(peer).q1, entry.times.get(peer).q3]),
    )
    .concat(entries.map((entry) => entry.floor).filter(Boolean));
  const [low, high] = [Math.min(...seconds) / 1.15, Math.max(...seconds) * 1.15];
  const sizes = entries.map((entry) => entry.sizes[size]);
  const [least, most] = [Math.min(...sizes), Math.max(...sizes)];
  put(plot, "h3", {}, `${SIZES[size]} `, put(document.createElement("span"), "small", {}, where));
  const describe = `Time of a call over ${SIZES[size]} from ${least} to ${most}, ${where}. ${cells
    .map((cell) =>
      ends(
        entries.filter(
          (entry) =>
            entry.cell === cell && entry.mode === view.modes.find((mode) => entries.some((e) => e.mode === mode)),
        ),
        size,
        contestants,
      ),
    )
    .join(" ")} The table below has every figure; arrow keys go from size to size.`;
  const svg = put(plot, "svg", {
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "group",
    "aria-label": describe,
  });
  const marks = [];
  cells.forEach((cell, p) => {
    const column = p % across;
    const x0 = axisWidth + column * (panelWidth + gap);
    const y0 = Math.floor(p / across) * (top + panelHeight + bottom) + top;
    const x = logScale(least, most, x0 + 12, x0 + panelWidth - 18);
    const y = logScale(low, high, y0 + panelHeight, y0);
    const group = put(svg, "g", { "aria-hidden": "true" });
    put(group, "text", { x: x0, y: y0 - 9, class: "panel-title" }, cellName(cell));
    for (const tick of logTicks(low, high, y, 22)) {
      put(group, "line", { x1: x0, x2: x0 + panelWidth, y1: y(tick), y2: y(tick), class: "grid" });
      if (!column)
        put(group, "text", { x: x0 - 7, y: y(tick) + 4, class: "tick", "text-anchor": "end" }, tickText(tick));
    }
    const values = [...new Set(sizes)].sort((a, b) => a - b);
    // Of sizes that are close to each other one has its number: the ends first, then from the left.
    const numbered = [];
    for (const value of new Set([values[0], values.at(-1), ...values])) {
      put(group, "line", { x1: x(value), x2: x(value), y1: y0 + panelHeight, y2: y0 + panelHeight + 4, class: "rule" });
      const half = widthOf(String(value), 11) / 2 + 3;
      if (numbered.some(([from, to]) => x(value) - half < to && x(value) + half > from)) continue;
      put(
        group,
        "text",
        { x: x(value), y: y0 + panelHeight + 17, class: "tick", "text-anchor": "middle" },
        String(value),
      );
      numbered.push([x(value) - half, x(value) + half]);
    }
    put(group, "line", { x1: x0, x2: x0 + panelWidth, y1: y0 + panelHeight, y2: y0 + panelHeight, class: "rule" });
    const here = entries.filter((entry) => entry.cell === cell).sort((a, b) => a.sizes[size] - b.sizes[size]);
    view.modes.forEach((mode, m) => {
      const mine = here.filter((entry) => entry.mode === mode);
      const floors = mine.filter((entry) => entry.floor && entry.times.size);
      if (floors.length)
        put(group, "polyline", {
          points: floors.map((entry) => `${x(entry.sizes[size])},${y(entry.floor)}`).join(" "),
          class: "line floor",
        });
      for (const peer of [...contestants].reverse()) {
        const timed = mine.filter((entry) => entry.times.has(peer));
        const tone = view.tones.get(peer);
        const points = timed.map((entry) => [x(entry.sizes[size]), entry.times.get(peer)]);
        for (const [at, { q1, q3 }] of points) put(group, "path", { d: `M${at} ${y(q1)}V${y(q3)}`, class: "whisker" });
        put(group, "polyline", {
          points: points.map(([at, { median }]) => `${at},${y(median)}`).join(" "),
          class: `tone-${tone} line${dashed(view, m) ? " dashed" : ""}`,
        });
        for (const [at, { median }] of points) marker(group, tone, at, y(median), dashed(view, m), 3);
      }
    });
    values.forEach((value, i) => {
      const mine = here.filter((entry) => entry.sizes[size] === value);
      if (!mine.length) return;
      const [before, after] = [values[i - 1] ?? value, values[i + 1] ?? value];
      const from = i ? (x(before) + x(value)) / 2 : x0;
      const to = after === value ? x0 + panelWidth : (x(value) + x(after)) / 2;
      const said = mine.flatMap((entry) =>
        entry.problem
          ? [[entry.mode, entry.problem]]
          : contestants
              .filter((peer) => entry.times.has(peer))
              .map((peer) => [
                `${nameOf(peer)}, ${entry.mode}`,
                `${timeText(entry.times.get(peer).median)}${entry.ratios.has(peer) ? `, ratio ${ratioText(entry.ratios.get(peer).median)}` : ""}`,
              ]),
      );
      if (mine.some((entry) => entry.problem))
        put(group, "text", { x: x(value), y: y0 + panelHeight - 5, class: "problem", "text-anchor": "middle" }, "✕");
      const element = hit(svg, plot, { x: from, y: y0, width: to - from, height: panelHeight }, [
        [`${cellName(cell)}, ${size} = ${value}`, ""],
        ...said,
      ]);
      marks.push({ element, row: Math.floor(p / across), column: column * 1000 + i });
    });
  });
  reachable(svg, marks);
}

/** Of several modes the second and further ones: what tells their lines from the first's. */
function dashed(view, m) {
  return m > 0 || (view.modes.length === 1 && view.model.modes.indexOf(view.modes[0]) > 0);
}

function ends(entries, size, contestants) {
  const timed = entries.filter((entry) => entry.times.size).sort((a, b) => a.sizes[size] - b.sizes[size]);
  if (!timed.length) return "";
  const [first, last] = [timed[0], timed.at(-1)];
  const said = contestants
    .filter((peer) => first.times.has(peer) && last.times.has(peer))
    .map(
      (peer) => `${nameOf(peer)} ${timeText(first.times.get(peer).median)} to ${timeText(last.times.get(peer).median)}`,
    );
  return `${cellName(first.cell)}, ${first.mode}: ${said.join(", ")}.`;
}

function nothing(plot, why) {
  put(plot, "p", { class: "nothing" }, why);
}
