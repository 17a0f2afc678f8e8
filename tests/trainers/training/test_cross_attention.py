"""AttnDreamBooth's regulariser: is it the formula, whatever the layers, the words, the split and the checkpointing?"""

import contextlib
import dataclasses

import pytest
import torch
from einops import rearrange

from personalize.tests.support import small
from personalize.trainers.data.batch import Batch
from personalize.trainers.models.families import SD1, SD2, SDXL
from personalize.trainers.training import trainables
from personalize.trainers.training.cross_attention import first_token_without_gradient, record_cross_attention
from personalize.trainers.training.losses import AttentionRegularization, denoising, positions
from personalize.trainers.training.objective import Objective

FAMILIES = pytest.mark.parametrize("family", [SD1, SD2, SDXL], ids=lambda family: family.name)
PROMPTS = ["a photo of a <dog> corgi dog", "<dog> corgi dog in the snow", "a corgi dog beside a <dog> corgi dog"]


def prepared(family=SD1, prompts=PROMPTS):
    """Models that know <dog> as two vectors, a batch with these prompts, its noise and timesteps."""
    models = small.models(family=family)
    for encoder in models.text_encoders:
        trainables.add_tokens(encoder, [("<dog>", "red dog")])
    g = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, len(prompts), 4, 8, 6, generator=g)
    batch = Batch(latents=latents, input_ids=models.tokenize(list(prompts)))
    return models, batch, noise, torch.tensor([10, 500, 900])[: len(prompts)]


def words(models, class_tokens=slice(None)):
    tokenizer = models.text_encoders[-1].tokenizer
    return tuple(tokenizer.placeholders["<dog>"]), tuple(tokenizer.encode_words("corgi dog")[class_tokens])


def regularizer(models, maps, statistic, batch_size=3, class_tokens=slice(None)):
    placeholder, noun = words(models, class_tokens)
    return AttentionRegularization(
        maps=maps, statistic=statistic, placeholder=placeholder, class_word=noun, batch_size=batch_size
    )


def probabilities(models, batch, noise, timesteps):
    """Of every cross-attention in float64, from inputs that hooks catch: {path: [B, heads, h * w, 77]}."""
    caught, hooks = {}, []
    layers = {path: layer for path, layer in models.unet.named_modules() if path.endswith(".attn2")}
    for path, layer in layers.items():

        def catch(module, args, named, path=path):
            caught[path] = (args[0], named["encoder_hidden_states"])

        hooks.append(layer.register_forward_pre_hook(catch, with_kwargs=True))
    with torch.no_grad():
        Objective(models, {}).predict(batch, noise, timesteps)
    for hook in hooks:
        hook.remove()
    result = {}
    for path, (x, context) in caught.items():
        layer, double = layers[path], [tensor.double() for tensor in (x, context)]
        query, key = double[0] @ layer.to_q.weight.double().T, double[1] @ layer.to_k.weight.double().T
        query, key = (rearrange(t, "b n (h d) -> b h n d", h=layer.heads) for t in (query, key))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        result[path] = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    return result


@FAMILIES
def test_statistics_are_those_of_the_softmax_and_the_output_stays(family):
    models, *inputs = prepared(family)
    expected = probabilities(models, *inputs)
    with torch.no_grad():
        before = Objective(models, {}).predict(*inputs).model_pred
        processors = [type(layer) for layer in models.unet.attn_processors.values()]
        with record_cross_attention(models.unet, keep=True) as maps:
            recorded = Objective(models, {}).predict(*inputs).model_pred
    assert (recorded - before).abs().max() < 1e-5
    assert maps.means.keys() == expected.keys() and len({p.shape for p in expected.values()}) > 1
    for path, p in expected.items():
        assert torch.allclose(maps.means[path].double(), p.mean(dim=(1, 2)), atol=1e-8)
        flat = rearrange(p, "b h n t -> b t (h n)")
        variance = ((flat - flat.mean(-1, keepdim=True)) ** 2).sum(-1) / (flat.shape[-1] - 1)
        assert torch.allclose(maps.variances[path].double(), variance, rtol=1e-4, atol=1e-12)
        assert torch.allclose(maps.maps[path].double(), p.mean(dim=1), atol=1e-7)
    assert [type(layer) for layer in models.unet.attn_processors.values()] == processors


def test_where_word_and_class_stand():
    models, batch, *_ = prepared()
    word, noun = positions(batch.input_ids[:, -1], *words(models))
    assert [row.nonzero().flatten().tolist() for row in word] == [[5, 6], [1, 2], [6, 7]]
    assert [row.nonzero().flatten().tolist() for row in noun] == [[7, 8], [3, 4], [8, 9]]  # not the first "corgi dog"
    first = positions(batch.input_ids[:, -1], *words(models, slice(1)))[1]
    assert [row.nonzero().flatten().tolist() for row in first] == [[7], [3], [8]]
    without = models.tokenize(["a corgi dog", "a <dog> cat", "a corgi dog and a <dog>"])[:, -1]
    assert not any(mask.any() for mask in positions(without, *words(models)))


@FAMILIES
@pytest.mark.parametrize("statistic", ["means", "variances"])
@pytest.mark.parametrize("class_tokens", [slice(None), slice(1)])
def test_regularizer_is_the_formula(family, statistic, class_tokens):
    """The mean over V's two vectors of (s_V - s_C)^2, summed over samples, averaged over layers, in float64."""
    models, *inputs = prepared(family)
    total, layers = 0.0, probabilities(models, *inputs)
    for p in layers.values():
        for sample, (v, c) in enumerate([([5, 6], [7, 8]), ([1, 2], [3, 4]), ([6, 7], [8, 9])]):
            flat = rearrange(p[sample], "h n t -> t (h n)")
            s = flat.mean(-1) if statistic == "means" else flat.var(-1, unbiased=True)
            total += ((s[v] - s[c[class_tokens]].mean()) ** 2).mean()
    with record_cross_attention(models.unet) as maps:
        loss = regularizer(models, maps, statistic, class_tokens=class_tokens)
        value = Objective(models, {"loss": loss})(*inputs)["loss"].item()
    assert value == pytest.approx((total / len(layers)).item(), rel=1e-3)
    assert value > 0


