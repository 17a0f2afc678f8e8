"""Transformers on the host's own modules: are their gradients right, does a LoRA on them learn, is it used whole?"""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from personalize.nodes.host import sampler, weights
from personalize.nodes.host.session import operations_with_gradients, training_session
from personalize.tests.support import random_native
from personalize.trainers.digest import digest_of
from personalize.trainers.formats import kohya
from personalize.trainers.models import flow, gradient_check
from personalize.trainers.models.families import FLOW_FAMILIES
from personalize.trainers.models.flow import blocks, is_linear
from personalize.trainers.training import memory, trainables

pytestmark = pytest.mark.comfy
CASTS = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default
PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module", params=random_native.LAYOUTS)
def models(tmp_path_factory, request):
    """`FlowModels` of a tiny random checkpoint with a LoRA; its text encoder is random numbers for each prompt."""
    models = random_native.models(tmp_path_factory.mktemp("random"), request.param)
    trainables.add_lora(models.unet, trainables.layers(models), 4, 4, torch.Generator().manual_seed(0))
    return models


@pytest.fixture(autouse=True)
def gradients():
    """As in a training session."""
    with operations_with_gradients():
        yield


def adapters(models):
    return [parameter for name, parameter in models.unet.named_parameters() if "lora_" in name]


def test_every_family_has_a_checkpoint_here():
    assert {family.name for family in FLOW_FAMILIES} == {*random_native.LAYOUTS}


def test_the_gradient_is_right_and_a_fixed_batch_is_learned(models):
    """The check of every training raises at a wrong gradient; then steps on six noise levels of one batch."""
    params = gradient_check.reached(models, adapters(models), PROMPT)
    assert len(params) > 0.8 * len(adapters(models)) and not any(p.is_inference() for p in models.unet.parameters())
    losses = fit(models, params, steps=8)
    assert losses[-1] < 0.97 * losses[0], losses
    used_whole(models)


def test_images_start_from_latents_of_the_familys_shape(models):
    sizes = {"Flux.2": (1, 128, 4, 8), "Qwen-Image": (1, 16, 1, 8, 16), "Krea 2": (1, 16, 1, 8, 16)}
    found = sampler.empty_latents(models.network.patcher, 64, 128).shape
    assert found == sizes.get(models.family.name, (1, 16, 8, 16))


def used_whole(models):
    """The stock loader finds a weight for every key of the file."""
    import comfy.lora
    import comfy.lora_convert

    state = kohya.lora(models)
    key_map = comfy.lora.model_lora_keys_unet(models.network.patcher.parent.model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(state)), key_map, log_missing=True)
    assert {key for adapter in loaded.values() for key in adapter.loaded_keys} == set(state)
    assert len(loaded) == len(state) / 3


def test_gradient_checkpointing_changes_no_gradient(models):
    params = gradient_check.reached(models, adapters(models), PROMPT)
    gradients = []
    for checkpointing in (False, True):
        models.save_memory(checkpointing)
        assert models.checkpointing == checkpointing
        gradients.append(gradient_of(models, params))
        models.save_memory(False)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9999
    assert gradients[1].norm() == pytest.approx(gradients[0].norm().item(), rel=1e-3)


