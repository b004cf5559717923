"""Interval bounds against exhaustive corners, sampled points, a second implementation and auto_LiRPA.

auto_LiRPA 0.3 is what the package index has. It asks for a torch of 2022 and works with a later one once three
names that are gone are given back: ``pip install --no-deps auto_LiRPA==0.3 appdirs`` runs its tests.
"""

import itertools
import math
import sys
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from telos.losses.robust.interval import IntervalTensor, margin_lower_bounds


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Residual(nn.Module):
    """``relu(x + body(x))``, written as models usually are."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.relu = body, nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.body(x)
        out += x
        return self.relu(out)


class Reshaped(nn.Module):
    """Functions and methods in place of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4 * 4, 3)
        self.register_buffer("mean", torch.tensor([0.3, 0.6]).view(2, 1, 1))

    def forward(self, x):
        x = (x - self.mean) / (2 * self.mean)
        x = F.avg_pool2d(F.max_pool2d(torch.tanh(self.first(x)), 2), 1)
        x = 1.0 - torch.add(x.relu(), torch.sigmoid(x), alpha=0.5)
        x = torch.sub(2.0 * x, -x) + self.mean.mean() * x - x.mean((2, 3)).reshape(x.size(0), -1, 1, 1)
        return self.head(x.view(x.shape[0], -1))


class Named(nn.Module):
    """Arithmetic by name: the operators between a box and a tensor do not compile."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        mean = torch.full((4,), 0.3, dtype=torch.float64)
        x = torch.add(torch.div(torch.sub(x, mean), mean), torch.mul(x, mean))
        return self.head(torch.sub(mean, torch.tanh(2.0 * x + 1)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


def mlp_bn() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU()),
        *(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
    )


def conv() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, bias=False), nn.ReLU()),
        *(nn.AvgPool2d(2), nn.Dropout(0.3), nn.Flatten(), nn.Linear(4, 3)),
    )


def residual() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()),
        Residual(nn.Conv2d(3, 3, 3, padding=1)),
        Residual(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)),
    )


NETWORKS = {
    "mlp": (mlp, (4,)),
    "mlp_bn": (mlp_bn, (4,)),
    "conv": (conv, (2, 4, 4)),
    "residual": (residual, (2, 4, 4)),
    "reshaped": (Reshaped, (2, 4, 4)),
    "named": (Named, (4,)),
}
networks = pytest.mark.parametrize("name", NETWORKS)


def network(name: str, n: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in evaluation mode with statistics and weights of its own, inputs in [0, 1] and labels."""
    build, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build().double()
        inputs = torch.rand(n, *shape, dtype=torch.float64)
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
    return model.eval(), inputs, torch.arange(n) % 3


def boxed(model: nn.Module, inputs: Tensor, eps: float, **keywords) -> IntervalTensor:
    return model(IntervalTensor.around(inputs, eps, (0.0, 1.0), **keywords))


# ------------------------------------------------------------------------------------------------- soundness


