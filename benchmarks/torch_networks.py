"""The networks of `benchmarks.networks` in PyTorch."""

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.networks import CLASSES, Network
from bn_research.models.inception_modules import MODULES, Widths, scaled
from bn_research.models.spec import Conv, Dense, Pool, parse_spec


def torch_network(network: Network) -> nn.Sequential:
    """Weights → BN → activation on every layer but the head."""
    activation = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}[network.activation]
    if network.modules:
        return _inception(network)
    height, width, channels = network.image
    parts: list[nn.Module] = []
    flat = False
    layers = parse_spec(network.spec)
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


class _Module(nn.Module):
    """Four branches, concatenated: see `bn_research.models.inception`."""

    def __init__(self, channels: int, widths: Widths):
        super().__init__()
        stride = widths.stride
        self.branches = nn.ModuleList()
        self.channels = widths.conv_3x3 + widths.double_3x3 + (widths.projection or channels)
        if widths.conv_1x1:
            self.branches.append(_block(channels, widths.conv_1x1, 1))
            self.channels += widths.conv_1x1
        self.branches += [
            nn.Sequential(
                _block(channels, widths.reduce_3x3, 1),
                _block(widths.reduce_3x3, widths.conv_3x3, 3, stride),
            ),
            nn.Sequential(
                _block(channels, widths.reduce_double_3x3, 1),
                _block(widths.reduce_double_3x3, widths.double_3x3, 3),
                _block(widths.double_3x3, widths.double_3x3, 3, stride),
            ),
        ]
        pool: nn.Module = nn.MaxPool2d(3, stride, padding=1)
        if widths.pool == "avg":
            pool = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
        if widths.projection:
            pool = nn.Sequential(pool, _block(channels, widths.projection, 1))
        self.branches.append(pool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _block(channels: int, features: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, features, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(features), nn.ReLU())


def _inception(network: Network) -> nn.Sequential:
    def narrow(widths: Widths) -> Widths:
        numbers = {
            name: value and scaled(value, network.width)
            for name, value in widths._asdict().items()
            if name not in ("name", "pool", "stride")
        }
        return Widths(**{**widths._asdict(), **numbers})

    channels = scaled(64, network.width)
    parts: list[nn.Module] = [
        _block(network.image[-1], channels, 3),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    for widths in MODULES:
        if widths.name in network.modules:
            module = _Module(channels, narrow(widths))
            parts.append(module)
            channels = module.channels
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    return nn.Sequential(*parts, *head)


def train_step(
    model: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    label: torch.Tensor,
    network: Network,
) -> Callable[[], int]:
    """A function that takes steps on the batches of x in turn."""
    position = 0
    half = torch.autocast(x.device.type, torch.bfloat16, enabled=network.dtype == "bfloat16")

    def run() -> int:
        nonlocal position
        for _ in range(network.steps):
            part = slice(position, position + network.batch)
            position = (position + network.batch) % len(x)  # whole batches, as of the others
            optimizer.zero_grad()
            with half:
                loss = nn.functional.cross_entropy(model(x[part]), label[part])
            loss.backward()
            optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()
        return network.steps

    return run
