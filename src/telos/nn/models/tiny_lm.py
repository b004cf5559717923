"""A small causal language model, for experiments in which a large one would be out of place."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from telos.losses._checks import check_range, check_shape


class TinyLM(nn.Module):
    r"""A causal transformer: pre-norm blocks, rotary positions, GELU, layer normalisation before the output layer.

    ::

        x   = embedding(input_ids)                   or inputs_embeds
        x   = x + attention(norm(x));  x = x + mlp(norm(x))        for every block
        logits_t = head(norm(x))_t                   predicts token t + 1

    Padding may stand on either side or anywhere else: attended tokens are numbered from 0 in their order and see
    attended tokens only, so that their logits are those of the sequence without padding. What the model gives at
    padding means nothing (but is finite).

    It takes the arguments of a ``transformers`` causal language model and returns the logits themselves. Blocks
    are in ``blocks``; :meth:`hidden` and ``head.weight`` are what :func:`telos.losses.token_logps` and
    :func:`telos.losses.linear_loss` take. Weights come from torch's global seed: normal with standard deviation
    0.02, divided by ``sqrt(2 layers)`` where a block writes into the residual stream, and zero biases.

    Args:
        vocab_size: number of tokens V.
        dim: width D, an even multiple of ``heads``.
        layers: number of blocks.
        heads: attention heads of a block.
        mlp_ratio: width of the hidden layer of a block over D.
        dropout: probability with which what a block writes is dropped in training, in [0, 1].
        bias: whether linear layers and normalisations have biases; the output layer has none.
        tied: whether the output layer shares its weight with the embedding.

    Raises:
        ValueError: for sizes below 1, a width that the heads cannot share evenly, or a dropout out of range.

    Source:
        Rotary positions: RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv 2104.09864.

    Example:
        >>> import torch
        >>> model = TinyLM(11, dim=8, layers=1, heads=2)
        >>> ids = torch.tensor([[3, 1, 4], [1, 5, 0]])
        >>> model(ids, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]])).shape
        torch.Size([2, 3, 11])
        >>> embeds = model.get_input_embeddings()(ids)
        >>> torch.equal(model(ids), model(inputs_embeds=embeds))
        True
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 64,
        layers: int = 2,
        heads: int = 4,
        *,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        bias: bool = True,
        tied: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("layers", layers), ("mlp_ratio", mlp_ratio)):
            check_range(name, value, 1, float("inf"))
        if heads < 1 or dim < 1 or dim % (2 * heads):
            raise ValueError(f"dim must be an even multiple of heads, got dim={dim} and heads={heads}")
        check_range("dropout", dropout, 0.0, 1.0)
        blocks = [_Block(dim, heads, mlp_ratio, dropout, bias) for _ in range(layers)]
        self.head_dim = dim // heads
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, bias=bias)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for block in blocks:
                block.out.weight /= math.sqrt(2 * layers)
                block.down.weight /= math.sqrt(2 * layers)
        if tied:
            self.head.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens, by the name that ``transformers`` gives it."""
        return self.embedding

    def hidden(
        self,
        input_ids: Integer[Tensor, "batch tokens"] | None = None,
        attention_mask: Bool[Tensor, "batch tokens"] | Integer[Tensor, "batch tokens"] | None = None,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
    ) -> Tensor:
        """What the output layer is given, (N, T, D); the arguments are those of :meth:`forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        check_shape("inputs_embeds", x, ("N", "T", self.embedding.embedding_dim))
        if attention_mask is None:
            attended = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        else:
            check_shape("attention_mask", attention_mask, tuple(x.shape[:2]))
            attended = attention_mask != 0
        # attended tokens are numbered in their order, wherever the padding stands
        rotation = _rotation(attended.cumsum(1) - 1, self.head_dim)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        # padding sees itself: a row that sees nothing would be NaN
        sees = causal & (attended[:, None, :] | torch.eye(x.shape[1], dtype=torch.bool, device=x.device))
        for block in self.blocks:
            x = block(x, rotation, sees[:, None])
        return self.norm(x)

    def forward(
        self,
        input_ids: Integer[Tensor, "batch tokens"] | None = None,
        attention_mask: Bool[Tensor, "batch tokens"] | Integer[Tensor, "batch tokens"] | None = None,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
    ) -> Tensor:
        """Logits of the next token at every position.

        Args:
            input_ids: (N, T) tokens in [0, V).
            attention_mask: (N, T), nonzero where there is a token and 0 at padding; all ones by default.
            inputs_embeds: (N, T, D) embeddings in place of tokens.

        Returns:
            Logits (N, T, V).
        """
        return self.head(self.hidden(input_ids, attention_mask, inputs_embeds))


class _Block(nn.Module):
    """Attention and MLP, each behind its own normalisation."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim, bias=bias)
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.mlp_norm = nn.LayerNorm(dim, bias=bias)
        self.up = nn.Linear(dim, mlp_ratio * dim, bias=bias)
        self.down = nn.Linear(mlp_ratio * dim, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], sees: Tensor) -> Tensor:
        # (N, T, 3, heads, head_dim) to three of (N, heads, T, head_dim)
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = _rotated(q, rotation), _rotated(k, rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sees).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))))


def _rotation(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine (N, 1, T, head_dim / 2) of ``position / 10000^(2 i / head_dim)``."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angle = positions[:, None, :, None].float() * 10000.0**-exponent
    return angle.cos(), angle.sin()


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)
