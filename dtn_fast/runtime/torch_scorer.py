"""Running of checkpoints in torch: eager, compiled, or as CUDA graphs."""

from __future__ import annotations

import contextlib
import copy
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtn_fast.device import PRECISIONS, computes_in
from dtn_fast.errors import UsageError
from dtn_fast.model.detector import Detector, device_of
from dtn_fast.model.fold import frozen
from dtn_fast.model.mask_head import WithMask
from dtn_fast.model.novelty import WithNovelty
from dtn_fast.model.preprocess import normalise
from dtn_fast.model.temporal import WithFeatures
from dtn_fast.runtime.batch_graphs import BatchGraphs
from dtn_fast.runtime.clips import TorchClips
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.scorer import BATCH, Scorer


class TorchScorer(Scorer):
    """Scorer of a folded copy of a detector, on the device of its weights; later training does not change the copy."""

    def __init__(self, model: Detector, batch_size: int = BATCH, runtime: Runtime = Runtime()) -> None:
        super().__init__(model.config, model.notice, "torch", batch_size)
        self.model, self._dtype = model, PRECISIONS[runtime.precision]
        self.folded = frozen(model).to(self._dtype)
        self.device = device_of(self.folded)
        if self.device.type == "cpu" and not computes_in(runtime.precision):
            raise UsageError(f"--precision {runtime.precision}: this processor has no instructions for it and takes "
                             "ten times as long as fp32; leave it out")  # fmt: skip
        mode = runtime.mode
        if mode == "auto":
            mode = "graph" if self.device.type == "cuda" else "eager"
        if mode == "graph" and self.device.type != "cuda":
            raise UsageError("--mode graph: CUDA graphs need a GPU; use --mode eager or compile")
        net: nn.Module = self.folded
        layer = self.folded.novelty_layer() if model.novelty is not None else None
        if model.novelty is not None and layer is not None:
            net = WithNovelty(net, layer, model.novelty)
        if model.temporal is not None:
            net = WithFeatures(net, self.folded.classifiers())
            self.clips = TorchClips(copy.deepcopy(model.temporal))
        if self.config.mask_head:
            net = WithMask(net, self.folded)
        config, device, dtype = self.config, self.device, self._dtype
        compiled = torch.compile(net) if mode == "compile" else net
        # does not refer to self: such a cycle would keep the graphs' memory until a garbage collection
        self._run = lambda crops: _side_by_side(compiled(normalise(crops, config, device).to(dtype)))
        self._graphs = BatchGraphs(self._run, batch_size) if mode == "graph" else None
        # the wrappers keep values of layers for a moment, so that threads must take turns
        self._turns = threading.Lock() if net is not self.folded else contextlib.nullcontext()

    def _outputs(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        batch = torch.from_numpy(np.require(crops, np.uint8, ["C", "W"]))
        with torch.inference_mode(), self._turns:
            return (self._graphs or self._run)(batch).cpu().numpy()


def _side_by_side(found: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """A network's output and, if it gives mask logits, the mask as further columns, float64."""
    if isinstance(found, Tensor):
        return found.double()
    return torch.cat((found[0].double(), found[1].double().sigmoid().flatten(1)), 1)
