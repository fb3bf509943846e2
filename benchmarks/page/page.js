"use strict";

// Results -> entries (what a figure and the table are made of) -> SVG and HTML. Strings of a result only ever become text
// nodes and attributes' values: a file that a visitor drops is anybody's.

const FUSED = "fused";
const OWN = "fused_rnn";
// A ratio within 3 % of 1 is put down to noise, as benchmarks/tables.py does.
const NOISE = 0.97;
const MOST_BYTES = 64 * 2 ** 20;
const GATES = { lstm: 4, gru: 3, rnn: 1 };
const PARTS = { table: "table", workloads: "workloads", sweeps: "sweeps of a size" };
// A hue and a texture of its own for each peer, the same in every result; the others take what is left.
const TONES = { [FUSED]: 0, "torch.nn": 1, cuDNN: 1, "ONNX Runtime": 2, FlashRNN: 2, OpenVINO: 3, haste: 3 };
const FREE_TONES = [4, 5, 6];
const SVG = "http://www.w3.org/2000/svg";

// ---- reading a result -----------------------------------------------------------------------------------------------

/** What is wrong with a file, said to its owner. */
class Unreadable extends Error {}

function kindOf(value) {
  if (value === undefined) return "nothing";
  if (value === null) return "null";
  return Array.isArray(value) ? "a list" : { string: "text", object: "an object" }[typeof value] || `a ${typeof value}`;
}

function wrong(path, expected, value) {
  return new Unreadable(`${path}: expected ${expected}, got ${kindOf(value)}`);
}

function own(value, key) {
  return Object.hasOwn(value, key) ? value[key] : undefined;
}

function object(value, path) {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw wrong(path, "an object", value);
  return value;
}

function list(value, path) {
  if (!Array.isArray(value)) throw wrong(path, "a list", value);
  return value;
}

function text(value, path) {
  if (typeof value !== "string") throw wrong(path, "text", value);
  return value;
}

function number(value, path, least = -Infinity) {
  if (typeof value !== "number") throw wrong(path, "a number", value);
  if (!Number.isFinite(value)) throw new Unreadable(`${path}: expected a finite number`);
  if (!(value >= least)) throw new Unreadable(`${path}: expected at least ${least}, got ${value}`);
  return value;
}

/** Above 0: it is drawn on a logarithmic axis. */
function positive(value, path) {
  if (!(number(value, path) > 0)) throw new Unreadable(`${path}: expected more than 0, got ${value}`);
  return value;
}

function spread(value, path) {
  object(value, path);
  const median = positive(own(value, "median"), `${path}.median`);
  const [q1, q3] = ["q1", "q3"].map((name) => (own(value, name) === undefined ? median : positive(own(value, name), `${path}.${name}`)));
  return { median, q1, q3 };
}

function spreads(value, path) {
  const found = new Map();
  if (value === undefined) return found;
  for (const [name, item] of Object.entries(object(value, path))) found.set(name, spread(item, `${path}[${JSON.stringify(name)}]`));
  return found;
}

