"""What a person sees, and what goes to NumPy and to disk."""

from __future__ import annotations

import copy
import difflib
import json
import os
import pickle
import pickletools
import re
import warnings
from collections import UserDict
from html.parser import HTMLParser
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from convtap import (
    LayerNotFound,
    ModifiedInPlace,
    NotCaptured,
    StoreError,
    capture,
    compare,
    list_layers,
    load,
    timeline,
)
from convtap._result.call import is_convolution
from tests.models import AfterConv, BranchOnData, FiveConvs, ReusedConv, StructuredOutputs
from tests.process import run_python
from tests.reference import same

X = torch.randn(2, 1, 30)


def test_printing_shows_one_line_a_call():
    model = ReusedConv()
    with capture(model) as acts:
        model(torch.randn(2, 4, 20))
    lines = str(acts).splitlines()
    assert lines[0].split() == ["layer", "shape", "dtype", "device", "bytes"]
    assert [line.split()[0] for line in lines[2:6]] == ["conv#0", "conv#1", "conv#2", "last"]
    assert re.split(r"  +", lines[2]) == ["conv#0", "(2, 4, 20)", "float32", "cpu", "640 B"]
    assert lines[6] == "4 calls, 2.2 KiB"
    assert repr(acts) == str(acts)


def test_printing_says_what_was_not_captured():
    model = BranchOnData()
    with capture(model) as acts:
        assert str(acts).splitlines()[0] == "no outputs captured"
        model(torch.ones(1, 1, 9))
    assert "not captured: low (acts.coverage says why)" in str(acts)
    assert str(acts.coverage).splitlines()[0] == "2 layers: 1 captured, 1 idle"
    assert [line.split(maxsplit=1) for line in str(acts.coverage).splitlines()[3:]] == [
        ["low", "idle"],
        ["high", "captured 1 time"],
    ]
    assert acts.coverage["low"].state == "idle"
    assert list(acts.coverage) == ["low", "high"]


