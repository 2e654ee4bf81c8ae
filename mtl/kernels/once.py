"""Operations without a derivative of their own, which torch would else take for constants where one is asked for."""

from typing import Any

from torch import Tensor
from torch.autograd import Function


def once(name: str, operation: Any, *args: Any) -> Any:
    """Run an operation that is itself a gradient: a second derivative through it is refused, by name."""
    return _Once.apply(name, operation, *args)


class _Once(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, operation: Any, *args: Any) -> Any:
        return operation(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"{ctx.name} has no second derivative: use --model.attention-impl plain for it")
