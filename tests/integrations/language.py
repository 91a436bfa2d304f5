"""A tiny language model, made from a configuration, and padded sentences for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

WORDS, LENGTH = 12, 8


def language_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
    )
    model: nn.Module = LlamaForCausalLM(config).to(dtype)
    return model


def sentences(count: int = 32) -> list[dict[str, Tensor]]:
    """Words that count upwards from a random one, of random lengths; 0 is padding, which no label asks for."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        length = int(torch.randint(4, LENGTH + 1, (), generator=generator))
        start = int(torch.randint(WORDS, (), generator=generator))
        words = torch.zeros(LENGTH, dtype=torch.int64)
        words[:length] = 1 + (start + torch.arange(length)) % (WORDS - 1)
        real = torch.arange(LENGTH) < length
        found.append({"input_ids": words, "attention_mask": real.long(), "labels": words.where(real, -100)})
    return found


def joined(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def batches(size: int = 8) -> list[dict[str, Tensor]]:
    found = sentences()
    return [joined(found[i : i + size]) for i in range(0, len(found), size)]


def own_loss(output: Any, batch: Any) -> Tensor:
    """For ``ProximalObjective(loss=)``: Hugging Face's models compute it themselves."""
    loss: Tensor = output.loss
    return loss


def counted_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As the Trainer asks for it: the sum over all words that are to be predicted, by their number."""
    loss: Tensor = model(**batch, num_items_in_batch=batch["labels"][..., 1:].ne(-100).sum()).loss
    return loss
