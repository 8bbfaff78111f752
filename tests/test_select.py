"""What a selection selects, and what it says when it selects nothing."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from convtap import ConvtapError, LayerNotFound, NotCaptured, capture, finite, list_layers, tapped
from tests.models import FiveConvs, FunctionalConvs, Images, PaddedConv, SharedConv, TwoParts

X = torch.randn(2, 1, 30)


def label(value):
    """Returns a text that is the same in every process, for the name of a test."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


class Nested(nn.Module):
    """Convolutions at several depths, among layers of other types."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict(
            {
                "conv1": nn.Conv1d(1, 2, 3, padding=1),
                "conv2": PaddedConv(2, 2, 3),
                "norm": nn.BatchNorm1d(2),
                "deep": nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU()),
            }
        )
        self.head = nn.Linear(30, 3)

    def forward(self, x):
        for part in self.encoder.values():
            x = part(x)
        return self.head(x)


NAMES = ["encoder.conv1", "encoder.conv2", "encoder.deep.0"]


def selected(model, layers, **options):
    return [row.name for row in list_layers(model, layers, **options)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, NAMES),
        ("encoder.conv1", NAMES[:1]),
        ("encoder.conv?", NAMES[:2]),
        ("encoder.*", NAMES),
        ("*", NAMES),
        ("*[02]", NAMES[1:]),
        (re.compile(r"encoder\.\w+"), NAMES[:2]),
        (re.compile("conv"), None),
        (0, NAMES[:1]),
        (-1, NAMES[2:]),
        (np.int64(1), NAMES[1:2]),
        (PaddedConv, NAMES[1:2]),
        (lambda name, module: module.kernel_size == (1,), NAMES[2:]),
        (["encoder.deep.0", "encoder.conv1"], [NAMES[0], NAMES[2]]),
        ((0, "encoder.conv1", PaddedConv), NAMES[:2]),
        ({"encoder.conv1"}, NAMES[:1]),
        ((name for name in NAMES[:2]), NAMES[:2]),
        ("head", ["head"]),
        ("encoder.norm", ["encoder.norm"]),
    ],
    ids=label,
)
def test_selectors(layers, expected):
    if expected is None:
        with pytest.raises(LayerNotFound, match="no layer matches 'conv'"):
            selected(Nested(), layers)
    else:
        assert selected(Nested(), layers) == expected


def test_a_module_instance_selects_itself_whatever_its_type():
    model = Nested()
    assert selected(model, [model.head, model.encoder.conv2]) == ["encoder.conv2", "head"]


def test_types_choose_other_modules():
    model = Nested()
    assert selected(model, None, types=nn.BatchNorm1d) == ["encoder.norm"]
    assert selected(model, None, types=[nn.BatchNorm1d, nn.Linear]) == ["encoder.norm", "head"]
    assert selected(model, -1, types=nn.Module) == ["head"]
    assert selected(model, None, types=nn.Module)[0] == "(root)"
    with capture(model, types=(nn.Linear, nn.ReLU)) as acts:
        model(X)
    assert list(acts) == ["encoder.deep.1", "head"]


def test_a_users_layer_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Conv1d(1, 1, 1), "_orig_mod": nn.Conv1d(1, 1, 1)})
    assert selected(model, None) == ["module", "_orig_mod"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            "encoder.convv",
            r"no layer is named 'encoder\.convv'\. The model has these Conv1d layers: encoder\.conv1, .*Did you mean 'encoder",
        ),
        (
            "encoder.*.convv",
            r"no layer matches 'encoder\.\*\.convv'\. The model has these Conv1d layers: .*list_layers\(model\) shows all",
        ),
        ("*.norm", "'[*].norm' matches 1 module of other types, but no Conv1d. Pass types=nn.Module"),
        (re.compile("encoder.deep.1"), "matches 1 module of other types"),
        (3, r"layer 3 is out of range: the model has 3 Conv1d, numbered 0 to 2 \(or -1 to -3\)"),
        (-4, "layer -4 is out of range"),
        (nn.LSTM, r"the model has no nn.LSTM, but it has 2? ?\d* ?Conv1d"),
        (lambda name, module: False, "the predicate <lambda> selects none of 3 layers"),
        (nn.Conv1d(1, 1, 1), "the Conv1d in layers is not a module of this Nested"),
    ],
    ids=lambda value: value if isinstance(value, str) else label(value)[:20],
)
def test_a_selector_that_matches_nothing_says_what_is_there(layers, message):
    with pytest.raises(LayerNotFound, match=message):
        capture(Nested(), layers)


def test_one_bad_selector_among_good_ones_is_an_error():
    with pytest.raises(LayerNotFound, match="no layer is named 'encoder.conv9'"):
        capture(Nested(), ["encoder.conv1", "encoder.conv9"])


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (
            (lambda x: x,),
            {},
            r"the first argument is a function, not a torch.nn.Module. Write: with capture\(model\) as acts",
        ),
        (
            (Nested(), X),
            {},
            r"the second argument is a Tensor, but it must select layers. Run the model inside: with capture",
        ),
        ((Nested(), X.numpy()), {}, r"the second argument is a ndarray, but it must select layers"),
        ((Nested(), {"x": X}), {}, r"the second argument is a dict, but it must select layers"),
        ((Nested(), 1.5), {}, "layers holds a float, which selects nothing. Pass a name, a glob"),
        ((Nested(), True), {}, "layers holds a bool, which selects nothing"),
        ((Nested(), [None]), {}, "layers holds a NoneType, which selects nothing"),
        ((Nested(), []), {}, "layers is empty.*Pass None for every 1-D convolution"),
        ((Nested(), int), {}, "layers: int is not a module type"),
        ((Nested(),), {"types": "Conv1d"}, "types holds 'Conv1d', which is not a module type"),
        ((Nested(),), {"types": []}, "types is empty"),
        ((Nested(),), {"at": "weights"}, "at='weights' is invalid. Pass one of 'output', 'input'"),
        ((Nested(),), {"keep": "first"}, "keep='first' is invalid. Pass one of 'all', 'last'"),
        (
            (Nested(),),
            {"reduce": "mean"},
            "reduce is a str, which is not a function. Write for example reduce=lambda t",
        ),
        (
            (Nested(),),
            {"dtype": "float16"},
            "dtype='float16' is not a torch.dtype. Write for example dtype=torch.float16",
        ),
        ((Nested(),), {"max_bytes": "2 bananas"}, "max_bytes='2 bananas' is not a number of bytes. Write for example"),
        ((Nested(),), {"max_bytes": "GB"}, "max_bytes='GB' is not a number of bytes"),
        ((Nested(),), {"max_bytes": 0}, "max_bytes=0 is less than one byte. Write for example"),
        ((Nested(),), {"max_bytes": -5}, "max_bytes=-5 is less than one byte"),
        ((Nested(),), {"max_bytes": []}, "max_bytes is a list, which is not a number of bytes"),
        ((Nested(),), {"offload": "nowhere"}, "offload='nowhere' is not a device. Write offload='cpu'"),
        ((Nested(),), {"offload": "meta"}, "offload='meta' would discard all values"),
        ((Nested(),), {"offload": 3.5}, "offload is a float, which is not a device"),
        ((Nested(),), {"offload": "cuda:97"}, "offload='cuda:97' does not work on this machine"),
    ],
    ids=lambda value: label(value)[:30],
)
def test_bad_arguments_are_refused_before_anything_is_hooked(args, options, message):
    with pytest.raises((ConvtapError, TypeError, ValueError), match=message) as caught:
        capture(*args, **options)
    assert isinstance(caught.value, ConvtapError)
    assert isinstance(caught.value, (TypeError, ValueError))


@pytest.mark.parametrize(
    ("function", "instead"),
    [
        (list_layers, r"To run the model once: list_layers\(model, example=x\)"),
        (finite, r"Run the model inside: with finite\(model\): model\(x\)"),
        (tapped, r"Call the result: tapped\(model\)\(x\)"),
    ],
)
def test_an_input_given_as_layers_is_refused_with_what_to_write(function, instead):
    with pytest.raises(TypeError, match=f"the second argument is a Tensor, but it must select layers. {instead}"):
        function(FiveConvs(), torch.ones(1, 1, 9))


def test_a_sample_that_is_no_number_is_refused():
    model = FiveConvs()
    with capture(model) as acts:
        model(torch.ones(1, 1, 40))
    with pytest.raises(TypeError, match=r"i='conv1' is not the number of an input"):
        acts.sample("conv1")


def test_an_unentered_capture_says_how_to_enter_it():
    block = capture(Nested())
    with pytest.raises(TypeError, match=r"Run the model inside the capture: with capture\(model\) as acts: model\(x\)"):
        block["encoder.conv1"]
    with pytest.raises(AttributeError, match=r"a capture has no attribute 'calls'. Activations have it: with capture"):
        block.calls()
    assert not hasattr(block, "anything_else")
    with pytest.raises(TypeError, match=r"a capture is not callable. Call the model inside it: with capture"):
        capture(Nested())(X)


def test_a_position_as_a_key_names_the_call_that_is_meant():
    model = FiveConvs()
    with capture(model) as acts:
        model(X)
    with pytest.raises(
        LayerNotFound,
        match=r"the key 4 is not a name. Write acts.calls\(\)\[4\] for the fifth call, of layer 'convs.4'",
    ):
        acts[4]
    with pytest.raises(LayerNotFound, match=r"the key 17 is not a name. Use one of these names: convs.0, "):
        acts[17]
    with pytest.raises(LayerNotFound, match=r"no output is named 'convs.5'.*Did you mean 'convs"):
        acts["convs.5"]
    assert acts.get("convs.5") is None
    assert 4 not in acts
    assert "convs.5" not in acts


def test_a_model_without_conv1d_says_what_it_has():
    expected = r"the Images has no Conv1d, but it has 4 Conv2d\. Pass types=nn\.Conv2d"
    with pytest.raises(NotCaptured, match=expected), capture(Images()) as acts:
        Images()(torch.randn(1, 3, 20, 20))
    with pytest.raises(LayerNotFound, match=expected), capture(Images(), functional=False):
        pass
    with pytest.raises(LayerNotFound, match=expected):
        list_layers(Images())
    model = Images()
    with capture(model, types=nn.Conv2d) as acts:
        y = model(torch.randn(1, 3, 20, 20))
    assert torch.equal(acts["body.3"], y)


def test_a_lazy_conv1d_is_captured_once_it_runs():
    model = nn.Sequential(nn.LazyConv1d(4, 3), nn.ReLU())
    assert [row.parameters for row in list_layers(model)] == [None]
    with capture(model) as acts:
        y = model(X)
    assert type(model[0]) is nn.Conv1d
    assert torch.equal(acts["0"].relu(), y)


@pytest.mark.parametrize("x", [torch.empty(0, 1, 30), torch.empty(2, 1, 30, device="meta")], ids=["empty", "meta"])
def test_empty_batches_and_meta_tensors(x):
    model = FiveConvs().to(x.device)
    with capture(model) as acts:
        model(x)
    assert [tuple(call.shape) for call in acts.calls()] == [(len(x), channels, 30) for channels in (4, 4, 8, 8, 8)]
    assert acts.nbytes == 0
    assert len(acts.summary(stats=True)) == 5
    assert len(acts.samples()) == len(x)


def test_list_layers_is_a_sized_iterable_of_rows_and_prints_as_a_table():
    rows = list_layers(Nested())
    assert len(rows) == 3
    assert [(row.name, row.type, row.parameters) for row in rows] == [
        ("encoder.conv1", "Conv1d", 1 * 2 * 3 + 2),
        ("encoder.conv2", "PaddedConv", 2 * 2 * 3 + 2),
        ("encoder.deep.0", "Conv1d", 2 * 2 * 1 + 2),
    ]
    assert (rows[0].kernel, rows[0].stride, rows[0].dilation) == (3, 1, 1)
    assert str(rows).splitlines()[2].split() == ["encoder.conv1", "Conv1d", "8", "3", "1", "1"]
    assert ">encoder.conv1</td>" in rows._repr_html_()
    assert [row.kernel for row in list_layers(Images(), types=nn.Conv2d)] == [(3, 3)] * 4


def test_list_layers_with_an_example_shows_how_each_layer_is_used():
    model, x = FunctionalConvs().train(), torch.randn(2, 1, 12)
    random_state = torch.get_rng_state()
    used = {
        row.name: (row.used, None if row.shape is None else tuple(row.shape)) for row in list_layers(model, example=x)
    }
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert used == {
        "conv": ("F.conv1d × 1", (2, 5, 12)),
        "kernel": ("F.conv1d × 1", (2, 4, 12)),
        "kernels.0": ("F.conv1d × 1", (2, 4, 12)),
        "kernels.1": ("F.conv1d × 1", (2, 4, 12)),
        "linear": ("F.conv1d × 1", (2, 5, 12)),
        "F.conv1d": ("F.conv1d × 1", (2, 2, 12)),
    }


def test_list_layers_forecasts_the_bytes_that_would_be_kept():
    model, x = FiveConvs(), torch.randn(3, 1, 40)
    rows = list_layers(model, example=x, reduce=lambda t: t.mean(-1), dtype=torch.float16)
    assert [row.nbytes for row in rows] == [3 * channels * 2 for channels in (4, 4, 8, 8, 8)]
    assert "kept: 192 B in this pass, 64 B a sample (batch of 3)" in str(rows)
    with capture(model, reduce=lambda t: t.mean(-1), dtype=torch.float16) as acts:
        model(x)
    assert acts.nbytes == sum(row.nbytes for row in rows)


def test_list_layers_names_idle_layers_and_takes_tuples_and_dicts():
    model = TwoParts()
    assert [row.used for row in list_layers(model.encoder, example=(X,))] == ["module × 1"]
    with pytest.raises(TypeError, match="example is a list. Pass a tensor, a tuple of positional arguments, or a dict"):
        list_layers(model, example=[X])
    model.spare = nn.Conv1d(1, 1, 1)
    assert list_layers(model, example={"x": X})[-1].used == "idle"


def test_a_shared_module_is_listed_once():
    assert selected(SharedConv(), None) == ["first"]
    assert selected(SharedConv(), "second.0") == ["first"]