/** Median and quartiles of samples, the latter between the two nearest (as statistics.quantiles' "inclusive"). */
function spreadOf(samples) {
  const sorted = [...samples].sort((a, b) => a - b);
  const at = (share) => {
    const place = share * (sorted.length - 1);
    const below = Math.floor(place);
    return sorted[below] + (place - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
  };
  return { median: at(0.5), q1: at(0.25), q3: at(0.75) };
}

/** Rows under columns, as the page holds them, to records. */
function unpacked(packed) {
  const records = packed.rows.map((row) => {
    const record = {};
    row.forEach((value, column) => {
      if (value === null) return;
      const keys = packed.columns[column];
      let place = record;
      for (const key of keys.slice(0, -1)) place = place[key] ??= {};
      place[keys.at(-1)] = value;
    });
    return record;
  });
  return { ...packed, [packed.kind === "gpu" ? "results" : "cases"]: records };
}

/** JSON; Python's NaN and Infinity outside of strings are null. */
function parsed(source) {
  try {
    return JSON.parse(source);
  } catch (error) {
    try {
      return JSON.parse(source.replace(/("(?:[^"\\]|\\.)*")|-?\b(?:NaN|Infinity)\b/g, (found, string) => string ?? "null"));
    } catch {
      throw new Unreadable(`not JSON: ${error.message}`);
    }
  }
}

function read(json, name, schemas) {
  if (typeof json !== "object" || json === null || Array.isArray(json)) throw wrong("the file", "an object", json);
  const kind = Object.hasOwn(json, "cases") ? "processor" : Object.hasOwn(json, "results") ? "gpu" : null;
  if (!kind) {
    throw new Unreadable('not a result of the benchmark: it has neither "cases" (python -m fused_rnn bench) nor "results" (python -m fused_rnn.bench.gpu)');
  }
  const schema = own(json, "schema");
  if (schema !== schemas[kind]) {
    throw new Unreadable(`schema: this page reads ${schemas[kind]}, the file has ${typeof schema === "number" ? schema : kindOf(schema)}; it was written by another version of fused_rnn, whose own page reads it`);
  }
  const environment = object(own(json, "environment"), "environment");
  const records = list(kind === "gpu" ? json.results : json.cases, kind === "gpu" ? "results" : "cases");
  if (!records.length) throw new Unreadable(`${kind === "gpu" ? "results" : "cases"}: expected at least one case, got none`);
  const entries = kind === "gpu" ? records.map((r, i) => gpuEntry(r, `results[${i}]`, json)) : records.map((r, i) => processorEntry(r, `cases[${i}]`));
  // Cases of a GPU are measured the most telling first, not in an order to read them in.
  const parts = [...new Set(entries.map(({ part }) => part))];
  const place = ({ part, sizes: { I, T, B, H } }) => [parts.indexOf(part), I, T, B, H];
  if (kind === "gpu") entries.sort((a, b) => place(a).map((value, i) => value - place(b)[i]).find((difference) => difference) ?? 0);
  entries.forEach((entry, order) => { entry.order = order; });
  const values = (get) => [...new Set(entries.flatMap(get))].filter((value) => value !== null);
  const peers = values((entry) => [...entry.ratios.keys()]);
  return {
    name,
    kind,
    entries,
    peers,
    threads: values((entry) => [entry.threads]).sort((a, b) => b - a),
    cells: values((entry) => [entry.cell]),
    dtypes: values((entry) => [entry.dtype]),
    modes: values((entry) => [entry.mode]),
    parts: values((entry) => [entry.part]),
    missed: list(own(json, "not_reached") ?? [], "not_reached").map((item, i) => text(item, `not_reached[${i}]`)),
    ...(kind === "gpu" ? gpuFacts(environment, json) : processorFacts(environment)),
  };
}

function optional(value) {
  return typeof value === "string" || typeof value === "number" ? String(value) : "";
}

function nested(value, ...keys) {
  return keys.reduce((place, key) => (typeof place === "object" && place !== null ? own(place, key) : undefined), value);
}

function buildOf(environment) {
  const commit = optional(nested(environment, "fused_rnn", "commit"));
  return `${OWN} ${optional(nested(environment, "fused_rnn", "version")) || "of an unknown version"}${commit ? ` (${commit.slice(0, 9)}${commit.endsWith("+") ? ", with changed files" : ""})` : ""}`;
}

function processorFacts(environment) {
  const processors = optional(nested(environment, "threads", "processors"));
  const set = optional(nested(environment, "instruction_sets", "used"));
  const peers = Object.entries(nested(environment, "peers") ?? {}).filter(([name]) => name !== FUSED).map(([name, version]) => `${name} ${optional(version)}`);
  const heap = own(environment, "freed_memory_kept");
  const load = own(environment, "load_average");
  const date = optional(own(environment, "date")).slice(0, 10);
  const machine = optional(own(environment, "processor")) || "a processor";
  return {
    title: `${machine}, ${processors || "?"} processors, ${date}`,
    facts: [
      `${processors || "?"} processors of ${machine}${set ? ` (${set})` : ""}, ${date}`,
      buildOf(environment),
      ...peers,
      `Python ${optional(own(environment, "python"))}`,
      ...(typeof heap === "boolean" ? [`freed memory ${heap ? "kept in the process" : "handed back to the system"}`] : []),
      ...(typeof load === "number" ? [`load average ${load} at the start`] : []),
    ].join("; "),
  };
}

function gpuFacts(environment, json) {
  const device = optional(own(environment, "device")) || "a GPU";
  const date = optional(own(environment, "date")).slice(0, 10);
  const left = list(own(json, "without") ?? [], "without").map((item, i) => text(item, `without[${i}]`));
  return {
    title: `${device}, ${date}`,
    facts: [
      `${device}, driver ${optional(own(environment, "driver")) || "unknown"}, ${date}`,
      buildOf(environment),
      `PyTorch ${optional(own(environment, "torch"))}`,
      `cuDNN ${optional(own(environment, "cudnn"))}`,
      ...(left.length ? [`left out: the variants ${left.join(", ")}`] : []),
    ].join("; "),
  };
}

function processorEntry(record, path) {
  object(record, path);
  const field = (name) => text(own(record, name), `${path}.${name}`);
  const shape = object(own(record, "shape"), `${path}.shape`);
  const size = (name) => number(own(shape, name), `${path}.shape.${name}`, 1);
  const parity = object(own(record, "parity"), `${path}.parity`);
  const deviations = Object.entries(object(own(parity, "deviations"), `${path}.parity.deviations`)).flatMap(([peer, found]) =>
    list(found, `${path}.parity.deviations[${JSON.stringify(peer)}]`).map((deviation, i) => ({ peer, ...object(deviation, `${path}.parity.deviations[${JSON.stringify(peer)}][${i}]`) })),
  );
  const errors = deviations.filter(({ peer }) => peer === FUSED).map(({ error }) => (typeof error === "number" ? error : Infinity));
  const failed = deviations.filter(({ error, tolerance }) => !(typeof error === "number" && error <= tolerance));
  const said = failed.map(({ peer, name, error, tolerance }) => `${peer}: ${optional(name)} off by ${typeof error === "number" ? brief(error) : "no finite number"}, allowed ${optional(tolerance)}`);
  const passed = own(parity, "passed");
  if (typeof passed !== "boolean") throw wrong(`${path}.parity.passed`, "true or false", passed);
  const times = spreads(own(record, "seconds"), `${path}.seconds`);
  if (passed && !times.has(FUSED)) throw wrong(`${path}.seconds.fused`, "an object", undefined);
  const notes = [];
  const reason = optional(own(record, "reference_reason"));
  if (reason) notes.push(`ran on the reference, not on a kernel: ${reason}`);
  const disturbed = nested(record, "disturbed_rounds", "kept");
  if (typeof disturbed === "number" && disturbed > 0) notes.push(`${disturbed} disturbed ${disturbed === 1 ? "round counts" : "rounds count"} all the same`);
  const rate = own(record, "fused_gflops");
  return {
    threads: number(own(record, "threads"), `${path}.threads`, 1),
    part: field("part"),
    group: field("group"),
    cell: field("cell"),
    mode: field("mode"),
    dtype: field("dtype"),
    shape: field("shape_name"),
    sizes: { B: size("batch_size"), T: size("seq_length"), I: size("input_size"), H: size("hidden_size") },
    times: passed ? times : new Map(),
    ratios: passed ? spreads(own(record, "ratio"), `${path}.ratio`) : new Map(),
    shares: passed ? spreads(own(record, "share_of_peak"), `${path}.share_of_peak`) : new Map(),
    peak: nested(record, "peak_gflops", "median"),
    gflops: typeof rate === "number" ? rate : null,
    error: errors.length ? Math.max(...errors) : null,
    problem: passed ? "" : `wrong numbers, not timed: ${said.join("; ") || "parity failed"}`,
    notes,
  };
}

function gpuEntry(record, path, json) {
  object(record, path);
  const shape = object(own(record, "case"), `${path}.case`);
  const size = (name) => number(own(shape, name), `${path}.case.${name}`, 1);
  const sizes = { B: size("batch_size"), T: size("seq_length"), I: size("input_size"), H: size("hidden_size") };
  const layers = own(shape, "num_layers") === undefined ? 1 : size("num_layers");
  const both = own(shape, "bidirectional") === true;
  const cell = text(own(shape, "cell"), `${path}.case.cell`);
  const dtype = text(own(shape, "dtype"), `${path}.case.dtype`);
  const mode = text(own(record, "which"), `${path}.which`);
  const rounds = new Map();
  for (const [peer, samples] of Object.entries(object(own(record, "milliseconds") ?? {}, `${path}.milliseconds`))) {
    const where = `${path}.milliseconds[${JSON.stringify(peer)}]`;
    if (list(samples, where).length) rounds.set(peer, samples.map((ms, i) => positive(ms, `${where}[${i}]`) / 1e3));
  }
  let problem = text(own(record, "problem") ?? "", `${path}.problem`);
  if (!problem && !rounds.has(FUSED)) problem = "not timed";
  const ours = rounds.get(FUSED);
  const times = new Map();
  const ratios = new Map();
  for (const [peer, samples] of problem ? [] : rounds) {
    times.set(peer, spreadOf(samples));
    // Round by round: a machine that slows down for a moment slows all.
    if (peer !== FUSED) {
      if (samples.length !== ours.length) throw new Unreadable(`${path}.milliseconds: expected as many rounds of ${peer} as of ${FUSED}, ${ours.length}, got ${samples.length}`);
      ratios.set(peer, spreadOf(samples.map((s, i) => s / ours[i])));
    }
  }
  const directions = both ? 2 : 1;
  let depths = sizes.I + sizes.H;
  for (let layer = 1; layer < layers; layer++) depths += directions * sizes.H + sizes.H;
  const flops = (mode === "forward" ? 1 : 3) * 2 * sizes.T * sizes.B * directions * (own(GATES, cell) ?? NaN) * sizes.H * depths;
  const peak = nested(json, "machine", "flops", dtype);
  const shares = new Map();
  if (typeof peak === "number" && peak > 0 && Number.isFinite(flops)) {
    for (const [peer, { median, q1, q3 }] of times) {
      const of = (seconds) => flops / seconds / peak;
      shares.set(peer, { median: of(median), q1: of(q3), q3: of(q1) });
    }
  }
  const floor = own(record, "floor_ms");
  const error = own(record, "error");
  const notes = [];
  const variant = optional(own(record, "variant"));
  const together = own(record, "layers");
  if (variant) notes.push(`variant ${variant}${together > 1 ? ` of ${optional(together)} layers` : ""}`);
  const rival = optional(own(record, "rival"));
  if (rival) notes.push(`cuDNN is ${rival}`);
  return {
    threads: null,
    part: text(own(shape, "grid"), `${path}.case.grid`),
    group: "",
    cell,
    mode,
    dtype,
    shape: `B${sizes.B} T${sizes.T} I${sizes.I} H${sizes.H}${layers > 1 ? ` L${layers}` : ""}${both ? " bidir" : ""}`,
    sizes,
    times,
    ratios,
    shares,
    floor: typeof floor === "number" && floor > 0 ? floor / 1e3 : null,
    peak: typeof peak === "number" ? peak / 1e9 : null,
    gflops: times.has(FUSED) && Number.isFinite(flops) ? flops / times.get(FUSED).median / 1e9 : null,
    error: typeof error === "number" ? error : null,
    problem,
    notes,
  };
}

// ---- words and numbers ----------------------------------------------------------------------------------------------

function ratioText(value) {
  return value.toFixed(value >= 100 ? 0 : value >= 10 ? 1 : 2);
}

function unitOf(seconds) {
  return seconds < 1e-3 ? [1e6, "µs"] : seconds < 1 ? [1e3, "ms"] : [1, "s"];
}

/** Three digits, and all those before the point. */
function three(value) {
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

function timeText(seconds) {
  const [factor, unit] = unitOf(seconds);
  return `${three(factor * seconds)} ${unit}`;
}

function tickText(seconds) {
  const [factor, unit] = unitOf(seconds);
  return `${Number((factor * seconds).toPrecision(2))} ${unit}`;
}

/** Quartiles in the unit of the median. */
function timeRange({ median, q1, q3 }) {
  const [factor] = unitOf(median);
  return `${three(factor * q1)}–${three(factor * q3)}`;
}

function ratioRange({ q1, q3 }) {
  return `${ratioText(q1)}–${ratioText(q3)}`;
}

function percentRange({ q1, q3 }) {
  return `${percent(q1)}–${percent(q3)}`;
}

function percent(share) {
  return share >= 0.1 ? (100 * share).toFixed(0) : share >= 0.01 ? (100 * share).toFixed(1) : String(Number((100 * share).toPrecision(2)));
}

function percentText(share) {
  return `${percent(share)} %`;
}

/** 5.0e-6 as 5e-6. */
function brief(value) {
  return Number(value.toPrecision(2)).toExponential().replace("e+0", "");
}

function spreadText(format, { median, q1, q3 }) {
  return `${format(median)} (${format(q1)} to ${format(q3)})`;
}

function count(many, one, more = `${one}s`) {
  return `${many} ${many === 1 ? one : more}`;
}

function nameOf(peer) {
  return peer === FUSED ? OWN : peer;
}

function cellName(cell) {
  return cell.toUpperCase();
}

function partName(part) {
  return own(PARTS, part) ?? part;
}

function headingOf(entry) {
  if (entry.part === "table") return entry.group;
  return entry.part === "workloads" ? "workloads" : entry.part;
}

function labelOf(entry) {
  return entry.part === "workloads" ? `${entry.group}: ${entry.shape}` : entry.shape;
}

function titleOf(entry) {
  return `${cellName(entry.cell)} ${entry.shape}, ${entry.mode}`;
}

/** The chosen peer that is hardest to beat; null where none was measured. */
function fastest(entry, peers) {
  const measured = peers.filter((peer) => entry.ratios.has(peer));
  if (!measured.length) return null;
  const ratio = (peer) => entry.ratios.get(peer).median;
  const peer = measured.reduce((best, other) => (ratio(other) < ratio(best) ? other : best));
  return { peer, ...entry.ratios.get(peer) };
}

function geometricMean(values) {
  return Math.exp(values.reduce((sum, value) => sum + Math.log(value), 0) / values.length);
}

// ---- elements -------------------------------------------------------------------------------------------------------

function put(parent, tag, attributes = {}, ...children) {
  const element = parent.namespaceURI === SVG || tag === "svg" ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) element.setAttribute(name, value);
  element.append(...children);
  parent.append(element);
  return element;
}

function clear(element) {
  element.replaceChildren();
  return element;
}

function by(id) {
  return document.getElementById(id);
}

const measuring = document.createElement("canvas").getContext("2d");
let font = "";

function widthOf(string, size = 12) {
  measuring.font = font.replace("12px", `${size}px`);
  return measuring.measureText(string).width;
}

// ---- tones: hue and texture of a peer -------------------------------------------------------------------------------

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
    const pattern = put(defs, "pattern", { id: `${prefix}-${tone}`, class: `tone-${tone}`, width: 4, height: 4, patternUnits: "userSpaceOnUse", patternTransform: `rotate(${tone === 6 ? -45 : 45})` });
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
  return put(parent, "rect", { x, y, width: Math.max(width, 0.5), height, class: `tone-${tone} bar`, style: null, fill: fill(tone) });
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
    const nearest = (candidates, distance) => candidates.reduce((best, mark) => (!best || distance(mark) < distance(best) ? mark : best), null);
    const along = (key, sign, other) => nearest(
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
      Escape: () => { hideTip(); return here; },
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
  const svg = put(plot, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": describe });
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
        put(group, "line", { x1: beside && !p ? 0 : x0, x2: left + panelWidth, y1: y + 2.5, y2: y + 2.5, class: "rule" });
        y += headingHeight;
        continue;
      }
      const middle = y + above + barsHeight / 2;
      const found = panel.cells.get(row.label);
      if (!beside) put(group, "text", { x: x0, y: y + 12, class: "label" }, row.label);
      else if (!p) put(group, "text", { x: labelWidth - 12, y: middle + 4, class: "label", "text-anchor": "end" }, row.label);
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
          for (const [i, [peer, value]] of [...found.extra].entries()) marker(group, tones.get(peer), scale(value.median), middle + (i - (found.extra.size - 1) / 2) * 5, true, 3);
        }
        put(group, "text", { x: left + panelWidth, y: middle + 4, class: found.low ? "side low" : "side", "text-anchor": "end" }, found.side);
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
  return [...groups].flatMap(([heading, labels]) => [{ heading }, ...[...labels].map((label) => ({ label, key: `${heading} ${label}` }))]);
}

function barPanels(entries, cells, make) {
  return cells
    .map((cell) => ({ title: cellName(cell), cells: new Map(entries.filter((entry) => entry.cell === cell).map((entry) => [labelOf(entry), make(entry)])) }))
    .filter((panel) => panel.cells.size);
}

function linesOf(entry, peers) {
  const lines = [[`${cellName(entry.cell)} ${labelOf(entry)}, ${entry.mode}`, ""]];
  if (entry.problem) return [...lines, ["", entry.problem]];
  lines.push([`${OWN}`, spreadText(timeText, entry.times.get(FUSED))]);
  for (const peer of peers) {
    if (entry.ratios.has(peer)) lines.push([peer, `${timeText(entry.times.get(peer).median)}, ratio ${spreadText(ratioText, entry.ratios.get(peer))}`]);
  }
  return lines;
}

function drawRatios(plot, view) {
  const entries = view.entries.filter((entry) => entry.part !== "sweeps");
  const shown = entries.filter((entry) => entry.problem || view.peers.some((peer) => entry.ratios.has(peer)));
  if (!shown.length) return nothing(plot, view.model.peers.length ? "No ratio was measured for this choice." : "Nothing was compared with in this result.");
  const all = shown.flatMap((entry) => view.peers.filter((peer) => entry.ratios.has(peer)).map((peer) => entry.ratios.get(peer)));
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
    drawBars(plot, { rows: rowsOf(mine), panels, peers, tones: view.tones, axis, describe: `Ratio, ${mode}. ${extremes(mine, view)} The table below has every figure; arrow keys go from case to case.` });
  }
}

