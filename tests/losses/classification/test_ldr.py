import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses import (
    ALDRKLLoss,
    CrammerSingerLoss,
    LDRKLLoss,
    TaskInfo,
    WestonWatkinsLoss,
    aldr_kl_loss,
    crammer_singer_loss,
    ldr_kl_loss,
    misfit,
    weston_watkins_loss,
)
from tests.declaration import Declaration, Inputs, classification_sample, shifted
from tests.golden.adapters import Case, gradients


def adaptive_sample(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    inputs = classification_sample()(n, generator, dtype)
    # the module starts every example of its training set at 10
    return {
        **inputs,
        "sample_temperature": torch.full((256,), 10.0),
        "index": torch.randperm(n, generator=generator),
    }


declarations = [
    Declaration(
        function=ldr_kl_loss,
        module=LDRKLLoss,
        sample=classification_sample(),
        invariances={"shift of the logits": shifted(3.7)},
    ),
    Declaration(
        function=aldr_kl_loss,
        module=lambda: ALDRKLLoss(256),
        sample=adaptive_sample,
        state=("sample_temperature",),
        surrogate="the temperature moves with the logits, and its gradient is stopped",
        module_only=("num_examples",),
    ),
    Declaration(
        function=crammer_singer_loss,
        module=CrammerSingerLoss,
        sample=classification_sample(),
        kinks="where two classes tie, and at a margin of c",
        invariances={"shift of the logits": shifted(3.7)},
    ),
    Declaration(
        function=weston_watkins_loss,
        module=WestonWatkinsLoss,
        sample=classification_sample(),
        kinks="at margins of c",
        invariances={"shift of the logits": shifted(3.7)},
    ),
]


def golden_ldr_losses(case: Case) -> dict[str, Any]:
    params = case.params
    margin = params.get("threshold", 0.0)
    if params["loss"] == "ALDRLoss_V1":
        return {"calls": _golden_adaptive(case)}
    logits, target = case.leaf("logits"), case.inputs["target"]
    if params["loss"] == "LDRLoss_V1":
        loss = ldr_kl_loss(logits, target, temperature=params["Lambda"], margin=margin, normalize="softplus")
    elif params["loss"] == "CELoss_v1":
        loss = ldr_kl_loss(logits, target, temperature=1.0, margin=0.0)
    elif params["loss"] == "CSLoss":
        loss = crammer_singer_loss(logits, target, margin=margin)
    else:
        loss = {"WWLoss": weston_watkins_loss}[params["loss"]](logits, target, margin=margin)
    return {"loss": loss, "grad_logits": gradients(loss, logits)[0]}


def _golden_adaptive(case: Case) -> list[dict[str, Any]]:
    params, answers = case.params, []
    state = torch.full((params["N"],), params["Lambda"], dtype=torch.float64)
    for entry in case.inputs["calls"]:
        logits = entry["logits"].clone().requires_grad_()
        loss, state = aldr_kl_loss(
            logits,
            entry["target"],
            sample_temperature=state,
            index=entry["index"],
            temperature=params["Lambda"],
            alpha=params["alpha"],
            margin=params["threshold"],
            normalize="softplus" if params["softplus"] else "l1",
        )
        answers.append({"loss": loss, "grad_logits": gradients(loss, logits)[0], "lambda_after": state})
    return answers


def batch(n: int = 6, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (n,), generator=generator)


def deltas(logits: Tensor, target: Tensor, margin: float) -> Tensor:
    """``f_k - f_y + c * 1[k != y]``, written out."""
    wrong = 1 - F.one_hot(target, logits.shape[-1]).double()
    return logits - logits.gather(1, target[:, None]) + torch.tensor(margin, dtype=torch.float64) * wrong


def each_label(loss, logits: Tensor, probabilities: Tensor, **options: Any) -> Tensor:
    """``sum_y q_y loss(logits, y)``, one label at a time."""
    total = torch.zeros(len(logits), dtype=logits.dtype)
    for y in range(logits.shape[-1]):
        target = torch.full((len(logits),), y)
        total = total + probabilities[:, y] * loss(logits, target, reduction="none", **options)
    return total


# ---------------------------------------------------------------------------------------------- LDR-KL


def test_temperature_one_is_cross_entropy_less_log_classes() -> None:
    logits, target = batch()
    expected = F.cross_entropy(logits, target) - math.log(5)
    torch.testing.assert_close(ldr_kl_loss(logits, target, margin=0.0), expected)


@pytest.mark.parametrize("margin", [0.0, 0.1, 2.0])
def test_small_temperature_is_the_crammer_singer_hinge(margin: float) -> None:
    logits, target = batch()
    loss = ldr_kl_loss(logits, target, temperature=1e-4, margin=margin, reduction="none")
    hinge = crammer_singer_loss(logits, target, margin=margin, reduction="none")
    # between max - T log C and max
    assert ((hinge - 1e-4 * math.log(5) - 1e-12 <= loss) & (loss <= hinge + 1e-12)).all()


def test_large_temperature_is_the_mean_and_symmetric() -> None:
    logits, target = batch()
    loss = ldr_kl_loss(logits, target, temperature=1e6, margin=0.3, reduction="none")
    torch.testing.assert_close(loss, deltas(logits, target, 0.3).mean(-1), rtol=0, atol=1e-4)
    everything = each_label(ldr_kl_loss, logits, torch.ones_like(logits), temperature=1e6, margin=0.3)
    torch.testing.assert_close(everything, torch.full((6,), 0.3 * 4, dtype=torch.float64), rtol=0, atol=1e-4)


def test_falls_and_is_convex_in_the_temperature_between_its_limits() -> None:
    logits, target = batch()
    temperatures = torch.linspace(0.05, 8.0, 60).tolist()
    curve = torch.stack(
        [ldr_kl_loss(logits, target, temperature=t, margin=0.5, reduction="none") for t in temperatures]
    )
    delta = deltas(logits, target, 0.5)
    assert (curve.diff(dim=0) < 0).all()
    assert (curve.diff(n=2, dim=0) > -1e-12).all()
    assert (curve >= delta.mean(-1)).all()
    assert (curve <= delta.amax(-1)).all()
    floor = -torch.tensor(temperatures, dtype=torch.float64) * math.log(5)
    assert (curve >= floor[:, None]).all()


def test_gradient_is_the_adversary_less_the_label() -> None:
    logits, target = batch()
    leaf = logits.clone().requires_grad_()
    (slope,) = gradients(ldr_kl_loss(leaf, target, temperature=0.7, margin=0.4, reduction="sum"), leaf)
    adversary = torch.softmax(deltas(logits, target, 0.4) / 0.7, -1)
    torch.testing.assert_close(slope, adversary - F.one_hot(target, 5))


def test_is_the_maximum_over_the_simplex() -> None:
    """Exponentiated gradient ascent on p, which knows nothing of the closed form."""
    logits, target = batch()
    delta, temperature = deltas(logits, target, 0.4), 1.3
    p = torch.full_like(delta, 0.2)

    def payoff(p: Tensor) -> Tensor:
        return (p * delta).sum(-1) - temperature * (p * (5 * p).log()).sum(-1)

    for _ in range(400):
        p = torch.softmax(p.log() + 0.1 * (delta - temperature * (5 * p).log()), -1)
    loss = ldr_kl_loss(logits, target, temperature=temperature, margin=0.4, reduction="none")
    torch.testing.assert_close(payoff(p), loss)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = torch.softmax(2 * torch.randn(delta.shape, generator=generator, dtype=torch.float64), -1)
        assert (payoff(other) <= loss).all()


@pytest.mark.parametrize("normalize", [None, "softplus", "l1"])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 10.0])
def test_probabilities_average_the_labels(normalize: Any, temperature: float) -> None:
    logits, _ = batch(scale=20.0)
    probabilities = torch.softmax(batch()[0], -1)
    options = {"temperature": temperature, "margin": 0.8, "normalize": normalize}
    torch.testing.assert_close(
        ldr_kl_loss(logits, probabilities, reduction="none", **options),
        each_label(ldr_kl_loss, logits, probabilities, **options),
    )