def test_what_blocks_are_run_again_from_is_counted(models):
    """What autograd keeps has each block's inputs, whether they are given by position or by name."""
    inputs, kept = [], []
    seen = lambda block, args, kwargs: inputs.extend([*args, *kwargs.values()])  # noqa: E731
    hooks = [block.register_forward_pre_hook(seen, with_kwargs=True) for block in blocks(models.unet)]
    latents, noise, timesteps, encoding = batch(models)
    models.save_memory(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        models.predict(latents, timesteps, encoding)
    models.save_memory(False)
    for hook in hooks:
        hook.remove()
    trained = [part for part in inputs if isinstance(part, torch.Tensor) and part.requires_grad]
    addresses = {tensor.data_ptr() for tensor in kept}
    assert trained and all(part.data_ptr() in addresses for part in trained)


def test_what_is_left_of_a_training_does_not_stop_the_next(tmp_path):
    """A quantised copy cannot be moved in inference mode, in which the next one unloads what the host still has."""
    path = random_native.write_transformer(tmp_path / "qwen.safetensors", "Qwen-Image", scaled_fp8=True)
    gc.disable()
    try:
        models = random_native.models_of(random_native.load_transformer(path), "Qwen-Image")
        models.network.place(torch.float32)
        models.itself = models
        del models
        with training_session():
            pass
    finally:
        gc.enable()


def gradient_of(models, params):
    latents, noise, timesteps, encoding = batch(models)
    prediction = models.predict(models.add_noise(latents, noise, timesteps), timesteps, encoding)
    loss = (prediction - models.target(latents, noise, timesteps)).square().mean()
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, params)])


@pytest.mark.parametrize("scaled", [False, True])
def test_weights_in_float8_stay_so_and_give_right_gradients(tmp_path, scaled):
    """Cast by Load Diffusion Model, or with a scale for each matrix as files have them."""
    path = random_native.write_transformer(tmp_path / "qwen.safetensors", "Qwen-Image", scaled_fp8=scaled)
    model = random_native.load_transformer(path, **{} if scaled else {"dtype": torch.float8_e4m3fn})
    models = random_native.models_of(model, "Qwen-Image")
    lora = trainables.add_lora(models.unet, trainables.layers(models), 4, 4, torch.Generator().manual_seed(0))
    assert len(lora) == 2 * 2 * 14
    params = gradient_check.reached(models, lora, PROMPT)
    sampled = [weights._sampled(model, name, parameter) for name, parameter in model.model.named_parameters()]
    assert len(digest_of(sampled, [])) == 16
    weight = models.unet.transformer_blocks[0].attn.to_q.base_layer.weight
    assert weight.dtype == torch.float8_e4m3fn or type(weight).__name__ == "QuantizedTensor"
    losses = fit(models, params, steps=4)
    assert losses[-1] < losses[0]
    used_whole(models)


def test_blocks_that_are_run_twice_on_what_they_changed_are_refused(tmp_path, monkeypatch):
    """Gradient checkpointing without copies: the second pass through a block of Flux begins with its own output."""
    models = random_native.models(tmp_path, "Flux.1")
    lora = trainables.add_lora(models.unet, trainables.layers(models), 4, 4, torch.Generator().manual_seed(0))

    def twice(block, *others):
        run = type(block).forward.__get__(block)
        return lambda *args, **kwargs: checkpoint(lambda: run(*args, **kwargs), use_reentrant=False)

    monkeypatch.setattr(flow, "_Checkpointed", twice)
    with pytest.raises(ValueError, match=r"^The gradients of Flux\.1 are wrong in this ComfyUI \(a slope of"):
        gradient_check.reached(models, lora, PROMPT)
    assert all(not parameter.any() for parameter in lora[1::2])  # they are what they were


@pytest.mark.parametrize("step", ["check", "estimate"])
def test_before_a_training_no_weights_in_another_precision_pile_up(tmp_path, step):
    """A base in bfloat16 or float8 that fills a card would not fit once more, or twice, into it."""
    path = random_native.write_transformer(tmp_path / "transformer.safetensors", "Qwen-Image")
    model = random_native.load_transformer(path, dtype=torch.float8_e4m3fn)
    models = random_native.models_of(model, "Qwen-Image")
    models.to("cpu", torch.bfloat16)
    matrices = {module.weight.shape for module in models.unet.modules() if is_linear(module)}
    lora = trainables.add_lora(models.unet, trainables.layers(models), 4, 4, torch.Generator().manual_seed(0))
    with Copies(matrices) as copies:
        if step == "check":
            gradient_check.reached(models, lora, PROMPT)
        else:
            assert memory.activation_bytes(models, 16, False) > 2 * sum(shape.numel() for shape in matrices)
    assert copies.made > 2 * len(blocks(models.unet)) * 14 and copies.most < 1.5 * 14, (copies.made, copies.most)
    gc.collect()
    assert sum(not reference.expired() for reference in copies.activations) < 10  # text, and noise levels


