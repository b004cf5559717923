"""Post-hoc calibrators: a temperature for all examples, or one for each from how its prediction moves."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from telos.fit import fit
from telos.losses._checks import check_classification, check_floating, check_range, check_shape
from telos.losses._reduction import at_least_float32
from telos.losses.classification.correctness_aware import CorrectnessAwareLoss

View: TypeAlias = Callable[[Tensor], Tensor]
"""A transformation of a batch of inputs that leaves the class as it is."""

LUMA = (0.299, 0.587, 0.114)


class TemperatureScaling(nn.Module):
    """One temperature for all examples: ``logits / T``, which changes no prediction.

    The baseline of post-hoc calibration. T is a parameter, held as its logarithm.

    Args:
        temperature: T before :meth:`fit`, above 0.

    Raises:
        ValueError: for a temperature that is not positive.

    Source:
        On Calibration of Modern Neural Networks, arXiv 1706.04599.

    Example:
        >>> import torch
        >>> logits = 3 * torch.eye(2).repeat(4, 1)  # sure of itself by 3, right in 6 of 8
        >>> target = torch.tensor([0, 1, 0, 1, 0, 1, 1, 0])
        >>> scaling = TemperatureScaling().fit(logits, target)
        >>> scaling(logits).softmax(-1).amax().detach()
        tensor(0.7500)
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_range("temperature", temperature, 0.0, float("inf"), open_low=True)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    @property
    def temperature(self) -> Float[Tensor, ""]:
        """T, with a graph."""
        return self.log_temperature.exp()

    def forward(self, logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
        """The logits over T, in float32 or better."""
        check_floating("logits", logits)
        logits = at_least_float32(logits)
        return logits / self.temperature.to(logits.dtype)

    def fit(
        self,
        logits: Float[Tensor, "*batch classes"],
        target: Integer[Tensor, "*batch"],
        max_iter: int = 100,
    ) -> Self:
        """Set T to the minimiser of cross-entropy (L-BFGS in float64, on log T, from T = 1).

        Take held-out logits: where all predictions are right, as on a training set, the best T is 0, and where they
        are worse than chance it is infinity. Labels of -100 do not count.
        """
        check_classification(logits, target, None, None, -100)
        classes = logits.shape[-1]
        scores, labels = logits.detach().double().reshape(-1, classes), target.reshape(-1).long()
        log_temperature = torch.zeros((), dtype=torch.float64, device=logits.device, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [log_temperature],
            max_iter=max_iter,
            tolerance_grad=1e-10,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(scores / log_temperature.exp(), labels)
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        with torch.no_grad():
            self.log_temperature.copy_(log_temperature)
        return self


def transform_consistency_features(
    logits: Float[Tensor, "batch classes"],
    view_logits: Float[Tensor, "views batch classes"] | Sequence[Float[Tensor, "batch classes"]],
    *,
    k: int = 4,
) -> Float[Tensor, "batch features"]:
    r"""What transformed views of an input say about the classes that the model holds most likely.

    ::

        top      the k largest logits of the original, in descending order
        features = concat_v softmax(view_logits_v)[top]

    A prediction that survives the views is more often right. The original's own probabilities are not included.

    Args:
        logits: (N, C) of the original inputs.
        view_logits: (V, N, C), or V times (N, C); see :func:`view_logits`.
        k: how many classes, in [1, C]; 4 in the paper, reviews of which report that more hurt.

    Returns:
        (N, V k) probabilities, view by view, in float32 or better.

    Raises:
        ValueError: for a wrong shape, no view, or k out of range.
        TypeError: for a wrong dtype.

    Source:
        Optimizing Calibration by Gaining Aware of Prediction Correctness, arXiv 2404.13016.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
        >>> views = torch.tensor([[[2.0, 0.0, 1.0]], [[0.0, 2.0, 0.0]]])
        >>> transform_consistency_features(logits, views, k=2)
        tensor([[0.6652, 0.2447, 0.1065, 0.1065]])
    """
    check_floating("logits", logits)
    check_shape("logits", logits, ("N", "C"))
    if not isinstance(view_logits, Tensor):
        if not view_logits:
            raise ValueError("view_logits must hold at least one view, got none")
        view_logits = torch.stack(list(view_logits))
    check_floating("view_logits", view_logits)
    check_shape("view_logits", view_logits, ("V", *logits.shape))
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must lie in [1, {logits.shape[-1]}], the number of classes, got {k}")
    top = logits.topk(k, -1).indices
    probabilities = at_least_float32(view_logits).softmax(-1)
    found = probabilities.gather(-1, top.expand(probabilities.shape[0], -1, -1))
    return found.transpose(0, 1).flatten(1)


@torch.no_grad()
def view_logits(
    model: nn.Module, inputs: Tensor, views: Sequence[View]
) -> Float[Tensor, "views batch classes"]:
    """The logits of a frozen model on transformed views of a batch, in evaluation mode and without gradient.

    Args:
        model: inputs to logits (N, C).
        inputs: a batch, as the views take it.
        views: V callables; :func:`default_views` for images.

    Returns:
        (V, N, C) logits.

    Raises:
        ValueError: for no view.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> view_logits(model, torch.ones(5, 3), [torch.neg, lambda x: 0.9 * x]).shape
        torch.Size([2, 5, 2])
    """
    if not views:
        raise ValueError("views must hold at least one callable, got none")
    was_training = model.training
    model.eval()
    found = torch.stack([model(view(inputs)) for view in views])
    model.train(was_training)
    return found


def default_views(degrees: float = 15.0, jitter: float = 0.4) -> tuple[View, View, View]:
    """The paper's three kinds of views of images: rotated, grey, and with other colours.

    Each takes images (N, 1 or 3, H, W) with values in [0, 1] and does the same to all of them, so that the features
    of an example do not depend on its batch or on chance. Normalise for the model after them. The paper names the
    kinds; their strengths are RECONSTRUCTED, and so is that they are fixed.

    Args:
        degrees: angle of the rotation about the centre; what comes in from outside is black.
        jitter: brightness, then contrast, then saturation are multiplied by 1 + jitter; at least -1.

    Returns:
        Three callables for :func:`view_logits`.

    Raises:
        ValueError: for a jitter below -1.

    Source:
        Optimizing Calibration by Gaining Aware of Prediction Correctness, arXiv 2404.13016.

    Example:
        >>> import torch
        >>> rotated, grey, jittered = default_views()
        >>> grey(torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)).flatten()
        tensor([0.2990, 0.2990, 0.2990])
    """
    check_range("jitter", jitter, -1.0, float("inf"))
    return partial(_rotated, degrees=degrees), _grey, partial(_jittered, factor=1 + jitter)


def _rotated(images: Tensor, *, degrees: float) -> Tensor:
    _check_images(images)
    height, width = images.shape[-2:]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # the grid's coordinates run from -1 to 1 on both sides, whatever their lengths
    turn = [[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]]
    theta = torch.tensor(turn, dtype=images.dtype, device=images.device).expand(len(images), -1, -1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _luma(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device).reshape(1, 3, 1, 1)
    return (weights * images).sum(1, keepdim=True)


def _grey(images: Tensor) -> Tensor:
    _check_images(images)
    return _luma(images).expand_as(images)


def _jittered(images: Tensor, *, factor: float) -> Tensor:
    _check_images(images)
    images = (factor * images).clamp(0, 1)
    mean = _luma(images).mean((-1, -2), keepdim=True)
    images = (mean + factor * (images - mean)).clamp(0, 1)
    grey = _luma(images)
    return (grey + factor * (images - grey)).clamp(0, 1)


def _check_images(images: Tensor) -> None:
    check_floating("images", images)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (N, 1 or 3, H, W), got {tuple(images.shape)}")


class AdaptiveTemperature(nn.Module):
    r"""A temperature of its own for every example, from features of that example.

    ::

        T_i = clamp( w2 . relu(W1 features_i + b1) + b2, t_min, t_max ),      logits_i / T_i

    It changes no prediction, and no temperature takes a confidence below 1 / C. Train it on held-out data with
    :func:`fit_calibrator`, the classifier frozen.

    Args:
        num_features: width of the features, V k for those of :func:`transform_consistency_features`.
        hidden: hidden units.
        t_min: lowest temperature, above 0.
        t_max: highest temperature.
        init_temperature: where the network starts, about: b2. The authors' code leaves b2 as torch draws it, so that
            all temperatures may start below ``t_min``, where nothing is learned.
        parametrization: ``"clamp"`` has no gradient outside the bounds (the authors'); ``"softplus"`` approaches
            ``t_min`` smoothly, ``t_min + softplus(...)``, and clamps only at ``t_max``.

    Raises:
        ValueError: for bounds that are not ``0 < t_min < t_max``, an initial temperature that is not between them,
            or an unknown parametrization.

    The authors' network has a second branch that predicts correctness, and a scalar temperature; the calibrated
    logits depend on neither, and they are left out.

    Source:
        Optimizing Calibration by Gaining Aware of Prediction Correctness, arXiv 2404.13016.

    Example:
        >>> import torch
        >>> calibrator = AdaptiveTemperature(num_features=12)
        >>> logits, features = torch.randn(5, 10), torch.rand(5, 12)
        >>> calibrator(logits, features).shape, calibrator.temperature(features).shape
        (torch.Size([5, 10]), torch.Size([5]))
    """

    def __init__(
        self,
        num_features: int,
        hidden: int = 5,
        t_min: float = 0.1,
        t_max: float = 10.0,
        init_temperature: float = 1.0,
        parametrization: Literal["clamp", "softplus"] = "clamp",
    ) -> None:
        super().__init__()
        if not 0 < t_min < t_max:
            raise ValueError(f"t_min and t_max must satisfy 0 < t_min < t_max, got {t_min} and {t_max}")
        if not t_min < init_temperature < t_max:
            raise ValueError(f"init_temperature must lie in ({t_min}, {t_max}), got {init_temperature}")
        if parametrization not in ("clamp", "softplus"):
            raise ValueError(f"parametrization must be 'clamp' or 'softplus', got {parametrization!r}")
        self.num_features, self.t_min, self.t_max = num_features, t_min, t_max
        self.init_temperature, self.parametrization = init_temperature, parametrization
        self.hidden = nn.Linear(num_features, hidden)
        self.output = nn.Linear(hidden, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, as ``torch.nn.Linear`` does, around the initial temperature."""
        self.hidden.reset_parameters()
        self.output.reset_parameters()
        above = self.init_temperature - self.t_min
        start = (
            self.init_temperature
            if self.parametrization == "clamp"
            else above + math.log(-math.expm1(-above))
        )
        nn.init.constant_(self.output.bias, start)

    def temperature(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch"]:
        """T of every example, in [t_min, t_max]."""
        check_floating("features", features)
        if features.ndim < 1 or features.shape[-1] != self.num_features:
            raise ValueError(
                f"features must have shape (..., {self.num_features}), got {tuple(features.shape)}"
            )
        raw = self.output(self.hidden(features.to(self.hidden.weight.dtype)).relu()).squeeze(-1)
        raw = at_least_float32(raw)
        if self.parametrization == "softplus":
            return (self.t_min + F.softplus(raw)).clamp_max(self.t_max)
        return raw.clamp(self.t_min, self.t_max)

    def forward(
        self, logits: Float[Tensor, "*batch classes"], features: Float[Tensor, "*batch features"]
    ) -> Float[Tensor, "*batch classes"]:
        """The logits over the temperatures, in float32 or better."""
        check_floating("logits", logits)
        if features.shape[:-1] != logits.shape[:-1]:
            raise ValueError(
                f"features must have shape {(*logits.shape[:-1], self.num_features)}, got {tuple(features.shape)}"
            )
        logits = at_least_float32(logits)
        return logits / self.temperature(features).unsqueeze(-1).to(logits.dtype)

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        return f"t_min={self.t_min}, t_max={self.t_max}, parametrization={self.parametrization!r}"


@dataclass(frozen=True)
class _Shuffled:
    """Shuffled batches of the tensors' rows, in another order at every walk."""

    tensors: tuple[Tensor, ...]
    batch_size: int
    generator: torch.Generator | None

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        device = None if self.generator is None else self.generator.device
        order = torch.randperm(len(self.tensors[0]), generator=self.generator, device=device)
        for chosen in order.to(self.tensors[0].device).split(self.batch_size):
            yield tuple(tensor[chosen] for tensor in self.tensors)


def fit_calibrator(
    calibrator: nn.Module,
    logits: Float[Tensor, "batch classes"],
    features: Float[Tensor, "batch features"],
    target: Integer[Tensor, "batch"],
    loss: nn.Module | None = None,
    *,
    lr: float = 1e-4,
    epochs: int = 10,
    batch_size: int = 1000,
    generator: torch.Generator | None = None,
) -> list[dict[str, float]]:
    """Train a calibrator on held-out logits with Adam.

    The defaults are the authors', for the 50,000 images of ImageNet's validation set: 500 steps. On a small set ten
    epochs barely move the calibrator; raise ``epochs`` to some hundred steps, and ``lr`` to about 1e-2.

    Args:
        calibrator: called as ``calibrator(logits, features)``; only its parameters are trained.
        logits: (N, C) of the frozen classifier on examples that it was not trained on.
        features: (N, F) of the same examples.
        target: (N,) labels.
        loss: called as ``loss(calibrated_logits, target)``; by default
            :class:`telos.losses.CorrectnessAwareLoss`, of which the authors' code has the balanced form.
        lr: learning rate.
        epochs: walks through the examples.
        batch_size: examples of a step.
        generator: decides the order; without one it is torch's default generator of the CPU.

    Returns:
        One record per epoch, as :func:`telos.fit.fit` gives it: ``epoch``, ``loss`` and ``seconds``.

    Raises:
        ValueError: for a wrong shape or a label out of range.
        TypeError: for a wrong dtype.
        telos.fit.Diverged: when the loss is infinite or not a number.

    Source:
        Optimizing Calibration by Gaining Aware of Prediction Correctness, arXiv 2404.13016.

    Example:
        >>> import torch
        >>> calibrator = AdaptiveTemperature(num_features=2)
        >>> logits, features, target = torch.randn(50, 3), torch.rand(50, 2), torch.arange(50) % 3
        >>> history = fit_calibrator(calibrator, logits, features, target, lr=1e-2, epochs=20)
        >>> history[-1]["loss"] < history[0]["loss"]
        True
    """
    check_classification(logits, target, None, None, -100)
    check_floating("features", features)
    check_shape("features", features, (logits.shape[0], "F"))
    objective = CorrectnessAwareLoss() if loss is None else loss
    optimizer = torch.optim.Adam(calibrator.parameters(), lr=lr)

    def step(batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        scores, cues, labels = batch
        return {"loss": objective(calibrator(scores, cues), labels)}

    was_training = calibrator.training
    calibrator.train()
    with torch.enable_grad():
        data = _Shuffled((logits.detach(), features.detach(), target), batch_size, generator)
        history = fit(step, data, optimizer, epochs=epochs)
    calibrator.train(was_training)
    return history
