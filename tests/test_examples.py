"""Every example runs on made-up data, learns as torch.nn does, goes on where it stopped, and says what is wrong."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.apart import run_apart
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rnn
from fused_rnn import demo

EXAMPLES = demo.EXAMPLES
REAL_DATA = EXAMPLES.parents[1] / "shared" / "data"

# Small enough for a few seconds each.
SMALL: dict[str, tuple[str, ...]] = {
    "ag_news": ("--sample", "--epochs", "1", "--compare-steps", "3"),
    "by_hand": (),
    "char_lm": ("--sample", "--steps", "12", "--compare-steps", "6", "--hidden-size", "16", "--seq-length", "16")
    + ("--prompt", "the ", "--length", "20"),
    "forecast": ("--steps", "4", "--compare-steps", "2"),
    "imdb": ("--sample", "--epochs", "1", "--compare-steps", "3"),
    "long_dependencies": ("--lengths", "8", "--steps", "4", "--compare-steps", "2"),
    "memory_ppo": ("--environments", "4", "--rollout", "24", "--steps", "18", "--compare-steps", "2"),
    "nsmc": ("--sample", "--epochs", "1", "--compare-steps", "3"),
    "train_distributed": ("--sample", "--steps", "4", "--hidden-size", "16", "--seq-length", "16"),
    "stream_server": ("--sessions", "20", "--seconds", "0.5", "--input-size", "8", "--hidden-size", "16"),
    "voice_activity": ("--made-up", "--seconds", "6"),
    "word_lm": ("--sample", "--epochs", "1", "--steps", "3", "--compare-steps", "2"),
}


@pytest.fixture(scope="module")
def common() -> Iterator[Any]:
    """The examples' shared modules, imported as the programs import them."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield argparse.Namespace(
            **{name: importlib.import_module(f"common.{name}") for name in ("options", "training", "data", "report")}
        )
    finally:
        sys.path.remove(str(EXAMPLES))
        for name in [name for name in sys.modules if name.partition(".")[0] == "common"]:
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _one_thread_in_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in conftest.py; other processes run tests beside them. And no processes of theirs that wait to compile."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")


def run_example(name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "fused_rnn", "demo", name, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout + process.stderr


def test_every_example_is_tried_here() -> None:
    assert set(demo.examples()) == set(SMALL)


def test_the_list_of_examples_says_what_each_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(SMALL)
    assert all(len(line.split()) > 5 for line in lines)


def test_without_the_source_the_list_says_where_examples_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "examples", lambda: {})
    assert demo.main([]) == 2
    assert "part of the source" in capsys.readouterr().err


@pytest.mark.kernels
@pytest.mark.parametrize("name", SMALL)
def test_example_runs_and_learns_as_torch_nn_does(name: str, tmp_path: Path) -> None:
    if name == "memory_ppo":
        pytest.importorskip("gymnasium")
    if name == "voice_activity" and importlib.util.find_spec("silero_vad") is None:
        pytest.skip("silero-vad is not installed, which has the weights")
    out = () if name in ("by_hand", "stream_server", "voice_activity") else ("--out", str(tmp_path))
    printed = run_example(name, *SMALL[name], *out)
    if name == "voice_activity":  # tests/test_voice_activity.py has more
        assert "s of speech in 6.0 s" in printed and "us a chunk of 32 ms" in printed
        return
    if name == "stream_server":  # tests/test_stream_server.py has more
        assert "20 sessions, 5 that vanish, 5 that are slow to read" in printed and "ms until an answer" in printed
        return
    if name == "by_hand":
        assert "every number agrees" in printed
        return
    if name == "train_distributed":  # nothing trains along: tests/test_train_distributed.py
        assert "step 4/4" in printed and "held-out loss" in printed
        return
    header, _, *rows = printed[printed.index("model  ") :].splitlines()
    models = rows[: rows.index("")]
    assert models and all(row.endswith("  agree") for row in models), printed
    assert header.split()[-1] == "curves"
    assert len(list(tmp_path.glob("*.pt"))) == len(models)
    assert list(tmp_path.glob("*.png"))


