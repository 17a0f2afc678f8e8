"""Saving and loading through the nodes, and what the models then compute. No test in here."""

import types

import torch

NODE = types.SimpleNamespace(unique_id="1")


def save(result, name="mine", **options):
    from personalize.nodes.save import Save

    return Save.execute(result=result, name=name, overwrite=False, **options)


def load(graph, personalized="none", **inputs):
    """MODEL, CLIP and RESULT of the node."""
    from personalize.nodes.load_files import LoadFiles

    class Node(LoadFiles):
        hidden = NODE

    return Node.execute(model=graph[0], clip=graph[1], personalized=personalized, **inputs).result


def words(clip, prompt="a photo of a dog"):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(prompt)).clone()


@torch.inference_mode()  # in which the host loads and runs its models
def unet_of_the_host(model, latents, timesteps, context, pooled=None):
    """What the host's own U-Net, on its device, makes of latents, on the CPU.

    Args:
        pooled: the prompts' pooled output `[1, p]` where the family reads it; the image's size is the latents'.
    """
    import comfy.model_management as mm

    mm.load_models_gpu([model])
    y, device = {}, model.load_device
    if pooled is not None:
        height, width = (8 * side for side in latents.shape[-2:])
        y = {"y": model.model.encode_adm(pooled_output=pooled.to(device), width=width, height=height)}
        y = {"y": y["y"].expand(len(latents), -1).to(device)}  # the host makes it on the CPU
    latents, timesteps, context = (tensor.to(device) for tensor in (latents, timesteps, context))
    return model.model.diffusion_model(latents, timesteps, context=context, **y).cpu().clone()


def unet(model):
    """The U-Net's output for inputs that are always the same."""
    import comfy.model_management as mm

    g = torch.Generator().manual_seed(1)
    config = model.model.model_config.unet_config
    context = torch.randn(2, 77, config["context_dim"], generator=g)
    inputs = {"y": torch.randn(2, config["adm_in_channels"], generator=g)} if config.get("adm_in_channels") else {}
    latents, timesteps = torch.randn(2, 4, 16, 16, generator=g), torch.tensor([3, 801])
    with torch.inference_mode():
        mm.load_models_gpu([model])
        device = model.load_device
        inputs = {name: value.to(device) for name, value in ({"context": context} | inputs).items()}
        return model.model.diffusion_model(latents.to(device), timesteps.to(device), **inputs).cpu().clone()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def stock(graph, state):
    """MODEL and CLIP of the host's Load LoRA, and the keys that it used."""
    import comfy.lora
    import comfy.sd

    keys = comfy.lora.model_lora_keys_clip(
        graph[1].cond_stage_model, comfy.lora.model_lora_keys_unet(graph[0].model, {})
    )
    loaded = comfy.lora.load_lora(dict(state), keys, log_missing=True)
    used = {key for patch in loaded.values() for key in getattr(patch, "loaded_keys", ())}
    return comfy.sd.load_lora_for_models(*graph[:2], dict(state), 1.0, 1.0), used