def test_probability_one_on_a_label_keeps_its_digits() -> None:
    """The largest score dwarfs the others: their sum must not be a difference of large numbers."""
    logits, target = torch.tensor([[400.0, 0.0, 1.0]], dtype=torch.float64), torch.tensor([0])
    sure = F.one_hot(target, 3).double()
    expected = 0.5 * math.log1p(math.exp(2 * 150.0 - 800) + math.exp(2 * 151.0 - 800)) - 0.5 * math.log(3)
    loss = ldr_kl_loss(logits, sure, temperature=0.5, margin=150.0)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    leaf = logits.clone().requires_grad_()
    (slope,) = gradients(ldr_kl_loss(leaf, sure, temperature=0.5, margin=150.0), leaf)
    expected_slope = torch.tensor([math.exp(2 * 150.0 - 800), math.exp(2 * 151.0 - 800)], dtype=torch.float64)
    torch.testing.assert_close(slope[0, 1:], expected_slope, rtol=1e-10, atol=0)


@pytest.mark.parametrize("normalize", ["softplus", "l1"])
def test_normalised_scores_have_mean_size_one(normalize: Any) -> None:
    logits, target = batch()
    raised = F.softplus(logits) if normalize == "softplus" else logits
    scores = raised / raised.abs().mean(-1, keepdim=True)
    torch.testing.assert_close(
        ldr_kl_loss(logits, target, temperature=2.0, normalize=normalize),
        ldr_kl_loss(scores, target, temperature=2.0),
    )