@networks
@pytest.mark.parametrize("eps", [0.01, 0.2])
def test_points_of_the_box_stay_within_the_bounds(name: str, eps: float) -> None:
    model, inputs, target = network(name)
    box = IntervalTensor.around(inputs, eps, (0.0, 1.0))
    logits = model(box)
    margins = margin_lower_bounds(logits, target)
    others = torch.tensor([[j for j in range(3) if j != y] for y in target.tolist()])
    for draw in range(1000 // 20):
        # half of the points on the corners, where bounds are attained
        mix = torch.rand((20, *inputs.shape), dtype=torch.float64, generator=generator(draw))
        mix = torch.where(mix[:, :1, :1].mean() > 0.5, mix, mix.round())
        points = box.lower + mix * (box.upper - box.lower)
        found = model(points.flatten(0, 1)).unflatten(0, (20, -1))
        assert (found >= logits.lower - 1e-12).all()
        assert (found <= logits.upper + 1e-12).all()
        gaps = found.gather(2, target.expand(20, -1)[..., None]) - found.gather(2, others.expand(20, -1, -1))
        assert (gaps >= margins - 1e-12).all()


@networks
def test_a_box_of_radius_zero_is_the_clean_pass(name: str) -> None:
    model, inputs, target = network(name)
    logits, clean = boxed(model, inputs, 0.0), model(inputs)
    for bound in (logits.lower, logits.upper, logits.clean):
        torch.testing.assert_close(bound, clean)
    margins = margin_lower_bounds(logits, target)
    torch.testing.assert_close(torch.relu(-margins).amax(1) == 0, clean.argmax(1) == target)


@networks
def test_a_smaller_box_has_tighter_bounds(name: str) -> None:
    model, inputs, _ = network(name)
    inner, outer = boxed(model, inputs, 0.05), boxed(model, inputs, 0.1)
    assert (inner.lower >= outer.lower).all()
    assert (inner.upper <= outer.upper).all()
    assert (inner.radius < outer.radius).any()


def test_one_linear_layer_attains_its_bounds_at_corners() -> None:
    layer = nn.Linear(5, 4).double()
    inputs = torch.rand(3, 5, dtype=torch.float64, generator=generator())
    box = IntervalTensor.around(inputs, 0.3, (0.0, 1.0))
    logits = layer(box)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=5)), dtype=torch.float64)
    found = layer(box.lower + corners[:, None] * (box.upper - box.lower))
    torch.testing.assert_close(logits.lower, found.amin(0))
    torch.testing.assert_close(logits.upper, found.amax(0))
    # the merged margins of a linear network are exact, those of separate bounds are not
    target = torch.tensor([0, 3, 1])
    margins = margin_lower_bounds(logits, target)
    for row, y in enumerate(target.tolist()):
        gaps = found[:, row, y, None] - found[:, row, [j for j in range(4) if j != y]]
        torch.testing.assert_close(margins[row], gaps.amin(0))
    assert (margins > margin_lower_bounds(IntervalTensor(logits.lower, logits.upper), target)).any()


def test_two_layers_are_bounded_by_the_corners_of_each() -> None:
    """The bounds of a network are those of its second layer over all corners of the first layer's bounds."""
    first, second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    inputs = torch.rand(3, 3, dtype=torch.float64, generator=generator())
    logits = nn.Sequential(first, nn.ReLU(), second)(IntervalTensor.around(inputs, 0.2))

    def over_corners(layer: nn.Module, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        corners = itertools.product((0.0, 1.0), repeat=lower.shape[1])
        choice = torch.tensor(list(corners), dtype=torch.float64)[:, None]
        found = layer(lower + choice * (upper - lower))
        return found.amin(0), found.amax(0)

    middle = over_corners(first, inputs - 0.2, inputs + 0.2)
    lower, upper = over_corners(second, *(bound.relu() for bound in middle))
    torch.testing.assert_close(logits.lower, lower)
    torch.testing.assert_close(logits.upper, upper)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 4, 3, padding=1, stride=2),
        nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(2, 4, (3, 1), padding="same", groups=2),
        nn.Conv3d(2, 3, 2, dilation=2),
        nn.ConvTranspose2d(2, 3, 2, stride=2),
        nn.BatchNorm2d(2),
        nn.BatchNorm2d(2, affine=False),
    ],
    ids=repr,
)
def test_layers_equal_the_matrix_they_are(layer: nn.Module) -> None:
    """Every linear layer against centre and radius under its own matrix, read off unit vectors."""
    shape = (2, *[4] * {"1d": 1, "2d": 2, "3d": 3}[type(layer).__name__[-2:]])
    layer = layer.double().eval()
    if isinstance(layer, nn.BatchNorm2d):
        layer.running_var.uniform_(0.5, 2.0, generator=generator())
        layer.running_mean.normal_(generator=generator())
        if layer.affine:
            layer.weight.data = torch.tensor([-1.5, 0.5], dtype=torch.float64)
    inputs = torch.randn(3, *shape, dtype=torch.float64, generator=generator())
    radius = torch.rand(3, *shape, dtype=torch.float64, generator=generator(1))
    box = layer(IntervalTensor(inputs - radius, inputs + radius))
    units = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    matrix = (layer(units) - layer(torch.zeros(1, *shape, dtype=torch.float64))).flatten(1)
    width = (radius.flatten(1) @ matrix.abs()).view(layer(inputs).shape)
    torch.testing.assert_close(box.lower, layer(inputs) - width)
    torch.testing.assert_close(box.upper, layer(inputs) + width)


