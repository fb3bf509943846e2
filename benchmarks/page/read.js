"use strict";

// A result file, or what the page holds of one, to entries: what a figure and the table are made of. Each part of a file
// is asked for what it must be; an error names its place. Strings of a result only ever become text nodes and values of
// attributes: a file that a visitor drops is anybody's.

const FUSED = "fused";
const OWN = "fused_rnn";
const GATES = { lstm: 4, gru: 3, rnn: 1 };

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
  const [q1, q3] = ["q1", "q3"].map((name) =>
    own(value, name) === undefined ? median : positive(own(value, name), `${path}.${name}`),
  );
  return { median, q1, q3 };
}

function spreads(value, path) {
  const found = new Map();
  if (value === undefined) return found;
  for (const [name, item] of Object.entries(object(value, path)))
    found.set(name, spread(item, `${path}[${JSON.stringify(name)}]`));
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
      return JSON.parse(
        source.replace(/("(?:[^"\\]|\\.)*")|-?\b(?:NaN|Infinity)\b/g, (found, string) => string ?? "null"),
      );
    } catch {
      throw new Unreadable(`not JSON: ${error.message}`);
    }
  }
}

function read(json, name, schemas) {
  if (typeof json !== "object" || json === null || Array.isArray(json)) throw wrong("the file", "an object", json);
  const kind = Object.hasOwn(json, "cases") ? "processor" : Object.hasOwn(json, "results") ? "gpu" : null;
  if (!kind) {
    throw new Unreadable(
      'not a result of the benchmark: it has neither "cases" (python -m fused_rnn bench) nor "results" (python -m fused_rnn.bench.gpu)',
    );
  }
  const schema = own(json, "schema");
  if (schema !== schemas[kind]) {
    throw new Unreadable(
      `schema: this page reads ${schemas[kind]}, the file has ${typeof schema === "number" ? schema : kindOf(schema)}; it was written by another version of fused_rnn, whose own page reads it`,
    );
  }
  const environment = object(own(json, "environment"), "environment");
  const records = list(kind === "gpu" ? json.results : json.cases, kind === "gpu" ? "results" : "cases");
  if (!records.length)
    throw new Unreadable(`${kind === "gpu" ? "results" : "cases"}: expected at least one case, got none`);
  const entries =
    kind === "gpu"
      ? records.map((r, i) => gpuEntry(r, `results[${i}]`, json))
      : records.map((r, i) => processorEntry(r, `cases[${i}]`));
  // Cases of a GPU are measured the most telling first, not in an order to read them in.
  const parts = [...new Set(entries.map(({ part }) => part))];
  const place = ({ part, sizes: { I, T, B, H } }) => [parts.indexOf(part), I, T, B, H];
  if (kind === "gpu")
    entries.sort(
      (a, b) =>
        place(a)
          .map((value, i) => value - place(b)[i])
          .find((difference) => difference) ?? 0,
    );
  entries.forEach((entry, order) => {
    entry.order = order;
  });
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
  return keys.reduce(
    (place, key) => (typeof place === "object" && place !== null ? own(place, key) : undefined),
    value,
  );
}

function buildOf(environment) {
  const commit = optional(nested(environment, "fused_rnn", "commit"));
  return `${OWN} ${optional(nested(environment, "fused_rnn", "version")) || "of an unknown version"}${commit ? ` (${commit.slice(0, 9)}${commit.endsWith("+") ? ", with changed files" : ""})` : ""}`;
}

function processorFacts(environment) {
  const processors = optional(nested(environment, "threads", "processors"));
  const set = optional(nested(environment, "instruction_sets", "used"));
  const peers = Object.entries(nested(environment, "peers") ?? {})
    .filter(([name]) => name !== FUSED)
    .map(([name, version]) => `${name} ${optional(version)}`);
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
      ...(typeof heap === "boolean"
        ? [`freed memory ${heap ? "kept in the process" : "handed back to the system"}`]
        : []),
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
  const deviations = Object.entries(object(own(parity, "deviations"), `${path}.parity.deviations`)).flatMap(
    ([peer, found]) =>
      list(found, `${path}.parity.deviations[${JSON.stringify(peer)}]`).map((deviation, i) => ({
        peer,
        ...object(deviation, `${path}.parity.deviations[${JSON.stringify(peer)}][${i}]`),
      })),
  );
  const errors = deviations
    .filter(({ peer }) => peer === FUSED)
    .map(({ error }) => (typeof error === "number" ? error : Infinity));
  const failed = deviations.filter(({ error, tolerance }) => !(typeof error === "number" && error <= tolerance));
  const said = failed.map(
    ({ peer, name, error, tolerance }) =>
      `${peer}: ${optional(name)} off by ${typeof error === "number" ? brief(error) : "no finite number"}, allowed ${optional(tolerance)}`,
  );
  const passed = own(parity, "passed");
  if (typeof passed !== "boolean") throw wrong(`${path}.parity.passed`, "true or false", passed);
  const times = spreads(own(record, "seconds"), `${path}.seconds`);
  if (passed && !times.has(FUSED)) throw wrong(`${path}.seconds.fused`, "an object", undefined);
  const notes = [];
  const reason = optional(own(record, "reference_reason"));
  if (reason) notes.push(`ran on the reference, not on a kernel: ${reason}`);
  const disturbed = nested(record, "disturbed_rounds", "kept");
  if (typeof disturbed === "number" && disturbed > 0)
    notes.push(`${disturbed} disturbed ${disturbed === 1 ? "round counts" : "rounds count"} all the same`);
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
    if (list(samples, where).length)
      rounds.set(
        peer,
        samples.map((ms, i) => positive(ms, `${where}[${i}]`) / 1e3),
      );
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
      if (samples.length !== ours.length)
        throw new Unreadable(
          `${path}.milliseconds: expected as many rounds of ${peer} as of ${FUSED}, ${ours.length}, got ${samples.length}`,
        );
      ratios.set(peer, spreadOf(samples.map((s, i) => s / ours[i])));
    }
  }
  const directions = both ? 2 : 1;
  let depths = sizes.I + sizes.H;
  for (let layer = 1; layer < layers; layer++) depths += directions * sizes.H + sizes.H;
  const flops =
    (mode === "forward" ? 1 : 3) * 2 * sizes.T * sizes.B * directions * (own(GATES, cell) ?? NaN) * sizes.H * depths;
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
