"""Families of models that can be trained, one row of data each."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models, as data."""

    name: str
    text_encoders: tuple[str, ...]  # the host's names for those that can train
    layer: int | None  # the hidden state that the U-Net reads; `None` for the last
    final_norm: bool = True  # whether the final norm follows a hidden state that is not the last
    pooled: bool = False  # the U-Net also reads the last encoder's pooled output, and the image's size
    resolutions: dict[str, int]  # pixels on a side that models were trained at, by what they predict
    latent_scale: float


SD1 = Family(
    name="SD 1.x",
    text_encoders=("clip_l",),
    layer=None,
    resolutions={"epsilon": 512, "v_prediction": 512},
    latent_scale=0.18215,
)
SD2 = Family(
    name="SD 2.x",
    text_encoders=("clip_h",),
    layer=-2,
    resolutions={"epsilon": 512, "v_prediction": 768},  # 2.x-base and 2.x
    latent_scale=0.18215,
)
SDXL = Family(
    name="SDXL",
    text_encoders=("clip_l", "clip_g"),
    layer=-2,
    final_norm=False,
    pooled=True,
    resolutions={"epsilon": 1024, "v_prediction": 1024},
    latent_scale=0.13025,
)
FAMILIES = (SD1, SD2, SDXL)


def _flow(name: str) -> Family:
    """Return a family of transformers that train by flow matching on the host's own modules, see flow.py."""
    return Family(name=name, text_encoders=(), layer=None, resolutions={"flow": 1024}, latent_scale=1.0)


ZIMAGE, QWEN_IMAGE, KREA2 = map(_flow, ("Z-Image", "Qwen-Image", "Krea 2"))
FLUX1, FLUX2, SD3 = map(_flow, ("Flux.1", "Flux.2", "SD 3"))
LUMINA2, CHROMA = map(_flow, ("Lumina Image 2", "Chroma"))
FLOW_FAMILIES = (ZIMAGE, QWEN_IMAGE, KREA2, FLUX1, FLUX2, SD3, LUMINA2, CHROMA)
