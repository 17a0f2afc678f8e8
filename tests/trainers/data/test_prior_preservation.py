"""Images of the class: the loss on them, how they share a batch, where they come from, what names a run of them."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from personalize.tests.support import small
from personalize.trainers.data.batch import Batch
from personalize.trainers.data.class_images import CHUNK, class_images_of
from personalize.trainers.data.concept import Concept
from personalize.trainers.data.context import Context
from personalize.trainers.data.templates import IMAGENET, IMAGENET_SMALL
from personalize.trainers.digest import digest_of
from personalize.trainers.recipes.attndreambooth import AttnDreamBooth
from personalize.trainers.recipes.dreambooth_lora import DreamBoothLoRA
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.runs.run import Run
from personalize.trainers.training import losses, trainables
from personalize.trainers.training.objective import Objective
from personalize.trainers.training.stage import freeze_all_but

PICTURE = torch.rand(3, 48, 32, generator=torch.Generator().manual_seed(5))


def concept(**changes):
    return Concept(**{"images": (PICTURE,), "resolution": 32} | changes)


def batch_of(own=3, other=2, masks=True, seed=0):
    """A batch of both kinds with made-up latents; its noise and timesteps."""
    g = torch.Generator().manual_seed(seed)
    models = small.models()
    mask = torch.rand(own, 1, 4, 4, generator=g) if masks else None
    instances = Batch(
        latents=torch.randn(own, 4, 4, 4, generator=g), input_ids=models.tokenize(["a dog"] * own), masks=mask,
        preservation_ids=models.tokenize(["snow"]), preservation_targets=torch.zeros(1, 77, 32),
    )  # fmt: skip
    classes = Batch(latents=torch.randn(other, 4, 4, 4, generator=g), input_ids=models.tokenize(["a cat"] * other))
    noise, timesteps = torch.randn(own + other, 4, 4, 4, generator=g), torch.randint(1000, (own + other,), generator=g)
    return models, instances.with_class(classes), noise, timesteps


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(("own", "other"), [(2, 2), (3, 2), (1, 4)])
def test_losses_are_the_formulas(own, other, masks):
    """Masked mean within each image of the instance, then over them; plain mean over the class: in float64."""
    models, batch, noise, timesteps = batch_of(own, other, masks)
    objective = Objective(models, {"denoising": losses.denoising, "prior": losses.prior_preservation})
    with torch.no_grad():
        prediction = objective.predict(batch, noise, timesteps)
        terms = objective(batch, noise, timesteps)
    squares = (prediction.model_pred.double() - noise.double()) ** 2
    instance = 0.0
    for i in range(own):
        weight = batch.masks[i].double().expand(4, -1, -1) if masks else torch.ones(4, 4, 4).double()
        instance += (squares[i] * weight).sum() / weight.sum() / own
    assert terms["denoising"].item() == pytest.approx(instance.item(), rel=1e-5)
    assert terms["prior"].item() == pytest.approx(squares[own:].mean().item(), rel=1e-5)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_shares_of_a_batch_add_up(parts):
    models, batch, noise, timesteps = batch_of()
    objective = Objective(models, {"denoising": losses.denoising, "prior": losses.prior_preservation})
    batch = dataclasses.replace(batch, preservation_ids=None, preservation_targets=None)
    with torch.no_grad():
        whole = objective(batch, noise, timesteps)
        sums = dict.fromkeys(whole, 0.0)
        for part, e, t in zip(
            batch.split(parts), noise.tensor_split(parts), timesteps.tensor_split(parts), strict=True
        ):
            for name, term in objective(part, e, t).items():
                sums[name] += len(part) / len(batch) * term
    assert all(sums[name].item() == pytest.approx(term.item(), rel=1e-5) for name, term in whole.items())


def test_the_instances_of_a_batch():
    _, batch, *_ = batch_of(own=3, other=2)
    own = batch.instances()
    assert len(batch) == 5 and len(own) == 3 and own.weights is None and own.preservation_ids is None
    assert torch.equal(own.latents, batch.latents[:3]) and torch.equal(own.masks, batch.masks[:3])
    assert torch.equal(own.input_ids, batch.input_ids[:3]) and torch.equal(own.instances().latents, own.latents)
    assert (batch.masks[3:] == 1).all() and batch.weights.mean(dim=0).tolist() == pytest.approx([1, 1])


# -- where the images come from


def pixels(pictures):
    return torch.cat([latents.mean for latents in pictures.latents.values()])


def test_the_size_of_all_class_images_is_bounded_before_one_is_drawn():
    with pytest.raises(
        ValueError, match="^The 10000000 class images to generate have .* million pixels together, more"
    ):
        class_images_of(small.models(), concept(), Context(), seed=7, count=10_000_000, steps=2)


def test_the_model_draws_them_the_same_every_time(tmp_path):
    first, again, kept, read, other = (small.models() for _ in range(5))
    drawn = class_images_of(first, concept(), Context(), seed=7, count=11, steps=2)
    assert pixels(drawn).shape == (11, 4, 4, 4) and len({tuple(p.flatten().tolist()) for p in pixels(drawn)}) == 11
    torch.manual_seed(3)
    assert torch.equal(pixels(class_images_of(again, concept(), Context(), seed=7, count=11, steps=2)), pixels(drawn))
    assert torch.equal(
        pixels(class_images_of(kept, concept(), Context(cache=tmp_path), seed=7, count=11, steps=2)), pixels(drawn)
    )
    files = sorted(tmp_path.rglob("*"))
    assert [file.name for file in files if file.is_file()] == [f"{i:04d}.png" for i in range(11)]
    read.unet = None  # nothing is drawn a second time
    read_unet = dataclasses.replace(read, unet=first.unet)
    calls = []
    read_unet.unet.register_forward_hook(lambda *args: calls.append(1))
    assert (
        torch.equal(
            pixels(class_images_of(read_unet, concept(), Context(cache=tmp_path), seed=7, count=11, steps=2)),
            pixels(drawn),
        )
        and not calls
    )
    assert not torch.equal(
        pixels(class_images_of(other, concept(), Context(cache=tmp_path), seed=8, count=11, steps=2)), pixels(drawn)
    )


def test_half_of_a_chunk_or_a_damaged_image_is_drawn_again(tmp_path):
    whole = pixels(class_images_of(small.models(), concept(), Context(), seed=0, count=2 * CHUNK, steps=2))
    for damage in (lambda file: file.unlink(), lambda file: file.write_bytes(b"no picture")):
        models = small.models()
        class_images_of(models, concept(), Context(cache=tmp_path), seed=0, count=2 * CHUNK, steps=2)
        damage(sorted(tmp_path.rglob("*.png"))[CHUNK + 1])
        calls = []
        models.unet.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        assert torch.equal(
            pixels(class_images_of(models, concept(), Context(cache=tmp_path), seed=0, count=2 * CHUNK, steps=2)), whole
        )
        assert len(calls) == 2  # one chunk, two sampler steps


def test_what_decides_the_images_names_their_folder(tmp_path):
    def folders(seed=0, count=2, steps=2, change=lambda models: None, **changes):
        models = small.models()
        change(models)
        class_images_of(models, concept(**changes), Context(cache=tmp_path), seed=seed, count=count, steps=steps)
        return len([*tmp_path.iterdir()])

    def other_weights(models):
        models.unet.conv_out.weight.data += 1e-3

    assert folders() == 1 and folders() == 1 and folders(placeholder_token="<other>") == 1
    counts = [folders(seed=1), folders(count=3), folders(steps=3), folders(class_word="cat"), folders(resolution=64)]
    assert [*counts, folders(change=other_weights)] == [2, 3, 4, 5, 6, 7]


def test_an_interrupt_reaches_the_drawing(tmp_path):
    class Interrupted(BaseException):
        pass

    said, models = [], small.models()

    def notice(sentence):
        said.append(sentence)
        if "8 of 20" in sentence:
            raise Interrupted

    with pytest.raises(Interrupted):
        class_images_of(models, concept(), Context(notice=notice, cache=tmp_path), seed=0, count=20, steps=1)
    assert said == ["class images: 0 of 20", "class images: 8 of 20"] and len([*tmp_path.rglob("*.png")]) == 8


def test_given_images_are_taken_with_their_captions():
    models = small.models()
    given = tuple(torch.full((3, 40, 40 + 8 * i), i / 4) for i in range(4))
    captions = ("a cat on grass", "", "two cats", "")
    made = class_images_of(
        models,
        concept(class_word="cat", class_images=given, class_captions=captions),
        Context(),
        seed=0,
        count=200,
        steps=25,
    )
    assert pixels(made)[:, 0].mean(dim=(1, 2)).tolist() == pytest.approx([i - 2 for i in range(4)], abs=1e-4)
    prompts = ["a cat on grass", "a photo of a cat", "two cats", "a photo of a cat"]
    assert torch.equal(made.input_ids, models.tokenize(prompts))


def test_every_size_of_bucket_has_class_images():
    pictures = (PICTURE, PICTURE.mT)
    made = class_images_of(small.models(), concept(images=pictures, crop="bucket"), Context(), seed=0, count=3, steps=1)
    assert {*made.latents} == {(5, 3), (3, 5)}
    batch = Batch(latents=torch.zeros(2, 4, 3, 5), input_ids=torch.zeros(2, 1, 77))
    assert made.sample(batch, torch.Generator()).latents.shape == (2, 4, 3, 5)


# -- what names a run


TEXTBOOST = TextBoost(
    steps=2, batch_size=2, views=2, prior_weight=0.5, class_images=3, class_image_steps=1, captions=small.CAPTIONS
)
ATTNDREAMBOOTH = AttnDreamBooth(
    steps_1=1, steps_2=1, steps_3=1, batch_size_1=2, batch_size_2=2, batch_size_3=2, views=2, prior_weight=0.5,
    class_images=3, class_image_steps=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "stages"), [(TEXTBOOST, [True]), (ATTNDREAMBOOTH, [False, True, True])], ids=["textboost", "attn"]
)
def test_other_methods_keep_their_class_where_weights_train(recipe, stages):
    """As many images of the class as of the subject, generated by the unchanged model; their plain mean, weighted."""
    models, generator = small.models(), torch.Generator().manual_seed(3)
    drawn = class_images_of(small.models(), concept(), Context(), seed=3, count=3, steps=1)
    for stage, has_class in zip(recipe.stages(models, concept(), generator, Context()), stages, strict=True):
        freeze_all_but(stage, models)
        batch = next(stage.batches)
        assert len(batch) == stage.batch_size == (4 if has_class else 2)
        assert ("prior_preservation" in stage.losses) == has_class
        if not has_class:
            continue
        other = batch.weights[:, 0] == 0
        assert other.tolist() == [False, False, True, True] and stage.losses["prior_preservation"][0] == 0.5
        assert torch.equal(batch.input_ids[other], models.tokenize(["a photo of a dog"] * 2))
        known = drawn.latents[4, 4].mean
        distances = (batch.latents[other][:, None] - known[None]).flatten(2).norm(dim=-1)
        assert (distances.min(dim=1).values < 0.5 * distances.max()).all()
        objective = Objective(models, {name: loss for name, (_, loss) in stage.losses.items()})
        noise, t = torch.randn(batch.latents.shape, generator=generator), stage.timesteps(len(batch))
        terms, prediction = objective(batch, noise, t), objective.predict(batch, noise, t)
        squares = ((prediction.model_pred - prediction.target).double() ** 2).mean(dim=(1, 2, 3))
        assert terms["prior_preservation"].item() == pytest.approx(squares[other].mean().item(), rel=1e-5)
        stage.after_pass()


def test_class_images_leave_the_attention_regularizer_as_it_is():
    """Their prompts have no placeholder token: the sum over the subject's samples stays, whatever stands next to it."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 20, (4, 1, 77), generator=g)
    ids[:2, 0, 3], ids[:, 0, 4] = 7, 8  # V before C in the first two, C alone in the others
    values = torch.rand(4, 77, generator=g)
    found = []
    for n in (2, 4):
        maps = SimpleNamespace(means={"layer": values[:n]})
        regularizer = losses.AttentionRegularization(
            maps=maps, statistic="means", placeholder=(7,), class_word=(8,), batch_size=n
        )
        found.append(regularizer(SimpleNamespace(batch=SimpleNamespace(input_ids=ids[:n]))).item())
    assert found == pytest.approx([((values[:2, 3] - values[:2, 4]) ** 2).sum().item()] * 2, rel=1e-6)


