"""The layers of the models that the throughput is measured on, as the matrices that are preconditioned.

``(m, n)``: a convolution's weight ``(out, in, k, k)`` is ``out × in·k²``; every layer's bias is one more column.
"""

Shape = tuple[int, int]


def linear(inputs: int, outputs: int) -> Shape:
    return outputs, inputs + 1


def conv(inputs: int, outputs: int, kernel: int = 3) -> Shape:
    return outputs, inputs * kernel**2 + 1


def _vgg16() -> list[Shape]:
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    return [conv(i, o) for i, o in zip([3, *widths], widths, strict=False)] + [linear(512, 10)]


def _resnet18() -> list[Shape]:
    layers = [conv(3, 64), *[conv(64, 64)] * 4]
    for i, o in ((64, 128), (128, 256), (256, 512)):
        layers += [conv(i, o), *[conv(o, o)] * 3, conv(i, o, 1)]
    return [*layers, linear(512, 10)]


def _transformer() -> list[Shape]:
    attention, feedforward = [linear(512, 512)] * 4, [linear(512, 2048), linear(2048, 512)]
    return [*attention, *feedforward] * 6 + [*attention, *attention, *feedforward] * 6


MODELS: dict[str, list[Shape]] = {
    "mlp": [linear(784, 1000), linear(1000, 1000), linear(1000, 10)],
    "lenet": [conv(3, 6, 5), conv(6, 16, 5), linear(400, 120), linear(120, 84), linear(84, 10)],
    "vgg16": _vgg16(),
    "resnet18": _resnet18(),
    "transformer": _transformer(),
}
"""Two-layer MLP 784-1000-1000-10; LeNet, VGG16 and ResNet-18 for 32×32 colour images; a 6+6-layer Transformer of
width 512 (its linear layers)."""

QUICK_MODELS = ("mlp", "lenet")
