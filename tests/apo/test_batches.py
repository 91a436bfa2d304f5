"""Batches B′ follow the model to its device: loaders give them where they were made."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import apo
from apo.inputs.batches import moved, only_device

META = torch.device("meta")
Pair = namedtuple("Pair", "inputs targets")


def test_every_kind_of_batch_is_moved() -> None:
    x = torch.ones(2)
    packed = moved(pack_sequence([x, x]), META)
    found: Any = moved({"a": [x, (x, "text")], "b": Pair(x, 3), "c": None}, META)
    assert found["a"][0].is_meta
    assert found["a"][1][0].is_meta
    assert found["a"][1][1] == "text"
    assert isinstance(found["b"], Pair)
    assert found["b"].inputs.is_meta
    assert found["b"].targets == 3
    assert found["c"] is None
    assert packed.data.is_meta


def test_nothing_is_copied_where_nothing_moves() -> None:
    x = torch.ones(2)
    assert moved((x, x), torch.device("cpu"))[0] is x


def test_a_model_on_one_device_has_its_batches_there() -> None:
    objective = apo.ProximalObjective(nn.Linear(2, 2, device="meta"), [(torch.ones(1, 2), torch.ones(1))])
    assert all(x.is_meta for x in objective.checked_draw())


def test_a_model_on_several_devices_gets_them_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert only_device(model) is None
    assert only_device(nn.ReLU()) is None
    objective = apo.ProximalObjective(model, [(torch.ones(1, 2), torch.ones(1))])
    assert not any(x.is_meta for x in objective.checked_draw())
