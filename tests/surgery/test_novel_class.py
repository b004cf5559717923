"""New classes without training."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses import NormalizedSoftmaxLoss
from telos.nn import HypersphericalHead
from telos.surgery import add_class, class_prototype, replace_classes


@pytest.fixture
def head() -> HypersphericalHead:
    made = HypersphericalHead(4, 3, scale=12.0).double()
    with torch.no_grad():
        made.weight.mul_(torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64))
    return made


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_prototype_is_the_mean_direction() -> None:
    support = normal(5, 4)
    mean = (support / support.norm(dim=1, keepdim=True)).mean(0)
    torch.testing.assert_close(class_prototype(support), mean / mean.norm())
    long = support * torch.tensor([[1.0], [1000.0], [1.0], [1.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(class_prototype(long), class_prototype(support))


def test_one_shot_prototype_has_cosine_one_with_its_example(head: HypersphericalHead) -> None:
    support = normal(1, 4)
    assert add_class(head, support)(support)[0, -1].item() == pytest.approx(12.0, rel=1e-12)


def test_known_rows_and_their_logits_stay(head: HypersphericalHead) -> None:
    grown = add_class(head, normal(6, 4))
    assert torch.equal(grown.weight[:3], head.weight)
    queries = normal(9, 4, seed=1)
    # a wider matrix product may sum in another order, no more
    torch.testing.assert_close(grown(queries)[:, :3], head(queries), rtol=1e-13, atol=1e-13)


def test_one_after_the_other_equals_both_at_once(head: HypersphericalHead) -> None:
    first, second = normal(3, 4, seed=1), normal(2, 4, seed=2)
    mixed = torch.stack([second[0], first[0], first[1], second[1], first[2]])
    both = add_class(head, mixed, torch.tensor([70, 30, 30, 70, 30]))
    torch.testing.assert_close(both.weight, add_class(add_class(head, first), second).weight)


def test_the_old_head_is_left_alone(head: HypersphericalHead) -> None:
    before = head.weight.detach().clone()
    grown = add_class(head, normal(6, 4))
    with torch.no_grad():
        grown.weight.zero_()
    assert torch.equal(head.weight, before)
    assert head.num_classes == 3
    assert grown.num_classes == 4
    assert grown.weight.requires_grad
    assert not grown.weight.grad_fn


@pytest.mark.parametrize("mode", ["reparam", "project"])
@pytest.mark.parametrize("learn_scale", [False, True])
def test_scale_mode_and_dtype_are_taken_over(mode: str, learn_scale: bool) -> None:
    old = HypersphericalHead(4, 3, 6.5, learn_scale, mode).double().eval()  # type: ignore[arg-type]
    old.weight.requires_grad_(False)
    grown = add_class(old, normal(2, 4))
    assert torch.equal(torch.as_tensor(grown.scale), torch.as_tensor(old.scale))
    assert (grown.mode, grown.training, grown.weight.dtype) == (mode, False, torch.float64)
    assert (grown.log_scale is not None) == learn_scale
    assert not grown.weight.requires_grad


def test_a_loss_that_owns_the_weights_will_do() -> None:
    loss = NormalizedSoftmaxLoss(3, 4, scale=8.0).double()
    queries = normal(5, 4, seed=3)
    grown = add_class(loss, normal(2, 4))
    known = grown(queries)[:, :3]
    torch.testing.assert_close(known, 8.0 * F.normalize(queries, dim=1) @ F.normalize(loss.weight, dim=1).T)


def test_replacing_drops_the_known_classes(head: HypersphericalHead) -> None:
    support, labels = normal(6, 4), torch.tensor([1, 0, 1, 0, 1, 1])
    novel = replace_classes(head, support, labels)
    assert novel.weight.shape == (2, 4)
    torch.testing.assert_close(novel.weight.detach(), add_class(head, support, labels).weight[3:].detach())
    torch.testing.assert_close(novel.weight[1].detach(), class_prototype(support[labels == 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_that_cancel(dtype: torch.dtype) -> None:
    angles = torch.tensor([0.0, 2 * torch.pi / 3, 4 * torch.pi / 3], dtype=torch.float64)
    support = (5 * torch.stack([angles.cos(), angles.sin()], 1)).to(dtype)
    with pytest.raises(ValueError, match="directions that cancel"):
        class_prototype(support)
    head = HypersphericalHead(2, 2).to(dtype)
    with pytest.raises(ValueError, match="new class 1 must have a mean direction"):
        add_class(head, torch.cat([support, support[:1]]), torch.tensor([5, 5, 5, 4]))
    flat = add_class(head, support, strict=False)
    assert torch.count_nonzero(flat.weight[2]) == 0
    assert torch.count_nonzero(flat(support)[:, 2]) == 0


@pytest.mark.bare
def test_refuses_what_it_cannot_use(head: HypersphericalHead) -> None:
    with pytest.raises(ValueError, match=r"support_embeddings must have shape \(K, 4\)"):
        add_class(head, normal(2, 5))
    with pytest.raises(ValueError, match="at least one example"):
        add_class(head, normal(0, 4))
    with pytest.raises(ValueError, match="labels must have shape"):
        add_class(head, normal(2, 4), torch.tensor([0]))
    with pytest.raises(TypeError, match="labels must have an integer dtype"):
        add_class(head, normal(2, 4), torch.tensor([0.0, 1.0]))
