"""docs/results.html: made from the kept results, and used in a browser as a reader does, by keyboard too."""

from __future__ import annotations

import copy
import csv
import importlib.util
import io
import json
import math
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import browser

from fused_rnn.bench import bars, gpu, gpu_cases, report, runner

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.html"
DESK, PHONE = (1280, 900), (360, 740)

needs_browser = pytest.mark.skipif(browser.executable() is None, reason="no Chromium is installed: `make browser`")


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("page", ROOT / "benchmarks" / "page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RESULTS = generator().kept_results()


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """The newest of the kept results, which the page opens with."""
    found = [json.loads(path.read_text()) | {"stem": path.stem} for path in RESULTS]
    return max(found, key=lambda result: str(result["environment"]["date"]))


@pytest.fixture(scope="module")
def first_view(kept: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases that the page shows when it is opened."""
    threads = max(case["threads"] for case in kept["cases"])
    dtype = kept["cases"][0]["dtype"]
    return [case for case in kept["cases"] if (case["threads"], case["dtype"]) == (threads, dtype)]


# ---- made from the results ------------------------------------------------------------------------------------------


def test_the_page_is_what_the_kept_results_give() -> None:
    made = generator().page(RESULTS)
    assert made == generator().page(RESULTS[::-1])
    # `make figures`, or python benchmarks/page.py, makes it anew
    assert PAGE.read_text(encoding="utf-8") == made


def test_the_page_holds_the_values_of_the_results() -> None:
    held = json.loads(
        re.findall(r'<script type="application/json" id="data">(.*?)</script>', PAGE.read_text(), re.S)[0]
    )
    assert held["schemas"] == {"processor": report.SCHEMA, "gpu": gpu.SCHEMA}
    for path, packed in zip(sorted(RESULTS), sorted(held["results"], key=lambda result: str(result["name"]))):
        result = json.loads(path.read_text())
        records = result["results" if packed["kind"] == "gpu" else "cases"]
        assert packed["name"] == path.stem and len(packed["rows"]) == len(records)
        for record, row in zip(records, packed["rows"]):
            for keys, value in zip(packed["columns"], row):
                found = record
                for key in keys:
                    found = found.get(key, {})
                assert value is None or value == found or (keys[:2] == ["parity", "deviations"] and value[0] in found)
        for field in ("seconds", "ratio", "share_of_peak"):
            columns = {tuple(keys) for keys in packed["columns"]}
            for record in records if packed["kind"] == "processor" else ():
                assert {(field, peer, "median") for peer in record.get(field, {})} <= columns


def test_the_page_is_one_file_that_may_ask_for_nothing() -> None:
    text = PAGE.read_text()
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[0]
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed.pop("default-src") == "'none'" and allowed.pop("img-src") == "data:"
    assert re.fullmatch(r"'sha256-\S+'", allowed.pop("script-src")) and re.fullmatch(
        r"'sha256-\S+'", allowed.pop("style-src")
    )
    assert set(allowed.values()) == {"'none'"}
    assert not re.findall(r"(?:src|href)=\"(?!#|data:|[\w-]+\.md\")[^\"]*\"|@import|url\((?!#\$)", text)
    assert len(text) < 600_000


def test_a_result_of_another_schema_is_not_made_into_a_page(tmp_path: Path, kept: dict[str, Any]) -> None:
    (tmp_path / "old.json").write_text(json.dumps(kept | {"schema": 1}))
    with pytest.raises(ValueError, match=f"old: expected schema {report.SCHEMA}, got 1"):
        generator().page([tmp_path / "old.json"])


def gpu_result() -> dict[str, Any]:
    """A made-up one: a size varied, a stack, a case with wrong numbers, one that failed, one that was not reached."""
    machine = gpu.Machine({"bfloat16": 8e14, "float32": 4e14}, {"cluster": 0.8})
    chosen = [gpu_cases.GpuCase("flashrnn", "lstm", 16, steps, 768, 768, "bfloat16") for steps in (2048, 256, 512)]
    chosen += [gpu_cases.GpuCase("stacks", "gru", 4, 64, 128, 128, "bfloat16", 2, bidirectional=True)]
    measured = [gpu.Measured(case, which, "cluster") for case in chosen for which in gpu_cases.PASSES]
    for i, one in enumerate(measured):
        one.floor_ms = machine.floor_ms(one.case, one.which)
        ours = [one.floor_ms * (2 + 0.1 * turn) for turn in range(6)]
        one.milliseconds = {"cuDNN": [ms * (0.8 + 0.1 * i) for ms in ours], "fused": ours[::-1]}
        one.peak_bytes = {"cuDNN": 2048, "fused": 1024}
        one.error = 1e-3
    measured[0].rival = "cuDNN in float16"
    measured[4].problem, measured[4].error, measured[4].milliseconds = "wrong numbers: off by nan", math.nan, {}
    measured[5].problem, measured[5].milliseconds = "failed: RuntimeError: a launch", {}
    where = {"date": "2030-01-02T03:04:05+00:00", "device": "a GPU", "driver": "1", "torch": "2", "cudnn": 9}
    where["fused_rnn"] = {"version": "1", "commit": "0123456789abcdef"}
    return gpu.as_json(measured, machine, ["lstm B1 T1 I1 H1 float32"], where, ["grid"])


def test_not_a_number_is_left_out_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(gpu_result()))
    assert "NaN" in (tmp_path / "gpu.json").read_text()
    made = generator().page([tmp_path / "gpu.json"])
    data = re.findall(r'id="data">(.*?)</script>', made, re.S)[0]
    assert json.loads(data, parse_constant=pytest.fail)["results"][0]["kind"] == "gpu"


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.opened(tmp_path_factory.mktemp("profile")) as page:
        yield page


@contextmanager
def opened_at(tab: browser.Page, view: str) -> Iterator[browser.Page]:
    """The page, just opened on a desk's screen; whatever a test does, nothing may complain or be fetched."""
    tab.resize(*DESK)
    tab.media(prefers_color_scheme="light")
    tab.open(PAGE.as_uri() + view)
    yield tab
    assert tab.complaints == []
    assert {request.partition("#")[0] for request in tab.requests} == {PAGE.as_uri()}


@pytest.fixture
def page(tab: browser.Page) -> Iterator[browser.Page]:
    """As it opens by itself."""
    with opened_at(tab, "") as found:
        yield found


@pytest.fixture
def few(tab: browser.Page) -> Iterator[browser.Page]:
    """With few cases, which are faster to draw; one of each kind of element is there."""
    with opened_at(tab, "#cell=gru&part=table&part=sweeps&sort=-time") as found:
        yield found


def file_of(folder: Path, result: object, name: str = "mine.json") -> Path:
    path = folder / name
    path.write_text(result if isinstance(result, str) else json.dumps(result))
    return path


def give(page: browser.Page, *paths: Path) -> None:
    """Choose files and wait for what the page says of them."""
    before = page.run("document.getElementById('trouble').textContent + location.hash")
    page.choose_files("#file", *paths)
    page.wait("(before) => document.getElementById('trouble').textContent + location.hash !== before", before)


def ratio_text(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.1f}" if share >= 0.01 else f"{100 * share:.2g}"


def number(text: str) -> float:
    """The first number of a text."""
    return float(re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", text)[0])


def rows(page: browser.Page) -> list[dict[str, str]]:
    """The table below: for each row the texts by column."""
    found = page.run(
        "() => [...document.querySelectorAll('#rows tr')].map(r => [...r.cells].map(c => c.innerText.trim()))"
    )
    header = [label.rstrip(" ↑↓") for label in found[0]]
    return [dict(zip(header, row, strict=True)) for row in found[1:]]


def plain(text: str) -> str:
    """A ratio without the word that a screen reader is given beside it."""
    return " ".join(text.replace("slower", "").split())


def status(page: browser.Page) -> str:
    return str(page.run("document.getElementById('status').textContent"))


def check(page: browser.Page, name: str, *values: str) -> None:
    """Make these and no others of a field the chosen ones, as clicks do."""
    page.run(
        """(name, values) => {
            for (const input of document.querySelectorAll(`input[name="${name}"]`))
                if (input.checked !== values.includes(input.value)) input.click();
        }""",
        name,
        list(values),
    )


@needs_browser
def test_opens_without_complaint_and_fetches_nothing(page: browser.Page, first_view: list[dict[str, Any]]) -> None:
    assert status(page).startswith(f"{len(first_view)} cases, ")
    assert page.run("document.querySelectorAll('.plot > svg').length") >= 4
    assert page.run("performance.getEntriesByType('resource').length") == 0


@needs_browser
def test_the_policy_refuses_the_network(page: browser.Page) -> None:
    refused = page.run(
        """() => new Promise((done) => {
            addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
            fetch("http://127.0.0.1:9/").catch(() => {});
        })"""
    )
    assert refused == "connect-src"
    assert all("Content Security Policy" in complaint for complaint in page.complaints)
    page.complaints.clear()


@needs_browser
def test_the_table_has_the_values_of_the_result(page: browser.Page, first_view: list[dict[str, Any]]) -> None:
    found = rows(page)
    assert len(found) == len(first_view)
    for row, case in zip(found, first_view, strict=True):
        assert row["case"] == f"{case['cell'].upper()} {case['shape_name']}" and row["mode"] == case["mode"]
        ours = case["seconds"]["fused"]["median"]
        unit = {"µs": 1e-6, "ms": 1e-3, "s": 1.0}[row["fused_rnn"].split(" ")[1]]
        assert number(row["fused_rnn"]) * unit == pytest.approx(ours, rel=6e-3)
        for peer, ratio in case["ratio"].items():
            low, high = (ratio_text(ratio[q]) for q in ("q1", "q3"))
            assert plain(row[f"{peer} / ours"]) == f"{ratio_text(ratio['median'])} ({low}–{high})"
            assert ("slower" in row[f"{peer} / ours"]) == (ratio["median"] < 1)
        if "share_of_peak" in case:
            share = 100 * case["share_of_peak"]["fused"]["median"]
            assert number(row["of peak"]) == pytest.approx(share, rel=0.06, abs=0.5 if share >= 10 else 0.051)
        error = max(deviation["error"] for deviation in case["parity"]["deviations"]["fused"])
        assert number(row["error"]) == pytest.approx(error, rel=0.06)


@needs_browser
def test_bars_are_as_long_as_the_logarithm_of_the_ratio(page: browser.Page, first_view: list[dict[str, Any]]) -> None:
    """And as many as there are ratios, to the right of 1 where fused_rnn is faster."""
    expected = [
        ratio["median"]
        for case in first_view
        if case["part"] != "sweeps" and case["mode"] == "inference"
        for ratio in case["ratio"].values()
    ]
    drawn = page.run(
        """() => {
            const svg = document.querySelector("#ratio svg[role=group]");
            const bases = [...svg.querySelectorAll(".base")].map((line) => line.x1.baseVal.value);
            return [...svg.querySelectorAll(".bar")].map((bar) => {
                const [from, width] = [bar.x.baseVal.value, bar.width.baseVal.value];
                const right = bases.some((base) => Math.abs(from - base) < 1e-3);
                return right ? width : -width;
            });
        }"""
    )
    assert len(drawn) == len(expected)
    scale = max(drawn) / math.log(max(expected))
    # A bar of no length is still drawn, half a pixel wide.
    lengths = sorted(scale * math.log(ratio) for ratio in expected if abs(scale * math.log(ratio)) > 0.5)
    assert sorted(length for length in drawn if abs(length) > 0.5) == pytest.approx(lengths, abs=0.01)


@needs_browser
def test_marks_say_what_they_show(page: browser.Page, first_view: list[dict[str, Any]]) -> None:
    said = page.run("() => [...document.querySelectorAll('#ratio .hit')].map(e => e.getAttribute('aria-label'))")
    cases = [case for case in first_view if case["part"] != "sweeps"]
    assert len(said) == len(cases)
    for case in cases:
        name = f"{case['cell'].upper()} {case['shape_name']}, {case['mode']}"
        (label,) = (text for text in said if name in text.replace(f"{case['group']}: ", ""))
        for peer, ratio in case["ratio"].items():
            median, q1, q3 = (ratio_text(ratio[key]) for key in ("median", "q1", "q3"))
            assert re.search(rf"{re.escape(peer)} [^;]*ratio {median} \({q1} to {q3}\)", label)


@needs_browser
def test_lines_go_through_the_medians(page: browser.Page, first_view: list[dict[str, Any]]) -> None:
    """On logarithmic axes: the places of a line's points are linear in the logarithms of size and time."""
    chosen = [
        case
        for case in first_view
        if (case["part"], case["group"], case["cell"], case["mode"]) == ("sweeps", "T", "lstm", "inference")
    ]
    places = page.run(
        """() => [...document.querySelector("#sweeps svg[role=group]").querySelectorAll("polyline.tone-0")]
            .map((line) => [...line.points].map(({ x, y }) => [x, y]))[0]"""
    )
    assert len(places) == len(chosen) > 2
    values = [(case["shape"]["seq_length"], case["seconds"]["fused"]["median"]) for case in chosen]
    for axis in (0, 1):
        logs = [math.log(value[axis]) for value in sorted(values)]
        slope = (places[-1][axis] - places[0][axis]) / (logs[-1] - logs[0])
        assert [p[axis] - places[0][axis] for p in places] == pytest.approx(
            [slope * (v - logs[0]) for v in logs], abs=0.05
        )


@needs_browser
def test_the_summary_counts_what_is_slower(page: browser.Page, first_view: list[dict[str, Any]]) -> None:
    ratios = [{peer: ratio["median"] for peer, ratio in case["ratio"].items()} for case in first_view]
    least = [min(found.values()) for found in ratios]
    assert f", {sum(ratio < 1 for ratio in least)} below 1" in status(page)
    lines = page.run("() => [...document.querySelectorAll('.means tr')].map(r => [...r.cells].map(c => c.innerText))")[
        1:
    ]
    by_peer = {line[0]: line[1:] for line in lines}
    for peer in bars.ENGINES:
        mine = [found[peer] for found in ratios if peer in found]
        below = [str(sum(ratio < limit for ratio in mine)) for limit in (1, 0.97)]
        mean = ratio_text(statistics.geometric_mean(mine))
        assert by_peer[peer] == [str(len(mine)), mean, ratio_text(min(mine)), *below]
    assert by_peer["the fastest of them"][1] == ratio_text(statistics.geometric_mean(least))
    listed = page.run("() => [...document.querySelectorAll('#slower li')].map(item => item.textContent)")
    assert len(listed) == sum(ratio < 1 for ratio in least)
    for case, worst in zip(first_view, least):
        if worst < 1:
            (line,) = (
                x for x in listed if x.startswith(f"{case['cell'].upper()} {case['shape_name']}, {case['mode']}:")
            )
            assert f" {ratio_text(worst)} (" in line
            assert ("noise" in line) == (worst >= 0.97)


@needs_browser
@pytest.mark.parametrize("peers", [("torch.nn",), ("ONNX Runtime", "OpenVINO")], ids=", ".join)
def test_choices_decide_what_is_shown(page: browser.Page, kept: dict[str, Any], peers: tuple[str, ...]) -> None:
    check(page, "cell", "gru")
    check(page, "mode", "training", "inference")
    check(page, "threads", "1")
    check(page, "part", "table", "workloads")
    check(page, "peer", *peers)
    expected = [
        case
        for case in kept["cases"]
        if (case["cell"], case["threads"], case["dtype"]) == ("gru", 1, kept["cases"][0]["dtype"])
        and case["part"] in ("table", "workloads")
    ]
    assert [row["case"] for row in rows(page)] == [f"GRU {case['shape_name']}" for case in expected]
    assert {name for name in rows(page)[0] if name.endswith("/ ours")} == {f"{peer} / ours" for peer in peers}
    below = sum(any(case["ratio"][peer]["median"] < 1 for peer in peers if peer in case["ratio"]) for case in expected)
    assert status(page).startswith(f"{len(expected)} cases, {below} below 1")
    marks = page.run("document.querySelectorAll('#ratio .hit').length")
    assert marks == sum(any(peer in case["ratio"] for peer in peers) for case in expected)
    assert page.run("document.querySelector('#sweeps .nothing') !== null")


@needs_browser
def test_an_empty_choice_says_so(page: browser.Page) -> None:
    check(page, "cell")
    assert status(page) == "No case: no cell is chosen."
    assert page.run("document.querySelectorAll('.plot .nothing, #rows .nothing').length") == 4
    assert page.run("document.getElementById('download').disabled")
    check(page, "cell", "rnn")
    check(page, "part", "workloads")
    assert status(page) == "No case: nothing was measured in this combination of choices."


@needs_browser
def test_an_address_brings_a_view_back(page: browser.Page) -> None:
    check(page, "cell", "lstm", "rnn")
    check(page, "dtype", "bfloat16")
    check(page, "peer")
    page.run("document.querySelector('#rows button').click()")
    page.run("document.querySelector('#rows button').click()")
    address, before, said = page.run("location.href"), rows(page), status(page)
    page.open(address)
    assert (rows(page), status(page), page.run("location.href")) == (before, said, address)
    checked = page.run("() => [...document.querySelectorAll('input:checked')].map(e => [e.name, e.value])")
    given = page.run("() => [...new URLSearchParams(location.hash.slice(1))]")
    assert checked == [pair for pair in given if pair[1] and pair[0] not in ("result", "sort")]
    page.run("location.hash = '#cell=gru&cell=nonsense&threads=99'")
    page.wait("document.querySelector('#rows tbody th').textContent.startsWith('GRU')")
    assert page.run("() => [...document.querySelectorAll('input[name=threads]:checked')].length") == 1
    page.run("location.hash = '#result=gone.json'")
    page.wait("document.getElementById('trouble').textContent.includes('gone.json')")


@needs_browser
def test_the_table_sorts_by_every_column(page: browser.Page) -> None:
    unsorted = rows(page)
    columns = page.run("() => [...document.querySelectorAll('#rows thead button')].map(b => b.dataset.column)")
    assert page.run("document.querySelectorAll('#rows [aria-sort]').length") == 0
    for i, column in enumerate(columns):
        for direction in ("ascending", "descending"):
            page.run("(i) => document.querySelectorAll('#rows thead button')[i].click()", i)
            assert page.run("() => [...document.querySelectorAll('#rows th[aria-sort]')].map(e => e.cellIndex)") == [i]
            assert page.run("document.querySelector('#rows th[aria-sort]').ariaSort") == direction
            found = [list(row.values())[i] for row in rows(page)]
            assert sorted(found) == sorted(list(row.values())[i] for row in unsorted)
            measured = [text for text in found if text]
            # What was not measured is at the end, whichever way.
            assert found[: len(measured)] == measured
            if column.startswith("ratio") or column in ("gflops", "error"):
                values = [number(text) for text in measured]
                assert values == sorted(values, reverse=direction == "descending")
    assert "sort=-" in page.run("location.hash")
    page.resize(*PHONE)
    page.run("document.getElementById('rows').scrollLeft = 200")
    page.run("document.querySelectorAll('#rows thead button')[3].click()")
    assert page.run("document.getElementById('rows').scrollLeft") == 200


@needs_browser
def test_the_download_is_what_is_shown(
    page: browser.Page, first_view: list[dict[str, Any]], kept: dict[str, Any]
) -> None:
    check(page, "part", "table")
    text = page.run(
        """async () => {
            let made;
            const make = URL.createObjectURL;
            URL.createObjectURL = (blob) => { made = blob; return "data:,"; };
            HTMLAnchorElement.prototype.click = function () { window.savedAs = this.download; };
            document.getElementById("download").click();
            URL.createObjectURL = make;
            return made.text();
        }"""
    )
    assert page.run("savedAs") == f"fused_rnn-{kept['stem']}.csv"
    lines = list(csv.DictReader(io.StringIO(text)))
    cases = [case for case in first_view if case["part"] == "table"]
    assert len(lines) == len(cases)
    for line, case in zip(lines, cases):
        assert (line["case"], line["cell"], line["mode"]) == (case["shape_name"], case["cell"], case["mode"])
        assert float(line["fused_rnn seconds median"]) == case["seconds"]["fused"]["median"]
        for peer, ratio in case["ratio"].items():
            assert [float(line[f"{peer} / fused_rnn {q}"]) for q in ("median", "q1", "q3")] == list(ratio.values())


# ---- keyboard, screen reader, small and dark screens ----------------------------------------------------------------

FOCUSED = "document.activeElement.getAttribute('aria-label') ?? ''"


@needs_browser
def test_every_control_is_reached_and_used_by_keyboard(page: browser.Page) -> None:
    page.run("document.body.focus()")
    reached = []
    for _ in range(80):
        page.press("Tab")
        where = page.run(
            """() => {
                const e = document.activeElement;
                const [box, style] = [e.getBoundingClientRect(), getComputedStyle(e)];
                const seen = style.outlineStyle !== "none" || style.stroke !== "none";
                return { tag: e.tagName.toLowerCase(), name: e.name ?? "", id: e.id, column: e.dataset?.column ?? "",
                    seen: seen && box.width > 0, figure: e.closest?.("figure")?.id ?? "" };
            }"""
        )
        if where["tag"] == "body":
            break
        assert where["seen"], where
        reached.append(where)
    else:
        pytest.fail("Tab never leaves the page")
    named = {place["name"] for place in reached}
    assert {"result", "threads", "cell", "dtype", "mode", "peer", "part"} <= named
    assert {"file", "download", "rows"} <= {place["id"] for place in reached}
    # One stop in each drawing, from which arrows go on.
    drawings = page.run("document.querySelectorAll('.plot > svg').length")
    assert sum(place["tag"] == "rect" for place in reached) == drawings
    assert {place["figure"] for place in reached if place["tag"] == "rect"} == {"ratio", "sweeps", "peak"}
    columns = page.run("document.querySelectorAll('#rows thead button').length")
    assert sum(bool(place["column"]) for place in reached) == columns

    def tab_to(selector: str) -> None:
        page.run("document.activeElement.blur()")
        page.run("document.querySelector('.skip').focus()")
        for _ in range(80):
            if page.run("(selector) => document.activeElement.matches(selector)", selector):
                return
            page.press("Tab")
        pytest.fail(f"Tab does not reach {selector}")

    tab_to("input[name=cell][value=lstm]")
    page.press(" ")
    assert not any(row["case"].startswith("LSTM") for row in rows(page))
    tab_to("input[name=threads]:checked")
    page.press("ArrowDown")
    assert "threads=1&" in page.run("location.hash") + "&"
    tab_to("#rows thead button[data-column='ratio torch.nn']")
    page.press("Enter", "Enter")
    assert page.run("document.querySelector('#rows th[aria-sort=descending]').textContent").startswith("torch.nn")
    assert page.run("document.activeElement.dataset.column") == "ratio torch.nn"
    before = page.run("location.hash"), rows(page)
    page.run("document.querySelector('.skip').focus()")
    page.press("Enter")
    assert page.run("document.activeElement.id") == "figures"
    assert (page.run("location.hash"), rows(page)) == before
    page.press("Tab", "Tab")
    assert page.run("document.getElementById('figures').contains(document.activeElement)")


@needs_browser
@pytest.mark.parametrize("figure", ["ratio", "sweeps", "peak"])
def test_arrows_go_through_every_mark_of_a_drawing(page: browser.Page, figure: str) -> None:
    marks = page.run("(id) => document.querySelector(`#${id} svg[role=group]`).querySelectorAll('.hit').length", figure)
    page.run("(id) => document.querySelector(`#${id} .hit[tabindex='0']`).focus()", figure)
    onward, sideways = ("ArrowRight", "ArrowDown") if figure == "sweeps" else ("ArrowDown", "ArrowRight")
    seen = {page.run(FOCUSED)}
    for _ in range(marks):
        page.press(onward)
        seen.add(page.run(FOCUSED))
    assert len(seen) > 2 and page.run("document.querySelector('.tip').textContent").strip()
    before = page.run(FOCUSED)
    page.press("Home", "End")
    assert page.run(FOCUSED) != before or figure == "sweeps"
    stops = "(id) => document.querySelector(`#${id} svg[role=group]`).querySelectorAll('[tabindex=\"0\"]').length"
    assert page.run(stops, figure) == 1
    page.press("Home")
    start = page.run(FOCUSED)
    page.press(sideways)
    assert page.run(FOCUSED) != start or figure == "sweeps"
    page.press("Escape")
    assert page.run("document.querySelector('.tip') === null")


@needs_browser
def test_a_screen_reader_is_given_names(page: browser.Page, first_view: list[dict[str, Any]]) -> None:
    found = page.accessible()
    for role, name in (
        ("combobox", "Result"),
        ("group", "Cell"),
        ("checkbox", "LSTM"),
        ("radio", "float32"),
        ("form", "What to show"),
        ("main", ""),
        ("figure", "Figure 1. Ratio, case by case"),
        ("figure", "Figure 2. Time over T, H and B"),
        ("figure", "Figure 3. Share of the measured peak"),
        ("region", "Table 1. All that is chosen"),
        ("region", "Rows of table 1"),
        ("status", ""),
        ("alert", ""),
        ("button", "A result of your own"),
    ):
        assert any(r == role and n.startswith(name) for r, n in found), (role, name)
    headers = [name for role, name in found if role == "rowheader"]
    assert sum(name.startswith(("LSTM ", "GRU ", "RNN ")) for name in headers) == len(first_view)
    (inference,) = (name for role, name in found if role == "group" and name.startswith("Ratio, inference."))
    ratios = [
        (ratio["median"], f"{ratio_text(ratio['median'])} ({case['shape_name']}, {peer})")
        for case in first_view
        if (case["cell"], case["mode"]) == ("lstm", "inference") and case["part"] != "sweeps"
        for peer, ratio in case["ratio"].items()
    ]
    assert f"LSTM: from {min(ratios)[1]} to {max(ratios)[1]}." in inference
    assert not [name for role, name in found if role in ("image", "graphics-symbol", "button", "checkbox") and not name]


@needs_browser
def test_a_choice_is_announced_and_a_sort_is_not(page: browser.Page) -> None:
    page.run(
        """() => {
            window.said = [];
            const status = document.getElementById("status");
            new MutationObserver(() => said.push(status.textContent)).observe(status, { childList: true });
        }"""
    )
    page.run("document.querySelector('#rows button').click()")
    check(page, "cell", "gru")
    page.wait("said.length > 0")
    assert page.run("said") == [status(page)]


@needs_browser
@pytest.mark.parametrize("size", [PHONE, (390, 844), (640, 450), DESK], ids=str)
def test_nothing_is_wider_than_the_screen(page: browser.Page, size: tuple[int, int], tmp_path: Path) -> None:
    """640 pixels are what a desk's 1280 are at 200 % zoom."""
    page.resize(*size)
    give(page, file_of(tmp_path, gpu_result(), f"{'long-name-' * 12}.json"))
    for view in ("", "#dtype=bfloat16", "#cell=", page.run("location.hash")):
        page.run("(hash) => { location.hash = hash; }", view)
        page.wait("new Promise((done) => requestAnimationFrame(() => done(true)))")
        assert page.run("document.documentElement.scrollWidth") <= size[0], view
        wider = page.run(
            "() => [...document.querySelectorAll('.plot > svg')].map(e => e.getBoundingClientRect().right - innerWidth)"
        )
        assert not [by for by in wider if by > 0]
    page.run("location.hash = ''")
    small = page.run(
        """() => [...document.querySelectorAll("button, select, summary, fieldset label, nav a, #file")]
            .map((e) => [e.textContent.trim(), e.getBoundingClientRect()])
            .filter(([, box]) => box.height && box.height < 24).map(([name]) => name)"""
    )
    assert small == []


@needs_browser
def test_a_dark_screen_is_dark_and_a_printed_page_has_no_controls(page: browser.Page) -> None:
    def lightness() -> float:
        color = page.run("getComputedStyle(document.documentElement).backgroundColor")
        return statistics.mean(float(part) for part in re.findall(r"\d+", color)[:3])

    light = lightness()
    page.media(prefers_color_scheme="dark")
    assert lightness() < 60 and light > 200
    page.media(type="print")
    assert page.run("document.getElementById('choices').getBoundingClientRect().height") == 0
    assert page.run("document.getElementById('rows').scrollHeight") <= page.run(
        "document.getElementById('rows').clientHeight + 1"
    )


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_axe_finds_no_barrier(few: browser.Page, scheme: str, size: tuple[int, int], tmp_path: Path) -> None:
    spec = importlib.util.find_spec("axe_core_python")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("axe-core-python is not installed (requirements-dev.txt)")
    few.resize(*size)
    few.media(prefers_color_scheme=scheme)
    few.run((Path(spec.submodule_search_locations[0]) / "axe.min.js").read_text())
    for own in (False, True):
        if own:
            give(few, file_of(tmp_path, gpu_result()), file_of(tmp_path, "no", "wrong.json"))
        violations = few.run(
            """async () => (await axe.run()).violations
                .map(({ id, nodes }) => [id, ...nodes.slice(0, 3).map(({ html }) => html.slice(0, 200))])"""
        )
        assert violations == []


@needs_browser
def test_without_javascript_there_are_tables(tab: browser.Page, kept: dict[str, Any]) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.call("Page.navigate", url=PAGE.as_uri())
        tab.wait(lambda: ("rowheader", "B1 T1 I8 H8") in tab.accessible())
        found = tab.accessible()
        threads = max(case["threads"] for case in kept["cases"])
        for case in kept["cases"]:
            if (case["part"], case["dtype"], case["threads"]) == ("table", "float32", threads):
                assert ("cell", ", ".join(f"{ratio['median']:.2f}" for ratio in case["ratio"].values())) in found
        assert not any(role == "combobox" for role, _ in found)
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)


# ---- a file of one's own --------------------------------------------------------------------------------------------


@pytest.fixture
def mine(kept: dict[str, Any]) -> dict[str, Any]:
    """A result of a reader's own: cases of the kept one, of which one has wrong numbers and one ran on no kernel."""
    cases = copy.deepcopy([case for case in kept["cases"] if case["part"] == "table"][:8])
    wrong = cases[1]
    wrong["parity"]["passed"] = False
    wrong["parity"]["deviations"]["fused"][0] |= {"name": "output", "error": None, "tolerance": 5e-6}
    for field in ("seconds", "ratio", "fused_gflops", "share_of_peak"):
        wrong.pop(field, None)
    cases[2]["reference_reason"] = "no kernel for it"
    cases[3]["disturbed_rounds"]["kept"] = 2
    environment = kept["environment"] | {"processor": "my processor"}
    return {"schema": report.SCHEMA, "environment": environment, "cases": cases}


@needs_browser
def test_a_file_of_ones_own_is_read(few: browser.Page, mine: dict[str, Any], tmp_path: Path) -> None:
    give(few, file_of(tmp_path, mine))
    assert few.run("document.getElementById('trouble').textContent") == ""
    assert few.run("document.getElementById('result').selectedOptions[0].textContent").startswith("mine.json (my")
    assert "my processor" in few.run("document.getElementById('facts').textContent")
    first = mine["cases"][0]
    chosen = [c for c in mine["cases"] if (c["threads"], c["dtype"]) == (first["threads"], first["dtype"])]
    assert [row["case"] for row in rows(few)] == [f"{c['cell'].upper()} {c['shape_name']}" for c in chosen]
    # The others are still there.
    few.run("document.getElementById('result').focus()")
    few.press("Home")
    assert "my processor" not in few.run("document.getElementById('facts').textContent")


@needs_browser
def test_what_was_not_timed_is_shown_as_such(few: browser.Page, mine: dict[str, Any], tmp_path: Path) -> None:
    give(few, file_of(tmp_path, mine))
    wrong = mine["cases"][1]
    check(few, "dtype", wrong["dtype"])
    title = f"{wrong['cell'].upper()} {wrong['shape_name']}"
    assert "1 not timed" in status(few)
    said = "wrong numbers, not timed: fused: output off by no finite number, allowed 0.000005"
    assert few.run("document.querySelector('#failed li').textContent") == f"{title}, {wrong['mode']}: {said}"
    (row,) = (r for r in rows(few) if said in r["notes"])
    assert row["fused_rnn"] == "not timed"
    assert few.run("() => [...document.querySelectorAll('#ratio .problem')].map(e => e.textContent)") == ["✕ not timed"]
    notes = []
    for dtype in dict.fromkeys(case["dtype"] for case in mine["cases"]):
        check(few, "dtype", dtype)
        notes += [row["notes"] for row in rows(few)]
    assert "ran on the reference, not on a kernel: no kernel for it" in notes
    assert "2 disturbed rounds count all the same" in notes


@needs_browser
@pytest.mark.parametrize("way", ["dragged", "synthetic"])
def test_a_file_can_be_dropped(few: browser.Page, mine: dict[str, Any], tmp_path: Path, way: str) -> None:
    path = file_of(tmp_path, mine)
    if way == "dragged":
        few.drop_files(300, 300, path)
    else:
        few.run(
            """(text) => {
                const data = new DataTransfer();
                data.items.add(new File([text], "mine.json"));
                for (const kind of ["dragenter", "dragover", "drop"])
                    document.body.dispatchEvent(
                        new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
            }""",
            path.read_text(),
        )
    few.wait("location.hash.includes('mine.json')")
    assert len(rows(few)) > 0
    assert few.run("document.getElementById('drop').hidden")


@needs_browser
def test_a_result_of_a_gpu_is_read(few: browser.Page, tmp_path: Path) -> None:
    result = gpu_result()
    give(few, file_of(tmp_path, result))
    assert few.run("document.getElementById('trouble').textContent") == ""
    found = {(row["case"], row["mode"]): row for row in rows(few)}
    assert len(found) == len(result["results"]) == 8
    for one in result["results"]:
        case = gpu_cases.GpuCase(**one["case"])
        row = found[f"{case.cell.upper()} {case.name[len(case.cell) + 1 : -len(case.dtype) - 1]}", one["which"]]
        if one["problem"]:
            assert one["problem"] in row["notes"] and row["fused_rnn"] == "not timed"
            continue
        ours, theirs = one["milliseconds"]["fused"], one["milliseconds"]["cuDNN"]
        ratio = runner.Spread.of([b / a for a, b in zip(ours, theirs)])
        assert (
            plain(row["cuDNN / ours"]) == f"{ratio_text(ratio.median)} ({ratio_text(ratio.q1)}–{ratio_text(ratio.q3)})"
        )
        milliseconds = number(row["fused_rnn"]) * (1e-3 if "µs" in row["fused_rnn"] else 1)
        assert milliseconds == pytest.approx(statistics.median(ours), rel=6e-3)
        assert number(row["times the floor"]) == pytest.approx(statistics.median(ours) / one["floor_ms"], abs=0.006)
        flops = case.seq_length * sum(case.step_flops + case.input_flops(k) for k in range(case.num_layers))
        work = flops * (1 if one["which"] == "forward" else 3)
        spread = runner.Spread.of(ours)
        shares = [percent(work / (1e-3 * ms) / 8e14) for ms in (spread.median, spread.q3, spread.q1)]
        assert plain(row["of peak"]) == f"{shares[0]} % ({shares[1]}–{shares[2]})"
        assert ("cuDNN in float16" in row["notes"]) == bool(one["rival"])
    assert "2 not timed" in status(few)
    assert few.run("document.querySelector('#missed li').textContent") == "lstm B1 T1 I1 H1 float32"
    assert "the variants grid" in few.run("document.getElementById('facts').textContent")
    # T is varied in one of its grids; a size with a case that failed is marked.
    assert few.run("document.querySelector('#sweeps h3').textContent").startswith(
        "steps T B = 16, I = H = 768, flashrnn grid"
    )
    assert few.run("document.querySelectorAll('#sweeps .floor').length") >= 2
    assert few.run("document.querySelector('fieldset[data-field=threads]') === null")


def broken(result: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The result with another value at a path of keys in its first case."""
    found = copy.deepcopy(result)
    for keys, value in changes.items():
        *path, last = keys.split("__")
        place = found["cases"][0]
        for key in path:
            place = place[key]
        place[last] = value
    return found


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "mine.json: not JSON: "),
    "a list": ("[]", "the file: expected an object, got a list"),
    "something else": ('{"name": 1}', "not a result of the benchmark"),
    "another schema": ({"schema": 1}, f"schema: this page reads {report.SCHEMA}, the file has 1"),
    "no schema": ({"schema": None}, f"schema: this page reads {report.SCHEMA}, the file has null"),
    "no case": ({"cases": []}, "cases: expected at least one case, got none"),
    "cases are no list": ({"cases": {}}, "cases: expected a list, got an object"),
    "a case is no object": ({"cases": [1]}, "cases[0]: expected an object, got a number"),
    "no environment": ({"environment": 3}, "environment: expected an object, got a number"),
    "a name is a number": ("cell=3", "cases[0].cell: expected text, got a number"),
    "a time is text": ("seconds__fused__median=x", 'cases[0].seconds["fused"].median: expected a number, got text'),
    "a ratio is negative": ("ratio__torch.nn__q1=-1", 'cases[0].ratio["torch.nn"].q1: expected more than 0, got -1'),
    "a time without end": ("seconds__fused__q3=1e999", 'cases[0].seconds["fused"].q3: expected a finite number'),
    "no sizes": ("shape=null", "cases[0].shape: expected an object, got null"),
}


@needs_browser
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_told_what_is_wrong(few: browser.Page, mine: dict[str, Any], tmp_path: Path, name: str) -> None:
    given, message = WRONG[name]
    if isinstance(given, dict):
        given = mine | given
    elif "=" in given:
        keys, _, value = given.partition("=")
        given = broken(mine, **{keys: {"3": 3, "-1": -1, "null": None}.get(value, value)})
    before = rows(few)
    # Python writes no 1e999.
    give(few, file_of(tmp_path, given if isinstance(given, str) else json.dumps(given).replace('"1e999"', "1e999")))
    said = few.run("document.getElementById('trouble').textContent")
    assert said.startswith("mine.json: ") and message in said
    assert rows(few) == before
    assert ("alert", "") in few.accessible()
    # A good file takes the message away.
    give(few, file_of(tmp_path, mine, "good.json"))
    assert few.run("document.getElementById('trouble').textContent") == ""


@needs_browser
def test_names_in_a_file_stay_text(few: browser.Page, mine: dict[str, Any], tmp_path: Path) -> None:
    evil = '<img src=x onerror="window.ran = 1"><script>window.ran = 1</script>"\'>{{data}}</script>'
    for case in mine["cases"]:
        case |= dict.fromkeys(("cell", "shape_name", "group", "part", "mode", "dtype", "reference_reason"), evil)
        case["parity"]["deviations"] = {evil: [{"name": evil, "error": 1.0, "tolerance": evil}]}
        for field in ("seconds", "ratio", "share_of_peak"):
            if field in case:
                case[field] = {evil: {"median": 2.0}, "__proto__": {"median": 3.0}, "fused": {"median": 0.5}} | (
                    {"constructor": {"median": 1.5}} if field == "ratio" else {}
                )
        case["seconds"] = case.get("seconds", {"fused": {"median": 0.5}}) | {"constructor": {"median": 1.0}}
    mine["environment"] |= {"processor": evil, "python": evil, "date": evil, "peers": {evil: evil}}
    elements = "() => document.querySelectorAll('img, script, iframe, object, [onerror]').length"
    before = few.run(elements)
    give(few, file_of(tmp_path, mine, "<img src=x onerror=alert(1)>.json"))
    check(few, "peer", evil, "__proto__", "constructor")
    assert few.run("document.getElementById('trouble').textContent") == ""
    assert any(evil.upper() in row["case"] for row in rows(few))
    few.run("document.querySelector('#ratio .hit')?.focus()")
    assert few.run(elements) == before
    few.resize(*PHONE)
    few.wait("document.documentElement.clientWidth <= 360")
    assert few.run("document.documentElement.scrollWidth") <= PHONE[0]
    assert few.run("window.ran") is None and few.run("({}).median") is None


@needs_browser
def test_a_formula_is_no_formula_in_the_download(few: browser.Page, mine: dict[str, Any], tmp_path: Path) -> None:
    for case in mine["cases"]:
        case["shape_name"] = '=HYPERLINK("http://x")'
    give(few, file_of(tmp_path, mine))
    line = list(csv.DictReader(io.StringIO(few.run("csv(viewOf())"))))[0]
    assert line["case"] == '\'=HYPERLINK("http://x")'
