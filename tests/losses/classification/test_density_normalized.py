import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses import TaskInfo, misfit
from telos.losses.classification.density_normalized import (
    DensityNormalizedCrossEntropyLoss,
    density_normalized_cross_entropy_loss,
)
from telos.metrics.ranking import triplet_weights, weighted_triplet_recall
from tests.declaration import Declaration, classification_sample, shifted
from tests.golden.adapters import Case, gradients

declarations = [
    Declaration(
        function=density_normalized_cross_entropy_loss,
        module=DensityNormalizedCrossEntropyLoss,
        sample=classification_sample(),
        rows=False,
        invariances={"shift of the logits": shifted(3.7)},
    ),
    Declaration(
        function=None,
        module=lambda: DensityNormalizedCrossEntropyLoss("dnorm-fgbg", beta=0.3, background_class=1),
        sample=classification_sample(),
        rows=False,
    ),
]


def golden_density_normalized_edge(case: Case) -> dict[str, object]:
    if case.params.get("function") == "weighted_triplet_recall":
        ranks, counts = case.inputs["ranks"], case.inputs["train_counts"]
        weights = triplet_weights(counts)
        return {
            "weights": weights,
            "recall": [
                weighted_triplet_recall(ranks, torch.ones_like(counts), k=k) for k in case.params["ks"]
            ],
            "weighted_recall": [weighted_triplet_recall(ranks, counts, k=k) for k in case.params["ks"]],
            "weighted_mean_rank": (weights * ranks).sum(),
        }
    logits, target = case.leaf("logits"), case.inputs["target"]
    options = {name: case.params[name] for name in ("alpha", "beta", "gamma", "background_class")}
    loss = density_normalized_cross_entropy_loss(logits, target, mode=case.params["loss_type"], **options)
    return {
        "loss": loss,
        "grad_logits": gradients(loss, logits)[0],
        "m_fg": (target != options["background_class"]).sum(),
        "m_bg": (target == options["background_class"]).sum(),
    }


def edges() -> tuple[Tensor, Tensor]:
    """Ten edges, of which three are annotated."""
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits.requires_grad_(), torch.tensor([0, 2, 0, 0, 3, 0, 0, 1, 0, 0])


def loss_of(logits: Tensor, target: Tensor, **options: object) -> Tensor:
    return density_normalized_cross_entropy_loss(logits, target, **options)


def test_unit_weights_are_cross_entropy_over_the_density() -> None:
    logits, target = edges()
    plain = F.cross_entropy(logits, target)
    torch.testing.assert_close(loss_of(logits, target), plain * 10 / 3)
    torch.testing.assert_close(loss_of(logits, target, mode="baseline"), plain)


def test_weights_by_definition() -> None:
    logits, target = edges()
    nll = F.cross_entropy(logits, target, reduction="none")
    front, back = nll[target > 0], nll[target == 0]
    options = {"alpha": 0.5, "beta": 2.0, "gamma": 3.0}
    expected = {
        "dnorm": 3 * (0.5 * front.sum() / 3 + 2 * back.sum() / 3),
        "dnorm-fgbg": 3 * (0.5 * front.mean() + 2 * back.mean()),
        "baseline": 3 * (0.5 * front.sum() + 2 * back.sum()) / 10,
    }
    for mode, want in expected.items():
        torch.testing.assert_close(loss_of(logits, target, mode=mode, **options), want)


def test_more_background_leaves_the_foreground_alone() -> None:
    """Each background edge five times: M goes from 10 to 38."""
    logits, target = edges()
    front = target > 0
    times = torch.where(front, 1, 5)

    def foreground_gradient(mode: str, repeated: bool) -> Tensor:
        if repeated:
            loss = loss_of(logits.repeat_interleave(times, 0), target.repeat_interleave(times), mode=mode)
        else:
            loss = loss_of(logits, target, mode=mode)
        return gradients(loss, logits)[0][front]

    for mode in ("dnorm", "dnorm-fgbg"):
        torch.testing.assert_close(foreground_gradient(mode, True), foreground_gradient(mode, False))
    torch.testing.assert_close(
        foreground_gradient("baseline", True), foreground_gradient("baseline", False) * 10 / 38
    )