/** A sentence on each cell: the least and the largest ratio. */
function extremes(entries, view) {
  return view.cells
    .map((cell) => {
      const found = entries.filter((entry) => entry.cell === cell).flatMap((entry) => view.peers.filter((peer) => entry.ratios.has(peer)).map((peer) => [entry.ratios.get(peer).median, `${entry.shape}, ${peer}`]));
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
  const most = Math.max(1, ...entries.flatMap((entry) => [FUSED, ...view.peers].filter((peer) => entry.shares.has(peer)).map((peer) => entry.shares.get(peer).q3)));
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
        ...[FUSED, ...view.peers].filter((peer) => entry.shares.has(peer)).map((peer) => [nameOf(peer), spreadText(percentText, entry.shares.get(peer))]),
        ...(typeof entry.peak === "number" ? [["peak", `${Number(entry.peak.toPrecision(3))} GFLOP/s`]] : []),
      ],
    }));
    if (!panels.length) continue;
    const found = mine.map((entry) => [entry.shares.get(FUSED).median, titleOf(entry)]).sort((a, b) => a[0] - b[0]);
    put(plot, "h3", {}, mode);
    drawBars(plot, { rows: rowsOf(mine), panels, peers: [FUSED], tones: view.tones, axis, describe: `Share of the peak, ${mode}: ${OWN} from ${percentText(found[0][0])} (${found[0][1]}) to ${percentText(found.at(-1)[0])} (${found.at(-1)[1]}). The table below has every figure; arrow keys go from case to case.` });
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
      const held = { B: `B = ${B}`, T: `T = ${T}`, I: size === "H" ? (square ? "I = H" : `I = ${I}`) : square ? `I = H = ${H}` : `I = ${I}`, H: size === "H" || square ? "" : `H = ${H}` };
      delete held[size === "H" ? "H" : size];
      const shape = entry.shape.replace(/[BTIH]\d+ ?/g, "").trim();
      const where = [...Object.values(held).filter(Boolean), ...(shape ? [shape] : []), ...(view.model.kind === "gpu" ? [`${entry.part} grid`] : [])].join(", ");
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
  const sizesOf = (cell) => new Set(entries.filter((entry) => entry.cell === cell && entry.times.size).map((entry) => entry.sizes[size]));
  const cells = view.cells.filter((cell) => sizesOf(cell).size > 1);
  if (!cells.length) return;
  const width = Math.max(280, plot.clientWidth);
  const [axisWidth, gap, top, bottom] = [52, 14, 24, 26];
  const across = Math.max(1, Math.min(cells.length, Math.floor((width - axisWidth) / 190)));
  const panelWidth = Math.min(420, (width - axisWidth - gap * (across - 1)) / across);
  const panelHeight = Math.round(Math.max(170, Math.min(230, panelWidth * 0.72)));
  const lines = Math.ceil(cells.length / across);
  const height = lines * (top + panelHeight + bottom);
  const seconds = entries.flatMap((entry) => contestants.filter((peer) => entry.times.has(peer)).flatMap((peer) => [entry.times.get(peer).q1, entry.times.get(peer).q3])).concat(entries.map((entry) => entry.floor).filter(Boolean));
  const [low, high] = [Math.min(...seconds) / 1.15, Math.max(...seconds) * 1.15];
  const sizes = entries.map((entry) => entry.sizes[size]);
  const [least, most] = [Math.min(...sizes), Math.max(...sizes)];
  put(plot, "h3", {}, `${SIZES[size]} `, put(document.createElement("span"), "small", {}, where));
  const describe = `Time of a call over ${SIZES[size]} from ${least} to ${most}, ${where}. ${cells.map((cell) => ends(entries.filter((entry) => entry.cell === cell && entry.mode === view.modes.find((mode) => entries.some((e) => e.mode === mode))), size, contestants)).join(" ")} The table below has every figure; arrow keys go from size to size.`;
  const svg = put(plot, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": describe });
  const marks = [];
  cells.forEach((cell, p) => {
    const column = p % across;
    const x0 = axisWidth + column * (panelWidth + gap);
    const y0 = Math.floor(p / across) * (top + panelHeight + bottom) + top;
    const x = logScale(least, most, x0 + 12, x0 + panelWidth - 12);
    const y = logScale(low, high, y0 + panelHeight, y0);
    const group = put(svg, "g", { "aria-hidden": "true" });
    put(group, "text", { x: x0, y: y0 - 9, class: "panel-title" }, cellName(cell));
    for (const tick of logTicks(low, high, y, 22)) {
      put(group, "line", { x1: x0, x2: x0 + panelWidth, y1: y(tick), y2: y(tick), class: "grid" });
      if (!column) put(group, "text", { x: x0 - 7, y: y(tick) + 4, class: "tick", "text-anchor": "end" }, tickText(tick));
    }
    const values = [...new Set(sizes)].sort((a, b) => a - b);
    // Of sizes that are close to each other one has its number: the ends first, then from the left.
    const numbered = [];
    for (const value of new Set([values[0], values.at(-1), ...values])) {
      put(group, "line", { x1: x(value), x2: x(value), y1: y0 + panelHeight, y2: y0 + panelHeight + 4, class: "rule" });
      const half = widthOf(String(value), 11) / 2 + 3;
      if (numbered.some(([from, to]) => x(value) - half < to && x(value) + half > from)) continue;
      put(group, "text", { x: x(value), y: y0 + panelHeight + 17, class: "tick", "text-anchor": "middle" }, String(value));
      numbered.push([x(value) - half, x(value) + half]);
    }
    put(group, "line", { x1: x0, x2: x0 + panelWidth, y1: y0 + panelHeight, y2: y0 + panelHeight, class: "rule" });
    const here = entries.filter((entry) => entry.cell === cell).sort((a, b) => a.sizes[size] - b.sizes[size]);
    view.modes.forEach((mode, m) => {
      const mine = here.filter((entry) => entry.mode === mode);
      const floors = mine.filter((entry) => entry.floor && entry.times.size);
      if (floors.length) put(group, "polyline", { points: floors.map((entry) => `${x(entry.sizes[size])},${y(entry.floor)}`).join(" "), class: "line floor" });
      for (const peer of [...contestants].reverse()) {
        const timed = mine.filter((entry) => entry.times.has(peer));
        const tone = view.tones.get(peer);
        const points = timed.map((entry) => [x(entry.sizes[size]), entry.times.get(peer)]);
        for (const [at, { q1, q3 }] of points) put(group, "path", { d: `M${at} ${y(q1)}V${y(q3)}`, class: "whisker" });
        put(group, "polyline", { points: points.map(([at, { median }]) => `${at},${y(median)}`).join(" "), class: `tone-${tone} line${dashed(view, m) ? " dashed" : ""}` });
        for (const [at, { median }] of points) marker(group, tone, at, y(median), dashed(view, m), 3);
      }
    });
    values.forEach((value, i) => {
      const mine = here.filter((entry) => entry.sizes[size] === value);
      if (!mine.length) return;
      const [before, after] = [values[i - 1] ?? value, values[i + 1] ?? value];
      const from = i ? (x(before) + x(value)) / 2 : x0;
      const to = after === value ? x0 + panelWidth : (x(value) + x(after)) / 2;
      const said = mine.flatMap((entry) => (entry.problem ? [[entry.mode, entry.problem]] : contestants.filter((peer) => entry.times.has(peer)).map((peer) => [`${nameOf(peer)}, ${entry.mode}`, `${timeText(entry.times.get(peer).median)}${entry.ratios.has(peer) ? `, ratio ${ratioText(entry.ratios.get(peer).median)}` : ""}`])));
      if (mine.some((entry) => entry.problem)) put(group, "text", { x: x(value), y: y0 + panelHeight - 5, class: "problem", "text-anchor": "middle" }, "✕");
      const element = hit(svg, plot, { x: from, y: y0, width: to - from, height: panelHeight }, [[`${cellName(cell)}, ${size} = ${value}`, ""], ...said]);
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
  const said = contestants.filter((peer) => first.times.has(peer) && last.times.has(peer)).map((peer) => `${nameOf(peer)} ${timeText(first.times.get(peer).median)} to ${timeText(last.times.get(peer).median)}`);
  return `${cellName(first.cell)}, ${first.mode}: ${said.join(", ")}.`;
}

function nothing(plot, why) {
  put(plot, "p", { class: "nothing" }, why);
}

// ---- summary and table ----------------------------------------------------------------------------------------------

function drawSummary(view) {
  const place = clear(by("summary"));
  const { entries, peers } = view;
  const compared = entries.map((entry) => [entry, fastest(entry, peers)]).filter(([, least]) => least);
  if (compared.length) {
    const scroll = put(place, "div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Summary by engine" });
    const table = put(scroll, "table", { class: "means" });
    put(table, "caption", { class: "visually-hidden" }, "Ratios over the chosen cases");
    const head = put(put(table, "thead"), "tr");
    for (const [i, label] of ["time over ours", "cases", "geometric mean", "least", "below 1", "below 0.97"].entries()) put(head, "th", { scope: "col", class: i ? "figure" : null }, label);
    const body = put(table, "tbody");
    const line = (label, ratios) => {
      const row = put(body, "tr");
      put(row, "th", { scope: "row" }, label);
      const below = ratios.filter((ratio) => ratio < 1).length;
      const clearly = ratios.filter((ratio) => ratio < NOISE).length;
      for (const figure of [ratios.length, ratioText(geometricMean(ratios)), ratioText(Math.min(...ratios)), below, clearly]) put(row, "td", { class: "figure" }, String(figure));
    };
    for (const peer of peers) {
      const ratios = entries.filter((entry) => entry.ratios.has(peer)).map((entry) => entry.ratios.get(peer).median);
      if (ratios.length) line(peer, ratios);
    }
    if (peers.length > 1) line("the fastest of them", compared.map(([, least]) => least.median));
  }
  const slower = compared.filter(([, least]) => least.median < 1).sort((a, b) => a[1].median - b[1].median);
  if (slower.length) {
    const details = put(place, "details", { id: "slower", ...(slower.length <= 12 ? { open: "" } : {}) });
    put(details, "summary", {}, `Slower than the fastest peer: ${count(slower.length, "case")}`);
    const items = put(details, "ul");
    for (const [entry, least] of slower) {
      const noise = least.median >= NOISE ? ", within the 3 % that count as noise" : "";
      const item = put(items, "li", {}, `${titleOf(entry)}: `);
      put(item, "strong", {}, `${least.peer} ${ratioText(least.median)}`);
      item.append(` (${ratioText(least.q1)} to ${ratioText(least.q3)})${noise}`);
    }
  }
  const failed = entries.filter((entry) => entry.problem);
  if (failed.length) {
    const details = put(place, "details", { id: "failed", open: "" });
    put(details, "summary", {}, `Not timed: ${count(failed.length, "case")}`);
    const items = put(details, "ul");
    for (const entry of failed) put(items, "li", {}, `${titleOf(entry)}: ${entry.problem}`);
  }
  if (view.model.missed.length) {
    const details = put(place, "details", { id: "missed" });
    put(details, "summary", {}, `Not reached before the run's time was up: ${count(view.model.missed.length, "case")}`);
    const items = put(details, "ul");
    for (const name of view.model.missed) put(items, "li", {}, name);
  }
  const said = entries.length
    ? `${count(entries.length, "case")}${compared.length ? `, ${slower.length} below 1 against the fastest peer` : ""}${failed.length ? `, ${failed.length} not timed` : ""}.`
    : emptiness(view);
  // Said only when it has changed: a sorted table is no news.
  if (by("status").textContent !== said) by("status").textContent = said;
}

function emptiness(view) {
  const missing = Object.entries({ cell: view.cells, mode: view.modes, "group of cases": view.parts }).find(([, chosen]) => !chosen.length);
  return missing ? `No case: no ${missing[0]} is chosen.` : "No case: nothing was measured in this combination of choices.";
}

function columnsOf(view) {
  const columns = [
    { key: "case", label: "case", header: true, sort: (e) => e.order, show: (e) => `${cellName(e.cell)} ${e.shape}` },
    { key: "mode", label: "mode", sort: (e) => e.mode, show: (e) => e.mode },
    { key: "time", label: OWN, figure: true, sort: (e) => e.times.get(FUSED)?.median, spread: (e) => e.times.get(FUSED), format: timeText, range: timeRange },
    ...view.peers.map((peer) => ({ key: `ratio ${peer}`, label: `${peer} / ours`, figure: true, ratio: true, sort: (e) => e.ratios.get(peer)?.median, spread: (e) => e.ratios.get(peer), format: ratioText, range: ratioRange })),
  ];
  const optionals = [
    { key: "gflops", label: "GFLOP/s", figure: true, sort: (e) => e.gflops ?? undefined, show: (e) => (e.gflops === null ? "" : String(Number(e.gflops.toPrecision(3)))) },
    { key: "share", label: "of peak", figure: true, sort: (e) => e.shares.get(FUSED)?.median, spread: (e) => e.shares.get(FUSED), format: percentText, range: percentRange },
    { key: "floor", label: "times the floor", figure: true, sort: (e) => (e.floor && e.times.has(FUSED) ? e.times.get(FUSED).median / e.floor : undefined), show: (e) => (e.floor && e.times.has(FUSED) ? ratioText(e.times.get(FUSED).median / e.floor) : "") },
    { key: "error", label: "error", figure: true, sort: (e) => e.error ?? undefined, show: (e) => (e.error === null ? "" : e.error === Infinity ? "not finite" : brief(e.error)) },
    { key: "group", label: "group", sort: (e) => `${e.part} ${e.group}`, show: (e) => (e.group ? `${partName(e.part)}: ${e.group}` : e.part) },
    { key: "notes", label: "notes", sort: (e) => e.problem + e.notes.join("; "), show: (e) => [e.problem, ...e.notes].filter(Boolean).join("; ") },
  ];
  return [...columns, ...optionals.filter((column) => view.entries.some((entry) => (column.key === "notes" ? column.show(entry) : column.sort(entry) !== undefined)))];
}

function sorted(view, columns) {
  const column = columns.find(({ key }) => key === view.sort.key);
  if (!column) return view.entries;
  const sign = view.sort.down ? -1 : 1;
  return [...view.entries].sort((a, b) => {
    const [x, y] = [column.sort(a), column.sort(b)];
    // What was not measured stays last in either direction.
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return sign * (typeof x === "string" ? x.localeCompare(y, "en") : x - y) || a.order - b.order;
  });
}

function drawTable(view, onSort) {
  const place = by("rows");
  // A reader who sorts stays where they are: on the same button, at the same columns.
  const [focused, left] = [document.activeElement?.dataset?.column, place.scrollLeft];
  clear(place);
  by("download").disabled = !view.entries.length;
  if (!view.entries.length) return nothing(place, emptiness(view));
  const columns = columnsOf(view);
  const table = put(place, "table");
  const head = put(put(table, "thead"), "tr");
  for (const { key, label, figure } of columns) {
    const mine = view.sort.key === key;
    const cell = put(head, "th", { scope: "col", class: figure ? "figure" : null, "aria-sort": mine ? (view.sort.down ? "descending" : "ascending") : null });
    const button = put(cell, "button", { type: "button", "data-column": key }, label);
    put(button, "span", { "aria-hidden": "true" }, mine ? (view.sort.down ? " ↓" : " ↑") : "");
    button.addEventListener("click", () => onSort(key));
  }
  const body = put(table, "tbody");
  for (const entry of sorted(view, columns)) {
    const row = put(body, "tr", { class: entry.problem ? "failed" : null });
    for (const column of columns) {
      const cell = put(row, column.header ? "th" : "td", { scope: column.header ? "row" : null, class: column.figure ? "figure" : column.key === "notes" ? "notes" : null });
      if (!column.spread) {
        cell.append(column.show(entry));
        continue;
      }
      const value = column.spread(entry);
      if (!value) {
        if (column.key === "time") cell.append("not timed");
        continue;
      }
      if (column.ratio && value.median < 1) {
        put(cell, "strong", { class: "low" }, column.format(value.median));
        put(cell, "span", { class: "visually-hidden" }, " slower");
      } else cell.append(column.format(value.median));
      put(cell, "small", {}, ` (${column.range(value)})`);
    }
  }
  place.scrollLeft = left;
  [...head.querySelectorAll("button")].find((button) => button.dataset.column === focused)?.focus({ preventScroll: true });
}

/** The chosen cases in full precision, seconds; what a spreadsheet would take for a formula is made text. */
function csv(view) {
  const contestants = [FUSED, ...view.peers];
  const header = ["result", "threads", "part", "group", "cell", "case", "dtype", "mode"];
  for (const peer of contestants) header.push(...["median", "q1", "q3"].map((name) => `${nameOf(peer)} seconds ${name}`));
  for (const peer of view.peers) header.push(...["median", "q1", "q3"].map((name) => `${peer} / ${OWN} ${name}`));
  header.push(`${OWN} GFLOP/s`, `${OWN} share of peak`, "error", "problem", "notes");
  const lines = [header];
  for (const e of sorted(view, columnsOf(view))) {
    const three = (value) => (value ? [value.median, value.q1, value.q3] : ["", "", ""]);
    lines.push([
      view.model.name, e.threads ?? "", e.part, e.group, e.cell, e.shape, e.dtype, e.mode,
      ...contestants.flatMap((peer) => three(e.times.get(peer))),
      ...view.peers.flatMap((peer) => three(e.ratios.get(peer))),
      e.gflops ?? "", e.shares.get(FUSED)?.median ?? "", e.error ?? "", e.problem, e.notes.join("; "),
    ]);
  }
  const quoted = (value) => {
    const string = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\r\n]/.test(string) ? `"${string.replaceAll('"', '""')}"` : string;
  };
  return `${lines.map((line) => line.map(quoted).join(",")).join("\r\n")}\r\n`;
}

// ---- choices --------------------------------------------------------------------------------------------------------

const FIELDS = [
  { name: "threads", legend: "Threads", type: "radio", options: (m) => m.threads, label: String, first: (all) => all.slice(0, 1) },
  { name: "cell", legend: "Cell", type: "checkbox", options: (m) => m.cells, label: cellName, first: (all) => all },
  { name: "dtype", legend: "Dtype", type: "radio", options: (m) => m.dtypes, label: String, first: (all) => all.slice(0, 1) },
  { name: "mode", legend: "Mode", type: "checkbox", options: (m) => m.modes, label: String, first: (all) => all },
  { name: "peer", legend: "Compared with", type: "checkbox", options: (m) => m.peers, label: String, first: (all) => all },
  { name: "part", legend: "Cases", type: "checkbox", options: (m) => m.parts, label: partName, first: (all) => all },
];

const state = { models: [], model: null, chosen: {}, sort: { key: "", down: false } };

/** What was chosen from what there is; of a name that there is not, nothing. */
function choose(model, wanted) {
  const chosen = {};
  for (const { name, options, first, type } of FIELDS) {
    const all = options(model).map(String);
    const asked = wanted.has(name) ? wanted.getAll(name).filter((value) => all.includes(value)) : null;
    const kept = asked && (type === "checkbox" ? asked : asked.slice(0, 1));
    chosen[name] = kept && (kept.length || (type === "checkbox" && wanted.get(name) === "")) ? kept : all.length ? first(all) : [];
  }
  return chosen;
}

function parameters() {
  const found = new URLSearchParams({ result: state.model.name });
  for (const { name, options } of FIELDS) {
    const values = state.chosen[name];
    for (const value of values) found.append(name, value);
    if (!values.length && options(state.model).length) found.append(name, "");
  }
  if (state.sort.key) found.set("sort", `${state.sort.down ? "-" : ""}${state.sort.key}`);
  return found;
}

function fromHash() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const named = state.models.find((model) => model.name === wanted.get("result"));
  if (wanted.has("result") && !named) complain(`The link is to a result that this page does not hold, ${wanted.get("result")}: if it is a file, choose or drop it again.`);
  state.model = named ?? state.models[0];
  state.chosen = choose(state.model, wanted);
  const sort = wanted.get("sort") ?? "";
  state.sort = { key: sort.replace(/^-/, ""), down: sort.startsWith("-") };
}

function toHash() {
  const hash = `#${parameters()}`;
  if (location.hash !== hash) history.replaceState(null, "", hash);
}

function viewOf() {
  const { model, chosen } = state;
  const has = (name) => (value) => chosen[name].includes(String(value));
  const [threads, cell, dtype, mode, part] = ["threads", "cell", "dtype", "mode", "part"].map(has);
  return {
    model,
    entries: model.entries.filter((e) => (e.threads === null || threads(e.threads)) && cell(e.cell) && dtype(e.dtype) && mode(e.mode) && part(e.part)),
    cells: model.cells.filter(cell),
    modes: model.modes.filter(mode),
    parts: model.parts.filter(part),
    peers: model.peers.filter(has("peer")),
    tones: tonesOf(model.peers),
    sort: state.sort,
  };
}

function drawChoices() {
  const select = clear(by("result"));
  const groups = { "On processors": (m) => m.kind === "processor" && !m.dropped, "On GPUs": (m) => m.kind === "gpu" && !m.dropped, "Files of your own": (m) => m.dropped };
  for (const [label, belongs] of Object.entries(groups)) {
    const mine = state.models.filter(belongs);
    if (!mine.length) continue;
    const group = put(select, "optgroup", { label });
    for (const model of mine) put(group, "option", { value: model.name }, model.dropped ? `${model.name} (${model.title})` : model.title);
  }
  select.value = state.model.name;
  const place = clear(by("fields"));
  for (const { name, legend: title, type, options, label } of FIELDS) {
    const all = options(state.model);
    if (!all.length) continue;
    const set = put(place, "fieldset", { "data-field": name });
    put(set, "legend", {}, title);
    for (const value of all) {
      const wrapper = put(set, "label");
      const input = put(wrapper, "input", { type, name, value: String(value) });
      input.checked = state.chosen[name].includes(String(value));
      wrapper.append(label(value));
    }
  }
  by("facts").textContent = state.model.facts;
}

function drawFigures() {
  const view = viewOf();
  hideTip();
  font = getComputedStyle(by("figures")).getPropertyValue("--chart-font").trim();
  const sole = state.model.kind === "gpu";
  const where = `${state.model.title}${state.chosen.threads.length ? `, ${count(Number(state.chosen.threads[0]), "thread")}` : ""}, ${state.chosen.dtype[0]}`;
  const bars = view.peers.filter((peer) => view.entries.some((entry) => entry.ratios.has(peer)));
  const caption = (id, words) => { by(id).querySelector("figcaption p").textContent = words; };
  const plotOf = (id) => clear(by(id).querySelector(".plot"));
  caption("ratio", `The other engine's time over ours, ${where}. Bars begin at 1: to the right fused_rnn is faster, to the left slower. The figure beside a case is the least of its ratios.`);
  legend(by("ratio").querySelector(".legend"), bars.length ? [...bars.map((peer) => ({ tone: view.tones.get(peer), label: peer, kind: "bar" })), { kind: "whisker", label: "quartiles" }] : []);
  drawRatios(plotOf("ratio"), view);
  caption("sweeps", `Median time of a call, ${where}: one size varied, the others held; both axes logarithmic, a line lower down is faster.${sole ? " The floor is what no arrangement of these kernels can be faster than on this GPU, by what was measured on it." : ""}`);
  const all = families(view);
  const lines = [FUSED, ...view.peers].filter((peer) => all.some((family) => family.entries.some((entry) => entry.times.has(peer))));
  legend(by("sweeps").querySelector(".legend"), [
    ...lines.flatMap((peer) => view.modes.map((mode, m) => ({ tone: view.tones.get(peer), label: `${nameOf(peer)}, ${mode}`, kind: "line", hollow: dashed(view, m) }))),
    ...(sole && lines.length ? [{ kind: "floor", label: "floor" }] : []),
  ]);
  drawSweeps(plotOf("sweeps"), view);
  caption("peak", sole
    ? `Rate of the matrix products over that of a large product on the same GPU, ${where}. Bars are fused_rnn, marks the others.`
    : `Rate of the matrix products over the rate of independent multiply-adds in the same round, ${where}. Bars are fused_rnn, marks the others. Where sizes are small other things are the limit.`);
  const shares = view.entries.some((entry) => entry.shares.has(FUSED));
  legend(by("peak").querySelector(".legend"), shares ? [{ tone: 0, label: OWN, kind: "bar" }, ...view.peers.filter((peer) => view.entries.some((entry) => entry.shares.has(peer))).map((peer) => ({ tone: view.tones.get(peer), label: peer, kind: "mark" })), { kind: "whisker", label: "quartiles" }] : []);
  drawShares(plotOf("peak"), view);
  drawSummary(view);
  drawRows(view);
}

function drawRows(view = viewOf()) {
  drawTable(view, (key) => {
    state.sort = state.sort.key === key ? { key, down: !state.sort.down } : { key, down: false };
    toHash();
    drawRows();
  });
}

function complain(words) {
  by("trouble").textContent = words;
}

// ---- a file of one's own --------------------------------------------------------------------------------------------

async function take(files) {
  complain("");
  const troubles = [];
  let last = null;
  for (const file of files) {
    try {
      if (file.size > MOST_BYTES) throw new Unreadable(`expected at most ${MOST_BYTES / 2 ** 20} MiB, got ${Math.ceil(file.size / 2 ** 20)}`);
      const model = { ...read(parsed(await file.text()), file.name, state.schemas), dropped: true };
      state.models = [...state.models.filter(({ name }) => name !== model.name), model];
      last = model;
    } catch (error) {
      if (!(error instanceof Unreadable)) throw error;
      troubles.push(`${file.name}: ${error.message}.`);
    }
  }
  if (troubles.length) complain(troubles.join(" "));
  if (!last) return;
  state.model = last;
  state.chosen = choose(last, new URLSearchParams());
  state.sort = { key: "", down: false };
  drawChoices();
  drawFigures();
  toHash();
}

// ---- start ----------------------------------------------------------------------------------------------------------

function start() {
  const { schemas, results } = JSON.parse(by("data").textContent);
  state.schemas = schemas;
  state.models = results.map((packed) => read(unpacked(packed), packed.name, schemas));
  by("app").hidden = false;
  const begin = () => { fromHash(); drawChoices(); drawFigures(); };
  begin();
  addEventListener("hashchange", () => { complain(""); begin(); });

  by("choices").addEventListener("submit", (event) => event.preventDefault());
  by("result").addEventListener("change", (event) => {
    complain("");
    const wanted = parameters();
    state.model = state.models.find(({ name }) => name === event.target.value);
    // What can be kept of the choices is; a name that means nothing here is not.
    state.chosen = choose(state.model, wanted);
    drawChoices();
    drawFigures();
    toHash();
  });
  by("fields").addEventListener("change", ({ target }) => {
    state.chosen[target.name] = [...by("fields").querySelectorAll("input:checked")].filter(({ name }) => name === target.name).map(({ value }) => value);
    drawFigures();
    toHash();
  });
  by("file").addEventListener("change", (event) => {
    const files = [...event.target.files];
    // The same file, changed meanwhile, can be chosen again.
    event.target.value = "";
    take(files);
  });
  by("download").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv(viewOf())], { type: "text/csv" }));
    link.download = `fused_rnn-${state.model.name.replace(/\.json$/, "")}.csv`;
    link.click();
    URL.revokeObjectURL(link.href);
  });

  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  let depth = 0;
  const drop = by("drop");
  addEventListener("dragenter", (event) => { if (carriesFiles(event)) { depth += 1; drop.hidden = false; } });
  addEventListener("dragleave", (event) => { if (carriesFiles(event)) { depth = Math.max(0, depth - 1); drop.hidden = depth === 0; } });
  addEventListener("dragover", (event) => { if (carriesFiles(event)) event.preventDefault(); });
  addEventListener("drop", (event) => {
    depth = 0;
    drop.hidden = true;
    if (!carriesFiles(event)) return;
    event.preventDefault();
    take([...event.dataTransfer.files]);
  });

  let width = by("figures").clientWidth;
  new ResizeObserver(() => {
    if (by("figures").clientWidth === width) return;
    width = by("figures").clientWidth;
    drawFigures();
  }).observe(by("figures"));
}

start();