def test_statistics_match_numpy():
    model = AfterConv(lambda y: y)
    with capture(model) as acts:
        model(torch.randn(3, 2, 40))
    output = acts["conv"]
    output[0, 0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    output[1, 2] = 0
    values = output.double().numpy().ravel()
    finite = values[np.isfinite(values)]
    row = acts.summary(stats=True).rows[0]
    assert acts.summary(stats=True).columns[5:] == ("min", "mean", "max", "std", "zeros", "nan", "inf")
    np.testing.assert_allclose(row[5:9], [finite.min(), finite.mean(), finite.max(), finite.std()], rtol=1e-12)
    assert row[9] == f"{100 * (values == 0).mean():.1f}%"
    assert row[10:] == (1, 2)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")  # torch's own, from model.to()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_statistics_of_other_types(dtype):
    model, x = AfterConv(lambda y: y).to(dtype), torch.randn(1, 2, 40, dtype=dtype)
    with capture(model) as acts:
        y = model(x).detach()
    wide = y.to(torch.complex128).abs() if dtype.is_complex else y.double()
    row = acts.summary(stats=True).rows[0]
    np.testing.assert_allclose(row[5:8], [wide.min(), wide.mean(), wide.max()], rtol=1e-6)


def test_statistics_of_an_empty_and_of_an_all_nan_output():
    model = AfterConv(lambda y: y)
    with capture(model) as acts:
        model(torch.empty(0, 2, 9))
        model(torch.full((1, 2, 9), float("nan")))
    rows = acts.summary(stats=True).rows
    assert rows[0][5:] == (None, None, None, None, None, 0, 0)
    assert rows[1][5:] == (None, None, None, None, "0.0%", 36, 0)


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.cells.append(data)


def test_html_shows_the_same_cells_and_escapes_names():
    model = nn.Module()
    model.add_module("<script>alert(1)</script>", nn.Conv1d(1, 1, 1))
    with capture(model) as acts:
        model._modules["<script>alert(1)</script>"](X)
    page = _Cells()
    page.feed(acts._repr_html_())
    assert "<script>alert(1)</script>" in page.cells
    assert "(2, 1, 30)" in page.cells
    assert "script" not in page.tags


def test_names_are_on_the_left_and_numbers_on_the_right_in_every_theme():
    class Sides(HTMLParser):
        def __init__(self):
            super().__init__()
            self.rows = []

        def handle_starttag(self, tag, attrs):
            if tag == "tr":
                self.rows.append([])
            elif tag in ("td", "th"):
                style = dict(part.split(":") for part in dict(attrs)["style"].split(";"))
                self.rows[-1].append(style["text-align"])
                assert not {"color", "background", "background-color"} & style.keys()  # the theme's

    page = Sides()
    page.feed(many_calls(2).summary(stats=True)._repr_html_())
    # layer, shape, dtype, device; bytes, min, mean, max, std, zeros, nan, inf
    assert page.rows == [["left"] * 4 + ["right"] * 8] * 5


def test_a_table_of_30_rows_is_not_folded():
    assert "<details>" not in many_calls(15)._repr_html_()
    page = many_calls(16)._repr_html_()
    assert page.index("0#14") < page.index("1#14") < page.index("<details>") < page.index("0#15")
    assert "2 more rows</summary>" in page


def test_numpy_is_exact_and_keeps_structures():
    model, x = AfterConv(lambda y: y).to(torch.bfloat16), torch.randn(1, 2, 40, dtype=torch.bfloat16)
    with capture(model) as acts:
        y = model(x)
    array = acts.numpy()["conv"]
    assert array.dtype == np.float32
    assert torch.equal(torch.from_numpy(array).to(torch.bfloat16), y)
    structured = StructuredOutputs()
    with capture(structured, detach=False) as acts:
        structured(torch.randn(2, 1, 12))
    arrays = acts.numpy()
    assert isinstance(arrays["t"][1][0], np.ndarray)
    assert arrays["t"][1][1] is None
    np.testing.assert_array_equal(arrays["d"]["y"], acts["d"]["y"].detach().numpy())


# -- on disk


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")  # torch's own, from model.to()
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str
)
def test_what_was_saved_comes_back_bit_for_bit(dtype, tmp_path):
    model, x = ReusedConv().to(dtype), torch.randn(2, 4, 20, dtype=dtype)
    if dtype.is_complex:
        model.forward = lambda x: model.last(model.conv(model.conv(x)))
    with capture(model) as acts:
        model(x)
        model(x[:1])
    acts.save(tmp_path / "a.safetensors")
    back = load(tmp_path / "a.safetensors")
    assert same(dict(back), dict(acts))
    assert list(back) == list(acts)
    told = [(c.name, c.key, c.index, c.forward, c.via) for c in acts.calls()]
    assert [(c.name, c.key, c.index, c.forward, c.via) for c in back.calls()] == told
    assert same(back.sample(2), acts.sample(2))
    assert str(back) == str(acts)
    assert str(back.coverage) == str(acts.coverage)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_structures_overlapping_memory_and_strides_come_back(tmp_path):
    model = StructuredOutputs()
    with capture(model, reduce=None) as acts:
        model(torch.randn(2, 1, 12))
    acts.save(tmp_path / "a")
    back = load(tmp_path / "a")
    assert same(back["t"], acts["t"])
    assert same(back["p"]["hidden"], acts["p"].hidden)
    assert back["p"]["mask"] is None
    twice = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Identity())
    with capture(twice, types=(nn.Conv1d, nn.Identity)) as acts:
        twice(X)
    acts.save(tmp_path / "b")
    assert same(dict(load(tmp_path / "b")), dict(acts))


class Hidden(NamedTuple):
    hidden: torch.Tensor
    frames: int = 3


def saved(make, path):
    """Captures a layer that returns some structure; returns the structure before and after a file."""
    model = nn.Sequential(nn.Identity())
    model[0].forward = make
    with torch.no_grad(), capture(model, "0") as acts:
        model(torch.arange(6.0).reshape(2, 3))
    acts.save(path)
    return acts["0"], load(path)["0"]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Hidden(x),
        lambda x: Hidden((x, Hidden(x + 1, 5)), None),
        lambda x: [Hidden(x), {"a": (Hidden(x),), 3: [None]}],
        lambda x: nn.utils.rnn.pack_sequence([x[0], x[1, :2]]),
        lambda x: nn.utils.rnn.pack_sequence([x[1, :2], x[0]], enforce_sorted=False),
        lambda x: (x.dtype, x.device, x.shape, 1j, 1.5, "text", True),
    ],
    ids=["named tuple", "nested", "in containers", "packed", "packed and sorted", "plain values"],
)
def test_a_structure_comes_back_from_a_file_as_it_was(make, tmp_path):
    before, after = saved(make, tmp_path / "a")
    assert type(after) is type(before)
    assert same(after, before)
    assert repr(after) == repr(before).replace("torch.Size([2, 3])", "(2, 3)")


