"""Recipes over the loop: does exactly what is declared train, and twice alike? Small random models on the CPU."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from personalize.tests.support import small
from personalize.trainers.data import augmentation
from personalize.trainers.data.concept import Concept
from personalize.trainers.data.context import Context
from personalize.trainers.data.preservation import PreservationPrompts, PromptMix
from personalize.trainers.device import SingleDevice
from personalize.trainers.models.fingerprint import fingerprint
from personalize.trainers.models.tokenizer import Tokenizer, bundled_words
from personalize.trainers.recipes.textboost import PHRASES, PRESETS, TOKENS, TextBoost
from personalize.trainers.runs import train as training
from personalize.trainers.runs.callbacks import Callbacks
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.runs.preview import Preview
from personalize.trainers.runs.run import Run, check_lengths
from personalize.trainers.stopping.pick_by_score import PickByScore
from personalize.trainers.training import trainables
from personalize.trainers.training.loop import train_stage

FAST = TextBoost(steps=3, batch_size=4, views=8, captions=small.CAPTIONS)


def concept(**changes):
    picture = torch.rand(3, 48, 32, generator=torch.Generator().manual_seed(5))
    words = {"resolution": 32, "crop": "center", "initializer_token": "corgi dog"}
    return Concept(**{"images": (picture,), **words} | changes)


def train(recipe=FAST, folder=None, models=None, preview=None, seed=0, **changes):
    models = models or small.models()
    run = Run(concept=concept(**changes), recipe=recipe, seed=seed)
    return models, training.train(run, models, folder, preview=preview)


def weights(models):
    """Every tensor by name, as copies."""
    modules = {"unet": models.unet, "text": models.text_encoders[0].module}
    return {f"{m}.{k}": v.clone() for m, module in modules.items() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("rank", [0, 2])
def test_only_what_is_declared_changes(rank, tmp_path):
    models = small.models()
    before = weights(models)
    train(dataclasses.replace(FAST, unet_lora_rank=rank), models=models, folder=tmp_path)
    after = weights(models)
    for name, tensor in before.items():
        layer, _, kind = name.rpartition(".")
        moved = after.get(name, after.get(f"{layer}.base_layer.{kind}"))
        if name.endswith("token_embedding.weight"):
            moved = models.text_encoders[0].embedding.table
        assert torch.equal(moved, tensor), name
    lora = [name for name in after if "lora_" in name]
    in_unet = {name.partition(".lora_")[0] for name in lora if name.startswith("unet.")}
    blocks = {name.rpartition(".attn2.")[0] for name in before if ".attn2." in name}
    assert in_unet == ({f"{block}.attn2.to_{x}" for block in blocks for x in "kv"} if rank else set())
    assert len(lora) == 2 * 3 * 2 + 2 * len(in_unet)  # A and B; q, k, v of 2 layers in the text encoder
    assert all(after[name].abs().max() > 0 for name in lora)


def test_each_declared_parameter_has_a_gradient():
    models = small.models()
    stage = next(FAST.stages(models, concept(), torch.Generator().manual_seed(0), Context()))
    stage.params[0]["params"].append(torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(RuntimeError, match="no gradient"):
        train_stage(stage, models, SingleDevice(device=torch.device("cpu")), torch.Generator())


@pytest.mark.parametrize("preset", PRESETS)
def test_twice_in_one_process_is_the_same(preset, tmp_path):
    recipe = dataclasses.replace(PRESETS[preset], steps=3, batch_size=4, views=8)
    first, second = (train(recipe, tmp_path / str(i))[1] for i in range(2))
    assert [h["loss"] for h in first.history] == [h["loss"] for h in second.history]
    assert all(torch.equal(first.lora[key], second.lora[key]) for key in first.lora)
    other = train(recipe, tmp_path / "other", seed=1)[1]
    assert first.history[0]["loss"] != other.history[0]["loss"]


@pytest.mark.parametrize("preset", PRESETS)
def test_first_losses_equal_the_golden_ones(preset, tmp_path):
    """A change that should not alter results must not alter these numbers."""
    golden = json.loads((Path(__file__).parents[2] / "golden" / "losses.json").read_text())
    recipe = dataclasses.replace(PRESETS[preset], steps=3, batch_size=4, views=8)
    history = train(recipe, tmp_path)[1].history
    assert [step["terms"]["denoising"] for step in history] == pytest.approx(golden[f"textboost {preset}"], rel=1e-3)


def test_previews_change_nothing(tmp_path):
    quiet = train(folder=tmp_path / "quiet")[1]
    preview = Preview(prompts=("a photo of {}", "{} in snow"), every=1, images_per_prompt=2, steps=2)
    torch.manual_seed(123)  # nor does the global random state
    drawn = train(folder=tmp_path / "drawn", preview=preview)[1]
    assert all(torch.equal(quiet.lora[key], drawn.lora[key]) for key in quiet.lora)
    assert all(torch.equal(quiet.tokens[t][0], drawn.tokens[t][0]) for t in quiet.tokens)
    names = sorted(file.name for file in (tmp_path / "drawn" / "previews").iterdir())
    assert names == [f"step_{step:04d}.png" for step in range(4)]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_splitting_the_batch_changes_nothing(micro_batch_size):
    results = []
    for size in (0, micro_batch_size):
        models = small.models()
        generator = torch.Generator().manual_seed(0)
        stage = next(FAST.stages(models, concept(), generator, Context()))
        gradients = []
        stage.after_step = lambda g=gradients, s=stage: g.append([p.detach().clone() for p in s.parameters()])
        device = SingleDevice(device=torch.device("cpu"))
        train_stage(stage, models, device, generator, micro_batch_size=size)
        results.append(gradients)
    for whole, split in zip(*results, strict=True):
        assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(whole, split, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_null_prob_is_the_share_of_the_empty_prompt_that_is_preserved(share):
    models = small.models()
    recipe = dataclasses.replace(FAST, batch_size=64, **({} if share == 0.1 else {"null_prob": share}))
    batches = next(recipe.stages(models, concept(), torch.Generator().manual_seed(0), Context())).batches
    ids = torch.cat([next(batches).preservation_ids for _ in range(20)])
    empty = (ids == models.tokenize([""])).all(dim=2).float().mean().item()
    assert empty == pytest.approx(share, abs=0.0 if share in (0.0, 1.0) else 0.03)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype, rank, tmp_path):
    """The U-Net in half precision, with loss scaling for float16: the same losses but for rounding."""

    def losses(dtype):
        run = Run(concept=concept(), recipe=dataclasses.replace(FAST, unet_lora_rank=rank), dtype=dtype)
        return [h["loss"] for h in training.train(run, small.models(), tmp_path / str(dtype)).history]

    exact = losses(torch.float32)
    assert losses(dtype) == pytest.approx(exact, rel=0.02) and losses(dtype) != exact


def test_switches(tmp_path):
    """Each technique off changes what its name says."""

    def stage(**changes):
        models = small.models()
        recipe = dataclasses.replace(FAST, **changes)
        return models, next(recipe.stages(models, concept(), torch.Generator().manual_seed(0), Context()))

    assert "knowledge_preservation" not in stage(knowledge_weight=0.0)[1].losses
    assert stage(fixed_outputs=False)[0].text_encoders[0].fixed_outputs is None
    assert list(stage(augmentation_prompt="words")[0].text_encoders[0].tokenizer.placeholders) == ["<concept>"]
    only_flip = stage(augmentations="flip")[0].text_encoders[0].tokenizer.placeholders
    assert list(only_flip) == ["<concept>", "<grayscale>", "<hflip>"]
    models, changed = stage(augmentation_p=0.0, grayscale_p=0.0)
    ids = next(changed.batches).input_ids
    placeholders = models.text_encoders[0].tokenizer.placeholders
    assert set(ids[ids >= 49408].tolist()) == set(placeholders["<concept>"])
    drawn = torch.cat([stage(snr_weighted=on)[1].timesteps(5000)[None] for on in (True, False)]).float().mean(dim=1)
    assert drawn[0] > drawn[1] + 50
    models, loose = stage(clamp_norms=False, embedding_learning_rate=10.0)
    train_stage(loose, models, SingleDevice(device=torch.device("cpu")), torch.Generator().manual_seed(0))
    longest = models.text_encoders[0].embedding.table.norm(dim=-1).mean()
    assert models.text_encoders[0].embedding.rows.norm(dim=-1).max() > 2 * longest


def test_norm_clamp_holds(tmp_path):
    models, _ = train(dataclasses.replace(FAST, embedding_learning_rate=10.0), tmp_path)
    embedding = models.text_encoders[0].embedding
    longest = embedding.table.norm(dim=-1).mean()
    assert embedding.rows.norm(dim=-1).max() <= longest * (1 + 1e-5)
    short = torch.tensor([[0.3, 0.4], [3.0, 4.0]])
    trainables.clamp_norms(short, 1.0)
    assert torch.allclose(short, torch.tensor([[0.3, 0.4], [0.6, 0.8]]))


def test_preservation_prompts_are_drawn_in_their_shares():
    models = small.models()
    templates, captions = ["a {}", "one {}"], ["snow on a roof", "two boats"]
    prompts = PreservationPrompts(models, ["dog"], templates, captions, PromptMix(empty=0.1, class_word=0.25))
    ids, targets = prompts.sample(4000, torch.Generator().manual_seed(0))
    empty, template = models.tokenize([""])[0], models.tokenize(["a dog", "one dog"])
    is_empty = (ids == empty).all(dim=2)[:, 0]
    is_template = sum((ids == t).all(dim=2)[:, 0] for t in template)
    assert is_empty.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert is_template.float().mean().item() == pytest.approx(0.25, abs=0.02)
    with torch.no_grad():
        assert torch.allclose(targets[:5], models.encode_ids(ids[:5]).hidden_states, atol=1e-5)


def test_result_survives_its_folder(tmp_path):
    _, result = train(folder=tmp_path)
    loaded = RunFolder(tmp_path).result()
    assert loaded.settings == result.settings and loaded.history == result.history
    assert loaded.tokens.keys() == result.tokens.keys() and "<left>" in loaded.tokens
    assert all(torch.equal(loaded.tokens[t][0], result.tokens[t][0]) for t in result.tokens)
    assert all(torch.equal(loaded.lora[key], result.lora[key]) for key in result.lora)
    assert torch.equal(loaded.fixed_outputs[0], result.fixed_outputs[0])
    assert RunFolder(tmp_path / "nowhere").result() is None


def test_digest_names_everything_that_decides_a_result():
    models = small.models()
    base = Run(concept=concept(), recipe=FAST)
    digests = {base.digest(fingerprint(models))}
    assert base.digest(fingerprint(small.models())) in digests
    for change in (
        {"seed": 1},
        {"recipe": dataclasses.replace(FAST, lora_rank=8)},
        {"concept": concept(class_word="cat")},
        {"concept": concept(images=(torch.zeros(3, 32, 32),))},
        {"concept": concept(captions=("A house in {}",))},
        {"concept": concept(captions=("A tree in {}",))},
        {"dtype": torch.bfloat16},
    ):
        digests.add(dataclasses.replace(base, **change).digest(fingerprint(models)))
    models.unet.conv_out.weight.data += 1e-3
    digests.add(base.digest(fingerprint(models)))
    assert len(digests) == 9


def test_interrupt_leaves_a_partial_run(tmp_path):
    class Interrupted(BaseException):
        pass

    def stop(report):
        if report.step == 2:
            raise Interrupted

    run = Run(concept=concept(), recipe=FAST)
    with pytest.raises(Interrupted):
        training.train(run, small.models(), tmp_path, callbacks=training.Callbacks(on_step=stop))
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 2
    assert RunFolder(tmp_path).result() is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"placeholder_token": "dog"}, "is a word of the vocabulary"),
        ({"placeholder_token": "<left>"}, "already taken"),
        ({"placeholder_token": ""}, "one word"),
        ({"placeholder_token": "my dog"}, "one word"),
        ({"placeholder_token": "(dog:1.2)"}, "one word"),
        ({"class_word": ""}, "class word is empty"),
        ({"images": ()}, "no image"),
        ({"images": (torch.zeros(3, 1, 1),)}, "smaller than 8"),
        ({"resolution": 100}, "multiple of 8"),
        ({"captions": ("a house",)}, r"'a house' .* write \{\}"),
        ({"captions": ("{}", "{}")}, "captions .2. is not that of the images .1."),
    ],
)
def test_bad_concepts_get_one_sentence(changes, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence) as error:
        train(folder=tmp_path, **changes)
    assert str(error.value).count("\n") == 0


def test_a_loss_that_is_no_number_stops(tmp_path):
    """With numbers as weights, so that it is the training's: its prediction overflows."""
    models = small.models()
    models.unet.conv_out.bias.data.fill_(1e30)  # squared, more than float32 holds
    with pytest.raises(FloatingPointError, match="step 1"):
        train(models=models, folder=tmp_path / "run")