# --------------------------------------------------------------------------------------- batch normalisation


def test_training_statistics_are_those_of_the_clean_batch() -> None:
    model, inputs, _ = network("mlp_bn")
    model.train()
    twin, _, _ = network("mlp_bn")
    twin.train()
    box = boxed(model, inputs, 0.1)
    clean = twin(inputs)
    torch.testing.assert_close(box.clean, clean)
    # running statistics move as in one clean pass
    for (name, mine), (_, theirs) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    # with these statistics frozen the bounds are the same
    with torch.no_grad():
        hidden = inputs
        for layer in model:
            if isinstance(layer, nn.BatchNorm1d):
                var, mean = torch.var_mean(hidden, 0, correction=0)
                layer.running_mean.copy_(mean)
                layer.running_var.copy_(var)
            layer.eval()
            hidden = layer(hidden)
        frozen = boxed(model, inputs, 0.1)
    torch.testing.assert_close(box.lower, frozen.lower)
    torch.testing.assert_close(box.upper, frozen.upper)


def test_gradient_flows_through_the_clean_statistics() -> None:
    layer = nn.BatchNorm1d(3).double()
    inputs = torch.randn(5, 3, dtype=torch.float64, generator=generator())

    def upper(points: Tensor) -> Tensor:
        # the box is held still: what is left of the gradient is that of the statistics
        box = IntervalTensor(inputs - 0.1, inputs + 0.1, points)
        return layer(box).upper

    assert torch.autograd.gradcheck(upper, inputs.clone().requires_grad_())


def test_one_value_per_channel_is_refused_in_training() -> None:
    model, inputs, _ = network("mlp_bn", 1)
    with pytest.raises(ValueError, match="more than 1 value"):
        boxed(model.train(), inputs, 0.1)


def test_training_needs_the_clean_point() -> None:
    model, inputs, _ = network("mlp_bn")
    with pytest.raises(ValueError, match="clean"):
        boxed(model.train(), inputs, 0.1, clean=False)
    assert boxed(model.eval(), inputs, 0.1, clean=False).clean is None


# ------------------------------------------------------------------------------------------------- the box


def test_box_around_inputs() -> None:
    inputs = torch.tensor([[0.1, 0.5, 0.9]])
    box = IntervalTensor.around(inputs, 0.2, (0.0, 1.0))
    torch.testing.assert_close(box.lower, torch.tensor([[0.0, 0.3, 0.7]]))
    torch.testing.assert_close(box.upper, torch.tensor([[0.3, 0.7, 1.0]]))
    torch.testing.assert_close(box.radius, torch.tensor([[0.15, 0.2, 0.15]]))
    assert box.clean is inputs
    per_channel = IntervalTensor.around(inputs, torch.tensor([0.0, 0.1, 0.2]), (torch.zeros(3), 1.0))
    torch.testing.assert_close(per_channel.upper, torch.tensor([[0.1, 0.6, 1.0]]))
    assert IntervalTensor.around(inputs.half(), 0.1).dtype == torch.float32