def test_a_packed_sequence_from_a_file_unpacks(tmp_path):
    rows = [torch.arange(2.0), torch.arange(4.0)]
    _, after = saved(lambda x: nn.utils.rnn.pack_sequence(rows, enforce_sorted=False), tmp_path / "a")
    assert same(nn.utils.rnn.unpack_sequence(after), rows)


def test_a_model_output_comes_back_with_its_attributes_keys_and_positions(tmp_path):
    outputs = pytest.importorskip("transformers.modeling_outputs", reason="transformers comes with the test extra")
    before, after = saved(lambda x: outputs.BaseModelOutput(last_hidden_state=x, hidden_states=(x,)), tmp_path / "a")
    assert type(after) is type(before) is outputs.BaseModelOutput
    assert after.last_hidden_state is after["last_hidden_state"] is after[0]
    assert same(after.hidden_states, before.hidden_states)
    assert (after.attentions, list(after)) == (None, ["last_hidden_state", "hidden_states"])


def test_a_dataclass_and_any_other_mapping_come_back_as_dicts(tmp_path):
    _, after = saved(lambda x: UserDict(a=x), tmp_path / "a")
    assert type(after) is dict
    assert after["a"].shape == (2, 3)


READER = """
import sys
from convtap import load
found = load(sys.argv[1])["0"]
print(type(found).__name__, type(found).__module__, found._fields, found.hidden.tolist(), found[1], "evil" in sys.modules)
"""


def test_a_named_tuple_whose_class_is_not_imported_comes_back_as_one_of_the_same_fields(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    Hidden.__module__, module = "evil", Hidden.__module__
    try:
        before, _ = saved(lambda x: Hidden(x), tmp_path / "a")
    finally:
        Hidden.__module__ = module
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + READER
    found = run_python(script, str(tmp_path / "a")).stdout.split(maxsplit=2)
    assert found == ["Hidden", "convtap._result.file", f"('hidden', 'frames') {before.hidden.tolist()} 3 False\n"]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (["os", "system"], ["hidden", "frames"]),
        (["builtins", "exec"], ["hidden", "frames"]),
        (["subprocess", "Popen"], ["hidden", "frames"]),
        (["x", "__import__('os')"], ["hidden", "frames"]),
        (["tests.test_views", "Hidden"], ["__class__", "import"]),
        (["tests.test_views", "Hidden"], ["hidden", "a=print('run')"]),
    ],
)
def test_names_in_a_file_call_nothing(name, fields, tmp_path, capfd):
    from safetensors import safe_open
    from safetensors.torch import save_file

    saved(lambda x: Hidden(x), tmp_path / "a")
    with safe_open(str(tmp_path / "a"), "pt") as file:
        content = json.loads(file.metadata()["convtap"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    content["calls"][0]["value"].update(named=name, fields=fields)
    save_file(tensors, tmp_path / "a", metadata={"convtap": json.dumps(content)})
    found = load(tmp_path / "a")["0"]
    assert isinstance(found, tuple)
    assert (found[0].shape, found[1]) == ((2, 3), 3)
    assert type(found).__module__ == "convtap._result.file"
    assert capfd.readouterr().out == ""


def test_a_file_of_the_first_format_is_read(tmp_path):
    from safetensors.torch import save_file

    value = {"mapping": {"hidden": {"tensor": "000000"}, "frames": {"plain": 3}}}
    layer = {"name": "0", "captured": 1, "bypassed": None, "bypasses": 0, "computed": False, "unactivated": 0}
    content = {
        "format": 1,
        "calls": [{"name": "0", "index": 0, "forward": 0, "via": "module", "value": value}],
        "layers": [{**layer, "is_conv1d": False}],
        "inputs": [[0, [2, 3]]],
        "aliases": [],
        "notes": [],
    }
    save_file({"000000": X}, tmp_path / "a", metadata={"convtap": json.dumps(content)})
    found = load(tmp_path / "a")["0"]
    assert torch.equal(found.hidden, X)
    assert (found._fields, found.frames) == (("hidden", "frames"), 3)


# -- copies and pickles


def weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(1, 2, 3)), nn.ReLU())


def local_classes():
    class Conv(nn.Conv1d):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = Conv(1, 2, 3), lambda y: y.relu()

        def forward(self, x):
            return self.act(self.conv(x))

    return Model()