def test_class_images_are_part_of_a_runs_digest_and_their_absence_is_not():
    run = Run(concept=concept(), recipe=DreamBoothLoRA())
    assert run.settings()["concept"]["class_captions"] == [] and "class_images" not in run.settings()["concept"]
    assert run.dataset() == digest_of([PICTURE])  # as before there were class images
    changes = [{}, {"class_images": (PICTURE,)}, {"class_images": (PICTURE.flip(1),)}]
    changes += [{"class_images": (PICTURE,), "class_captions": ("a dog",)}, {"images": (PICTURE, PICTURE)}]
    digests = {Run(concept=concept(**change), recipe=DreamBoothLoRA()).digest("model") for change in changes}
    assert len(digests) == len(changes)


def test_bad_class_images_get_one_sentence():
    for changes, sentence in (
        ({"class_images": (PICTURE,), "class_captions": ("a", "b")}, r"class captions .2. .* class images .1."),
        ({"class_images": (torch.zeros(3, 4, 9),)}, "A class image is smaller"),
        ({"class_images": (PICTURE / 0,)}, "A class image contains NaN"),
    ):
        with pytest.raises(ValueError, match=sentence):
            concept(**changes)


# -- templates and initializers of these methods


def test_there_are_57_templates():
    assert len(IMAGENET) == len({*IMAGENET}) == 57 and IMAGENET[:27] == IMAGENET_SMALL
    begins = [template.split(" of ")[0] for template in IMAGENET]
    assert begins.count("a photo") == begins.count("an illustration") == begins.count("a depiction") == 15
    assert {"an illustration of my {}", "a depiction of the weird {}"} <= {*IMAGENET}
    assert all(template.count("{}") == 1 for template in IMAGENET)


