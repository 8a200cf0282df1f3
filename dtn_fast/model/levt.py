"""The locally-enhanced transformer block: BN, scaled attention, local connection, convolutional MLP (Eq. 14-24)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dtn_fast.kernels import reference
from dtn_fast.kernels.ops import fuses_local_connection, local_connection, mas_attention_packed
from dtn_fast.model.config import DTNConfig
from dtn_fast.model.mas import head_mixer, reattend
from dtn_fast.model.norm import recomputed, trains, update_statistics
from dtn_fast.model.state_space import StateSpace


class ScaledAttention(nn.Module):
    """Multi-head attention whose heads are scaled by sigmoid(head_scale) (MAS): [B, N, C] -> [B, N, C].

    reattention: mix the attention maps across heads instead of scaling them (Table 8), in plain torch.  headwise:
    project each head's own channels (DTNConfig.partition "before").
    """

    def __init__(
        self, width: int, num_heads: int, mas: bool, mas_init: float, reattention: bool = False, headwise: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = HeadwiseLinear(width, num_heads) if headwise else nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mix = head_mixer(num_heads) if reattention else None
        if mas:
            self.head_scale = nn.Parameter(torch.full((num_heads,), mas_init))
        else:  # sigmoid(+inf) = 1 exactly: plain attention by the same path
            self.register_buffer("head_scale", torch.full((num_heads,), torch.inf), persistent=False)

    def maps(self, tokens: Tensor) -> Tensor:
        """The attention maps that weight the values, head scales included, by the reference operator: [B, N, C] ->
        [B, H, N, N]."""
        q, k, v = self.project(tokens).unbind(2)
        found = reference.mas_attention(q, k, v, self.head_scale, return_maps=True)[1]
        return found if self.mix is None else self.mix(found)

    def project(self, tokens: Tensor) -> Tensor:
        """Queries, keys and values as one packed product [B, N, 3, H, D]."""
        return self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))

    def forward(self, tokens: Tensor) -> Tensor:
        packed = self.project(tokens)
        if self.mix is None:
            return self.out(mas_attention_packed(packed, self.head_scale).flatten(2))
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D] each
        return self.out(reattend(q, k, v, self.mix, q.shape[3] ** -0.5).transpose(1, 2).flatten(2))


class HeadwiseLinear(nn.Module):
    """Queries, keys and values of every head from its own channels alone, without bias: [B, N, C] -> [B, N, 3 C]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        size = width // num_heads
        bound = size**-0.5  # as in nn.Linear
        self.matrices = nn.Parameter(torch.empty(3, num_heads, size, size).uniform_(-bound, bound))

    @property
    def weight(self) -> Tensor:
        """The same as one product's weight [3 C, C]: a block for each head."""
        return torch.cat([torch.block_diag(*heads) for heads in self.matrices])

    def forward(self, tokens: Tensor) -> Tensor:
        parts = tokens.unflatten(2, self.matrices.shape[1:3])  # [B, N, H, D]
        return torch.einsum("bnhd,khed->bnkhe", parts, self.matrices.to(parts.dtype)).flatten(2)


class LEVTBlock(nn.Module):
    """One block on a map [B, C, H, W]: X + LC(Attention(BN(X))), then X + MLP(BN(X))."""

    norm_kernels = True
    grad_checkpointing = False

    def __init__(self, config: DTNConfig, drop_path_rate: float = DTNConfig.drop_path_rate) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        """Probability in training that the block leaves a sample as it is; the others' change is divided by 1 - rate.
        """
        width = config.channels[-1]
        hidden = width * config.mlp_ratio
        self.norm1 = nn.BatchNorm2d(width)
        heads, mas = config.num_heads, (config.mas, config.mas_init)
        self.attention: StateSpace | ScaledAttention = (
            StateSpace(width, heads, config.state_size, *mas) if config.mixer == "mamba"
            else ScaledAttention(width, heads, *mas, config.reattention, config.partition == "before")
        )  # fmt: skip
        self.local: nn.Module = nn.Identity()
        if config.local_connection:
            self.local = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width))
        self.norm2 = nn.BatchNorm2d(width)
        self.mlp = nn.Sequential(
            nn.Conv2d(width, hidden, 1), nn.BatchNorm2d(hidden), nn.GELU(), nn.Conv2d(hidden, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = recomputed(self._run, [self], x) if self.grad_checkpointing and self.training else self._run(x)
        if not (self.drop_path_rate and self.training):
            return y
        kept = 1 - self.drop_path_rate
        return x + (y - x) * (torch.rand(len(x), 1, 1, 1, device=x.device) < kept).to(x.dtype) / kept

    def _run(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.norm1(x).flatten(2).transpose(1, 2)  # [B, HW, C], a view of a channels_last map
        mixed = self.attention(tokens).transpose(1, 2).unflatten(2, (height, width))  # [B, C, H, W]
        x = self._connected(x, mixed)
        return x + self.mlp(self.norm2(x))

    def _connected(self, x: Tensor, mixed: Tensor) -> Tensor:
        """x + LC(mixed) (Eq. 23); one fused operator in training on a GPU."""
        if not (self.training and self.norm_kernels and isinstance(self.local, nn.Sequential)):
            return x + self.local(mixed)
        conv, norm = self.local
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        if type(norm) is not nn.BatchNorm2d or not (trains(norm) and fuses_local_connection(mixed)):
            return x + self.local(mixed)  # SyncBatchNorm, a frozen BN, or no kernels here
        y, mean, var = local_connection(mixed, x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)
        update_statistics(norm, mean, var, x.numel() // x.shape[1])
        return y
