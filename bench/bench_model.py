"""Latency of the model on this machine's CPU, per preset and memory layout.  Run: make bench"""

from __future__ import annotations

import pytest
import torch

from dtn_fast import DTN, DTNConfig


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize(("preset", "batch"), [("tiny", 1), ("tiny", 8), ("paper", 1)])
def bench_eager(benchmark, preset: str, batch: int, layout: torch.memory_format) -> None:
    """Eager float32 inference; the time is of the whole batch."""
    torch.manual_seed(0)
    model = DTN(DTNConfig.preset(preset)).eval().to(memory_format=layout)
    side = model.config.image_size
    images = torch.randn(batch, 3, side, side).contiguous(memory_format=layout)
    benchmark.extra_info.update(preset=preset, batch=batch, torch=torch.__version__, threads=torch.get_num_threads())
    with torch.inference_mode():
        logits = benchmark.pedantic(model, (images,), rounds=7, warmup_rounds=2)
    assert logits.isfinite().all()