def test_a_split_batch_gives_the_same_gradient():
    """The sum over the batch is the global batch times the mean, so that shares of it add up."""
    gradients = []
    for parts in (1, 3):
        models, batch, noise, timesteps = prepared()
        row = models.text_encoders[0].embedding.rows.requires_grad_(True)
        with record_cross_attention(models.unet) as maps:
            objective = Objective(models, {"loss": regularizer(models, maps, "means")})
            shares = zip(batch.split(parts), noise.tensor_split(parts), timesteps.tensor_split(parts), strict=True)
            for part in shares:
                (objective(*part)["loss"] / parts).backward()
        gradients.append(row.grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("losses", [{"means"}, {"variances"}, {"means", "variances", "denoising"}])
def test_checkpointing_changes_no_gradient(losses):
    """Also of the statistics alone: recomputation notes them twice, and a reentrant one would drop them silently."""
    gradients = []
    for checkpointing in (False, True):
        models, *inputs = prepared()
        chosen = trainables.select(models, "attn2.to_k")
        for parameter in chosen:
            parameter.requires_grad_(True)
        models.save_memory(checkpointing)
        with record_cross_attention(models.unet) as maps:
            every = {name: regularizer(models, maps, name) for name in losses - {"denoising"}}
            every |= {"denoising": denoising} if "denoising" in losses else {}
            sum(Objective(models, every)(*inputs).values()).backward()
        gradients.append([parameter.grad for parameter in chosen])
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 0 and torch.allclose(plain, again, rtol=1e-4, atol=1e-12)


def test_the_recorder_is_gone_after_an_interrupt():
    models = small.models()
    before = dict(models.unet.attn_processors)
    with pytest.raises(KeyboardInterrupt), record_cross_attention(models.unet):
        raise KeyboardInterrupt
    assert models.unet.attn_processors == before


# -- Custom Diffusion's first token


def start_and_rest(family, checkpointing, guarded):
    """Gradients of a loss on the U-Net's output: by what the prompt's states are, and by keys and values' weights.

    The states of the start token, those of the other positions, and every `attn2.to_k` and `to_v` weight.
    """
    models, batch, noise, timesteps = prepared(family)
    with torch.no_grad():
        encoding = models.encode_ids(batch.input_ids)
    parts = tuple(part.requires_grad_(True) for part in encoding.parts)
    chosen = [p for name in ("attn2.to_k", "attn2.to_v") for p in trainables.select(models, name)]
    for parameter in chosen:
        parameter.requires_grad_(True)
    models.save_memory(checkpointing)
    context = first_token_without_gradient(models.unet) if guarded else contextlib.nullcontext()
    with context:
        output = models.predict(noise, timesteps, dataclasses.replace(encoding, parts=parts))
        output.square().sum().backward()
    return output.detach(), torch.cat([part.grad for part in parts], dim=-1), [p.grad for p in chosen]


@FAMILIES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_token_carries_no_gradient(family, checkpointing):
    """Exactly none, while the output is the same bit for bit and the other positions' gradients are as without."""
    plain, guarded = (start_and_rest(family, checkpointing, on) for on in (False, True))
    assert torch.equal(plain[0], guarded[0])
    assert (guarded[1][:, 0] == 0).all() and plain[1][:, 0].abs().max() > 0
    assert torch.allclose(guarded[1][:, 1:], plain[1][:, 1:], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_learn_from_the_other_positions_alone(checkpointing):
    """d loss / d W = sum over positions of (d loss / d output)^T input, written out without the first."""
    models, batch, noise, timesteps = prepared()
    layer = models.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    caught = {}
    layer.register_full_backward_hook(lambda module, inputs, outputs: caught.update(grad=outputs[0]))
    layer.register_forward_pre_hook(lambda module, args: caught.update(x=args[0].detach()))
    layer.weight.requires_grad_(True)
    models.save_memory(checkpointing)
    with torch.no_grad():
        encoding = models.encode_ids(batch.input_ids)
    encoding = encoding.map(lambda states: states.requires_grad_(True))
    with first_token_without_gradient(models.unet):
        models.predict(noise, timesteps, encoding).square().sum().backward()
    every = torch.einsum("bno,bni->oi", caught["grad"].double(), caught["x"].double())
    others = torch.einsum("bno,bni->oi", caught["grad"][:, 1:].double(), caught["x"][:, 1:].double())
    close = {"rtol": 1e-4, "atol": 1e-5 * others.abs().max().item()}
    assert torch.allclose(layer.weight.grad.double(), others, **close)
    assert not torch.allclose(layer.weight.grad.double(), every, **close)


def test_hooks_are_gone_after_an_interrupt():
    models = small.models()
    layers = [layer for path, layer in models.unet.named_modules() if path.endswith((".attn2.to_k", ".attn2.to_v"))]
    with pytest.raises(KeyboardInterrupt), first_token_without_gradient(models.unet):
        assert layers and all(len(layer._forward_hooks) == 1 for layer in layers)
        raise KeyboardInterrupt
    assert not any(layer._forward_hooks for layer in layers)
