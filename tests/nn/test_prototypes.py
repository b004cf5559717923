"""The head of class directions."""

import pytest
import torch
import torch.nn.functional as F

from telos.losses import normalized_softmax_loss
from telos.nn import HypersphericalHead


def head(mode: str = "reparam", **options: object) -> HypersphericalHead:
    made = HypersphericalHead(5, 3, mode=mode, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        made.weight.mul_(torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64))
    return made


def test_logits_are_scaled_cosines() -> None:
    made, embeddings = head(scale=7.0), torch.randn(2, 4, 5, dtype=torch.float64)
    cosine = F.cosine_similarity(embeddings[:, :, None], made.weight[None, None], dim=-1)
    torch.testing.assert_close(made(embeddings), 7.0 * cosine)


@pytest.mark.parametrize("mode", ["reparam", "project"])
def test_cross_entropy_of_its_logits_is_the_loss(mode: str) -> None:
    made, embeddings = head(mode), torch.randn(6, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    torch.testing.assert_close(
        F.cross_entropy(made(embeddings), labels),
        normalized_softmax_loss(embeddings, labels, made.weight, scale=10.0, mode=mode),  # type: ignore[arg-type]
    )


def test_prediction_depends_on_neither_scale_nor_length() -> None:
    embeddings = torch.randn(20, 5, dtype=torch.float64)
    made = head()
    sharp = head(scale=100.0)
    sharp.weight.data.copy_(3 * made.weight)
    assert torch.equal(made(embeddings).argmax(1), sharp(embeddings).argmax(1))
    torch.testing.assert_close(made(embeddings), made(9 * embeddings))


def test_learned_scale_trains() -> None:
    made = head(learn_scale=True, scale=4.0)
    F.cross_entropy(made(torch.randn(6, 5, dtype=torch.float64)), torch.arange(6) % 3).backward()
    assert made.log_scale is not None
    assert made.log_scale.grad is not None
    assert made.log_scale.grad != 0


def test_projection_and_directions() -> None:
    made = head("project")
    before = made.directions().detach()
    made.project_()
    torch.testing.assert_close(made.weight.detach(), before, rtol=3e-7, atol=0)
    torch.testing.assert_close(before.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_half_precision_gives_float32_logits() -> None:
    made = HypersphericalHead(5, 3).to(torch.bfloat16)
    assert made(torch.randn(2, 5, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.bare
def test_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"embeddings must have shape \(..., 5\)"):
        head()(torch.randn(2, 4, dtype=torch.float64))
