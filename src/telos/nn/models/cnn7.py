"""The seven-layer convolutional network of the certified-training literature."""

from torch import nn


def cnn7(
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    *,
    width: int = 64,
    linear_width: int = 512,
    batch_norm: bool = True,
) -> nn.Sequential:
    """CNN-7 with batch normalisation between every hidden layer and its ReLU.

    Five 3 x 3 convolutions with ``width`` (twice), then ``2 * width`` channels, of which the third halves the
    image; a hidden linear layer; and the linear output layer, which has no normalisation. Fully normalised
    networks have roughly balanced active and inactive ReLUs, which plain interval training loses.

    Args:
        in_channels: channels of the images.
        image_size: their height and width, even.
        num_classes: number of logits.
        width: channels of the first convolutions.
        linear_width: units of the hidden linear layer.
        batch_norm: without it the network is that of earlier work.

    Returns:
        The network, of images (N, in_channels, image_size, image_size).

    Raises:
        ValueError: for an odd ``image_size``.

    Source:
        Fast Certified Robust Training with Short Warmup, arXiv 2103.17268.

    Example:
        >>> import torch
        >>> cnn7(1, 8, width=4, linear_width=16)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if image_size < 2 or image_size % 2:
        raise ValueError(f"image_size must be even and at least 2, got {image_size}")
    layers: list[nn.Module] = []
    channels = in_channels
    for out, stride in ((width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)):
        layers += [nn.Conv2d(channels, out, 3, stride, padding=1)]
        layers += [nn.BatchNorm2d(out)] if batch_norm else []
        layers += [nn.ReLU()]
        channels = out
    layers += [nn.Flatten(), nn.Linear(channels * (image_size // 2) ** 2, linear_width)]
    layers += [nn.BatchNorm1d(linear_width)] if batch_norm else []
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(linear_width, num_classes))
