"""The networks of `benchmarks.train_step` in PyTorch."""

from collections.abc import Callable

import torch
from torch import nn

from bn_research.models.spec import Conv, Dense, Pool, parse_spec


def network(spec: str, image: tuple[int, int, int], activation: type[nn.Module]) -> nn.Sequential:
    """Weights → BN → activation on every layer but the head, as `bn_research.models.cnn`."""
    height, width, channels = image
    parts: list[nn.Module] = []
    flat = False
    layers = parse_spec(spec)
    for layer in layers:
        if isinstance(layer, Pool):
            parts.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
            continue
        if isinstance(layer, Conv):
            parts.append(nn.Conv2d(channels, layer.features, layer.kernel, padding="same"))
            norm: type[nn.Module] = nn.BatchNorm2d
        else:
            assert isinstance(layer, Dense)
            if not flat:
                parts.append(nn.Flatten())
                channels, flat = channels * height * width, True
            parts.append(nn.Linear(channels, layer.features))
            norm = nn.BatchNorm1d
        channels = layer.features
        if layer is not layers[-1]:
            parts += [norm(channels), activation()]
    return nn.Sequential(*parts)


def train_step(
    model: nn.Module, x: torch.Tensor, label: torch.Tensor, batch: int, steps: int
) -> Callable[[], int]:
    """A function that takes steps of momentum SGD on the batches of x in turn."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    position = 0

    def run() -> int:
        nonlocal position
        for _ in range(steps):
            part = slice(position, position + batch)
            position = (position + batch) % len(x)  # whole batches, as of the others
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), label[part]).backward()
            optimizer.step()
        return steps

    return run
