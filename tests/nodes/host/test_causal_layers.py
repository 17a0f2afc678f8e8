"""A word's adapters on the layers of later and quantised hosts: called with more than their input, or not at all."""

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.comfy


def layer_of_later_hosts(inner, width):
    """A linear layer of this host, called as later hosts do: an activation before it and a sum after it."""
    import comfy.ops

    class Linear(comfy.ops.disable_weight_init.Linear):
        def forward(self, x, input_act=None, residual=None, residual_scale=None, further=None):
            x = comfy.ops.INPUT_ACT_EAGER[input_act](x) if input_act else x
            y = super().forward(x)
            return y if residual is None else torch.addcmul(residual, y, residual_scale)

    layer = Linear(inner, width)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    return layer


def adapted(layer, inner, width):
    """Its forward with one word's adapter of rank 2, strength 0.5, beside it; down, up and where the word acts."""
    from personalize.nodes.host import causal_adapters

    down, up, where = torch.randn(2, inner), torch.randn(width, 2), torch.zeros(1, 5, 1)
    where[:, 2:] = 1
    current = causal_adapters.Pass(masks={"<dog>": where})
    return causal_adapters.adapted(layer, "fc2", {"<dog>": (down, up, 0.5)}, current), down, up, where


@pytest.mark.parametrize("act", [None, "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("summed", [False, True])
def test_what_the_host_folds_into_a_layer_holds_for_its_adapter(act, summed):
    """`residual + scale * ((W + m * s * up @ down) act(x) + b)` in float64."""
    layer = layer_of_later_hosts(6, 4)
    forward, down, up, where = adapted(layer, 6, 4)
    x = torch.randn(1, 5, 12 if act == "swiglu" else 6)
    given = {"residual": torch.randn(1, 5, 4), "residual_scale": torch.randn(1, 5, 4)} if summed else {}
    given |= {"input_act": act} if act else {}
    with torch.no_grad():
        found = forward(x, **given)
    z = x.double()
    if act == "gelu_tanh":
        z = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    elif act == "swiglu":
        gate, up_part = z.chunk(2, dim=-1)
        z = gate / (1 + torch.exp(-gate)) * up_part
    learned = where.double() * 0.5 * (z @ down.double().T @ up.double().T)
    expected = z @ layer.weight.double().T + layer.bias.double() + learned
    if summed:
        expected = given["residual"].double() + given["residual_scale"].double() * expected
    assert learned.abs().max() > 0.1 and (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("given", "named"), [({"further": 1}, "further"), ({"input_act": "a norm"}, "a norm")])
def test_a_layer_called_with_what_the_pack_does_not_know_says_so(given, named):
    from personalize.nodes.host.internals import HostChanged

    class Open(torch.nn.Module):
        def forward(self, x, **given):
            return x @ torch.ones(6, 4)

    forward, *_ = adapted(Open(), 6, 4)
    x = torch.randn(1, 5, 6)
    assert torch.equal(forward(x, further=None), forward(x))
    with pytest.raises(HostChanged, match=f"This ComfyUI has .*{named}"):
        forward(x, **given)


FORMATS = ("int8_tensorwise", "float8_e4m3fn")


def quantise(clip, form):
    """The text encoder's perceptrons get the host's own quantised layers."""
    import comfy.ops

    operations, layout = comfy.ops.mixed_precision_ops({}, torch.float32), comfy.ops.QUANT_ALGOS[form]
    note = torch.tensor([*json.dumps({"format": form}).encode()], dtype=torch.uint8)
    for layer in clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers:
        weight = layer.mlp.fc2.weight.float().detach()
        quantised = operations.Linear(weight.shape[1], weight.shape[0], dtype=torch.float32)
        state = comfy.ops.QuantizedTensor.from_float(weight, layout["comfy_tensor_layout"]).state_dict("weight")
        quantised.load_state_dict(state | {"bias": layer.mlp.fc2.bias.float().detach(), "comfy_quant": note})
        layer.mlp.fc2 = quantised


@pytest.fixture(scope="module", params=FORMATS)
def graph(tmp_path_factory, request):
    """MODEL, CLIP, VAE of a random checkpoint whose text encoder is quantised."""
    from personalize.tests.support import random_sd

    made = random_sd.graph(tmp_path_factory.mktemp("random"), "SD 1.x")
    with torch.inference_mode():  # as a graph loads it
        quantise(made[1], request.param)
    return made


@pytest.fixture(scope="module")
def learned(graph):
    """A word and random adapters for every perceptron of the text encoder."""
    from personalize.trainers.runs.result import RunResult

    layers = graph[1].cond_stage_model.clip_l.transformer.text_model.encoder.layers
    width, inner = layers[0].mlp.fc2.weight.shape
    names = [f"text_encoders.0.encoder.layers.{number}.mlp.fc2" for number in range(len(layers))]
    adapters = {f"{name}.down": torch.randn(2, inner) for name in names}
    adapters |= {f"{name}.up": torch.randn(width, 2) for name in names}
    return RunResult(
        folder=Path("run"),
        settings={"concept": {"placeholder_token": "<dog>"}},
        dataset="",
        lora={},
        tokens={"<dog>": (torch.randn(1, width),)},
        fixed_outputs=(),
        history=[],
        stop_reason="completed",
        seconds=1.0,
        adapters=adapters,
    )


def states(clip, prompt="a <dog>"):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0].clone()


def test_the_adapters_of_a_quantised_text_encoder_act(graph, learned):
    """The layers' outputs are the quantised layers' and the adapters' together."""
    from personalize.nodes.apply import apply

    clip = apply(*graph[:2], learned)[1]
    without = apply(*graph[:2], learned, strength_text_encoder=0.0)[1]
    assert (states(clip) - states(without))[:, 2:4].abs().max() > 0.5
    assert torch.equal(states(clip, "two cats"), states(graph[1], "two cats"))


def test_a_quantised_layer_that_the_host_computes_without_calling_it_is_told(graph, learned, monkeypatch):
    """This host's own fused kernel of an activation and an INT8 layer; other layers it does call."""
    import comfy.clip_model
    import comfy.ops

    from personalize.nodes.apply import apply

    clip = apply(*graph[:2], learned)[1]
    fused = lambda mlp, x: comfy.ops.linear_input_act(mlp.fc2, mlp.fc1(x), "gelu_tanh")  # noqa: E731
    monkeypatch.setattr(comfy.clip_model.CLIPMLP, "forward", fused)
    assert states(graph[1]).isfinite().all()
    quantised = graph[1].cond_stage_model.clip_l.transformer.text_model.encoder.layers[0].mlp.fc2
    if quantised.quant_format == "int8_tensorwise":
        with pytest.raises(
            ValueError, match=r"skips the adapters that <dog> has in encoder\.layers\.0\.mlp\.fc2.*fp16"
        ):
            states(clip)
    else:
        assert (states(clip) - states(graph[1]))[:, 2:4].abs().max() > 0.5
