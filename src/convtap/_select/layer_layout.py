"""Finds the layout of a layer's output or input by the layer's type."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.ao.nn.quantized as nnq
from torch import nn

from convtap._select.module_tree import ROOT, ModuleTree, is_keras
from convtap._tensors.layout import Layout

#: Finds the layout of a module's output, or of its input: ``find(module, side)``.
_Rule: TypeAlias = "Callable[[nn.Module, str], Layout | None]"

#: The attributes that hold the number of channels of a layer's output and input.
_COUNTS = {
    "output": ("out_channels", "out_features", "num_features", "num_channels", "embedding_dim", "filters", "units"),
    "input": ("in_channels", "in_features", "num_features", "num_channels"),
}

#: Modules whose output is (B, C, ...) by definition.
_FIRST: tuple[type, ...] = (
    nn.modules.conv._ConvNd,
    nnq.Conv1d,
    nnq.Conv2d,
    nnq.Conv3d,
    nnq.ConvTranspose1d,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
    nn.Upsample,
    nn.Dropout1d,
    nn.Dropout2d,
)

#: Modules whose output is (B, ..., C) by definition.
_LAST: tuple[type, ...] = (nn.Linear, nnq.Linear, nn.Bilinear, nn.Embedding)

_BLOCKS: tuple[type, ...] = (
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.Transformer,
)

#: The names of modules that keep the order of the axes.
_ELEMENTWISE = frozenset(
    name
    for name, kind in vars(nn.modules.activation).items()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind not in (nn.MultiheadAttention, nn.GLU, nn.Module)
) | {"Dropout", "AlphaDropout", "FeatureAlphaDropout", "Identity"}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_KERAS_LAST = _words(
    "Dense EinsumDense Embedding ReversibleEmbedding LSTM GRU SimpleRNN RNN Bidirectional MultiHeadAttention "
    "GroupedQueryAttention Attention AdditiveAttention SpatialDropout1D Cropping1D UpSampling1D RepeatVector"
)
_KERAS_ELEMENTWISE = _words(
    "Activation ReLU LeakyReLU ELU PReLU Softmax Dropout AlphaDropout GaussianDropout GaussianNoise Identity Rescaling Masking "
    "ActivityRegularization UnitNormalization Add Subtract Multiply Average Maximum Minimum Concatenate"
)


class LayerLayouts:
    """The layouts of a model's layers that are known from their types.

    Args:
        tree: the model's modules.
        at: the captured value of the layers: ``"output"``, ``"input"`` or ``"activation"``.
    """

    def __init__(self, tree: ModuleTree, at: str = "output") -> None:
        self._tree = tree
        self._side = "input" if at == "input" else "output"
        self._exact = at != "activation"

    def of(self, name: str, *, reduced: bool = False) -> Layout | None:
        """Returns the layout of a layer's captured value, or None if it is unknown.

        Args:
            name: the layer.
            reduced: whether a function is applied to the value, which may change its axes.
        """
        exact = self._exact and not reduced
        module = self._tree.names.get(name)
        if module is None:  # a layer without a module is a convolution that was called as a function
            return Layout(exact=exact)
        found = layout_of(module, self._side)
        if found is None and _is_elementwise(module):
            found = self._before(name)
        if found is None and is_keras(type(module)):
            found = self._usual
        return found if found is None or exact else found._replace(exact=False)

    def _before(self, name: str) -> Layout | None:
        """Returns the layout of an elementwise layer's input, or None.

        It is known for a layer in a sequence or in a Keras graph.
        """
        module = self._tree.names[name]
        if is_keras(type(module)):
            found = _keras_producers(module, self._side) or self._usual
            return found and found._replace(channels=None, sure=found.sure or found is self._usual)
        parent, _, _ = name.rpartition(".")
        sequence = self._tree.names.get(parent or ROOT)
        if sequence is None or not _is_sequence(type(sequence)):
            return None
        parts = list(sequence.children())
        places = [place for place, part in enumerate(parts) if part is module]
        return _last_of(parts[: places[0]], "output") if len(places) == 1 else None

    @functools.cached_property
    def _usual(self) -> Layout | None:
        """The layout that all layers of a Keras model share, as a guess for others."""
        found = {layout.last for module in self._tree.names.values() if (layout := _keras(module)) is not None}
        if not found:
            return Layout(last=_keras_default() == "channels_last", sure=False)
        return Layout(last=found.pop(), sure=False) if len(found) == 1 else None


@functools.cache
def channels_first(channels: int) -> Layout:
    """Returns the layout of a plain convolution's output."""
    return Layout(channels=channels)


def layout_of(module: nn.Module, side: str = "output") -> Layout | None:
    """Returns the layout of a module's output or input by its type, or None.

    Args:
        module: the module.
        side: ``"output"`` or ``"input"``.
    """
    kind: Any = type(module)
    find = _rule(kind)
    return None if find is None else find(module, side)


@functools.cache  # called for every layer of every capture
def _rule(kind: Any) -> _Rule | None:
    """Returns the function that finds the layout of a module class, or None."""
    if is_keras(kind):
        return _keras
    if issubclass(kind, torch.jit.ScriptModule):
        return _scripted
    if _is_sequence(kind):
        return _sequence
    return next((find for kinds, find in _RULES if issubclass(kind, kinds)), None)


