"""What a method's test file declares about its loss; tests/conformance checks every contract from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
Sample = Callable[[int, torch.Generator, torch.dtype], Inputs]


@dataclass(frozen=True)
class Declaration:
    """One loss: how to call it and which contracts it keeps. Every exception carries its reason as text.

    Attributes:
        function: the public pure function (of a stateful loss: the one that takes the state and returns
            ``(loss, new state...)``), or ``None`` where a module has no function of its own.
        module: builds the module for a sample, or ``None`` where there is only a function.
        sample: ``sample(n, generator, dtype)`` gives the keyword arguments of ``function`` for n examples, floating
            tensors in ``dtype``. The module is called with those that its ``forward`` accepts.
        differentiable: names of the inputs whose gradients are checked.
        rows: whether the loss is row-wise, that is, whether its module has ``rows``.
        state: names of the function's arguments that hold state (left alone by gradient and precision checks).
        surrogate: why the backward is by design not the gradient of the value; "" for an ordinary gradient.
        kinks: where the loss is not differentiable; "" where it is C1. With kinks, the gradient is held between the
            one-sided derivatives instead of ``gradcheck``.
        superlinear: why the value may reach +inf at logits of +-30000; "" if it must stay finite.
        extreme: name of the input that is driven to +-30000, or "" for losses that normalise their input.
        no_vmap: why ``torch.func.vmap`` over a leading axis is not supported; "" if it is.
        no_compile: why ``torch.compile(fullgraph=True)`` is not supported; "" if it is.
        growth: the largest intermediate grows no faster than n ** growth.
        invariances: transformations of the inputs that leave the loss unchanged, by name. Permuting the batch is
            checked for every loss unless ``order_matters`` says why not.
        order_matters: why permuting the batch changes the loss; "" if it does not.
        module_only: constructor arguments of the module that the function does not have.
        function_only: keyword arguments of the function that are neither constructor nor call arguments of the module.
        minimum: fewest examples for which the loss is defined; with fewer it raises ValueError.
        no_distributed: why several ranks cannot reproduce one process; "" if they must.
        split: cuts a sample into one part per rank, where that is more than slicing the batch.
    """

    function: Callable[..., Any] | None
    module: Callable[[], nn.Module] | None
    sample: Sample
    differentiable: tuple[str, ...] = ("logits",)
    rows: bool = True
    state: tuple[str, ...] = ()
    surrogate: str = ""
    kinks: str = ""
    superlinear: str = ""
    extreme: str = "logits"
    no_vmap: str = ""
    no_compile: str = ""
    growth: int = 1
    invariances: Mapping[str, Callable[[Inputs], Inputs]] = field(default_factory=dict)
    order_matters: str = ""
    module_only: tuple[str, ...] = ()
    function_only: tuple[str, ...] = ()
    minimum: int = 0
    no_distributed: str = ""
    split: Callable[[Inputs, int], list[Inputs]] | None = None

    @property
    def name(self) -> str:
        """The name under which tests show this loss."""
        if self.function is not None:
            return self.function.__name__
        assert self.module is not None
        return type(self.module()).__name__


def classification_sample(classes: int = 5, soft: bool = False, **extra: Callable[..., Tensor]) -> Sample:
    """Logits (n, classes) and labels, or probabilities with ``soft``.

    ``extra`` maps the name of a further input to ``f(n, classes, generator, dtype)``.
    """

    def sample(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
        if soft:
            target = torch.randn(n, classes, generator=generator, dtype=torch.float64).softmax(-1).to(dtype)
        else:
            target = torch.randint(classes, (n,), generator=generator)
        inputs: Inputs = {"logits": logits.to(dtype), "target": target}
        for name, make in extra.items():
            inputs[name] = make(n, classes, generator, dtype)
        return inputs

    return sample


def two_view_sample(dim: int = 6) -> Sample:
    """Two views (n, dim) of n examples."""

    def sample(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        z1 = torch.randn(n, dim, generator=generator, dtype=torch.float64)
        z2 = z1 + 0.5 * torch.randn(n, dim, generator=generator, dtype=torch.float64)
        return {"z1": z1.to(dtype), "z2": z2.to(dtype)}

    return sample


def embedding_sample(dim: int = 6, classes: int = 3) -> Sample:
    """Embeddings (n, dim) and labels (n,)."""

    def sample(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        embeddings = torch.randn(n, dim, generator=generator, dtype=torch.float64).to(dtype)
        return {"embeddings": embeddings, "labels": torch.randint(classes, (n,), generator=generator)}

    return sample


def shifted(amount: float, name: str = "logits") -> Callable[[Inputs], Inputs]:
    """The invariance to a constant added to ``name``."""
    return lambda inputs: {**inputs, name: inputs[name] + amount}


def scaled(factor: float, *names: str) -> Callable[[Inputs], Inputs]:
    """The invariance to a positive factor on the named inputs."""
    return lambda inputs: {**inputs, **{name: factor * inputs[name] for name in names}}
