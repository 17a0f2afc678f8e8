"""What is taken from inside the host is there, and where it is not, a sentence says so instead of a wrong result."""

import pytest
import torch

pytestmark = pytest.mark.comfy


def names():
    from personalize.nodes.host import internals

    return sorted(internals.TAKEN)


def test_this_host_has_everything_that_is_taken():
    from personalize.nodes.host import internals

    assert len(names()) > 20
    assert all(getattr(internals, name) is not None for name in names())


def test_the_rest_of_the_pack_reaches_into_the_host_through_it():
    """No other file names a module of the host's insides."""
    import re

    from personalize.tests.conftest import ROOT

    files = [path for path in (ROOT / "nodes").rglob("*.py") if path.name != "internals.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert re.findall(r"\bcomfy\.\w+\.[\w.]+", text) == []
    assert not re.findall(r"^from comfy(?:\.|_execution)", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["calculate_weight", "unload_all_models"])
def test_what_a_host_no_longer_has_is_named(name, monkeypatch):
    import importlib

    from personalize.nodes.host import internals

    module = importlib.import_module(internals.TAKEN[name])
    monkeypatch.delattr(module, name)
    with pytest.raises(internals.HostChanged, match=f"This ComfyUI has no {module.__name__}.{name}, which .* update"):
        getattr(internals, name)
    monkeypatch.setitem(internals.TAKEN, name, "comfy.no_such_module")
    with pytest.raises(internals.HostChanged, match=f"comfy.no_such_module.{name}"):
        getattr(internals, name)


def test_a_part_that_a_host_no_longer_has_is_named():
    from personalize.nodes.host import internals

    layer = torch.nn.Linear(2, 3)
    assert internals.part(layer, "weight.shape") == (3, 2)
    with pytest.raises(internals.HostChanged, match=r"no Linear\.weight\.text_model, which"):
        internals.part(layer, "weight.text_model")
    with pytest.raises(AttributeError):
        internals.no_such_name  # noqa: B018


def test_a_tokenizer_that_asks_for_embeddings_another_way_is_refused():
    from personalize.nodes.host import clip_attachment, internals

    class Tokenizer:
        embedding_directory = None

        def tokenize_with_weights(self, text):
            return []

    with pytest.raises(internals.HostChanged, match="_try_get_embedding"):
        clip_attachment._with_words(Tokenizer(), {"<dog>": torch.zeros(1, 4)})
