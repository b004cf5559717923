import pytest
import torch
from torch import Tensor

from telos.data.selection.rejection import CoverageRefill
from telos.losses.classification.dco import DCOLoss, dco_factor


def scores(*p: float) -> Tensor:
    return torch.tensor(p, dtype=torch.float64).log()


def test_hands_out_full_batches_of_what_is_unsolved_in_order() -> None:
    logps = scores(0.9, 0.01, 0.8, 0.02, 0.01, 0.7, 0.03, 0.01, 0.02)
    refill = CoverageRefill(range(9), lambda index: logps[index], batch_size=2, n_samples=16, block_size=4)
    assert [batch.tolist() for batch in refill] == [[1, 3], [4, 6], [7, 8]]
    assert refill.waiting == []
    assert (refill.scored, refill.kept) == (9, 6)
    assert refill.mean_factor == pytest.approx(dco_factor(logps, n_samples=16).mean().item())


def test_what_is_left_comes_first_in_the_next_epoch() -> None:
    logps = scores(0.01, 0.01, 0.01, 0.9)
    refill = CoverageRefill([0, 1, 2, 3], lambda index: logps[index], batch_size=2)
    assert [batch.tolist() for batch in refill] == [[0, 1]]
    assert refill.waiting == [2]
    assert [batch.tolist() for batch in refill] == [[2, 0], [1, 2]]


def test_one_sample_keeps_everything() -> None:
    refill = CoverageRefill(
        range(4), lambda index: scores(0.999).expand(len(index)), batch_size=2, n_samples=1
    )
    assert [batch.tolist() for batch in refill] == [[0, 1], [2, 3]]


def test_solved_examples_end_the_epoch_without_a_batch() -> None:
    refill = CoverageRefill(range(5), lambda index: scores(0.99).expand(len(index)), batch_size=1)
    assert list(refill) == []
    assert (refill.scored, refill.kept) == (5, 0)


def test_threshold() -> None:
    logps = scores(0.1, 0.2, 0.3)
    factors = dco_factor(logps, n_samples=8).tolist()
    refill = CoverageRefill(
        range(3), lambda index: logps[index], batch_size=1, n_samples=8, threshold=factors[1]
    )
    assert [batch.tolist() for batch in refill] == [[0]]  # only what exceeds it


def test_each_block_is_scored_by_the_model_as_it_is() -> None:
    """Training on what is handed out solves it, and later blocks then hold less."""
    logits = torch.nn.Parameter(torch.zeros(2))
    target = torch.zeros(6, dtype=torch.long)

    def score(index: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return logits.log_softmax(-1)[target[index]]

    refill = CoverageRefill(range(6), score, batch_size=2, n_samples=4)
    loss, batches = DCOLoss(4), 0
    for batch in refill:
        loss(logits.expand(len(batch), 2), target[batch]).backward()
        with torch.no_grad():
            logits -= 100 * logits.grad
        batches += 1
    assert (batches, refill.scored) == (1, 6)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must lie in"),
        ({"n_samples": 0.5}, "n_samples must lie in"),
        ({"threshold": 1.0}, "threshold must lie in"),
        ({"block_size": 0}, "block_size must lie in"),
    ],
)
def test_doors(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoverageRefill(range(3), lambda index: index.float(), **{"batch_size": 1, **options})


@pytest.mark.bare
def test_scores_are_checked() -> None:
    with pytest.raises(ValueError, match="score"):
        next(iter(CoverageRefill(range(3), lambda index: torch.zeros(5), batch_size=2)))
    with pytest.raises(TypeError, match="score"):
        next(iter(CoverageRefill(range(3), lambda index: index, batch_size=2)))