@pytest.mark.parametrize("kind", PHRASES)
def test_what_stands_before_a_caption_is_at_most_what_is_reserved_for_it(kind):
    """Of every operation that a view can have at once: a zoom, crop, shift or flip, a collage and grayscale."""
    tokenizer = Tokenizer(bundled_words())
    for token, initializer in TOKENS.values():
        tokenizer.add_placeholder(token, len(tokenizer.encode_words(initializer)))
    most = 0
    for operation in TOKENS:
        for seed in range(16):  # of two phrases, and of two places, each occurs
            generator = torch.Generator().manual_seed(seed)
            prompt = augmentation.describe("caption", (operation, "collage", "grayscale"), PHRASES[kind], generator)
            most = max(most, len(tokenizer.words(prompt.partition("caption")[0])))
    assert most <= augmentation.BEFORE


LONG = "a small red and blue " * 15


def lengths(previews=(), stopper=(), **changes):
    images = (torch.zeros(3, 32, 32),)
    run = Run(concept=Concept(images=images, initializer_token="corgi dog", **changes), recipe=FAST, stopper=stopper)
    return check_lengths(run, previews, [Tokenizer(bundled_words())])


def test_a_prompt_whose_subject_is_cut_off_is_refused():
    """67 tokens of a caption are read whatever the augmentation writes before it, and 75 of others."""
    words = "a " * 65
    assert lengths(captions=(words + "{}",)) == [] and lengths(["a " * 73 + "{}"]) == []
    lost, behind = "a " * 74 + "{}", "has <concept> behind the (67|75) tokens that are read: shorten what"
    scored = (PickByScore(prompts=f"a {{}}\n{lost}"),)
    for prompts in ({"captions": (words + "a {}",)}, {"previews": [lost]}, {"stopper": scored}):
        with pytest.raises(ValueError, match=behind):
            lengths(**prompts)


def test_a_prompt_whose_end_is_cut_off_is_named():
    (sentence,) = lengths([f"a {{}} {LONG}"])
    assert re.match("The preview prompt 'a <concept> a small .*' has 78 tokens, of which the first 75 are", sentence)
    (*first, more) = lengths([f"{i} {{}} {LONG}" for i in range(5)])
    assert len(first) == 3 and more == "2 more prompts are longer than what is read: shorten them."


def test_a_preview_prompt_that_nearly_has_the_token_is_named(tmp_path):
    said, preview = [], Preview(prompts=("a {} with <Concept>", "a <collage>"), every=9, steps=1)
    run = Run(concept=concept(), recipe=FAST)
    folder = tmp_path / "run"  # other tests' folders beside it would be earlier runs
    training.train(run, small.models(), folder, preview=preview, callbacks=Callbacks(on_warning=said.append))
    place = "The preview prompt 'a {} with <Concept>' has <Concept>, which is not trained here: write <concept>."
    assert said == [place]