def test_l1_normalisation_ignores_the_scale() -> None:
    logits, target = batch()
    torch.testing.assert_close(
        ldr_kl_loss(7 * logits, target, normalize="l1"), ldr_kl_loss(logits, target, normalize="l1")
    )


def test_softplus_scores_survive_where_softplus_underflows() -> None:
    """softplus(f) is e^f down there, so its normalised scores are C * softmax(f), and learning goes on."""
    logits = torch.tensor([[-30000.0, -30001.0, -30002.0]], requires_grad=True)
    loss = ldr_kl_loss(logits, torch.tensor([2]), normalize="softplus", margin=0.0)
    scores = 3 * torch.softmax(torch.tensor([[0.0, -1.0, -2.0]]), -1)
    torch.testing.assert_close(loss, F.cross_entropy(scores, torch.tensor([2])) - math.log(3))
    assert gradients(loss, logits)[0].abs().min() > 1e-3


# ---------------------------------------------------------------------------------------------- ALDR-KL

PLAIN: dict[str, Any] = {"temperature": 1.5, "alpha": 2.0, "margin": 0.3, "normalize": None}


def penalty(temperature: Tensor, options: dict[str, Any] = PLAIN, classes: int = 5) -> Tensor:
    price = options["alpha"] * math.log(classes) / options["temperature"]
    return price / 2 * (temperature - options["temperature"]) ** 2


def test_exact_temperature_is_stationary_and_maximal() -> None:
    logits, target = batch(n=40)
    loss, new = aldr_kl_loss(
        logits, target, sample_temperature=torch.ones(40), exact=True, reduction="none", **PLAIN
    )
    new = aldr_kl_loss(logits, target, sample_temperature=torch.ones(40).double(), exact=True, **PLAIN)[1]

    def objective(temperature: Tensor) -> Tensor:
        delta = deltas(logits, target, 0.3) / temperature[:, None]
        return temperature * (torch.logsumexp(delta, -1) - math.log(5)) - penalty(temperature)

    leaf = new.clone().requires_grad_()
    (slope,) = gradients(objective(leaf), leaf)
    assert slope.abs().max() < 1e-8
    torch.testing.assert_close(loss, objective(new))
    # no point between the stationary temperature and the start is better
    for share in torch.linspace(0, 1, 20).tolist():
        assert (objective(new + share * (1.5 - new)) <= loss + 1e-12).all()