@pytest.mark.kernels
@pytest.mark.parametrize(
    "options",
    [("--backend", "torch"), ("--dtype", "bfloat16"), ("--compile",), ("--threads", "1", "--seed", "3")],
    ids=lambda options: options[0],
)
def test_options_that_all_examples_have(options: tuple[str, ...], tmp_path: Path) -> None:
    printed = run_example("imdb", "--sample", "--steps", "2", "--compare-steps", "2", *options, "--out", str(tmp_path))
    assert "imdb-rnn" in printed and "DISAGREE" not in printed
    assert ("not compared" in printed) == (options == ("--backend", "torch"))


@pytest.mark.kernels
def test_options_that_torch_nn_lacks_are_not_compared(tmp_path: Path) -> None:
    given = ("--weight-dropout", "0.5", "--input-dropout", "0.4", "--recurrent-dropout", "0.1", "--zoneout", "0.1")
    small = ("--sample", "--steps", "3", "--compare-steps", "2", "--models", "lstm-2-layers", "--out", str(tmp_path))
    printed = run_example("word_lm", *small, *given, "--plain-too")
    said = "with weight_dropout 0.5, input_dropout 0.4, recurrent_dropout 0.1, zoneout 0.1: torch.nn has no such option"
    assert said in printed
    rows = printed[printed.index("model  ") :].splitlines()[2:4]
    assert rows[0].startswith("ptb-lstm-2-layers ") and rows[0].endswith("  agree")
    assert rows[1].startswith("ptb-regularized-lstm-2-layers ") and rows[1].endswith("  not compared")
    plain, regularized = (
        torch.load(tmp_path / f"ptb-{name}lstm-2-layers.pt", weights_only=True)["learners"]
        for name in ("", "regularized-")
    )
    assert list(plain) == ["fused", "torch.nn"] and list(regularized) == ["fused"]
    assert regularized["fused"]["losses"] != plain["fused"]["losses"]


# ---- the loop


