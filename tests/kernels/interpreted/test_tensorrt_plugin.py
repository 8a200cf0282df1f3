"""The kernels that engines hold, as TensorRT calls them: contiguous tensors, inputs, integers, outputs."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from dtn_fast.export import tensorrt_plugin
from dtn_fast.kernels import reference
from dtn_fast.kernels.launch import Launch

FULL = torch.float32


def run(launch: Launch, grid: tuple[int, ...], args: tuple) -> None:
    """With real tensors, and without TF32, which no interpreter has."""
    launch._replace(grid=grid, args=args, constants={**launch.constants, "PRECISION": "ieee"}).run()


@pytest.mark.parametrize(("n", "heads", "dim"), [(64, 2, 32), (49, 3, 64), (197, 2, 32)])
def test_attention(n: int, heads: int, dim: int) -> None:
    torch.manual_seed(0)
    qkv, scale = torch.randn(2, n, 3, heads, dim), torch.randn(heads)
    expected = reference.mas_attention(*qkv.double().unbind(2), scale.double())
    offered = tensorrt_plugin.launches("MASAttention", (n, heads, dim), dim**-0.5, FULL)
    assert len(offered) >= 4
    for launch, rows in offered:
        out = torch.full((2, n, heads, dim), torch.nan)
        grid = (2 * heads * (-(-n // rows) if rows else 1),)
        run(launch, grid, (qkv, scale, out))
        assert_close(f"{launch.name} {launch.constants}", out, expected, FULL)


@pytest.mark.parametrize(("experts", "hidden", "channels", "positions"), [(2, 32, 64, 64), (3, 48, 96, 50)])
def test_gate(experts: int, hidden: int, channels: int, positions: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(positions, channels)
    shapes = ((experts, hidden, channels), (experts, hidden), (experts, hidden), (experts,), (experts,))
    weights = [torch.randn(s) for s in shapes]
    image = x.T.reshape(1, channels, positions, 1).double()
    expected = reference.moe_gate(image, *(w.double() for w in weights), 0.0, None).flatten(2)[0].T
    for launch, rows in tensorrt_plugin.launches("MoEGate", (experts, hidden, channels), 0.0, FULL):
        y = torch.full((positions, channels), torch.nan)
        run(launch, (-(-positions // rows),), (x, *weights, positions, y))
        assert_close(f"{launch.constants}", y, expected, FULL)
