"""The public operators.  Each is defined in the file of its name, with its Triton code in ``*_kernel.py`` beside it."""

from dtn_fast.kernels.batch_norm import bn_relu, fuses_bn
from dtn_fast.kernels.dispatch import tracing
from dtn_fast.kernels.local_connection import fuses_local_connection, local_connection
from dtn_fast.kernels.mas_attention import mas_attention, mas_attention_packed
from dtn_fast.kernels.moe_gate import moe_gate

__all__ = [
    "bn_relu",
    "fuses_bn",
    "fuses_local_connection",
    "local_connection",
    "mas_attention",
    "mas_attention_packed",
    "moe_gate",
    "tracing",
]