def reads_a_weight():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other = nn.Conv1d(1, 2, 3), nn.Conv1d(1, 2, 3)

        def forward(self, x):
            return self.other(x) + self.conv.weight.squeeze(1).sum()

    return Reads()


def keras_model():
    keras = pytest.importorskip("keras", reason="keras comes with the test extra")
    return keras.Sequential([keras.layers.Input((9, 1)), keras.layers.Conv1D(2, 3)])


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Sequential(nn.Conv1d(1, 2, 3)))


PICKLED = {
    "parametrized weight norm": (weight_norm, {}),
    "spectral norm": (lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv1d(1, 2, 3))), {}),
    "old weight norm": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Conv1d(1, 2, 3))), {}),
    "classes and functions without a name": (local_classes, {"types": nn.Module}),
    "a weight that is read": (reads_a_weight, {"strict": False}),
    "scripted": (scripted, {}),
    "lazy": (lambda: nn.Sequential(nn.LazyConv1d(2, 3)), {}),
    "keras": (keras_model, {}),
    "activation": (weight_norm, {"at": "activation"}),
    "aliases": (weight_norm, {"copy": False}),
    "gradients": (weight_norm, {"grads": True}),
    "graph": (weight_norm, {"detach": False}),
    "graph of what is reduced": (weight_norm, {"detach": False, "reduce": lambda t: t.mean(-1)}),
    "last": (weight_norm, {"keep": "last", "max_bytes": "1GB"}),
    "reduced": (weight_norm, {"reduce": lambda t: t.mean(-1)}),
    "offloaded": (weight_norm, {"offload": "cpu"}),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True], ids=["after the block", "inside the block"])
