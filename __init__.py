"""Personalize: train a subject into a diffusion model inside a ComfyUI graph. Entry point only."""

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    """Called by ComfyUI when it loads the pack; nothing heavy is imported before that."""
    from .nodes import Personalize

    return Personalize()
