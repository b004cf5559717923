"""TinyLM: padding, positions and causality against the model's own answer to the bare sequence."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses import cross_entropy_loss, sequence_logps, token_logps
from telos.nn.models.tiny_lm import TinyLM


def small(**options: object) -> TinyLM:
    torch.manual_seed(3)
    # weights larger than at the start, so that attention and positions matter
    model = TinyLM(13, dim=16, layers=2, heads=2, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(13, shape, generator=torch.Generator().manual_seed(1))


def test_a_token_depends_on_its_past_alone() -> None:
    model, tokens = small(), ids(1, 6)
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 13
    one, two = model(tokens), model(changed)
    torch.testing.assert_close(one[:, :3], two[:, :3], rtol=0, atol=0)
    assert ((one - two)[:, 3:].abs().amax(-1) > 1e-6).all()


def test_the_order_of_the_past_matters() -> None:
    model = small()
    one, two = model(torch.tensor([[1, 2, 3, 4]])), model(torch.tensor([[2, 1, 3, 4]]))
    assert (one - two)[0, -1].abs().max() > 1e-3


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.int32])
def test_padding_anywhere_gives_the_logits_of_the_bare_sequence(kind: torch.dtype) -> None:
    model, tokens = small(), ids(1, 4)
    want = model(tokens)
    for places in ([0, 1, 2, 3], [3, 4, 5, 6], [1, 2, 4, 6]):  # padding right, left, and in between
        padded, mask = torch.full((1, 7), 11), torch.zeros(1, 7, dtype=kind)
        padded[:, places], mask[:, places] = tokens, 1
        got = model(padded, attention_mask=mask)
        torch.testing.assert_close(got[:, places], want, rtol=1e-10, atol=1e-10)
        assert torch.isfinite(got).all()


def test_embeddings_in_place_of_tokens() -> None:
    model, tokens = small(), ids(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    embeds = model.get_input_embeddings()(tokens).detach().requires_grad_()
    got = model(inputs_embeds=embeds, attention_mask=mask)
    torch.testing.assert_close(got, model(tokens, attention_mask=mask), rtol=0, atol=0)
    (slope,) = torch.autograd.grad(got[1, -1].sum(), embeds)
    assert (slope[1, :2] == 0).all(), "padding reaches nothing"
    assert (slope[0] == 0).all(), "another row reaches nothing"
    assert (slope[1, 2:].abs().amax(-1) > 0).all()


def test_hidden_and_head_are_the_logits_and_serve_token_logps() -> None:
    model, tokens = small(), ids(2, 5)
    hidden = model.hidden(tokens)
    assert hidden.shape == (2, 5, 16)
    torch.testing.assert_close(hidden @ model.head.weight.T, model(tokens))
    torch.testing.assert_close(
        token_logps(hidden[:, :-1], model.head.weight, tokens[:, 1:], reduction="sum"),
        sequence_logps(model(tokens)[:, :-1], tokens[:, 1:]),
    )


def test_tied_and_untied_heads() -> None:
    torch.manual_seed(0)
    tied, untied = TinyLM(50, dim=8, heads=2), TinyLM(50, dim=8, heads=2, tied=False)
    assert tied.head.weight is tied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 50 * 8
    twin = copy.deepcopy(tied)
    assert twin.head.weight is twin.embedding.weight
    twin.load_state_dict(tied.state_dict())
    tied(torch.tensor([[1, 2]])).square().sum().backward()
    assert tied.embedding.weight.grad is not None
    assert (tied.embedding.weight.grad[3:] != 0).any(), "the output layer reaches the shared weight"


def test_initial_weights() -> None:
    torch.manual_seed(0)
    one = TinyLM(200, dim=64, layers=3, heads=4)
    torch.manual_seed(0)
    two = TinyLM(200, dim=64, layers=3, heads=4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    block = one.blocks[0]
    assert one.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for written in (block.out, block.down):
        assert written.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
        assert (written.bias == 0).all()
    # nearly uniform: the loss before training is log V
    loss = cross_entropy_loss(one(torch.randint(200, (4, 9))), torch.randint(200, (4, 9)))
    assert loss.item() == pytest.approx(math.log(200), rel=0.02)


def test_without_biases() -> None:
    names = [name for name, _ in TinyLM(7, dim=8, heads=2, bias=False).named_parameters()]
    assert not [name for name in names if name.endswith("bias")]


def test_dropout_in_training_alone() -> None:
    torch.manual_seed(0)
    model, tokens = TinyLM(13, dim=16, heads=2, dropout=0.5), ids(1, 4)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_it_learns_to_copy() -> None:
    torch.manual_seed(0)
    model = TinyLM(12, dim=32, layers=2, heads=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        half = torch.randint(12, (64, 3), generator=generator)
        tokens = torch.cat([half, half], 1)
        loss = F.cross_entropy(model(tokens)[:, 2:-1].flatten(0, 1), half.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_empty_batches(shape: tuple[int, int]) -> None:
    tokens = torch.zeros(shape, dtype=torch.long)
    assert TinyLM(5, dim=8, heads=2)(tokens).shape == (*shape, 5)


def test_meta_and_autocast() -> None:
    model = TinyLM(5, dim=8, heads=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 1]]))).all()
    model = model.to("meta")
    assert model(torch.zeros(2, 3, dtype=torch.long, device="meta")).device.type == "meta"


@pytest.mark.bare
def test_compiles_to_one_graph() -> None:
    model, tokens = small(), ids(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, mask), model(tokens, mask))


@pytest.mark.bare
def test_doors() -> None:
    with pytest.raises(ValueError, match="dim must be an even multiple of heads, got dim=12 and heads=4"):
        TinyLM(5, dim=12, heads=4)
    with pytest.raises(ValueError, match="layers must lie in"):
        TinyLM(5, layers=0)
    with pytest.raises(ValueError, match="dropout must lie in"):
        TinyLM(5, dropout=1.5)
    model, tokens = TinyLM(5, dim=8, heads=2), torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(tokens, inputs_embeds=torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(1, 2\), got \(1, 3\)"):
        model(tokens, attention_mask=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="inputs_embeds must have shape"):
        model(inputs_embeds=torch.zeros(1, 2, 6))