@pytest.mark.parametrize(
    "copied", [lambda acts: pickle.loads(pickle.dumps(acts)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
@pytest.mark.parametrize("kind", PICKLED)
def test_what_was_collected_can_be_copied_whatever_the_model_is_made_of(kind, copied, inside):
    make, options = PICKLED[kind]
    model = make()
    x = torch.randn(2, 9, 1) if kind == "keras" else torch.randn(2, 1, 9)
    with capture(model, **options) as acts:
        model(x)
        found = copied(acts) if inside else None
    found = found or copied(acts)
    assert list(found) == list(acts)
    assert same(dict(found), dict(acts))
    assert [(call.key, call.via, is_convolution(call)) for call in found.calls()] == [
        (call.key, call.via, is_convolution(call)) for call in acts.calls()
    ]
    if not inside:  # there, the notes at the end were not written yet
        assert str(found.summary()) == str(acts.summary())


@pytest.mark.parametrize(
    "kind", ["parametrized weight norm", "classes and functions without a name", "a weight that is read"]
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_holds_no_class_and_no_code_of_the_model(kind, inside):
    make, options = PICKLED[kind]
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with capture(model, **options) as acts:
            model(torch.randn(2, 1, 9))
            data = pickle.dumps(acts) if inside else b""
    names = {str(arg) for _, arg, _ in pickletools.genops(data or pickle.dumps(acts)) if isinstance(arg, str)}
    assert not [
        name for name in names if name.startswith("torch.nn") or "tests.test_views" in name or name.endswith("Conv1d")
    ]


@pytest.mark.parametrize(
    "copied", [lambda acts: pickle.loads(pickle.dumps(acts)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_a_copy_of_an_alias_knows_that_it_was_modified(copied):
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv1d(2, 2, 3))
    with torch.no_grad(), capture(model, copy=False) as acts:
        model(torch.randn(2, 1, 9))
    found = copied(acts)
    assert torch.equal(found["2"], acts["2"])
    with pytest.raises(ModifiedInPlace, match=r"'0' was kept as an alias.*\(1 time\)"):
        found["0"]
    found["2"].add_(1)
    with pytest.raises(ModifiedInPlace, match="'2' was kept as an alias"):
        found["2"]


def test_shared_names_resolve_after_loading(tmp_path):
    from tests.models import SharedConv

    model = SharedConv()
    with capture(model) as acts:
        model(torch.randn(1, 3, 9))
    acts.save(tmp_path / "a")
    assert torch.equal(load(tmp_path / "a")["second.0"], acts["first"])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*are deprecated:UserWarning")  # torch's own
def test_a_quantized_output_has_no_form_on_disk_and_says_what_to_write(tmp_path):
    model = AfterConv(lambda y: y)
    with capture(model, reduce=lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)) as acts:
        model(torch.randn(1, 2, 9))
    with pytest.raises(StoreError, match=r"the output of 'conv' is quantized.*reduce=lambda t: t.dequantize\(\)"):
        acts.save(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_bad_paths_and_foreign_files_are_clear_errors(tmp_path):
    model = FiveConvs()
    with capture(model) as acts:
        model(X)
    with pytest.raises(StoreError, match="cannot be written.*existing, writable folder"):
        acts.save(tmp_path / "missing" / "a")
    with pytest.raises(StoreError, match=r"does not exist. Write it with acts.save\(path\)"):
        load(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(StoreError, match="cannot be read as a safetensors file: "):
        load(tmp_path / "text")
    acts.save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match="cannot be read as a safetensors file: "):
        load(tmp_path / "cut")
    from safetensors.torch import save_file

    save_file({"x": X}, tmp_path / "foreign")
    with pytest.raises(StoreError, match=r"acts.save\(path\) did not write it"):
        load(tmp_path / "foreign")


def test_a_failed_save_leaves_the_old_file_whole(tmp_path):
    model = FiveConvs()
    with capture(model) as acts:
        model(X)
    acts.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with capture(model, reduce=lambda t: t.to_sparse()) as other:
        model(X)
    with pytest.raises(StoreError, match="sparse"):
        other.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before


# -- tables of many rows


def many_calls(passes: int):
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1))
    with torch.no_grad(), capture(model) as acts:
        for _ in range(passes):
            model(torch.zeros(1, 1, 2))
    return acts


def test_a_long_capture_prints_its_first_and_last_calls_and_the_totals():
    acts = many_calls(700)
    lines = str(acts).splitlines()
    keys = [line.split()[0] for line in lines[2:]]
    assert keys[:2] == ["0#0", "1#0"]
    assert keys[49] == "1#24"
    assert lines[2 + 50] == "… 1,300 more rows …"
    assert keys[51] == "0#675"
    assert keys[100] == "1#699"
    assert lines[-2] == "100 of 1,400 rows shown: print(acts.summary(rows=None)) shows all"
    assert lines[-1] == "1400 calls, 10.9 KiB"
    assert repr(acts) == str(acts) == str(acts.summary())


def test_the_length_of_what_is_printed_does_not_grow_with_the_calls():
    few, many = many_calls(500), many_calls(5000)
    for shown in (str, repr, lambda acts: acts._repr_html_(), lambda acts: str(acts.summary(stats=True))):
        assert abs(len(shown(few)) - len(shown(many))) < 1000
        assert len(shown(many)) < 50_000


def test_all_rows_are_printed_where_they_are_asked_for():
    acts = many_calls(300)
    text = str(acts.summary(rows=None))
    assert [line.split()[0] for line in text.splitlines()[2:-1]] == list(acts)
    assert "more rows" not in text
    assert "shown" not in text
    assert acts.summary(rows=None)._repr_html_().count("<tr>") == 602
    assert str(acts.summary().summary(rows=None)) == text


def test_a_table_of_a_few_rows_shows_as_many_from_both_ends():
    lines = str(many_calls(6).summary(rows=5)).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["0#0", "1#0", "0#1", "…", "0#5", "1#5", "5", "12"]
    assert str(many_calls(6).summary(rows=12)) == str(many_calls(6))


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [(0, ValueError, "rows=0 shows nothing"), (-1, ValueError, "rows=-1"), (True, TypeError, "rows is a bool")],
)
def test_a_number_of_rows_that_shows_nothing_is_an_error(rows, error, says):
    for table in (many_calls(1), many_calls(1).coverage, many_calls(1).summary()):
        with pytest.raises(error, match=says):
            table.summary(rows=rows)


def test_every_row_of_a_long_table_can_be_read():
    acts = many_calls(300)
    table = acts.summary(stats=True)
    assert len(table) == 600
    assert [row[0] for row in table] == list(acts)
    assert table[299] == acts.summary(stats=True, rows=None)[299]
    assert [row[0] for row in table.rows[297:300]] == list(acts)[297:300]


def test_rows_that_were_not_shown_say_when_their_outputs_were_cleared():
    acts = many_calls(300)
    table, whole = acts.summary(), acts.summary(rows=None)
    before = str(table)
    acts.clear()
    assert str(table) == before  # what is printed is of the moment when the table was made
    assert whole[299][0] == "1#149"
    with pytest.raises(NotCaptured, match=r"row 299 is not available, .* cleared .* acts\.summary\(rows=None\)"):
        table[299]


def test_printing_builds_only_the_rows_that_it_shows(monkeypatch):
    import convtap._result.summary as summary

    built = []
    monkeypatch.setattr(summary, "shapes_text", lambda shape: built.append(shape) or "")
    acts = many_calls(1000)
    str(acts), acts._repr_html_(), str(acts.summary(stats=True))
    assert len(built) == 300


def test_a_long_html_table_says_how_many_rows_it_leaves_out():
    page = many_calls(1000)._repr_html_()
    assert page.count("<tr>") == 2 + 101
    assert ">… 1,900 more rows …</td>" in page
    assert "100 of 2,000 rows shown: print(acts.summary(rows=None)) shows all" in page
    assert "2000 calls" in page


class Many(nn.Module):
    """Many convolutions, of which some in the middle do not run."""

    def __init__(self, count: int, idle: range) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(1, 1, 1) for _ in range(count)])
        self.idle = idle

    def forward(self, x):
        for number, conv in enumerate(self.convs):
            x = x if number in self.idle else conv(x)
        return x


def test_long_coverage_shows_what_was_not_captured():
    model = Many(400, range(200, 203))
    with torch.no_grad(), capture(model, strict=False) as acts:
        model(torch.zeros(1, 1, 2))
    lines = str(acts.coverage).splitlines()
    assert lines[0] == "400 layers: 397 captured, 3 idle"
    assert [line for line in lines if "idle" in line][1:] == [f"convs.{n}  idle" for n in (200, 201, 202)]
    assert lines[-1] == "103 of 400 rows shown: print(acts.coverage.summary(rows=None)) shows all"
    assert len(str(acts.coverage.summary(rows=None)).splitlines()) == 403


def test_tables_of_thousands_of_layers_are_short():
    model = Many(3000, range(0)).eval()
    table = list_layers(model)
    assert len(table) == 3000
    assert table[1500].name == "convs.1500"
    assert len(str(table)) < 10_000
    assert "2,900 more rows" in str(table)
    assert len(str(table.summary(rows=None)).splitlines()) == 3002

    times = timeline(model, torch.zeros(1, 1, 8))
    assert len(times.summary()) == 3000
    assert times.summary()[1500].key == "convs.1500"
    assert len(repr(times)) < 10_000
    assert len(times._repr_html_()) < 40_000
    assert len(str(times.summary(rows=None)).splitlines()) == 3002


def test_a_long_comparison_shows_the_first_output_over_the_tolerance():
    model = Many(400, range(0))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for conv in model.convs:
            conv.weight.fill_(1.0)
        other.load_state_dict(model.state_dict())
        other.convs[217].bias += 1
    found = compare(model, other, example=torch.ones(1, 1, 4))
    assert found.first.name == "convs.217"
    text = str(found)
    assert [line.split()[0] for line in text.splitlines() if "← first over" in line] == ["convs.217"]
    assert "101 of 401 rows shown: print(comparison.summary(rows=None)) shows all" in text
    assert len(text) < 20_000
    assert len(str(found.summary(rows=None)).splitlines()) > 401


def test_the_shapes_of_a_structure_of_many_tensors_are_short():
    class Lots(nn.Module):
        def forward(self, x):
            return [x] * 5000

    model = Lots()
    with capture(model, types=Lots) as acts:
        model(torch.zeros(1, 2))
    assert "(1, 2), (1, 2), … (5000)" in str(acts)
    assert len(str(acts)) < 500
    assert len(repr(acts.calls()[0])) < 500


def test_a_message_cuts_a_long_value_short():
    acts = many_calls(1)
    with pytest.raises(LayerNotFound, match="is not a name") as caught:
        acts[list(range(100_000))]
    assert len(str(caught.value)) < 500


def test_a_wrong_name_is_compared_with_a_bounded_number_of_names(monkeypatch):
    compared = []
    search = difflib.get_close_matches
    monkeypatch.setattr(
        difflib, "get_close_matches", lambda name, names, **k: compared.extend(names) or search(name, names, **k)
    )
    acts = many_calls(10_000)
    with pytest.raises(LayerNotFound, match=r"0#0, 1#0.*, … \(20000\)\. Did you mean '") as caught:
        acts["1#99999"]
    assert len(str(caught.value)) < 500
    assert len(compared) == 2000
