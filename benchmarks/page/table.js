// The summary above the figures, the table below them, and its CSV.

// A ratio within 3 % of 1 is put down to noise, as benchmarks/tables.py does.
const NOISE = 0.97;

function drawSummary(view) {
  const place = clear(by("summary"));
  const { entries, peers } = view;
  const compared = entries.map((entry) => [entry, fastest(entry, peers)]).filter(([, least]) => least);
  if (compared.length) {
    const scroll = put(place, "div", {
      class: "scroll",
      tabindex: "0",
      role: "region",
      "aria-label": "Summary by engine",
    });
    const table = put(scroll, "table", { class: "means" });
    put(table, "caption", { class: "visually-hidden" }, "Ratios over the chosen cases");
    const head = put(put(table, "thead"), "tr");
    for (const [i, label] of ["time over ours", "cases", "geometric mean", "least", "below 1", "below 0.97"].entries())
      put(head, "th", { scope: "col", class: i ? "figure" : null }, label);
    const body = put(table, "tbody");
    const line = (label, ratios) => {
      const row = put(body, "tr");
      put(row, "th", { scope: "row" }, label);
      const below = ratios.filter((ratio) => ratio < 1).length;
      const clearly = ratios.filter((ratio) => ratio < NOISE).length;
      for (const figure of [
        ratios.length,
        ratioText(geometricMean(ratios)),
        ratioText(Math.min(...ratios)),
        below,
        clearly,
      ])
        put(row, "td", { class: "figure" }, String(figure));
    };
    for (const peer of peers) {
      const ratios = entries.filter((entry) => entry.ratios.has(peer)).map((entry) => entry.ratios.get(peer).median);
      if (ratios.length) line(peer, ratios);
    }
    if (peers.length > 1)
      line(
        "the fastest of them",
        compared.map(([, least]) => least.median),
      );
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
  const missing = Object.entries({ cell: view.cells, mode: view.modes, "group of cases": view.parts }).find(
    ([, chosen]) => !chosen.length,
  );
  return missing
    ? `No case: no ${missing[0]} is chosen.`
    : "No case: nothing was measured in this combination of choices.";
}

function columnsOf(view) {
  const columns = [
    { key: "case", label: "case", header: true, sort: (e) => e.order, show: (e) => `${cellName(e.cell)} ${e.shape}` },
    { key: "mode", label: "mode", sort: (e) => e.mode, show: (e) => e.mode },
    {
      key: "time",
      label: OWN,
      figure: true,
      sort: (e) => e.times.get(FUSED)?.median,
      spread: (e) => e.times.get(FUSED),
      format: timeText,
      range: timeRange,
    },
    ...view.peers.map((peer) => ({
      key: `ratio ${peer}`,
      label: `${peer} / ours`,
      figure: true,
      ratio: true,
      sort: (e) => e.ratios.get(peer)?.median,
      spread: (e) => e.ratios.get(peer),
      format: ratioText,
      range: ratioRange,
    })),
  ];
  const optionals = [
    {
      key: "gflops",
      label: "GFLOP/s",
      figure: true,
      sort: (e) => e.gflops ?? undefined,
      show: (e) => (e.gflops === null ? "" : String(Number(e.gflops.toPrecision(3)))),
    },
    {
      key: "share",
      label: "of peak",
      figure: true,
      sort: (e) => e.shares.get(FUSED)?.median,
      spread: (e) => e.shares.get(FUSED),
      format: percentText,
      range: percentRange,
    },
    {
      key: "floor",
      label: "times the floor",
      figure: true,
      sort: (e) => (e.floor && e.times.has(FUSED) ? e.times.get(FUSED).median / e.floor : undefined),
      show: (e) => (e.floor && e.times.has(FUSED) ? ratioText(e.times.get(FUSED).median / e.floor) : ""),
    },
    {
      key: "error",
      label: "error",
      figure: true,
      sort: (e) => e.error ?? undefined,
      show: (e) => (e.error === null ? "" : e.error === Infinity ? "not finite" : brief(e.error)),
    },
    {
      key: "group",
      label: "group",
      sort: (e) => `${e.part} ${e.group}`,
      show: (e) => (e.group ? `${partName(e.part)}: ${e.group}` : e.part),
    },
    {
      key: "notes",
      label: "notes",
      sort: (e) => e.problem + e.notes.join("; "),
      show: (e) => [e.problem, ...e.notes].filter(Boolean).join("; "),
    },
  ];
  return [
    ...columns,
    ...optionals.filter((column) =>
      view.entries.some((entry) => (column.key === "notes" ? column.show(entry) : column.sort(entry) !== undefined)),
    ),
  ];
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
    const cell = put(head, "th", {
      scope: "col",
      class: figure ? "figure" : null,
      "aria-sort": mine ? (view.sort.down ? "descending" : "ascending") : null,
    });
    const button = put(cell, "button", { type: "button", "data-column": key }, label);
    put(button, "span", { "aria-hidden": "true" }, mine ? (view.sort.down ? " ↓" : " ↑") : "");
    button.addEventListener("click", () => onSort(key));
  }
  const body = put(table, "tbody");
  for (const entry of sorted(view, columns)) {
    const row = put(body, "tr", { class: entry.problem ? "failed" : null });
    for (const column of columns) {
      const cell = put(row, column.header ? "th" : "td", {
        scope: column.header ? "row" : null,
        class: column.figure ? "figure" : column.key === "notes" ? "notes" : null,
      });
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
  [...head.querySelectorAll("button")]
    .find((button) => button.dataset.column === focused)
    ?.focus({ preventScroll: true });
}

/** The chosen cases in full precision, seconds; what a spreadsheet would take for a formula is made text. */
function csv(view) {
  const contestants = [FUSED, ...view.peers];
  const header = ["result", "threads", "part", "group", "cell", "case", "dtype", "mode"];
  for (const peer of contestants)
    header.push(...["median", "q1", "q3"].map((name) => `${nameOf(peer)} seconds ${name}`));
  for (const peer of view.peers) header.push(...["median", "q1", "q3"].map((name) => `${peer} / ${OWN} ${name}`));
  header.push(`${OWN} GFLOP/s`, `${OWN} share of peak`, "error", "problem", "notes");
  const lines = [header];
  for (const e of sorted(view, columnsOf(view))) {
    const three = (value) => (value ? [value.median, value.q1, value.q3] : ["", "", ""]);
    lines.push([
      view.model.name,
      e.threads ?? "",
      e.part,
      e.group,
      e.cell,
      e.shape,
      e.dtype,
      e.mode,
      ...contestants.flatMap((peer) => three(e.times.get(peer))),
      ...view.peers.flatMap((peer) => three(e.ratios.get(peer))),
      e.gflops ?? "",
      e.shares.get(FUSED)?.median ?? "",
      e.error ?? "",
      e.problem,
      e.notes.join("; "),
    ]);
  }
  const quoted = (value) => {
    const string = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\r\n]/.test(string) ? `"${string.replaceAll('"', '""')}"` : string;
  };
  return `${lines.map((line) => line.map(quoted).join(",")).join("\r\n")}\r\n`;
}