def test_exact_loss_is_at_least_ldr_kl_at_the_start() -> None:
    logits, target = batch(n=40, scale=5.0)
    exact = aldr_kl_loss(
        logits, target, sample_temperature=torch.ones(40), exact=True, reduction="none", **PLAIN
    )[0]
    fixed = ldr_kl_loss(logits, target, temperature=1.5, margin=0.3, reduction="none")
    assert (exact >= fixed).all()
    assert (exact > fixed + 1e-3).any()


def test_exact_gradient_is_that_of_the_value() -> None:
    logits, target = batch(n=4)
    state = torch.ones(4, dtype=torch.float64)
    for normalize in (None, "softplus"):
        options = {**PLAIN, "normalize": normalize, "exact": True}
        assert torch.autograd.gradcheck(
            lambda leaf, options=options: aldr_kl_loss(leaf, target, sample_temperature=state, **options)[0],
            logits.clone().requires_grad_(),
        )


def test_one_step_gradient_is_taken_at_the_new_temperature() -> None:
    """The analytic oracle of the surrogate: p* - e_y at the returned temperature, the normaliser aside."""
    logits, target = batch()
    leaf = logits.clone().requires_grad_()
    state = torch.linspace(0.8, 1.5, 6, dtype=torch.float64)
    loss, new = aldr_kl_loss(leaf, target, sample_temperature=state, reduction="sum", **PLAIN)
    adversary = torch.softmax(deltas(logits, target, 0.3) / new[:, None], -1)
    torch.testing.assert_close(gradients(loss, leaf)[0], adversary - F.one_hot(target, 5))
    value = new * (torch.logsumexp(deltas(logits, target, 0.3) / new[:, None], -1) - math.log(5)) - penalty(
        new
    )
    torch.testing.assert_close(loss.detach(), value.sum())


def test_infinite_price_is_ldr_kl() -> None:
    logits, target = batch()
    options = {**PLAIN, "alpha": 1e12}
    expected = ldr_kl_loss(logits, target, temperature=1.5, margin=0.3)
    for exact in (False, True):
        state = torch.full((6,), 1.5, dtype=torch.float64)
        loss, new = aldr_kl_loss(logits, target, sample_temperature=state, exact=exact, **options)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(new, state)


@pytest.mark.parametrize("exact", [False, True])
def test_temperature_stays_in_its_interval(exact: bool) -> None:
    logits, target = batch(n=50, scale=30.0)
    state = torch.full((50,), 1.5, dtype=torch.float64)
    for _ in range(5):
        _, state = aldr_kl_loss(logits, target, sample_temperature=state, exact=exact, **PLAIN)
        assert (state >= 1.5 * (1 - 1 / 2.0)).all()
        assert (state <= 1.5).all()
    assert state.min() < 0.8, "a confident example comes close to the lower end"


def test_uniform_prediction_keeps_the_temperature() -> None:
    state = torch.full((2,), 1.1)
    _, new = aldr_kl_loss(torch.zeros(2, 4), torch.tensor([0, 1]), sample_temperature=state, temperature=1.5)
    torch.testing.assert_close(new, torch.full((2,), 1.5))


def test_one_step_probabilities_average_the_labels() -> None:
    """The authors' temperature does not see the label, so that the loss is linear in it."""
    logits, _ = batch()
    probabilities = torch.softmax(batch()[0] / 3, -1)
    state = torch.linspace(0.8, 1.5, 6, dtype=torch.float64)

    def loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return aldr_kl_loss(logits, target, sample_temperature=state, **options)[0]

    torch.testing.assert_close(
        loss(logits, probabilities, reduction="none", **PLAIN),
        each_label(loss, logits, probabilities, **PLAIN),
    )


