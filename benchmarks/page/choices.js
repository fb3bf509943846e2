// What is chosen: by controls, by the address, by files of a visitor's own.

const MOST_BYTES = 64 * 2 ** 20;

const FIELDS = [
  {
    name: "threads",
    legend: "Threads",
    type: "radio",
    options: (m) => m.threads,
    label: String,
    first: (all) => all.slice(0, 1),
  },
  { name: "cell", legend: "Cell", type: "checkbox", options: (m) => m.cells, label: cellName, first: (all) => all },
  {
    name: "dtype",
    legend: "Dtype",
    type: "radio",
    options: (m) => m.dtypes,
    label: String,
    first: (all) => all.slice(0, 1),
  },
  { name: "mode", legend: "Mode", type: "checkbox", options: (m) => m.modes, label: String, first: (all) => all },
  {
    name: "peer",
    legend: "Compared with",
    type: "checkbox",
    options: (m) => m.peers,
    label: String,
    first: (all) => all,
  },
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
    chosen[name] =
      kept && (kept.length || (type === "checkbox" && wanted.get(name) === "")) ? kept : all.length ? first(all) : [];
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
  if (wanted.has("result") && !named)
    complain(
      `The link is to a result that this page does not hold, ${wanted.get("result")}: if it is a file, choose or drop it again.`,
    );
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
    entries: model.entries.filter(
      (e) =>
        (e.threads === null || threads(e.threads)) && cell(e.cell) && dtype(e.dtype) && mode(e.mode) && part(e.part),
    ),
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
  const groups = {
    "On processors": (m) => m.kind === "processor" && !m.dropped,
    "On GPUs": (m) => m.kind === "gpu" && !m.dropped,
    "Files of your own": (m) => m.dropped,
  };
  for (const [label, belongs] of Object.entries(groups)) {
    const mine = state.models.filter(belongs);
    if (!mine.length) continue;
    const group = put(select, "optgroup", { label });
    for (const model of mine)
      put(group, "option", { value: model.name }, model.dropped ? `${model.name} (${model.title})` : model.title);
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
  const caption = (id, words) => {
    by(id).querySelector("figcaption p").textContent = words;
  };
  const plotOf = (id) => clear(by(id).querySelector(".plot"));
  caption(
    "ratio",
    `The other engine's time over ours, ${where}. Bars begin at 1: to the right fused_rnn is faster, to the left slower. The figure beside a case is the least of its ratios.`,
  );
  legend(
    by("ratio").querySelector(".legend"),
    bars.length
      ? [
          ...bars.map((peer) => ({ tone: view.tones.get(peer), label: peer, kind: "bar" })),
          { kind: "whisker", label: "quartiles" },
        ]
      : [],
  );
  drawRatios(plotOf("ratio"), view);
  caption(
    "sweeps",
    `Median time of a call, ${where}: one size varied, the others held; both axes logarithmic, a line lower down is faster.${sole ? " The floor is what no arrangement of these kernels can be faster than on this GPU, by what was measured on it." : ""}`,
  );
  const all = families(view);
  const lines = [FUSED, ...view.peers].filter((peer) =>
    all.some((family) => family.entries.some((entry) => entry.times.has(peer))),
  );
  legend(by("sweeps").querySelector(".legend"), [
    ...lines.flatMap((peer) =>
      view.modes.map((mode, m) => ({
        tone: view.tones.get(peer),
        label: `${nameOf(peer)}, ${mode}`,
        kind: "line",
        hollow: dashed(view, m),
      })),
    ),
    ...(sole && lines.length ? [{ kind: "floor", label: "floor" }] : []),
  ]);
  drawSweeps(plotOf("sweeps"), view);
  caption(
    "peak",
    sole
      ? `Rate of the matrix products over that of a large product on the same GPU, ${where}. Bars are fused_rnn, marks the others.`
      : `Rate of the matrix products over the rate of independent multiply-adds in the same round, ${where}. Bars are fused_rnn, marks the others. Where sizes are small other things are the limit.`,
  );
  const shares = view.entries.some((entry) => entry.shares.has(FUSED));
  legend(
    by("peak").querySelector(".legend"),
    shares
      ? [
          { tone: 0, label: OWN, kind: "bar" },
          ...view.peers
            .filter((peer) => view.entries.some((entry) => entry.shares.has(peer)))
            .map((peer) => ({ tone: view.tones.get(peer), label: peer, kind: "mark" })),
          { kind: "whisker", label: "quartiles" },
        ]
      : [],
  );
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
      if (file.size > MOST_BYTES)
        throw new Unreadable(`expected at most ${MOST_BYTES / 2 ** 20} MiB, got ${Math.ceil(file.size / 2 ** 20)}`);
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
  const begin = () => {
    fromHash();
    drawChoices();
    drawFigures();
  };
  begin();
  addEventListener("hashchange", () => {
    complain("");
    begin();
  });

  // The address holds the choices: a link within the page goes without it.
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    by("figures").focus();
  });
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
    state.chosen[target.name] = [...by("fields").querySelectorAll("input:checked")]
      .filter(({ name }) => name === target.name)
      .map(({ value }) => value);
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
  addEventListener("dragenter", (event) => {
    if (carriesFiles(event)) {
      depth += 1;
      drop.hidden = false;
    }
  });
  addEventListener("dragleave", (event) => {
    if (carriesFiles(event)) {
      depth = Math.max(0, depth - 1);
      drop.hidden = depth === 0;
    }
  });
  addEventListener("dragover", (event) => {
    if (carriesFiles(event)) event.preventDefault();
  });
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
