"""Semantic Diffusion Guidance for ComfyUI: steer a diffusion model by text and pictures while it samples."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension with this pack's nodes, asked for by ComfyUI when it starts."""
    from .nodes import extension

    return extension()
