"""Base class of all detectors: a module with a configuration, saved as safetensors and JSON (no pickle)."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from dtn_fast.dataclass_json import from_json
from dtn_fast.errors import UsageError
from dtn_fast.files import json_text, write_whole
from dtn_fast.model.card import CARD, CARD_PAGE, Card, measures_novelty
from dtn_fast.model.novelty import FILE as NOVELTY
from dtn_fast.model.novelty import Novelty
from dtn_fast.model.temporal import TemporalHead

WEIGHTS, CONFIG = "model.safetensors", "config.json"
Depth = Literal["backbone", "gate", "last-block", "head"]
"""Places of a detector whose maps Grad-CAM explains, from the input on; ``DTN.cam_layers`` says which maps they are."""


class Detector(nn.Module):
    """Images [B, 3, S, S] (normalised RGB) -> logits [B, num_classes]; logit 0 is real, 1 is fake.

    ``config`` is a frozen dataclass with image_size, mean, std, num_classes and clip, ``config_class`` its type.
    """

    temporal: TemporalHead | None
    """The temporal head, which scores clips of ``config.clip`` frames; None: there is none."""

    config_class: ClassVar[Any]
    fits_meta: ClassVar[bool] = False
    """Whether the model can be made on torch's meta device, without memory, to compare shapes."""
    config: Any
    notice = ""
    """Statement that every report of this model must show, such as that it was trained on synthetic faces."""
    novelty: Novelty | None = None
    """Statistics of the training crops, by ``dtn-fast calibrate``; None: novelty is not measured."""

    mask_head: nn.Module | None
    """The MaskHead that maps the forged pixels, if ``config.mask_head``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.temporal = config, None

    def add_temporal(self) -> None:
        """Makes the temporal head that ``config.clip`` asks for, after all other layers.

        Raises UsageError when the features are the inputs of other layers than linear ones."""
        if self.config.clip:
            layers = self.classifiers()
            if not layers or not all(isinstance(layer, nn.Linear) for layer in layers):
                name = getattr(self.config, "timm", type(self).__name__)
                raise UsageError(
                    f"{name}: its classifier is no linear layer, so it has no features for a temporal head"
                )
            width = sum(layer.in_features for layer in layers)  # type: ignore[misc]
            self.temporal = TemporalHead(self.config.clip, width, self.config.num_classes)

    def cam_layers(self) -> dict[Depth, nn.Module]:
        """The layers whose output Grad-CAM explains, a map [B, C, h, w] or tokens [B, N, C] whose last ones are the
        patches of a square, from the input on; empty: this detector has none."""
        return {}

    def novelty_layer(self) -> nn.Module | None:
        """The layer whose output tells how unlike the training data an input is (``WithNovelty``), some way into the
        network: a map [B, C, h, w] or tokens [B, N, C]; None: this detector has none."""
        return None

    def mask_layers(self) -> list[nn.Module]:
        """The layers whose output the mask head reads, each called once and in this order in a forward pass: maps
        [B, C, h, w] or tokens [B, N, C]; empty: this detector has none."""
        return []

    def classifiers(self) -> list[nn.Module]:
        """The layers that make a frame's logits, here the last linear one; their inputs are the detector's features."""
        linear: list[nn.Module] = [module for name, module in self.named_modules()
                                   if isinstance(module, nn.Linear) and not name.startswith("temporal.")]  # fmt: skip
        return linear[-1:]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes the insides of the layers again in the backward, in place of keeping them.  Raises UsageError when
        the model cannot."""
        raise UsageError(f"{type(self).__name__}: has no gradient checkpointing; leave --grad-checkpointing out")

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.safetensors, with checksums of both files, config.json and, if the model has such, card.json and
        novelty.safetensors into ``folder``, each atomically."""
        from safetensors.torch import save

        state: dict[str, Tensor] = {}
        stored = set[int]()
        for name, tensor in self.state_dict().items():
            tensor = tensor.detach().cpu().contiguous()
            address = tensor.untyped_storage().data_ptr()
            state[name] = tensor.clone() if address in stored else tensor  # safetensors refuses shared memory
            stored.add(address)
        text = dataclasses.replace(self.config, card=None).to_json()
        facts = {"notice": self.notice, **_checksums(state, self.notice, text)}
        write_whole(Path(folder) / WEIGHTS, _in_order(save(state, facts)))
        write_whole(Path(folder) / CONFIG, text)
        for name in (CARD, CARD_PAGE, NOVELTY):  # of the weights that were there before
            (Path(folder) / name).unlink(missing_ok=True)
        if self.novelty is not None:
            self.novelty.save(Path(folder))
        if self.config.card is not None:
            write_card(Path(folder), self.config.card)

    @classmethod
    def from_pretrained(cls, path: str | Path, config: Any = None) -> Self:
        """Reads a folder written by :meth:`save_pretrained`, in eval mode; ``config`` replaces the stored one.

        Raises UsageError when the folder, a file or a tensor is missing, the weights are of another shape, or a
        checksum differs; files of earlier versions have none.
        """
        from safetensors import SafetensorError, safe_open

        folder = Path(path)
        check_folder(folder)
        text = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
        try:
            with safe_open(folder / WEIGHTS, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                facts = file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise UsageError(f"{folder / WEIGHTS}: not a safetensors file ({error})") from error
        notice, where = facts.get("notice", ""), str(folder / WEIGHTS)
        if config is None:
            config = cls.config_class.from_json(text, str(folder / CONFIG))
        if cls.fits_meta:
            with torch.device("meta"):  # a damaged configuration may ask for any size
                check_state(cls(config), state, where)
        for name, checksum in _checksums(state, notice, text).items():
            if facts.get(name, checksum) != checksum:
                raise UsageError(f"{folder / name}: damaged (another checksum than when it was written); copy or train "
                                 "the model again")  # fmt: skip
        card = read_card(folder)
        known = card.calibration.weights if card is not None and card.calibration is not None else ""
        if known and known != _checksums(state, notice, text)[WEIGHTS]:
            raise UsageError(f"{folder / CARD}: its calibration is of other weights; delete it, then run dtn-fast "
                             "calibrate")  # fmt: skip
        model = cls(dataclasses.replace(config, card=card))
        model.notice, model.novelty = notice, Novelty.load(folder) if measures_novelty(card) else None
        check_state(model, state, where)
        model.load_state_dict(state)
        return model.eval()


def write_card(folder: Path, card: Card) -> None:
    """Writes card.json of a checkpoint folder."""
    write_whole(folder / CARD, json_text(dataclasses.asdict(card), indent=1))


def read_card(folder: Path) -> Card | None:
    """Reads card.json of a checkpoint folder; None if there is none.  Raises UsageError when it is damaged."""
    path = folder / CARD
    try:
        return from_json(Card, path.read_text(encoding="utf-8"), str(path), "; delete it, and run dtn-fast calibrate")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata sorted: safetensors writes them in an order that differs from run to run."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def state_bytes(state: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Names, dtypes, shapes and values of tensors, by name: what a digest of weights covers."""
    for name, tensor in sorted(state.items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        whole = tensor.detach().cpu().contiguous()  # of a single value, strides may be any
        yield whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy().data


def _checksums(state: dict[str, Tensor], notice: str, config: str) -> dict[str, str]:
    """CRC-32 by file name: of the weights with their notice, and of the configuration's text."""
    crc = zlib.crc32(notice.encode())
    for part in state_bytes(state):
        crc = zlib.crc32(part, crc)
    return {WEIGHTS: f"{crc:08x}", CONFIG: f"{zlib.crc32(config.encode()):08x}"}


def weights_checksum(model: Detector) -> str:
    """The checksum of a model's weights and notice that its checkpoint stores."""
    return _checksums(model.state_dict(), model.notice, "")[WEIGHTS]


def check_folder(folder: Path) -> None:
    """Raises UsageError when ``folder`` is not a checkpoint folder."""
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: no {name} there; give a folder written by training or save_pretrained")


def check_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Raises UsageError naming ``where`` and the first tensor that does not fit ``model``."""
    own = model.state_dict()
    for name in [*own, *state]:
        got, want = (tuple(s[name].shape) if name in s else None for s in (state, own))
        if got != want:
            raise UsageError(
                f"{where}: {name} is {got or 'absent'}, the model needs {want or 'no such tensor'}; "
                "the checkpoint belongs to another preset or configuration"
            )


def patch_side(tokens: int) -> int:
    """Side of the square that the patches form, in a sequence of ``tokens`` that may begin with a class token and up to
    four others; 0: no square."""
    side = math.isqrt(tokens)
    return side if tokens - side**2 <= 5 else 0


def as_map(output: Tensor) -> Tensor:
    """A map [B, C, h, w] as it is; of tokens [B, N, C] the patches, as a map."""
    if output.dim() == 4:
        return output
    side = patch_side(output.shape[1])
    return output[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


Model = TypeVar("Model", bound=Detector)


def move_to(model: Model, device: str | torch.device) -> Model:
    """``model`` moved to ``device``, its convolutions in channels_last."""
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