def test_memory_follows_the_index_and_ignored_rows_keep_theirs() -> None:
    logits, target = batch()
    loss = ALDRKLLoss(10, temperature=1.5, normalize=None)
    index = torch.tensor([9, 2, 4, 0, 7, 5])
    target = torch.where(torch.arange(6) == 1, -100, target)
    logits[1] = torch.nan
    loss(logits, target, index=index)
    state = torch.full((6,), 1.5)
    expected = aldr_kl_loss(logits, target, sample_temperature=state, temperature=1.5, normalize=None)[1]
    torch.testing.assert_close(loss.memory.temperature[index], expected)
    assert expected[1] == 1.5
    assert loss.memory.seen.tolist() == [i in (9, 4, 0, 7, 5) for i in range(10)]


def test_function_addresses_the_training_set_by_index() -> None:
    logits, target = batch()
    index = torch.tensor([9, 2, 4, 0, 7, 5])
    state = torch.linspace(0.7, 1.5, 10, dtype=torch.float64)
    loss, new = aldr_kl_loss(logits, target, sample_temperature=state, index=index, **PLAIN)
    expected, moved = aldr_kl_loss(logits, target, sample_temperature=state[index], **PLAIN)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(new[index], moved)
    untouched = [1, 3, 6, 8]
    assert torch.equal(new[untouched], state[untouched])


def test_second_visit_starts_from_the_first() -> None:
    logits, target = batch()
    index = torch.arange(6)
    loss = ALDRKLLoss(6, temperature=1.5, normalize=None)
    loss(logits, target, index=index)
    first = loss.memory.temperature.clone()
    expected, second = aldr_kl_loss(logits, target, sample_temperature=first, temperature=1.5, normalize=None)
    torch.testing.assert_close(loss(logits, target, index=index), expected)
    torch.testing.assert_close(loss.memory.temperature, second)


def test_without_index_every_example_is_new_and_nothing_is_remembered() -> None:
    logits, target = batch()
    loss = ALDRKLLoss(6, temperature=1.5)
    fresh = loss(logits, target)
    assert not loss.memory.seen.any()
    state = torch.full((6,), 1.5)
    torch.testing.assert_close(
        fresh, aldr_kl_loss(logits, target, sample_temperature=state, temperature=1.5)[0]
    )


def test_evaluation_reads_the_memory() -> None:
    logits, target = batch()
    loss = ALDRKLLoss(6, temperature=1.5, normalize=None).eval()
    loss.memory.temperature.fill_(0.8)
    expected = aldr_kl_loss(
        logits, target, sample_temperature=torch.full((6,), 0.8), temperature=1.5, normalize=None
    )[0]
    torch.testing.assert_close(loss(logits, target, index=torch.arange(6)), expected)
    assert (loss.memory.temperature == torch.tensor(0.8)).all()


def test_sequences_need_no_memory() -> None:
    logits, target = batch()
    flat = ALDRKLLoss(6)(logits, target)
    torch.testing.assert_close(ALDRKLLoss(6)(logits.reshape(2, 3, 5), target.reshape(2, 3)), flat)


def test_built_from_a_task() -> None:
    info = TaskInfo("classification", num_classes=3, num_examples=12, supplies=frozenset({"index"}))
    assert misfit(ALDRKLLoss, info) is None
    assert ALDRKLLoss.from_task(info, alpha=3.0).memory.num_examples == 12
    assert misfit(ALDRKLLoss, TaskInfo("classification", num_classes=3, num_examples=12)) is not None
    with pytest.raises(ValueError, match="num_examples"):
        ALDRKLLoss.from_task(TaskInfo("classification", num_classes=3))


# ---------------------------------------------------------------------------------------------- hinges


