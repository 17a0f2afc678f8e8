"""What a graph has done to a MODEL or CLIP that a training cannot see, in words for a warning."""

from .causal_adapters import KEY, Conditions, ContextAdapters

# What a sampler may be given beside the weights, by the host's names.
OPTIONS = {
    "model_function_wrapper": "a wrapper of the model",
    "sampler_cfg_function": "a guidance function",
    "sampler_pre_cfg_function": "a guidance function",
    "sampler_post_cfg_function": "a guidance function",
    "sampler_calc_cond_batch_function": "a guidance function",
}


def warning(model, clip) -> str:
    """One sentence, or nothing where a training sees all that the graph does."""
    parts = [f"{what} on the {name}" for name, p in (("MODEL", model), ("CLIP", clip.patcher)) for what in _on(p)]
    if not parts:
        return ""
    return f"The training learns without {', '.join(parts)}: what is drawn with them may differ from its previews."


def _on(patcher) -> list[str]:
    """What no copy of the weights shows: hooks, injected code, patches of functions and of the sampling."""
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