def test_relu_inputs_are_collected_in_order() -> None:
    model, inputs, _ = network("residual")
    collected: list[IntervalTensor] = []
    boxed(model, inputs, 0.1, relu_inputs=collected)
    assert [tuple(box.shape) for box in collected] == [(6, 3, 4, 4)] * 4
    # in-place ReLUs and sums do not reach back into what was collected
    first = model[0](IntervalTensor.around(inputs, 0.1, (0.0, 1.0)))
    torch.testing.assert_close(collected[0].lower, first.lower)
    assert all((box.lower < 0).any() for box in collected)


def test_in_place_changes_reach_every_name_of_the_box() -> None:
    box = IntervalTensor(torch.tensor([[-1.0, 1.0]]), torch.tensor([[2.0, 3.0]]))
    alias = box
    F.relu(box, inplace=True)
    alias += 1.0
    torch.testing.assert_close(box.lower, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(box.upper, torch.tensor([[3.0, 4.0]]))


def test_a_change_of_the_features_does_not_move_margins_taken_before() -> None:
    features = IntervalTensor(torch.zeros(1, 2), torch.ones(1, 2))
    logits = nn.Linear(2, 3)(features)
    expected = margin_lower_bounds(logits, torch.tensor([1]))
    features += features
    torch.testing.assert_close(margin_lower_bounds(logits, torch.tensor([1])), expected)


def test_margins_without_a_last_linear_layer() -> None:
    model, inputs, target = network("mlp")
    merged = margin_lower_bounds(boxed(model, inputs, 0.1), target)
    # a sum with zero hides the layer
    separate = margin_lower_bounds(boxed(model, inputs, 0.1) + 0.0, target)
    assert (merged >= separate - 1e-12).all()
    assert (merged > separate + 1e-6).any()


def test_upper_never_falls_below_lower_in_float32() -> None:
    model, inputs, _ = network("residual", 64)
    model, inputs = model.float(), inputs.float()
    collected: list[IntervalTensor] = []
    logits = model(IntervalTensor.around(inputs, 0.0, relu_inputs=collected))
    for box in (*collected, logits):
        assert (box.upper >= box.lower).all()


def test_autocast_and_half_weights_leave_the_box_in_float32() -> None:
    model, inputs, _ = network("mlp_bn")
    model, inputs = model.float(), inputs.float()
    expected = boxed(model, inputs, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        box = boxed(model, inputs, 0.1)
    torch.testing.assert_close(box.lower, expected.lower)
    assert boxed(model.half(), inputs.half(), 0.1).dtype == torch.float32


def test_meta_device_and_empty_batch() -> None:
    model, inputs, target = network("conv")
    meta = boxed(model.to("meta"), inputs.to("meta"), 0.1)
    assert margin_lower_bounds(meta, target.to("meta")).shape == (6, 2)
    model, inputs, target = network("conv")
    assert margin_lower_bounds(boxed(model, inputs[:0], 0.1), target[:0]).shape == (0, 2)


@pytest.mark.bare
@pytest.mark.parametrize("name", ["mlp", "mlp_bn", "conv", "residual", "named"])
def test_compiles_to_one_graph(name: str) -> None:
    model, inputs, target = network(name)

    def margins(points: Tensor) -> Tensor:
        return margin_lower_bounds(boxed(model, points, 0.1), target)

    compiled = torch.compile(margins, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs), margins(inputs))


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "unsound",
    [
        lambda box: torch.exp(box),
        lambda box: F.layer_norm(box, (2,)),
        lambda box: F.gelu(box),
        lambda box: F.dropout(box, training=True),
        lambda box: box * box,
        lambda box: torch.ones(2) / box,
        lambda box: box / box,
        lambda box: F.linear(torch.ones(1, 2), box),
    ],
)
def test_what_has_no_rule_is_refused(unsound: Callable) -> None:
    with pytest.raises(NotImplementedError, match="no interval bound"):
        unsound(IntervalTensor(torch.zeros(1, 2), torch.ones(1, 2)))


