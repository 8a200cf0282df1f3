"""Families of forgeries: face swaps, reenactments, whole synthetic faces and edits, and across these, diffusion models.

The first four are the types of DF40 (Yan et al., 2024).  A forgery may be in several families: a lip-synced swap is a
swap and a reenactment, an inpainted face an edit by diffusion.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dtn_fast.errors import UsageError

FAMILIES = ("swap", "reenactment", "whole-face", "editing", "diffusion", "other")
OTHER = "other"
"""Family of the forgeries that no table and no option knows."""

_NAMES = {
    "swap": (
        # FF++, DFD, Celeb-DF, DFDC and its preview, DeeperForensics, and DeepfakeBench's names of them
        "Deepfakes, FaceSwap, FaceShifter, DeepFakeDetection, Celeb-synthesis, DFDC, method_A, method_B, end_to_end, "
        "reenact_postprocess, FF-SH, CelebDFv1, CelebDFv2, Celeb-DF-v2, DFDCP_FakeA, DFDCP_FakeB, DFD, DF, UADFV, roop,"
        # DF40, FakeAVCeleb, DiffusionFace
        "FSGAN, SimSwap, InSwapper, InSwap, BlendFace, UniFace, MobileSwap, e4s, FaceDancer, DeepFaceLab, FSAll, "
        "faceswap-wav2lip, fsgan-wav2lip, DiffSwap,"
        # the demo's, by what they imitate: both paste a face with a blending boundary
        "SelfBlended, SynthSwap, SynthBlend"
    ),
    "reenactment": (
        "Face2Face, NeuralTextures, FOMM, FS_vid2vid, facevid2vid, Wav2Lip, MRAA, OneShot, one_shot_free, PIRender, "
        "TPSM, LIA, DaGAN, danet, SadTalker, MCNet, HyperReenact, HeyGen, FRAll, faceswap-wav2lip, fsgan-wav2lip, "
        "SynthWarp"
    ),
    "whole-face": (
        "VQGAN, StyleGAN, StyleGANs, StyleGAN2, StyleGAN3, StyleGAN-XL, SD-1.5, SD-2.1, SDv1.5, SDv2.1, DDPM, DDIM, "
        "PNDM, RDDM, ADM, LDM, PixArt, PixArt-α, DiT, DiT-XL/2, SiT, SiT-XL/2, MidJourney, MidJounery6, WhichisReal, "
        "dalle2_face, DALLE2, EFSAll, MMDGAN, MSGGAN, ProGAN, IF, DCFace, Latent Diffusion, "
        "Stable Diffusion v1.5, Stable Diffusion, Text2Img, T2I, HPS, GLIDE, SDv4, SDv5, VQDM, wukong, BigGAN"
    ),
    "editing": (
        "CollabDiff, collaborative_diffusion, e4e, StarGAN, StarGANv2, StyleCLIP, AttGAN, STGAN, Palette, "
        "Stable Diffusion Inpainting, Inpaint, Inpainting, Img2Img, I2I, SynthResample"
    ),
    "diffusion": (
        "SD-1.5, SD-2.1, SDv1.5, SDv2.1, DDPM, DDIM, PNDM, RDDM, ADM, LDM, PixArt, PixArt-α, DiT, DiT-XL/2, SiT, "
        "SiT-XL/2, MidJourney, MidJounery6, dalle2_face, DALLE2, IF, DCFace, Latent Diffusion, Palette, "
        "Stable Diffusion v1.5, Stable Diffusion, Stable Diffusion Inpainting, Text2Img, T2I, Img2Img, I2I, Inpaint, "
        "Inpainting, HPS, DiffSwap, CollabDiff, collaborative_diffusion, GLIDE, SDv4, SDv5, VQDM, wukong"
    ),
}  # fmt: skip
"""Family -> names of its forgeries, as the datasets' folders, lists and papers spell them."""


def plain_name(name: str) -> str:
    """A name in lower case without signs, as spellings of one name have in common."""
    return "".join(filter(str.isalnum, name.casefold()))


def _key(name: str) -> str:
    """The plain name of a forgery without DeepfakeBench's ending ``_Fake`` and DeeperForensics' perturbations."""
    key = plain_name(name)
    return "endtoend" if key.startswith("endtoend") else key.removesuffix("fake")


_FAMILIES: dict[str, tuple[str, ...]] = {_key(family): (family,) for family in _NAMES}  # a folder named "diffusion"
for _family, _listed in _NAMES.items():
    for _name in _listed.split(","):
        _FAMILIES[_key(_name)] = (*_FAMILIES.get(_key(_name), ()), _family)


def families_of(forgery: str) -> tuple[str, ...]:
    """The families of a forgery, in the order of FAMILIES; (OTHER,) when its name is unknown."""
    return _FAMILIES.get(_key(forgery), (OTHER,))


def named_families(pairs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The families that ``--families`` names, from texts FORGERY=FAMILY or FORGERY=FAMILY,FAMILY.

    Raises UsageError on another form or an unknown family.
    """
    found = {}
    for pair in pairs:
        name, equals, listed = pair.rpartition("=")
        families = tuple(listed.split(","))
        if not (name and equals) or not set(families) <= set(FAMILIES):
            raise UsageError(f"--families {pair}: FORGERY=FAMILY was expected, such as MyGAN=whole-face; families are "
                             f"{', '.join(FAMILIES)}, several with commas between")  # fmt: skip
        found[name] = families
    return found


def by_family(forgeries: Iterable[str], named: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Family -> its forgeries among ``forgeries``, in the order of FAMILIES; empty when all are in the same families.

    named: the families of forgeries that are not by the table.  Raises UsageError when it names a forgery that is not
    among them.
    """
    forgeries = tuple(forgeries)
    if unknown := sorted(set(named) - set(forgeries)):
        raise UsageError(f"--families {unknown[0]}=...: no such forgery here; there are {', '.join(forgeries)}")
    families = {forgery: named.get(forgery, families_of(forgery)) for forgery in forgeries}
    if len(set(families.values())) < 2:
        return {}
    groups = {family: tuple(f for f in forgeries if family in families[f]) for family in FAMILIES}
    return {family: group for family, group in groups.items() if group}
