"""The commands on files: pictures and reports of saved runs, what a file holds, and comparisons with their exit statuses."""

from __future__ import annotations

import json
import os
import re
import sys
import wave

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

import convtap.report
from convtap import capture, extract, load, timeline
from convtap._result.activations import Activations
from convtap.cli import main
from tests.process import SRC, run_python

NET = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 4, 5, stride=2), nn.ReLU(), nn.Conv1d(4, 3, 3, padding=1))


def other():
    model = build()
    model[2].bias.data += 1
    return model
"""


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 4, 5, stride=2), nn.ReLU(), nn.Conv1d(4, 3, 3, padding=1)).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with runs of two models on two sounds, statistics, and a store."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "nets.py").write_text(NET)
        for name, length in (("a", 400), ("b", 300)):
            with wave.open(f"{name}.wav", "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes((np.sin(np.arange(length) / 9) * 9000).astype("<i2").tobytes())
        for name in ("build", "other"):
            assert main(["run", f"nets.py:{name}", "--input", "?.wav", "--out", name]) == 0
            assert main(["stats", f"nets.py:{name}", "--input", "?.wav", "--out", f"{name}.st"]) == 0
        assert main(["run", "nets.py:build", "--input", "a.wav", "--layers", "0", "--out", "less"]) == 0
        batches = [(torch.randn(3, 1, 40), [f"s{i + k}" for k in range(3)]) for i in (0, 3)]
        extract(net(), batches, folder / "store", ids=lambda batch: batch[1], progress=False)
    return folder


@pytest.fixture
def here(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    capsys.readouterr()
    return made


@pytest.fixture
def drawn(monkeypatch):
    """What the public ``plot`` and ``report`` are called with."""
    calls = []

    def plot(acts, *args, **options):
        calls.append((acts, options))
        return Figure()

    def report(acts, path, model=None, **options):
        calls.append((acts, {**options, "model": model}))
        path.write_text("report")

    monkeypatch.setattr(Activations, "plot", plot)
    monkeypatch.setattr(Activations, "report", report)
    return calls


def mistake(capsys, *argv):
    capsys.readouterr()
    try:
        status = main(list(argv))
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1), err
    return err.strip()


# -- plot and report


@pytest.mark.parametrize("command", ["plot", "report"])
@pytest.mark.parametrize("path", ["build", "build/activations.safetensors"])
def test_a_saved_run_is_drawn_with_its_signal_in_seconds_on_one_time_axis(here, drawn, capsys, command, path):
    assert main([command, path, "--sample", "1", "--out", "made.png", "--layers", "2", "--channels", "7"]) == 0
    assert capsys.readouterr().out == "wrote made.png\n"
    ((acts, options),) = drawn
    assert len(acts) == 4
    assert (options["sample"], options["layers"], options["channels"]) == (1, ["2"], 7)
    assert (options["channels_last"], options["sample_rate"]) == (None, 8000)
    assert options["signal"].shape == (1, 1, 300)
    assert options["timeline"].input_length == 300
    times = timeline(net(), torch.zeros(1, 1, 400))
    for layer in ("0", "2"):
        for t in (0, 17):
            assert options["timeline"][layer].centre(t) == times[layer].centre(t)
        assert options["timeline"][layer].stride == times[layer].stride == 2


def test_the_picture_of_a_folder_is_the_one_of_the_capture_itself(here, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: seen.append(self))
    assert main(["plot", "build", "--out", "made.png"]) == 0
    x = torch.tensor((np.sin(np.arange(400) / 9) * 9000).astype("<i2") / 32768, dtype=torch.float32).reshape(1, 1, -1)
    model = net()
    with torch.no_grad(), capture(model) as acts:
        model(x)
    acts.plot(signal=x, sample_rate=8000, timeline=timeline(model, x)).savefig("unused")
    ours, theirs = ([axes for axes in figure.axes if axes.images or axes.lines] for figure in seen)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.get_xlim() == other.get_xlim()
        for mine, its in zip(one.images, other.images, strict=True):
            assert mine.get_extent() == its.get_extent()
            np.testing.assert_array_equal(np.asarray(mine.get_array()), np.asarray(its.get_array()))


def test_a_span_is_in_seconds_of_the_sound(here, drawn):
    assert main(["plot", "build", "--span", "0.01:0.02", "--out", "made.png"]) == 0
    ((_, options),) = drawn
    assert options["span"] == (0.01, 0.02)


def test_pages_are_numbered_files_behind_an_index(here, capsys, tmp_path):
    (tmp_path / "many.py").write_text(
        "from torch import nn\nbuild = lambda: nn.Sequential(*(nn.Conv1d(1, 1, 3, padding=1) for _ in range(40)))\n"
    )
    assert main(["run", str(tmp_path / "many.py:build"), "--input", "a.wav", "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["plot", str(tmp_path / "out"), "--pages", "--out", str(tmp_path / "maps.png")]) == 0
    written = [tmp_path / f"maps-{page}.png" for page in range(3)]
    assert capsys.readouterr().out.splitlines() == [f"wrote {path}" for path in written]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)


def test_outputs_that_do_not_fit_into_one_picture_are_drawn_on_pages(here, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("convtap._view.pages.MOST_AT_ALL", 30)
    (tmp_path / "lots.py").write_text(
        "from torch import nn\nbuild = lambda: nn.Sequential(*(nn.Conv1d(1, 1, 3, padding=1) for _ in range(70)))\n"
    )
    out = tmp_path / "out"
    assert main(["run", str(tmp_path / "lots.py:build"), "--input", "a.wav", "--out", str(out), "--plot"]) == 0
    written = [out / f"activations-{page}.png" for page in range(4)]  # the index and three pages
    assert [line for line in capsys.readouterr().out.splitlines() if "activations-" in line] == [
        f"wrote {path}" for path in written
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)
    assert not (out / "activations.png").exists()
    assert main(["plot", str(out), "--out", str(tmp_path / "maps.png")]) == 0
    assert [path.name for path in sorted(tmp_path.glob("maps*"))] == [f"maps-{page}.png" for page in range(4)]


def test_a_report_has_the_title_and_the_notes(here):
    assert main(["report", "less", "--title", "Run <12>", "--notes", "tried\nagain", "--out", "titled.html"]) == 0
    text = (here / "titled.html").read_text(encoding="utf-8")
    assert "Run &lt;12&gt;" in text
    assert "tried\nagain" in text or "tried<br" in text


def test_without_a_name_the_files_go_into_the_folder(here, capsys):
    assert main(["plot", "less"]) == 0
    assert main(["report", "less", "--channels-last"]) == 0
    assert capsys.readouterr().out == "wrote less/activations.png\nwrote less/report.html\n"
    assert (here / "less" / "activations.png").read_bytes()[:4] == b"\x89PNG"
    assert "<html" in (here / "less" / "report.html").read_text(encoding="utf-8")


def test_a_picture_has_the_form_of_its_name(here, capsys):
    assert main(["plot", "less", "--out", "maps.pdf"]) == 0
    assert (here / "maps.pdf").read_bytes()[:5] == b"%PDF-"


def test_a_report_shows_the_tree_of_a_model_that_is_named(here, capsys):
    assert main(["report", "less", "--out", "plain.html"]) == 0
    assert main(["report", "less", "--model", "nets.py:build", "--out", "tree.html"]) == 0
    assert "ReLU" not in (here / "plain.html").read_text(encoding="utf-8")
    assert "ReLU" in (here / "tree.html").read_text(encoding="utf-8")


def test_a_file_of_acts_save_is_drawn_without_a_signal(here, drawn, tmp_path):
    load("build/activations.safetensors").save(tmp_path / "alone.safetensors")
    assert main(["plot", str(tmp_path / "alone.safetensors")]) == 0
    assert (tmp_path / "alone.png").exists()
    assert [drawn[0][1][key] for key in ("signal", "sample_rate", "timeline")] == [None] * 3


def test_outputs_that_another_program_put_there_are_not_drawn_with_the_old_signal(here, drawn, tmp_path, capsys):
    assert main(["run", "nets.py:build", "--shape", "1,1,40", "--out", str(tmp_path)]) == 0
    load("build/activations.safetensors").save(tmp_path / "activations.safetensors")
    assert main(["plot", str(tmp_path), "--out", "made.png"]) == 0
    assert drawn[0][1]["signal"] is None
    assert "inputs.safetensors belongs to other outputs" in capsys.readouterr().err


def test_inputs_of_layers_are_not_placed_by_the_timeline_of_outputs(here, drawn, tmp_path):
    assert main(["run", "nets.py:build", "--input", "a.wav", "--at", "input", "--out", str(tmp_path), "--plot"]) == 0
    assert drawn[0][1]["timeline"] is None
    assert drawn[0][1]["sample_rate"] == 8000


def test_one_sample_of_a_store_is_drawn(here, drawn, capsys):
    assert main(["plot", "store", "--sample", "s4", "--out", "made.png"]) == 0
    ((acts, options),) = drawn
    assert options["sample"] == 0
    from convtap import Store

    expected = Store("store").sample("s4")
    assert list(acts) == list(expected)
    assert all(torch.equal(acts.sample(0)[name], row) for name, row in expected.items())
    assert "note: sample s4 of 6 samples" in capsys.readouterr().err
    assert main(["report", "store", "--out", "made.html"]) == 0
    assert torch.equal(drawn[1][0].sample(0)["2"], Store("store")["2"]["s0"])


def test_a_store_and_statistics_are_drawn_for_real(here, capsys):
    assert main(["plot", "store", "--out", "store.png"]) == 0
    assert main(["report", "store", "--out", "store.html"]) == 0
    assert main(["plot", "build.st"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "wrote build.png"
    assert (here / "build.png").read_bytes()[:4] == b"\x89PNG"


# -- info


def test_info_says_how_a_run_was_made(here, capsys):
    assert main(["info", "build"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Sequential of nets.py:build"
    assert re.fullmatch(
        rf"\d{{4}}-\d\d-\d\dT.*, convtap {convtap.__version__}, torch {re.escape(torch.__version__)}", lines[1]
    )
    assert lines[2] == "input 0: a.wav, of shape 1,1,400 (float32), 8000 samples per second"
    assert lines[-1].startswith("4 calls")
    assert main(["info", "less", "--stats"]) == 0
    out = capsys.readouterr().out
    assert "Sequential of nets.py:build --layers 0" in out
    assert "zeros" in out


def test_info_of_a_store_and_of_statistics(here, capsys):
    assert main(["info", "store"]) == 0
    assert "store: 6 samples" in capsys.readouterr().out
    assert main(["info", "build.st"]) == 0
    assert "dead" in capsys.readouterr().out


# -- compare and verify


def test_compare_exits_with_1_only_if_the_captures_differ(here, capsys):
    assert main(["compare", "build", "build/activations.safetensors"]) == 0
    assert main(["compare", "build", "other"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "first over" in line] == ["2#0"]
    assert main(["compare", "build", "other", "--atol", "1.01"]) == 0  # the bias of "2" is 1 more
    assert main(["compare", "build", "other", "--atol", "0.99"]) == 1
    assert main(["compare", "build", "other", "--sqnr", "-100"]) == 0
    assert main(["compare", "build", "less"]) == 1  # a layer without a partner does not agree


def test_compare_shows_how_far_statistics_have_moved(here, capsys):
    assert main(["compare", "build.st", "other.st"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[0] == "2"
    assert float(row[1]) > 0


@pytest.mark.parametrize("damaged", [False, True])
def test_verify_exits_with_1_only_if_a_shard_is_bad(here, capsys, tmp_path, damaged):
    folder = tmp_path / "store"
    extract(net(), TensorDataset(torch.randn(6, 1, 40)), folder, progress=False)
    if damaged:
        shard = next(folder.rglob("shard*"))
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    assert main(["verify", str(folder)]) == damaged
    out = capsys.readouterr().out
    assert ("the checksums of all shards match" in out) is not damaged
    assert ("1 bad" in out) is damaged


# -- mistakes


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["plot", "buld"], "'buld' does not exist. Did you mean 'build'?"),
        (["info", "xyz"], "'xyz' does not exist. Write it with convtap run or acts.save."),
        (
            ["plot", "empty"],
            "the folder 'empty' has no activations.safetensors and is not a store. Write it with convtap run",
        ),
        (
            ["info", "."],
            "and is not a store. Pass one of its files: lone.safetensors.",
        ),
        (["plot", "nets.py"], "'nets.py' cannot be read"),
        (["report", "build/inputs.safetensors"], "holds the inputs of a run. Pass its folder: 'build'."),
        (["report", "build.st"], "'build.st' holds statistics, not outputs. Draw it: convtap plot build.st"),
        (
            ["plot", "build", "--sample", "2"],
            "sample 2 does not exist, since the capture has 2 inputs. Numbers start at 0.",
        ),
        (["plot", "build", "--sample", "x"], "--sample x is not the number of an input. Write --sample 0"),
        (["plot", "build", "--layers", "3"], "no captured layer matches '3'"),
        (["plot", "build", "--channels", "0"], "channels"),
        (
            ["plot", "build.st", "--span", "1:2"],
            "--span does not apply to statistics, which have no inputs. Remove --span.",
        ),
        (["info", "store", "--stats"], "--stats applies only to the outputs of a run, and 'store' is a store."),
        (["plot", "build.st", "--pages"], "--pages does not apply to statistics"),
        (["plot", "build.st", "--sample", "0"], "--sample does not apply to statistics"),
        (["plot", "build", "--span", "1"], "'1' is not a span. Write its start and stop: --span 1.5:3"),
        (["plot", "build", "--span", "9:10"], "span=(9, 10) is not within the time axis"),
        (["plot", "build", "--out", "maps.xyz"], "Format 'xyz' is not supported"),
        (["plot", "build", "--out", "gone/maps.png"], "the file 'gone/maps.png' cannot be written"),
        (["report", "build", "--out", "gone/maps.html"], "the file 'gone/maps.html' cannot be written"),
        (
            ["plot", "store", "--sample", "s9"],
            "sample 's9' does not exist in the store. Its ids are s0, s1, s2, s3, … (6). Did you mean",
        ),
        (["compare", "build", "build.st"], "'build' is a capture, and 'build.st' is statistics. Pass two captures"),
        (["compare", "store", "store"], "'store' is a store, and 'store' is a store. Pass two captures"),
        (["compare", "build.st", "other.st", "--atol", "1"], "compare of statistics does not take atol"),
        (["compare", "build"], "the following arguments are required: B"),
        (["compare", "a", "b", "--atol", "much"], "argument --atol: invalid float value: 'much'"),
        (["verify", "build"], "'build' is not a store"),
        (["verify", "gone"], "the directory 'gone' does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(here, capsys, argv, says):
    (here / "empty").mkdir(exist_ok=True)
    (here / "lone.safetensors").touch()
    assert says in mistake(capsys, *argv)


def change(file, **about):
    """Writes other values into what a run says of itself."""
    with safe_open(str(file), framework="pt") as saved:
        found = json.loads(saved.metadata()["convtap_run"])
    save_file({}, str(file), metadata={"convtap_run": json.dumps({**found, **about})})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: file.write_bytes(b"damaged"), "is damaged"),
        (lambda file: save_file({}, str(file)), "is damaged"),
        (lambda file: change(file, model=None), "is damaged"),
        (lambda file: change(file, inputs=[{"name": "x"}]), "is damaged"),
        (lambda file: change(file, timeline={"time_dim": -1}), "is damaged"),
        (lambda file: change(file, format=2), "was written by a newer convtap. Update convtap: pip install -U convtap"),
    ],
)
def test_a_damaged_file_beside_the_outputs_says_what_to_do(here, capsys, tmp_path, damage, says):
    assert main(["run", "nets.py:build", "--shape", "1,1,40", "--out", str(tmp_path)]) == 0
    damage(tmp_path / "inputs.safetensors")
    for command in ("plot", "info"):
        assert says in mistake(capsys, command, str(tmp_path))


def test_a_matplotlib_that_does_not_import_is_not_said_to_be_missing(here, tmp_path):
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise ImportError('numpy.core.multiarray failed to import')")
    code = "import sys; from convtap.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ["run", "nets.py:gone", "--shape", "1,1,40", "--out", str(tmp_path / "out"), "--plot"]
    done = run_python(code, *command, variables={"PYTHONPATH": f"{SRC}{os.pathsep}{tmp_path}"})
    assert done.returncode == 2
    assert "import failed: ImportError: numpy.core.multiarray failed to import. Install it again" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse the name")
def test_a_folder_whose_name_is_not_utf8_is_refused_before_the_model_runs(here, capsys, tmp_path):
    out = os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9")
    for command in ("run", "stats"):
        assert "is not UTF-8" in mistake(capsys, command, "nets.py:gone", "--shape", "1,1,40", "--out", out)
    assert not os.path.exists(out)
    assert (
        main(["stats", "nets.py:build", "--shape", "1,1,40", "--plot", f"{out}/a.png"]) == 0
    )  # no file of safetensors
    assert os.path.exists(f"{out}/a.png")


def test_pictures_without_matplotlib_fail_before_the_model_runs(here, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["run", "nets.py:gone", "--shape", "1,1,40", "--out", str(tmp_path / "out"), "--plot"]
    assert "pip install 'convtap[plot]'" in mistake(capsys, *command)
    assert not (tmp_path / "out").exists()