@pytest.mark.bare
def test_doors() -> None:
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    box = IntervalTensor(zeros, ones)
    for call, match in (
        (lambda: IntervalTensor(ones, zeros), "nowhere below"),
        (lambda: IntervalTensor(zeros, ones[:1]), "upper must have shape"),
        (lambda: IntervalTensor.around(zeros, -0.1), "eps must be at least 0"),
        (lambda: IntervalTensor.around(zeros, torch.tensor(-0.1)), "eps must be at least 0"),
        (lambda: IntervalTensor.around(2 * ones, 0.1, (0.0, 1.0)), "within bounds"),
        (lambda: margin_lower_bounds(box, torch.tensor([0])), "target must have shape"),
        (lambda: margin_lower_bounds(box, torch.tensor([0, 3])), "target must lie in"),
        (lambda: margin_lower_bounds(IntervalTensor(zeros[0], ones[0]), torch.tensor([0])), "at least two"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    for call, match in (
        (lambda: IntervalTensor(zeros.long(), ones.long()), "lower must have a floating"),
        (lambda: IntervalTensor.around(zeros.long(), 0.1), "inputs must have a floating"),
        (lambda: margin_lower_bounds(zeros, torch.tensor([0, 1])), "IntervalTensor"),
        (lambda: margin_lower_bounds(box, torch.tensor([0.0, 1.0])), "target must have an integer"),
    ):
        with pytest.raises(TypeError, match=match):
            call()


# ------------------------------------------------------------------------------------------------- auto_LiRPA


@pytest.fixture
def lirpa(monkeypatch: pytest.MonkeyPatch):
    """auto_LiRPA, with what torch and NumPy have dropped since given back for the length of the test."""
    import torch.onnx.symbolic_helper as helper

    if "numpy.lib.arraysetops" not in sys.modules:
        sets = types.ModuleType("numpy.lib.arraysetops")
        sets.isin = np.isin
        monkeypatch.setitem(sys.modules, "numpy.lib.arraysetops", sets)
    if not hasattr(helper, "_set_opset_version"):
        monkeypatch.setattr(helper, "_set_opset_version", lambda version: None, raising=False)
    if not hasattr(torch._C.Node, "__getitem__"):
        monkeypatch.setattr(
            torch._C.Node,
            "__getitem__",
            lambda node, name: getattr(node, node.kindOf(name))(name),
            raising=False,
        )
    return pytest.importorskip(
        "auto_LiRPA",
        reason="auto_LiRPA is not installed: pip install --no-deps auto_LiRPA==0.3 appdirs",
        exc_type=ImportError,
    )


@pytest.mark.parametrize("name", ["mlp", "mlp_bn", "conv", "residual"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_bounds_equal_auto_lirpa(lirpa, name: str, training: bool) -> None:
    from auto_LiRPA.perturbations import PerturbationLpNorm

    model, inputs, target = network(name)
    model.train(training)
    if name == "conv":  # auto_LiRPA draws a mask for dropout even in evaluation
        model[6] = nn.Identity()
    lower, upper = (inputs - 0.07).clamp_min(0), (inputs + 0.07).clamp_max(1)
    spec = torch.eye(3, dtype=torch.float64)[target].unsqueeze(1) - torch.eye(3, dtype=torch.float64)
    spec = torch.stack([rows[torch.arange(3) != y] for rows, y in zip(spec, target, strict=True)])
    theirs = lirpa.BoundedModule(model, inputs)
    theirs.train(training)
    model.train(training)  # the conversion puts one-dimensional batch normalisation into evaluation mode
    boundary = PerturbationLpNorm(norm=np.inf, x_L=lower, x_U=upper)
    point = lirpa.BoundedTensor(inputs, boundary)
    theirs(point)
    expected = theirs.compute_bounds(x=(point,), IBP=True, method=None)
    margins, _ = theirs.compute_bounds(x=(point,), IBP=True, C=spec, method=None, bound_upper=False)
    logits = boxed(model, inputs, 0.07)
    torch.testing.assert_close((logits.lower, logits.upper), expected)
    torch.testing.assert_close(margin_lower_bounds(logits, target), margins)
