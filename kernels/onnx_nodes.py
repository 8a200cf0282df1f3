"""The operators as ONNX nodes of the domain ``dtn``, with function bodies of standard operators.

An exported file holds both: a runtime that knows dtn::MASAttention and dtn::MoEGate (TensorRT with
``export.tensorrt_plugin``) runs its own kernels, any other runs the body.  Shapes: MASAttention(qkv [B, N, 3, H, D],
head_scale [H]; scale = 1/sqrt(D)) -> [B, N, H, D].  MoEGate(x [B, N, C], w1 [E, M, C], b1 [E, M], w2 [E, M], b2 [E],
expert_scale [E]) -> [B, N, C].
"""

from __future__ import annotations

import torch
from torch import Tensor

DOMAIN = "dtn"

_MAS_BODY = """
MASAttention <scale> (qkv, head_scale) => (out)
{
  third = Constant <value = int64[1] {2}> ()
  last = Constant <value = int64[1] {-1}> ()
  q0, k0, v0 = Split <axis = 2, num_outputs = 3> (qkv)
  q1 = Squeeze (q0, third)
  k1 = Squeeze (k0, third)
  v1 = Squeeze (v0, third)
  q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
  k2 = Transpose <perm = [0, 2, 3, 1]> (k1)
  v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
  factor = Constant <value_float: float = @scale> ()
  cast = CastLike (factor, qkv)
  q3 = Mul (q2, cast)
  scores = MatMul (q3, k2)
  weights = Softmax <axis = -1> (scores)
  mixed = MatMul (weights, v2)
  rows = Transpose <perm = [0, 2, 1, 3]> (mixed)
  gate = Sigmoid (head_scale)
  column = Unsqueeze (gate, last)
  out = Mul (rows, column)
}
"""

_MOE_BODY = """
MoEGate (x, w1, b1, w2, b2, expert_scale) => (out)
{
  first = Constant <value = int64[1] {1}> ()
  last = Constant <value = int64[1] {-1}> ()
  both = Constant <value = int64[2] {-2, -1}> ()
  rows = Unsqueeze (x, first)
  weight = Transpose <perm = [0, 2, 1]> (w1)
  product = MatMul (rows, weight)
  bias = Unsqueeze (b1, first)
  shifted = Add (product, bias)
  hidden = Relu (shifted)
  column = Unsqueeze (w2, last)
  sums = MatMul (hidden, column)
  shift = Unsqueeze (b2, both)
  logits = Add (sums, shift)
  expert = Sigmoid (logits)
  scale = Sigmoid (expert_scale)
  scales = Unsqueeze (scale, both)
  scaled = Mul (expert, scales)
  best = ReduceMax <keepdims = 0> (scaled, first)
  attention = Sigmoid (best)
  out = Mul (x, attention)
}
"""


def body(operator: str, opset: int) -> str:
    """Function body of MASAttention or MoEGate in standard operators of ``opset`` (20 and up), in ONNX's text form."""
    return f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">{_BODIES[operator]}'


_BODIES = {"MASAttention": _MAS_BODY, "MoEGate": _MOE_BODY}


def mas_attention(qkv: Tensor, head_scale: Tensor) -> Tensor:
    """Adds the node dtn::MASAttention while ``torch.onnx.export`` traces: [B, N, 3, H, D] -> [B, N, H, D]."""
    batch, n, _, heads, dim = qkv.shape
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::MASAttention",
        (qkv, head_scale),
        {"scale": dim**-0.5},
        dtype=qkv.dtype,
        shape=(batch, n, heads, dim),
        version=1,
    )


def moe_gate(x: Tensor, *weights: Tensor) -> Tensor:
    """Adds the node dtn::MoEGate on the rows of a map: [B, C, H, W] -> [B, C, H, W]."""
    rows = x.flatten(2).transpose(1, 2)  # [B, N, C]
    out = torch.onnx.ops.symbolic(
        f"{DOMAIN}::MoEGate", (rows, *weights), dtype=x.dtype, shape=tuple(rows.shape), version=1
    )
    return out.transpose(1, 2).unflatten(2, x.shape[2:])