def test_crammer_singer_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.5], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    loss = crammer_singer_loss(logits, torch.tensor([1, 0, 2]), margin=1.0, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.5, 0.0, 1.0]))


def test_crammer_singer_probabilities_average_the_labels() -> None:
    logits, _ = batch()
    logits[0, :2] = 9.0  # a tie at the top
    probabilities = torch.softmax(batch()[0], -1)
    torch.testing.assert_close(
        crammer_singer_loss(logits, probabilities, reduction="none"),
        each_label(crammer_singer_loss, logits, probabilities),
    )


@pytest.mark.parametrize("margin", [0.1, 1.0, 10.0])
def test_weston_watkins_is_torchs_multi_margin_loss(margin: float) -> None:
    logits, target = batch()
    torch.testing.assert_close(
        weston_watkins_loss(logits, target, margin=margin), F.multi_margin_loss(logits, target, margin=margin)
    )


def test_hinges_agree_for_two_classes() -> None:
    logits, target = batch(classes=2)
    torch.testing.assert_close(2 * weston_watkins_loss(logits, target), crammer_singer_loss(logits, target))


# ---------------------------------------------------------------------------------------------- doors


@pytest.mark.bare
def test_doors() -> None:
    logits, target = batch()
    for bad in ({"temperature": 0.0}, {"margin": -0.1}, {"normalize": "l2"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ldr_kl_loss(logits, target, **bad)
        with pytest.raises(ValueError, match=next(iter(bad))):
            LDRKLLoss(**bad)
        with pytest.raises(ValueError, match=next(iter(bad))):
            ALDRKLLoss(4, **bad)
    with pytest.raises(ValueError, match="margin"):
        crammer_singer_loss(logits, target, margin=-1.0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        ldr_kl_loss(logits[:, :1], torch.zeros(6, dtype=torch.long))
    state = torch.ones(6)
    with pytest.raises(ValueError, match="alpha"):
        aldr_kl_loss(logits, target, sample_temperature=state, alpha=1.0, exact=True)
    with pytest.raises(ValueError, match="sample_temperature must have shape"):
        aldr_kl_loss(logits, target, sample_temperature=state[:3])
    with pytest.raises(ValueError, match="index must lie in"):
        aldr_kl_loss(logits, target, sample_temperature=state[:4], index=torch.arange(6))
    with pytest.raises(TypeError, match="sample_temperature"):
        aldr_kl_loss(logits, target, sample_temperature=state.long())
    with pytest.raises(ValueError, match="index must lie in"):
        ALDRKLLoss(4)(logits, target, index=torch.arange(6))
    for loss in (weston_watkins_loss, WestonWatkinsLoss()):
        with pytest.raises(TypeError, match="target must have an integer dtype"):
            loss(logits, torch.softmax(logits, -1))
    soft = torch.softmax(logits, -1)
    with pytest.raises(TypeError, match="target must have an integer dtype"):
        ALDRKLLoss(6, exact=True)(logits, soft)
    with pytest.raises(TypeError, match="target must have an integer dtype"):
        aldr_kl_loss(logits, soft, sample_temperature=state, exact=True)


def test_exact_temperatures_at_extreme_scores() -> None:
    """A row of KL = log C: the stationary temperature is T_0 (1 - 1/alpha), and nothing overflows on the way."""
    logits = torch.tensor([[30000.0, -30000.0, 0.0]], requires_grad=True)
    loss, new = aldr_kl_loss(
        logits,
        torch.tensor([0]),
        sample_temperature=torch.full((1,), 10.0),
        temperature=10.0,
        alpha=2.0,
        normalize=None,
        exact=True,
    )
    torch.testing.assert_close(new, torch.tensor([5.0]))
    # psi at T = 5 is -T log 3, and the price of leaving T_0 is (alpha log C / (2 T_0)) (T - T_0)^2
    expected = -5 * math.log(3) - 2 * math.log(3) / 20 * 25
    torch.testing.assert_close(loss.detach(), torch.tensor(expected))
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