class Copies(TorchDispatchMode):
    """Counts tensors of some shapes that a cast has made: all, and at most at the same time; notes all activations."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.made, self.alive, self.most, self.activations = shapes, 0, set(), 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim == 3:
            self.activations.add(StorageWeakRef(result.untyped_storage()))
        if function in CASTS and result.shape in self.shapes:
            self.made += 1
            self.alive.add(StorageWeakRef(result.untyped_storage()))
            self.alive = {reference for reference in self.alive if not reference.expired()}
            self.most = max(self.most, len(self.alive))
        return result


def test_another_precision_loads_no_weights_again(tmp_path, monkeypatch):
    """They are 12 to 40 GB: on a card, each time took ten seconds."""
    path = random_native.write_transformer(tmp_path / "transformer.safetensors", "Z-Image")
    models = random_native.models_of(random_native.load_transformer(path, dtype=torch.bfloat16), "Z-Image")
    monkeypatch.setattr(type(models.network.patcher), "load", lambda *args, **options: pytest.fail("loaded again"))
    latents, _, timesteps, encoding = batch(models)
    found, computed = {}, []
    layer = models.unet.layers[0].attention.qkv
    layer.register_forward_hook(lambda layer, given, output: computed.append(output.dtype))
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        models.to("cpu", dtype)
        computed.clear()
        with torch.no_grad():
            found[dtype] = models.predict(latents, timesteps, encoding)
        assert {*computed} == {dtype}
    assert 0 < (found[torch.float32] - found[torch.bfloat16]).abs().max() < 0.1


def test_operations_in_place_are_exchanged_where_results_stay_the_same(tmp_path):
    """A block that drops the result of `add_` computes something else without it."""
    models = random_native.models(tmp_path, "Flux.1")
    lora = trainables.add_lora(models.unet, trainables.layers(models), 4, 4, torch.Generator().manual_seed(0))
    embed = models.unet.txt_in.forward

    def dropped(x):
        y = embed(x)
        y.mul_(3.0)
        return y

    models.unet.txt_in.forward = dropped
    with pytest.raises(ValueError, match="what it computes changes without operations in place"):
        gradient_check.reached(models, lora, PROMPT)


def test_a_part_of_the_gradient_that_is_missing_is_refused(tmp_path):
    models = random_native.models(tmp_path, "SD 3")
    lora = trainables.add_lora(models.unet, trainables.layers(models), 4, 4, torch.Generator().manual_seed(0))
    attention = models.unet.joint_blocks[0].x_block.attn
    whole = attention.pre_attention
    attention.pre_attention = lambda x: tuple(part.detach() for part in whole(x))
    with pytest.raises(ValueError, match="The gradients of SD 3 are wrong"):
        gradient_check.reached(models, lora, PROMPT)


def test_a_clip_of_another_family_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="^This CLIP does not belong to a Qwen-Image model: use the text encoder"):
        random_native.models(tmp_path, "Qwen-Image", text="Krea 2")


def batch(models):
    """Latents, noise, timesteps of six levels and the encoding of a fixed batch, on the models' device."""
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(6, models.channels, 8, 8, generator=generator).to(models.device) for _ in range(2))
    timesteps = ((torch.arange(6) + 0.5) / 6 * len(models.sigmas)).long().to(models.device)
    return latents, noise, timesteps, models.encode_prompts([PROMPT] * 6)


def fit(models, params, steps):
    """The losses of some steps on one batch."""
    latents, noise, timesteps, encoding = batch(models)
    optimizer, losses = torch.optim.AdamW(params, lr=5e-3), []
    for _ in range(steps):
        prediction = models.predict(models.add_noise(latents, noise, timesteps), timesteps, encoding)
        loss = (prediction - models.target(latents, noise, timesteps)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