def _scripted(module: nn.Module, side: str) -> Layout | None:
    find = _rule(getattr(nn, getattr(module, "original_name", ""), nn.Module))
    return None if find is None else find(module, side)


def _sequence(module: nn.Module, side: str) -> Layout | None:
    return _last_of(list(module.children()), side)


def _last_of(parts: list[nn.Module], side: str) -> Layout | None:
    """Returns the layout of a sequence's output, from its last modules, or None.

    The layout of its input comes from its first modules.
    """
    for part in parts if side == "input" else reversed(parts):
        found = layout_of(part, side)
        if found is not None or not _is_elementwise(part):
            return found
    return None


def _is_sequence(kind: Any) -> bool:
    return issubclass(kind, nn.Sequential) and kind.forward is nn.Sequential.forward


def _is_elementwise(module: nn.Module) -> bool:
    names = _KERAS_ELEMENTWISE if is_keras(type(module)) else _ELEMENTWISE
    return type(module).__name__ in names or getattr(module, "original_name", None) in names


def _count(module: nn.Module, side: str) -> int | None:
    for key in _COUNTS[side]:
        found = getattr(module, key, None)
        if isinstance(found, int) and found > 0:
            return found
    return None


def _first(module: nn.Module, side: str) -> Layout | None:
    return Layout(channels=_count(module, side))


def _last(module: nn.Module, side: str) -> Layout | None:
    if side == "input" and isinstance(module, nn.Embedding):
        return None
    return Layout(last=True, channels=_count(module, side))


def _normalized(module: nn.Module, side: str) -> Layout | None:
    """Returns the layout of LayerNorm or RMSNorm.

    The last axis is the channels. If several axes are normalized, the channel axis is unknown.
    """
    shape = tuple(getattr(module, "normalized_shape", ()))
    return Layout(last=True, channels=shape[0]) if len(shape) == 1 else None


def _attention(module: nn.Module, side: str) -> Layout | None:
    attention = next((part for part in module.modules() if isinstance(part, nn.MultiheadAttention)), None)
    if attention is None:
        return None
    return Layout(last=True, batch=0 if attention.batch_first else 1, channels=attention.embed_dim)


def _recurrent(module: nn.Module, side: str) -> Layout | None:
    if not isinstance(module, nn.RNNBase):
        return None
    directions = 2 if module.bidirectional else 1
    channels = module.input_size if side == "input" else directions * (module.proj_size or module.hidden_size)
    return Layout(last=True, batch=0 if module.batch_first else 1, channels=channels)


_RULES: tuple[tuple[tuple[type, ...], _Rule], ...] = (
    (_FIRST, _first),
    (_LAST, _last),
    (tuple(getattr(nn, name) for name in ("LayerNorm", "RMSNorm") if hasattr(nn, name)), _normalized),
    ((nn.MultiheadAttention, *_BLOCKS), _attention),
    ((nn.RNNBase,), _recurrent),
)


# -- Keras


def _keras(module: nn.Module, side: str = "output") -> Layout | None:
    """Returns the layout of a Keras layer.

    It is known from the layer's ``data_format``, its normalized axis, or its class.
    """
    kind = type(module)
    if not is_keras(kind):
        return None
    channels = _count(module, side) if side == "output" else None
    data_format = getattr(module, "data_format", None)
    if data_format in ("channels_first", "channels_last"):
        return Layout(last=data_format == "channels_last", channels=channels)
    names = {base.__name__ for base in kind.__mro__ if base.__module__.startswith("keras.src.layers.")}
    if names & {"BatchNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization"}:
        axis = getattr(module, "axis", None)
        axis = axis[0] if isinstance(axis, (list, tuple)) and len(axis) == 1 else axis
        return Layout(last=axis != 1) if isinstance(axis, int) else None
    if names & _KERAS_LAST:
        return Layout(last=True, channels=channels if "Dense" in names else None)
    return _producer(module, side)


def _keras_default() -> str:
    """Returns Keras' default data format."""
    return str(sys.modules["keras"].config.image_data_format())


def _producer(model: nn.Module, side: str) -> Layout | None:
    """Returns the layout of a nested Keras model: that of its output layer."""
    outputs: Any = getattr(model, "outputs", None)
    if side != "output" or not isinstance(outputs, (list, tuple)) or len(outputs) != 1:
        return None
    return _of_tensor(outputs[0], 0)


def _keras_producers(layer: Any, side: str) -> Layout | None:
    """Returns the layout of a layer's input in a Keras graph, if all its uses agree."""
    found = [_of_tensor(tensor, 0) for node in getattr(layer, "_inbound_nodes", ()) for tensor in node.input_tensors]
    known = {layout.last for layout in found if layout is not None}
    return Layout(last=known.pop()) if len(known) == 1 else None


def _of_tensor(tensor: Any, depth: int) -> Layout | None:
    maker: Any = getattr(getattr(tensor, "_keras_history", None), "operation", None)
    if maker is None or depth > 100:
        return None
    own = _keras(maker)
    if own is not None or type(maker).__name__ not in _KERAS_ELEMENTWISE:
        return own
    inputs = [tensor for node in getattr(maker, "_inbound_nodes", ())[:1] for tensor in node.input_tensors]
    return next((found for one in inputs if (found := _of_tensor(one, depth + 1)) is not None), None)