def make_workload(training: Any, *, dropout: float = 0.0) -> Any:
    """Eight classes of sequences, carried state, dropout if asked for: whatever a checkpoint has to keep."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.GRU(4, 6)
            self.dropout = nn.Dropout(dropout)
            self.output = nn.Linear(6, 3)

        def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
            output, state = self.recurrent(x, state)
            return self.output(self.dropout(output)), state

    class Small(training.Workload):  # type: ignore[misc]
        name = "small"
        title = "A small model"
        steps_per_epoch = 5

        def make_model(self) -> nn.Module:
            return Model()

        def batch(self, step: int) -> Any:
            generator = torch.Generator().manual_seed(step)
            return torch.randn(7, 2, 4, generator=generator), torch.randint(3, (7, 2), generator=generator)

        def loss(self, model: Any, batch: Any, memory: dict[str, Any]) -> Tensor:
            said, state = model(batch[0], memory.get("state"))
            memory["state"] = training.detached(state)
            return F.cross_entropy(said.flatten(0, 1), batch[1].flatten())

        def evaluate(self, model: Any) -> dict[str, float]:
            return {"largest weight": max(p.abs().max().item() for p in model.parameters())}

    return Small()


def arguments_of(common: Any, out: Path, *given: str) -> argparse.Namespace:
    parser = common.options.make_parser("small", "", data="", epochs=2)
    arguments: argparse.Namespace = parser.parse_args([*given, "--out", str(out)])
    return arguments


@pytest.mark.kernels
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_resumed_run_is_the_run_that_was_not_stopped(stop: int, common: Any, tmp_path: Path) -> None:
    def run(out: str, *given: str) -> Any:
        arguments = arguments_of(common, tmp_path / out, "--compare-steps", "6", *given)
        return common.training.run_workload(make_workload(common.training, dropout=0.5), arguments)

    whole = run("whole")
    run("parts", "--steps", str(stop))
    resumed = run("parts", "--resume")
    for learner, expected in zip(resumed.learners, whole.learners, strict=True):
        assert learner.losses == expected.losses
        for name, value in expected.model.state_dict().items():
            assert torch.equal(learner.model.state_dict()[name], value), name
    assert [len(learner.losses) for learner in whole.learners] == [10, 6]
    # A stop within an epoch is evaluated too, and only there may the histories differ.
    last = resumed.learners[0].history[-1]
    assert last == whole.learners[0].history[-1]
    assert last["loss"] == pytest.approx(sum(whole.learners[0].losses[5:]) / 5)


@pytest.mark.kernels
def test_a_run_is_not_resumed_with_other_numbers(common: Any, tmp_path: Path) -> None:
    workload = make_workload(common.training)
    common.training.run_workload(workload, arguments_of(common, tmp_path, "--steps", "2"))
    with pytest.raises(common.options.ExampleError, match="^--seed: expected 0 as in the checkpoint .*, got 1$"):
        common.training.run_workload(workload, arguments_of(common, tmp_path, "--resume", "--seed", "1"))
    (tmp_path / "small.pt").write_bytes(b"something else")
    with pytest.raises(common.options.ExampleError, match="^--resume: expected a checkpoint of this program"):
        common.training.run_workload(workload, arguments_of(common, tmp_path, "--resume"))


@pytest.mark.kernels
@pytest.mark.parametrize("fault", ["a bias left out", "noise", "NaN"])
def test_a_fused_model_that_learns_otherwise_is_found(
    fault: str, common: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = common.training
    workload = make_workload(training)
    arguments = arguments_of(common, tmp_path, "--epochs", "7")
    learners = training.make_learners(workload, arguments)
    parameter = learners[0].model.recurrent.bias_ih_l0

    def spoil(gradient: Tensor) -> Tensor:
        if fault == "a bias left out":
            return torch.zeros_like(gradient)
        return gradient * math.nan if fault == "NaN" else gradient + 0.02 * torch.randn_like(gradient)

    parameter.register_hook(spoil)
    assert training.train(learners, arguments) == "curves disagree"
    both = training.Comparison(*learners)
    assert not both.curves_agree and "DISAGREE" in str(both)
    outcome = training.Outcome(workload, learners, "curves disagree", both)
    assert common.report.exit_status("small", [outcome]) == 1
    assert "a bug, please report it" in capsys.readouterr().err


@pytest.mark.kernels
def test_ctrl_c_ends_a_step_later_with_a_checkpoint_that_goes_on(tmp_path: Path) -> None:
    arguments = ["char_lm", *SMALL["char_lm"], "--out", str(tmp_path)]
    arguments[arguments.index("--steps") + 1] = "100000"
    arguments += ["--epochs", "100000"]
    command = [sys.executable, "-u", "-m", "fused_rnn", "demo", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = ""
    deadline = time.monotonic() + 120
    while "held-out loss" not in printed:  # the first epoch is over
        assert time.monotonic() < deadline and process.poll() is None, printed
        printed += process.stdout.read(64)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed + rest
    assert "--resume goes on" in rest
    saved = torch.load(tmp_path / "lstm.pt", weights_only=True)
    steps = len(saved["learners"]["fused"]["losses"])
    arguments[arguments.index("--steps") + 1] = str(steps + 2)
    assert "agree" in run_example(*arguments, "--resume")
    saved = torch.load(tmp_path / "lstm.pt", weights_only=True)
    assert len(saved["learners"]["fused"]["losses"]) == steps + 2


# ---- data


# In one process: each would import PyTorch.
MISSING_DATA = """
import contextlib, sys
from fused_rnn import demo

with contextlib.redirect_stderr(sys.stdout):
    for call in (["imdb"], ["nsmc"], ["ag_news"], ["word_lm"], ["char_lm", "--data", sys.argv[1]]):
        print("status", demo.main(call))