def test_a_row_of_the_vocabulary_can_be_the_initializer():
    """`ktn` is row 42170, which no text is spelled with."""
    tokenizer = small.models().text_encoders[0].tokenizer
    assert len(tokenizer.encode_words("ktn")) == 2
    assert trainables.initializer_ids(tokenizer, "id:42170") == [42170]
    red, dog = tokenizer.encode_words("red"), tokenizer.encode_words("dog")
    assert trainables.initializer_ids(tokenizer, "red id:42170 dog") == [*red, 42170, *dog]
    assert trainables.initializer_ids(tokenizer, "a corgi dog") == tokenizer.encode_words("a corgi dog")
    assert trainables.initializer_ids(tokenizer, "paid:3") == tokenizer.encode_words("paid:3")
    for number in (49406, 10**9):
        with pytest.raises(ValueError, match="The initializer 'id:.*use id:0 to id:49405"):
            trainables.check_words(tokenizer, "<dog>", f"id:{number}", "dog")
    encoder = small.models().text_encoders[0]
    table = encoder.embedding.weight.clone()
    assert torch.equal(trainables.add_tokens(encoder, [("<dog>", "id:42170")]).rows, table[42170][None])


def test_what_was_drawn_can_be_opened(tmp_path):
    models = small.models()
    class_images_of(models, concept(), Context(cache=tmp_path), seed=0, count=1, steps=1)
    (file,) = tmp_path.rglob("*.png")
    with Image.open(file) as picture:
        assert picture.size == (32, 32)
