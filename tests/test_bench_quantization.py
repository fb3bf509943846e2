"""What the page on fewer bits says of accuracy: the program that measures it, and that the page has its result."""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_rnn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import quantization, tables  # noqa: E402

pytestmark = pytest.mark.kernels

MADE = ("int8", "bfloat16", "float16")
OF_ONNX_RUNTIME = ("ONNX Runtime int8", "ONNX Runtime int8, per_channel")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of the files that the examples read, each as short as they take it."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "tinyshakespeare.txt").write_text("to be, or not to be, that is the question:\n" * 60)
    reviews = [f"{'good' if i % 2 else 'bad'} film number {i}\t{i % 2}" for i in range(40)]
    for part in ("train", "test"):
        with gzip.open(folder / f"imdb_{part}_small.tsv.gz", "wt") as file:
            file.write("\n".join(["review\tlabel", *reviews]))
    news = [f'"{1 + i % 4}","Title {i % 4}","Text of class {i % 4}"' for i in range(60)]
    (folder / "ag_news_test.csv").write_text("\n".join(news))
    return folder


def test_the_program_measures_errors_and_models(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(quantization, "STEPS", (5, 20))
    path = tmp_path / "result.json"
    quantization.main(["--data", str(data), "--steps", "1", "--json", str(path)])
    result = json.loads(path.read_text())
    by_layer = result["errors"]
    lstms = [title for title in by_layer if "LSTM" in title]
    assert len(by_layer) - len(lstms) == 2 and len(lstms) >= 3
    for title, found in by_layer.items():
        assert tuple(found) == MADE + (OF_ONNX_RUNTIME if title in lstms else ())
        for name, errors in found.items():
            assert len(errors) == 2 and all(0 < error < 0.1 for error in errors), (title, name)
        assert max(found["float16"]) < max(found["bfloat16"]) < max(found["int8"])
    characters, *classifiers = result["trained"]
    assert list(characters["values"]) == ["float32", *MADE, *OF_ONNX_RUNTIME]
    assert [model["quantity"] for model in (characters, *classifiers)] == ["perplexity", *["accuracy"] * 3]
    plain = characters["values"]["float32"]
    assert 1 < plain and all(value == pytest.approx(plain, rel=1e-2) for value in characters["values"].values())
    for model in classifiers:
        assert list(model["values"]) == ["float32", *MADE] and model["decisions"] in (40, 12)
        assert all(0 <= value <= 1 for value in model["values"].values())
    if "silero" in result:  # the package with its weights is installed
        heard = result["silero"]
        assert heard["chunks"] == 20 and all(0 < value < 0.1 for value in heard["largest_difference"].values())
    shown = tables.accuracy(result, str(path))
    assert shown in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_int8_is_closer_to_float32_than_onnx_runtime_s(seed: int) -> None:
    """Over 300 steps of an LSTM with torch.nn's first weights: on average, and where it is furthest away."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(seed)
    layer, x = fused_rnn.LSTM(128, 128).eval(), torch.randn(300, 1, 128)
    with torch.no_grad():
        wanted = layer.double()(x.double())[0].float()
        layer.float()
        found = {name: (run(x) - wanted).abs() for name, run in quantization.contestants(layer, 300).items()}
    for name in OF_ONNX_RUNTIME:
        assert found["int8"].mean() < 0.9 * found[name].mean()
        assert found["int8"].max() < found[name].max()


def test_the_page_has_the_result_that_is_kept() -> None:
    (path,) = (ROOT / "benchmarks" / "results").glob("quantization-*.json")
    result: dict[str, Any] = json.loads(path.read_text())
    page = (ROOT / "docs" / "quantization.md").read_text()
    for file, regions in tables.texts(result, str(path.relative_to(ROOT))).items():
        assert file == "docs/quantization.md"
        for region, content in regions.items():
            assert tables.replaced(page, region, content) == page, "run benchmarks/tables.py"
    assert not re.search(r"\d\.\de-\d\d", re.sub(r"<!-- figures: .*?figures: end -->", "", page, flags=re.DOTALL))