"""


def test_missing_data_is_said_in_one_line(tmp_path: Path) -> None:
    lines = run_apart("-c", MISSING_DATA, str(tmp_path / "none.txt"))
    assert lines[1::2] == ["status 2"] * 5 and len(lines) == 10
    for name, line in zip(("imdb", "nsmc", "ag_news", "word_lm"), lines[::2]):
        assert line.startswith(f"{name}: --data: expected ")
    assert lines[8].startswith("char_lm: ") and "which does not exist" in lines[8]


def test_vocabulary_has_the_most_frequent_words_behind_padding_and_unknown(common: Any) -> None:
    vocabulary = common.data.Vocabulary([["b", "a", "b"], ["c", "a", "b"]], most=4)
    assert vocabulary.words == ["<padding>", "<unknown>", "b", "a"]
    assert vocabulary.encode(["a", "c", "b", "zzz"]) == [3, 1, 2, 1]


def test_sequences_are_padded_and_cut(common: Any) -> None:
    tokens, lengths = common.data.padded([[5], [1, 2, 3], []], last=2)
    assert tokens.tolist() == [[5, 0], [2, 3], [0, 0]] and lengths.tolist() == [1, 2, 1]
    assert common.data.padded_before([[5], [1, 2, 3], []], 2).tolist() == [[0, 5], [2, 3], [0, 0]]


def test_public_formats_are_read(common: Any, tmp_path: Path) -> None:
    news = tmp_path / "test.csv"
    news.write_text('"3","A title","A text\\with a ""quote"""\n"1","Other","Text"\n')
    assert common.data.read_ag_news(news) == (["A title", "Other"], ['A text with a "quote"', "Text"], [2, 0])
    table = tmp_path / "nsmc.tsv"
    table.write_text('id\tdocument\tlabel\n1\t"좋은 영화\t1\n2\t\t0\n', encoding="utf-8")
    assert common.data.read_tsv(table, "document") == (['"좋은 영화', ""], [1, 0])
    with pytest.raises(common.options.ExampleError, match="expected a column 'review'"):
        common.data.read_tsv(table, "review")
    with pytest.raises(common.options.ExampleError, match="expected rows of class"):
        common.data.read_ag_news(table)


def test_what_is_fetched_has_to_have_its_checksum(common: Any, tmp_path: Path) -> None:
    source = tmp_path / "source.txt"
    source.write_text("text")
    digest = hashlib.sha256(b"text").hexdigest()
    folder = tmp_path / "data"
    common.data.fetch(source.as_uri(), f"sha256:{digest}", folder)
    assert (folder / "source.txt").read_text() == "text"
    source.unlink()  # it is there already, so nothing is fetched
    common.data.fetch(source.as_uri(), f"sha256:{digest}", folder)
    with pytest.raises(common.options.ExampleError, match="expected .* with md5:0, got md5:"):
        common.data.fetch(source.as_uri(), "md5:0", folder)
    (folder / "source.txt").unlink()
    with pytest.raises(common.options.ExampleError, match="cannot be had"):
        common.data.fetch(source.as_uri(), f"sha256:{digest}", folder)
    assert not (folder / "source.txt").exists()


def load(name: str) -> Any:
    return importlib.import_module(name)


