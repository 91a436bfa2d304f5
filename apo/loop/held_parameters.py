"""The parameters that an optimizer was built with, by the names that their models call them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

__all__ = ["HeldParameters"]


class HeldParameters:
    """Notices parameters that were replaced after an optimizer was built, as ``fully_shard`` and accelerate do.

    Args:
        models: where the parameters are looked for.
        parameters: those that the optimizer was given.
    """

    def __init__(self, models: Iterable[nn.Module], parameters: Sequence[Tensor]) -> None:
        wanted = {id(p) for p in parameters}
        self._places = [
            (f"{prefix}.{name}" if prefix else name, module, name, p)
            for model in models
            for prefix, module in model.named_modules()
            for name, p in module._parameters.items()
            if p is not None and id(p) in wanted
        ]

    def replaced(self) -> list[tuple[str, Tensor, Tensor]]:
        """The name, the parameter that was held and what stands there now, of each that was replaced.

        A parameter that moved within its module (parametrizations, pruning) or that was deleted wasn't replaced.
        """
        found = []
        for full, module, name, p in self._places:
            now = _parameter(module, name)
            if now is None and all(p is not each for each in module.parameters()):
                now = getattr(module, name, None)  # computed from others, as by weight_norm
            if isinstance(now, Tensor) and now is not p:
                found.append((full, p, now))
        return found

    @staticmethod
    def refuse(replaced: Sequence[tuple[str, Tensor, Tensor]]) -> None:
        """Refuse to go on with parameters that aren't the model's any more.

        Raises:
            ValueError: some were replaced, by name.
        """
        for name, held, now in replaced:
            raise ValueError(
                f"the optimizer must be built after the model's parameters are final, but {name} was replaced since: "
                f"a {type(held).__name__} of {held.dtype} on {held.device} by a {type(now).__name__} of {now.dtype} "
                f"on {now.device}. fully_shard, accelerate's prepare, to_empty, load_state_dict(assign=True) and "
                "weight_norm replace parameters: build the optimizer after them"
            )


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    held = module._parameters
    return held.get(name) if isinstance(held, dict) else dict(held.items()).get(name)  # a ScriptModule has no get
