"""The models' layers against what is published of them."""

from __future__ import annotations

from benchmarks.kernels.shapes import MODELS, conv, linear


def parameters(model: str) -> int:
    return sum(m * n for m, n in MODELS[model])


def test_layers_and_parameters() -> None:
    assert MODELS["mlp"] == [(1000, 785), (1000, 1001), (10, 1001)]
    assert {name: len(layers) for name, layers in MODELS.items()} == {
        "mlp": 3,
        "lenet": 5,
        "vgg16": 14,
        "resnet18": 21,
        "transformer": 96,
    }
    assert parameters("lenet") == 62_006  # LeNet-5 on 32×32×3
    assert parameters("vgg16") == 14_714_688 + 5_130  # its convolutions, and 512 → 10
    # ResNet-18 for CIFAR-10 has 11,173,962, of which 9,600 in batch norms; here each convolution has a bias too.
    assert parameters("resnet18") == 11_173_962 - 9_600 + 9_600 // 2
    # 12 blocks of 4 or 8 attention matrices and the feed-forward pair.
    assert parameters("transformer") == 72 * 512 * 513 + 12 * (2048 * 513 + 512 * 2049)


def test_a_layer_is_its_weight_and_its_bias() -> None:
    import torch

    for layer, shape in (
        (torch.nn.Linear(7, 3), linear(7, 3)),
        (torch.nn.Conv2d(2, 5, 3), conv(2, 5)),
        (torch.nn.Conv2d(2, 5, 1), conv(2, 5, 1)),
    ):
        m, n = shape
        assert layer.weight.flatten(1).shape == (m, n - 1)
        assert sum(p.numel() for p in layer.parameters()) == m * n
