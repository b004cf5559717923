import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from telos.losses import (
    ALDRKLLoss,
    CrammerSingerLoss,
    CrossEntropyLoss,
    EnsLoss,
    FocalLoss,
    Loss,
    MAELoss,
    Mixture,
    SmoothAdversarialCompSumLoss,
    TaskInfo,
    misfit,
)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randint(5, (6,), generator=generator)


class PlainEntropy(nn.Module):
    """Somebody else's loss: the family's call and nothing more."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


class PlainKeywords(nn.Module):
    """Takes any keyword, and says which came."""

    def __init__(self) -> None:
        super().__init__()
        self.got: dict = {}

    def forward(self, logits: Tensor, target: Tensor, **keywords: Tensor) -> Tensor:
        self.got = keywords
        return logits.sum() * 0


class OtherFamily(Loss):
    family = "metric"


def linear(step: int) -> float:
    return 0.5 * step


# ---------------------------------------------------------------------------------------------- sums


def test_a_sum_is_the_sum_and_a_multiple_the_multiple() -> None:
    logits, target = batch()
    ce, focal = CrossEntropyLoss(), FocalLoss(3.0)
    mixture = ce + 0.1 * focal
    torch.testing.assert_close(mixture(logits, target), ce(logits, target) + 0.1 * focal(logits, target))
    torch.testing.assert_close((focal * 0.25)(logits, target), 0.25 * focal(logits, target))
    terms = mixture.terms(logits, target)
    assert list(terms) == ["cross_entropy_loss", "focal_loss"]
    torch.testing.assert_close(terms["focal_loss"], focal(logits, target), msg="terms are unweighted")


def test_gradients_flow_through_every_term() -> None:
    logits, target = batch()
    leaf = logits.clone().requires_grad_()
    (2 * CrossEntropyLoss() + 3 * MAELoss())(leaf, target).backward()
    twin = logits.clone().requires_grad_()
    p = twin.softmax(-1).gather(1, target[:, None])
    (2 * F.cross_entropy(twin, target) + 3 * (1 - p).mean()).backward()
    torch.testing.assert_close(leaf.grad, twin.grad)


def test_nested_sums_are_flat_and_products_distribute() -> None:
    logits, target = batch()
    ce, focal, mae = CrossEntropyLoss(), FocalLoss(), MAELoss()
    nested = 2 * (ce + 0.5 * (focal + 4 * mae))
    assert nested.current_weights() == [2.0, 1.0, 4.0]
    assert [type(loss) for loss in nested.losses] == [CrossEntropyLoss, FocalLoss, MAELoss]
    expected = 2 * ce(logits, target) + focal(logits, target) + 4 * mae(logits, target)
    torch.testing.assert_close(nested(logits, target), expected)
    torch.testing.assert_close(((ce + focal) + mae)(logits, target), (ce + (focal + mae))(logits, target))


def test_the_sum_of_a_list() -> None:
    logits, target = batch()
    losses = [CrossEntropyLoss(), FocalLoss(), MAELoss()]
    torch.testing.assert_close(sum(losses)(logits, target), sum(loss(logits, target) for loss in losses))


def test_equal_classes_get_names_of_their_own() -> None:
    logits, target = batch()
    mixture = FocalLoss(1.0) + FocalLoss(3.0) + MAELoss()
    terms = mixture.terms(logits, target)
    assert list(terms) == ["focal_loss_1", "focal_loss_2", "mae_loss"]
    torch.testing.assert_close(terms["focal_loss_2"], FocalLoss(3.0)(logits, target))


def test_a_plain_loss_is_one_term() -> None:
    logits, target = batch()
    assert FocalLoss().terms(logits, target) == {"focal_loss": FocalLoss()(logits, target)}


def test_a_plain_module_stands_on_either_side() -> None:
    logits, target = batch()
    for mixture in (CrossEntropyLoss() + PlainEntropy(), CrossEntropyLoss().__radd__(PlainEntropy())):
        torch.testing.assert_close(
            mixture(logits, target), CrossEntropyLoss()(logits, target) + PlainEntropy()(logits, target)
        )
    torch_loss = nn.CrossEntropyLoss()  # its arguments are called input and target
    torch.testing.assert_close(
        (FocalLoss() + torch_loss)(logits, target), FocalLoss()(logits, target) + torch_loss(logits, target)
    )


def test_the_terms_are_not_copied() -> None:
    focal = FocalLoss(1.0)
    mixture = CrossEntropyLoss() + focal
    assert mixture.losses[1] is focal
    assert isinstance(mixture.losses, nn.ModuleList)


# ---------------------------------------------------------------------------------------------- denominators


def test_each_term_keeps_its_own_denominator() -> None:
    logits, target = batch()
    target[:2] = -100
    weight = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
    mixture = CrossEntropyLoss(class_weight=weight) + 3 * CrossEntropyLoss()
    expected = F.cross_entropy(logits, target, weight=weight) + 3 * F.cross_entropy(logits, target)
    torch.testing.assert_close(mixture(logits, target), expected)


def test_sample_weight_and_denominator_reach_every_term() -> None:
    logits, target = batch()
    weight = torch.linspace(0.0, 2.0, 6, dtype=torch.float64)
    ce, mae = CrossEntropyLoss(), MAELoss()
    keywords = {"sample_weight": weight, "denominator": 7.0}
    torch.testing.assert_close(
        (ce + mae)(logits, target, **keywords),
        ce(logits, target, **keywords) + mae(logits, target, **keywords),
    )


# ---------------------------------------------------------------------------------------------- keywords


def test_keywords_go_to_the_terms_that_take_them() -> None:
    logits, target = batch()
    moved, index = logits.flip(0), torch.arange(6)
    adversarial, adaptive = SmoothAdversarialCompSumLoss(), ALDRKLLoss(6)
    mixture = adversarial + adaptive + CrossEntropyLoss()
    twin = copy.deepcopy(adaptive)
    expected = (
        adversarial(logits, target, adversarial_logits=moved)
        + twin(logits, target, index=index)
        + F.cross_entropy(logits, target)
    )
    torch.testing.assert_close(mixture(logits, target, adversarial_logits=moved, index=index), expected)
    assert adaptive.memory.seen.all()


def test_a_module_with_any_keyword_gets_them_all() -> None:
    logits, target = batch()
    greedy = PlainKeywords()
    (FocalLoss() + greedy)(logits, target, sample_weight=torch.ones(6, dtype=torch.float64), colour=target)
    assert sorted(greedy.got) == ["colour", "sample_weight"]


def test_a_keyword_that_nobody_takes_raises() -> None:
    logits, target = batch()
    with pytest.raises(
        TypeError, match=r"no term of cross_entropy_loss [+] focal_loss takes the keyword 'index'"
    ):
        (CrossEntropyLoss() + FocalLoss())(logits, target, index=target)


@pytest.mark.parametrize("keyword", ["sample_weight", "denominator"])
def test_a_weight_that_a_term_would_not_honour_raises(keyword: str) -> None:
    logits, target = batch()
    value = torch.ones(6, dtype=torch.float64) if keyword == "sample_weight" else 3.0
    with pytest.raises(TypeError, match=f"{keyword} would be ignored by plain_entropy"):
        (CrossEntropyLoss() + PlainEntropy())(logits, target, **{keyword: value})


def test_a_missing_keyword_raises() -> None:
    logits, target = batch()
    with pytest.raises(TypeError, match="adversarial_logits"):
        (CrossEntropyLoss() + SmoothAdversarialCompSumLoss())(logits, target)


# ---------------------------------------------------------------------------------------------- schedules


def test_a_schedule_counts_training_steps() -> None:
    logits, target = batch()
    ce, mae = CrossEntropyLoss(), MAELoss()
    mixture = ce + linear * mae
    for step in range(4):
        expected = ce(logits, target) + 0.5 * step * mae(logits, target)
        torch.testing.assert_close(mixture(logits, target), expected)
    with torch.no_grad():
        mixture(logits, target)
    mixture.eval()
    mixture(logits, target)
    assert int(mixture.steps) == 4


def test_schedules_multiply() -> None:
    mixture = 2 * (linear * (CrossEntropyLoss() + 3 * MAELoss()))
    mixture.steps += 2
    assert mixture.current_weights() == [2.0, 6.0]
    squared = linear * (linear * MAELoss())
    squared.steps += 4
    assert squared.current_weights() == [4.0]


def test_a_mixture_of_numbers_takes_no_steps() -> None:
    logits, target = batch()
    mixture = CrossEntropyLoss() + 2 * MAELoss()
    mixture(logits, target)
    assert int(mixture.steps) == 0


# ---------------------------------------------------------------------------------------------- state


def test_state_dict_holds_the_steps_and_the_state_of_the_terms() -> None:
    logits, target = batch()

    def build() -> Mixture:
        return linear * CrossEntropyLoss() + ALDRKLLoss(6, temperature=2.0)

    mixture = build()
    for _ in range(3):
        mixture(logits, target, index=torch.arange(6))
    fresh = build()
    fresh.load_state_dict(mixture.state_dict())
    assert int(fresh.steps) == 3
    expected = mixture.eval()(logits, target, index=torch.arange(6))
    for twin in (fresh, copy.deepcopy(mixture)):
        torch.testing.assert_close(twin.eval()(logits, target, index=torch.arange(6)), expected)


@pytest.mark.parametrize("weight", [0.5, linear])
def test_a_mixture_can_be_pickled(weight: float) -> None:
    logits, target = batch()
    mixture = weight * CrossEntropyLoss() + MAELoss()
    mixture(logits, target)
    twin = pickle.loads(pickle.dumps(mixture))
    torch.testing.assert_close(twin(logits, target), mixture(logits, target))


def test_train_and_eval_reach_the_terms() -> None:
    scores, target = torch.randn(8, 2, dtype=torch.float64), torch.arange(8) % 2
    mixture = EnsLoss() + CrossEntropyLoss()
    torch.testing.assert_close(mixture.eval()(scores, target), 2 * F.cross_entropy(scores, target))


def test_parameters_of_the_terms_are_the_mixtures() -> None:
    class Scaled(Loss):
        family = "classification"

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(self.scale * logits, target)

    assert [name for name, _ in (MAELoss() + Scaled()).named_parameters()] == ["losses.1.scale"]


# ---------------------------------------------------------------------------------------------- declarations


def test_a_mixture_declares_what_its_terms_declare() -> None:
    mixture = ALDRKLLoss(4) + SmoothAdversarialCompSumLoss() + EnsLoss() + PlainEntropy()
    assert mixture.family == "classification"
    assert mixture.needs == {"index", "adversarial_logits"}
    assert mixture.binary_only
    three = TaskInfo("classification", num_classes=3, supplies=frozenset({"index", "adversarial_logits"}))
    assert "two classes" in str(misfit(mixture, three))
    assert misfit(CrossEntropyLoss() + CrammerSingerLoss(), three) is None
    assert not (CrossEntropyLoss() + MAELoss()).binary_only
    assert Mixture.needs == frozenset(), "the class itself is left alone"


def test_repr_shows_names_and_weights() -> None:
    text = repr(CrossEntropyLoss() + 0.1 * FocalLoss() + linear * MAELoss())
    assert "1 * cross_entropy_loss + 0.1 * focal_loss + schedule * mae_loss" in text


@pytest.mark.bare
def test_doors() -> None:
    with pytest.raises(ValueError, match="must share a call"):
        CrossEntropyLoss() + OtherFamily()
    with pytest.raises(TypeError, match=r"torch.nn.Module, got int"):
        CrossEntropyLoss() + 3
    with pytest.raises(TypeError, match="weight must be a number or a function"):
        "0.1" * CrossEntropyLoss()
    with pytest.raises(ValueError, match="at least one"):
        Mixture([])
