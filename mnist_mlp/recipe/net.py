"""The net: how it is built, what it reads, and how its weights are written."""

import math
from collections.abc import Sequence
from itertools import chain, pairwise

import psutil
import safetensors
import safetensors.torch
from torch import Tensor, nn

from lineage import UserError
from mnist_mlp.recipe import data, exact


def mlp(hidden: Sequence[int]) -> nn.Sequential:
    """Build the net: pixels in, hidden layers with ReLU, a raw score for each class.

    784-400-200-100-10, as in the tutorial, has 415,310 parameters.

    Raises:
        UserError: the machine has too little memory for it.
    """
    memory = psutil.virtual_memory().total
    widths = [math.prod(data.SHAPE), *hidden, data.CLASSES]
    needed = 2 * 4 * sum(n_in * n_out for n_in, n_out in pairwise(widths))  # float32, and its gradient
    if needed > memory:
        raise UserError(
            f"params.yaml: model.hidden {list(hidden)} needs at least {needed / 1e9:.0f} GB of memory, "
            f"and this machine has {memory / 1e9:.0f} GB; lower the widths"
        )
    layers = [(exact.Linear(n_in, n_out), nn.ReLU()) for n_in, n_out in pairwise(widths)]
    return nn.Sequential(*chain(*layers))[:-1]


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Turn grey levels 0 to 255, (N, *SHAPE) uint8, into the net's input, (N, pixels) float32."""
    return images.flatten(1).float().div_(255).sub_(mean).div_(std)


class ImageClassifier(nn.Module):
    """The net as others use it: raw images (N, *SHAPE), uint8, to probabilities (N, CLASSES)."""

    def __init__(self, net: nn.Module, mean: float, std: float) -> None:
        """Wrap a net that was trained on ``normalise(images, mean, std)``."""
        super().__init__()
        self.net, self.mean, self.std = net, mean, std

    def forward(self, images: Tensor) -> Tensor:
        """Normalise, score, and turn scores into probabilities."""
        probabilities: Tensor = self.net(normalise(images, self.mean, self.std)).softmax(1)
        return probabilities


def save_weights(net: nn.Module) -> bytes:
    """Write the weights as the content of a safetensors file, which holds numbers only and can run no code."""
    return safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in net.state_dict().items()})


def load_weights(net: nn.Module, content: bytes, name: str) -> None:
    """Fill the net with the weights of a safetensors file.

    Args:
        net: as ``mlp`` builds it.
        content: the file's bytes.
        name: what to call the file in an error.

    Raises:
        UserError: the file is not a whole safetensors file, or it holds the weights of another net.
    """
    try:
        net.load_state_dict(safetensors.torch.load(content))
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{name} is not a whole safetensors file ({error}); `dvc repro -f train` makes it again"
        ) from None
    except RuntimeError:
        raise UserError(
            f"{name} holds the weights of another net than model.hidden asks for; run `dvc repro`"
        ) from None
