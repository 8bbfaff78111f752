"""SpliceAI, a dilated residual network with 10,000 bases of context, in Keras.

The weights are in the package.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gallery.reference import Convolution

TITLE = "SpliceAI `spliceai1.h5`, Keras, 1,000 bases with their context"


def load() -> tuple[Any, Callable[[], object]]:
    """Loads the first of the five models. It reads random bases, one-hot (B, T, 4)."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    # not imported, since the package's own code needs TensorFlow
    (folder,) = importlib.util.find_spec("spliceai").submodule_search_locations
    model = keras.saving.load_model(Path(folder) / "models" / "spliceai1.h5", compile=False)
    bases = F.one_hot(torch.randint(4, (1, 11_000)), 4).float()
    return model, lambda: model(bases)


def captured(model: Any, name: str, convolution: Convolution) -> Tensor:
    """Returns the expected value (B, T, C), with the layer's bias and activation."""
    layer = model.get_layer(name)
    value = convolution.by_hand().movedim(1, -1)
    if layer.use_bias and convolution.bias is None:
        value = value + layer.bias.value.double()
    return value.softmax(-1) if layer.activation.__name__ == "softmax" else value  # only in the last layer