def test_models_have_as_many_parameters_as_published(common: Any) -> None:
    nsmc, char_lm = load("nsmc"), load("char_lm")
    model = nsmc.Classifier(10_000, nn.RNN, 1)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 506_715
    model = char_lm.CharLM(80, char_lm.TEXTBOOK, one_bias=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_636_432


def test_options_of_the_word_model_reach_its_layer(common: Any) -> None:
    word_lm = load("word_lm")
    arguments = argparse.Namespace(models=["rnn", "lstm-2-layers"], plain_too=False, backend="fused", seed=0)
    arguments.__dict__.update(dtype="float32", device=torch.device("cpu"), compile=False, compare_steps=5)
    given = {"weight_dropout": 0.5, "input_dropout": 0.4, "recurrent_dropout": 0.0, "zoneout": 0.1}
    arguments.__dict__.update(given)
    chosen = word_lm.choose_models(arguments)
    taken = {name: value for name, value in given.items() if value}
    assert chosen == [("rnn", {}), ("lstm-2-layers", taken)]

    text = ["a", "b", "c"] * 400
    workload = word_lm.Words("lstm-2-layers", (text, text), arguments, taken)
    assert workload.identity().keys() == {"data", *taken}
    (learner,) = common.training.make_learners(workload, arguments)
    assert {name: getattr(learner.model.recurrent, name) for name in given} == given
    # One mask for all words of a step is in place of the one that the plain model draws for each.
    assert learner.model.input_dropout.p == 0.0
    plain = word_lm.Words("lstm-2-layers", (text, text), arguments, {})
    assert plain.make_model().input_dropout.p == 0.5

    common.training.check_backend(plain, argparse.Namespace(backend="torch"))
    with pytest.raises(common.options.ExampleError, match="^--backend: expected fused .* no option weight_dropout, "):
        common.training.check_backend(workload, argparse.Namespace(backend="torch"))
    arguments.models = ["rnn"]
    with pytest.raises(common.options.ExampleError, match="^--weight-dropout: expected lstm-2-layers among --models"):
        word_lm.choose_models(arguments)
    arguments.__dict__.update(dict.fromkeys(given, 0.0), plain_too=True)
    with pytest.raises(common.options.ExampleError, match="^--plain-too: expected one of --weight-dropout, "):
        word_lm.choose_models(arguments)


def test_splitting_by_episodes_is_what_reset_does(common: Any) -> None:
    memory_ppo = load("memory_ppo")
    torch.manual_seed(0)
    theirs = memory_ppo.Policy(remembers=True).double()
    nn.init.normal_(theirs.initial)
    x, h = torch.randn(9, 5, 2, dtype=torch.float64), torch.randn(1, 5, memory_ppo.HIDDEN, dtype=torch.float64)
    is_first = torch.rand(9, 5) < 0.3
    expected = theirs(x, h, is_first)
    with fused_rnn.use_backend("reference"):
        found = fused_rnn.convert(theirs)(x, h, is_first)
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right)


def test_advantages_are_sums_of_discounted_errors_up_to_the_end_of_an_episode(common: Any) -> None:
    memory_ppo = load("memory_ppo")
    torch.manual_seed(0)
    reward, value, last = torch.rand(6, 3), torch.randn(6, 3), torch.randn(3)
    terminated, ended = torch.zeros(6, 3, dtype=torch.bool), torch.zeros(6, 3, dtype=torch.bool)
    terminated[2, 0] = ended[2, 0] = ended[3, 1] = True  # the pole of the first falls; the time of the second is over
    after = torch.cat([value[1:], last[None]])
    errors = reward + memory_ppo.DISCOUNT * after * ~terminated - value
    expected = torch.zeros(6, 3)
    for row, ends in enumerate(((2, 5), (3, 5), (5, 5))):
        for t in range(6):
            end = ends[0] if t <= ends[0] else ends[1]
            weights = (memory_ppo.DISCOUNT * memory_ppo.TRACE) ** torch.arange(end - t + 1)
            expected[t, row] = (weights * errors[t : end + 1, row]).sum()
    torch.testing.assert_close(memory_ppo.advantages(reward, value, terminated, ended, last), expected)


@pytest.mark.skipif(not REAL_DATA.exists(), reason="the data for trying workloads is not here")
def test_the_novel_is_the_text_that_the_textbook_counts(common: Any) -> None:
    char_lm = load("char_lm")
    arguments = char_lm.parse_arguments(["--textbook", "--data", str(REAL_DATA / "mysterious_island.txt")])
    text = char_lm.Text(char_lm.read_text(arguments))
    assert (len(text.tokens), len(text.vocabulary)) == (1_112_350, 80)
    assert char_lm.TextbookWorkload(text, char_lm.TEXTBOOK, arguments).steps_per_epoch == 423
