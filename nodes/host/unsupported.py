"""Describes changes of a MODEL or CLIP in the graph that a training cannot take into account, for a warning."""

from .causal_adapters import KEY, Conditions, ContextAdapters

# Options of a sampler that change its results without changing weights, by the host's names.
OPTIONS = {
    "model_function_wrapper": "a wrapper of the model",
    "sampler_cfg_function": "a guidance function",
    "sampler_pre_cfg_function": "a guidance function",
    "sampler_post_cfg_function": "a guidance function",
    "sampler_calc_cond_batch_function": "a guidance function",
}


def warning(model, clip) -> str:
    """Return one sentence, or "" if a training takes the whole graph into account."""
    parts = [f"{what} on the {name}" for name, p in (("MODEL", model), ("CLIP", clip.patcher)) for what in _on(p)]
    if not parts:
        return ""
    return f"The training ignores {', '.join(parts)}: images generated with them may differ from the previews."


def _on(patcher) -> list[str]:
    """List what a copy of the weights lacks: hooks, injected code, patches of functions and of the sampling."""
    found = ["a bypass LoRA" if name == "bypass_lora" else f"injected code ({name})" for name in patcher.injections]
    hooks = getattr(patcher, "hook_patches", None) or getattr(patcher, "forced_hooks", None)
    found += ["hooks"] if hooks else []
    carried = patcher.get_attachment(KEY)
    ours = {*getattr(carried, "patches", ()), "model_sampling", "manual_cast_dtype"}
    others = [name for name, patch in patcher.object_patches.items() if not isinstance(patch, Conditions)]
    found += [f"a patch of {name}" for name in sorted({*others} - ours)]
    found += sorted({words for option, words in OPTIONS.items() if option in patcher.model_options})
    options = patcher.model_options.get("transformer_options", {})
    for kind in ("patches", "patches_replace"):
        for name, patches in options.get(kind, {}).items():
            found += [] if all(isinstance(patch, ContextAdapters) for patch in patches) else [f"{name} patches"]
    found += ["wrappers"] if any(key != KEY for kinds in patcher.wrappers.values() for key in kinds) else []
    return [*dict.fromkeys(found)]
