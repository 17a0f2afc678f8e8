"""Weights of a metric model that change under their name: are they noticed by what is loaded and by a run's name?"""

import os

import torch
from safetensors.torch import load_file, save_file

from personalize.tests.support import world_clip
from personalize.trainers.metrics.weight_files import digest, from_hub
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.runs.run import start_of
from personalize.trainers.stopping.clip_early_stopping import ClipEarlyStopping


def test_changed_weights_are_loaded_again_and_make_another_run(shelf, folder):
    config, file = world_clip.CHOICE, folder / world_clip.FILE
    monitor = ClipEarlyStopping(clip_model=config.clip_model, clip_weights=config.clip_weights)
    first, before = shelf.load(config), start_of(TextBoost(), (monitor,), "model", shelf)
    assert shelf.load(config) is first

    state = load_file(file)
    save_file(state, file)  # the same once more, at another time
    os.utime(file, (1, 1))
    assert start_of(TextBoost(), (monitor,), "model", shelf) == before

    changed = {key: value * 1.5 if value.is_floating_point() else value for key, value in state.items()}
    save_file(changed, file)
    assert start_of(TextBoost(), (monitor,), "model", shelf) != before
    pairs = zip(shelf.load(config).module.parameters(), first.module.parameters(), strict=True)
    assert any(not torch.equal(new, old) for new, old in pairs)
    assert start_of(TextBoost(), (), "model", shelf) == "model"


def test_a_digest_tells_files_apart_that_differ_in_size_or_in_what_is_read(tmp_path):
    file = tmp_path / "weights.safetensors"
    seen = set()
    for content in (b"", b"a", b"b", b"a" * 10**6, b"a" * (10**6 + 1), b"b" + b"a" * (10**6 - 1)):
        file.write_bytes(content)
        seen.add(digest([file]))
    assert len(seen) == 6 and digest([]) != digest([file])


def test_weights_that_are_here_are_not_asked_for_on_the_network(tmp_path, monkeypatch):
    import huggingface_hub

    def network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", network)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: str(tmp_path / file))
    assert from_hub("CLIP", "x", "y/z", ["a.safetensors"], download=True) == [tmp_path / "a.safetensors"]