def test_without_foreground() -> None:
    logits, _ = edges()
    target = torch.zeros(10, dtype=torch.long)
    nll = F.cross_entropy(logits, target, reduction="none")
    # the authors' code leaves the weight of 1, without beta
    torch.testing.assert_close(loss_of(logits, target, beta=7.0, gamma=2.0), 2 * nll.sum())
    torch.testing.assert_close(loss_of(logits, target, beta=7.0, empty_foreground="mean"), nll.mean())
    torch.testing.assert_close(loss_of(logits, target, mode="dnorm-fgbg", beta=7.0), 7 * nll.mean())


@pytest.mark.parametrize("mode", ["dnorm", "dnorm-fgbg", "baseline"])
def test_without_background(mode: str) -> None:
    logits, _ = edges()
    target = torch.arange(10) % 3 + 1
    torch.testing.assert_close(loss_of(logits, target, mode=mode), F.cross_entropy(logits, target))


@pytest.mark.parametrize("mode", ["dnorm", "dnorm-fgbg", "baseline"])
def test_nothing_that_counts_is_zero_with_a_graph(mode: str) -> None:
    logits, _ = edges()
    loss = loss_of(logits, torch.full((10,), -100), mode=mode)
    assert loss.item() == 0
    assert (gradients(loss, logits)[0] == 0).all()


@pytest.mark.parametrize("mode", ["dnorm", "dnorm-fgbg", "baseline"])
def test_ignored_edges_are_in_neither_count(mode: str) -> None:
    logits, target = edges()
    ignored = target.clone()
    ignored[[0, 1]] = -100  # one of the background, one annotated
    torch.testing.assert_close(
        loss_of(logits, ignored, mode=mode, beta=0.4), loss_of(logits[2:], target[2:], mode=mode, beta=0.4)
    )


def test_another_background_class() -> None:
    logits, target = edges()
    swapped = torch.tensor([3, 1, 2, 0])
    torch.testing.assert_close(
        loss_of(logits[:, swapped], swapped[target], background_class=3), loss_of(logits, target)
    )


@pytest.mark.parametrize("mode", ["dnorm", "dnorm-fgbg"])
def test_reductions_agree(mode: str) -> None:
    logits, target = edges()
    mean = loss_of(logits, target, mode=mode)
    torch.testing.assert_close(loss_of(logits, target, mode=mode, reduction="none").mean(), mean)
    torch.testing.assert_close(loss_of(logits, target, mode=mode, reduction="sum"), 10 * mean)
    torch.testing.assert_close(loss_of(logits, target, mode=mode, denominator=20.0), mean / 2)


def test_sequences_are_edges() -> None:
    logits, target = edges()
    torch.testing.assert_close(
        loss_of(logits.reshape(2, 5, 4), target.reshape(2, 5)), loss_of(logits, target)
    )


def test_it_fits_a_classification_task() -> None:
    info = TaskInfo(family="classification", num_classes=10)
    assert misfit(DensityNormalizedCrossEntropyLoss, info) is None


@pytest.mark.bare
def test_errors() -> None:
    logits, target = edges()
    with pytest.raises(TypeError, match="target must have an integer dtype"):
        loss_of(logits, logits.softmax(-1))
    with pytest.raises(ValueError, match="background_class must lie in"):
        loss_of(logits, target, background_class=4)
    for name in ("alpha", "beta", "gamma"):
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            loss_of(logits, target, **{name: -1.0})
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            DensityNormalizedCrossEntropyLoss(**{name: -1.0})
    with pytest.raises(ValueError, match="mode must be"):
        loss_of(logits, target, mode="density")
    with pytest.raises(ValueError, match="empty_foreground must be"):
        loss_of(logits, target, empty_foreground="none")
