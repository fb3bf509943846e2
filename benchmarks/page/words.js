// Numbers and cases in words, and elements that hold them.

const PARTS = { table: "table", workloads: "workloads", sweeps: "sweeps of a size" };
const SVG = "http://www.w3.org/2000/svg";

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
  return share >= 0.1
    ? (100 * share).toFixed(0)
    : share >= 0.01
      ? (100 * share).toFixed(1)
      : String(Number((100 * share).toPrecision(2)));
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
  const element =
    parent.namespaceURI === SVG || tag === "svg" ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (value !== null && value !== undefined) element.setAttribute(name, value);
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
