"""Memory estimates of a stage, and plans to fit it into less: smaller micro-batches, gradient checkpointing."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..device import TOO_LARGE, is_out_of_memory
from ..models.diffusion import Encoding, Models
from ..models.flow import FlowModels, blocks
from ..models.text_encoder import TextEncoder
from ..models.tokenizer import LENGTH
from .cross_attention import records_attention
from .optimizers import BYTES_PER_VALUE
from .stage import Stage, freeze_all_but

# For what is not counted below: workspaces, fragmentation, temporary gradients.
MARGIN, BASE = 1.25, 256 * 2**20
PROMPTS = 2  # at most, that the text encoders read for one image: its own and one for knowledge preservation


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Measures to fit into memory. They cost time and never change a result beyond rounding."""

    micro_batch_size: int = 0  # samples that go through the model at once; 0 = the whole batch
    gradient_checkpointing: bool = False

    def words(self, batch_size: int) -> str:
        """Say the plan for a notice."""
        split = f"micro-batch size {self.micro_batch_size or batch_size} of {batch_size}"
        return split + (", gradient checkpointing" if self.gradient_checkpointing else "")


def sample_bytes(models: Models, resolution: int, checkpointing: bool) -> int:
    """Count the bytes that autograd keeps for a sample through the U-Net and the text encoders that train."""
    texts = sum(text_activation_bytes(encoder, checkpointing) for encoder in _trained_texts(models))
    return activation_bytes(models, resolution // models.pixels_per_latent, checkpointing) + PROMPTS * texts


def stage_bytes(
    models: Models,
    memory_plan: MemoryPlan,
    *,
    trained: int,
    batch_size: int,
    resolution: int,
    optimizer: str = "adamw",
    sample: int | None = None,
) -> int:
    """Estimate the bytes that a stage needs besides the models' weights.

    Args:
        trained: number of trained values; each has a gradient in float32 and what the optimizer remembers of it.
            `requires_grad` in the text encoders decides where activations are kept.
        optimizer: a key of `BYTES_PER_VALUE`.
        resolution: pixels on a side.
        sample: its `sample_bytes`, where they are known.
    """
    size, twice = min(memory_plan.micro_batch_size or batch_size, batch_size), memory_plan.gradient_checkpointing
    activations = sample_bytes(models, resolution, twice) if sample is None else sample
    half = unet_precision(models) != torch.float32
    casts = copied_bytes(models) + (sum(map(cast_bytes, _trained_texts(models))) if half and not twice else 0)
    return int(BYTES_PER_VALUE[optimizer] * trained + MARGIN * size * activations) + casts + BASE


def _trained_texts(models: Models) -> list[TextEncoder]:
    return [encoder for encoder in models.text_encoders if any(p.requires_grad for p in encoder.parameters())]


_counted: dict[tuple, int] = {}  # by all that decides it: a host's process trains the same again and again


def activation_bytes(models: Models, side: int, checkpointing: bool) -> int:
    """Count the bytes that autograd keeps for a sample `[4, side, side]` through the U-Net, with fused attention.

    Counted without memory (the meta device), in seconds at most and once per process: with LoRA, trained weights
    and recorded attention. Attention runs unfused there; the scores, which a fused kernel never stores,
    are left out unless they are recorded.
    """
    if isinstance(models, FlowModels):
        return _flow_activation_bytes(models, side, checkpointing)
    unet = models.unet
    layers = tuple((name, type(layer)) for name, layer in unet.named_modules())
    weights = tuple((name, weight.shape, weight.requires_grad) for name, weight in unet.named_parameters())
    options = side, checkpointing, unet_precision(models), records_attention(unet), str(unet.config)
    if (key := (layers, weights, options)) not in _counted:
        _counted[key] = _unet_activation_bytes(models, side, checkpointing)
    return _counted[key]


def _unet_activation_bytes(models: Models, side: int, checkpointing: bool) -> int:
    unet, before, dtype = models.unet, models.unet.training, unet_precision(models)
    tensors = {name: _empty(t, dtype) for name, t in (*unet.named_parameters(), *unet.named_buffers())}
    scores = _unstored(unet.config.attention_head_dim, recorded=records_attention(unet))
    models.save_memory(checkpointing)
    try:
        forward = lambda: torch.func.functional_call(unet, tensors, kwargs=_inputs(models, side, dtype))  # noqa: E731
        whole = _kept_bytes(forward, tensors.values(), scores)
    finally:
        models.save_memory(before)
    if not checkpointing:
        return whole
    # While it goes back, one block at a time is computed again.
    return whole + activation_bytes(models, side, False) // len(list(unet.down_blocks) + list(unet.up_blocks))


def _flow_activation_bytes(models: FlowModels, side: int, checkpointing: bool) -> int:
    """Count what autograd keeps of a sample in a transformer that runs on its device alone; it grows with the area.

    It is counted at two small sizes. Copies of weights in the precision that it computes in are among what is kept.
    """
    (small, fewer), (large, more) = ((area, _kept_at(models, area, checkpointing)) for area in (16, 32))
    kept = fewer + (more - fewer) * (side**2 - small**2) // (large**2 - small**2)
    if not checkpointing:
        return kept
    return kept + _flow_activation_bytes(models, side, False) // max(1, len(blocks(models.unet)))


def _kept_at(models: FlowModels, side: int, checkpointing: bool) -> int:
    before = models.checkpointing
    models.save_memory(checkpointing)
    latents = torch.zeros(1, models.channels, side, side, device=models.device)
    timesteps = torch.full((1,), len(models.sigmas) // 2, device=models.device)
    encoding = models.encode_ids(models.tokenize([""]))
    try:
        forward = lambda: models.predict(latents, timesteps, encoding)  # noqa: E731
        return _kept_bytes(forward, models.unet.parameters(), lambda tensor: False)
    finally:
        models.save_memory(before)


def unet_precision(models: Models) -> torch.dtype:
    """Return the precision that the U-Net computes in."""
    return models.precision if models.base_weights else models.unet_dtype


def copied_bytes(models: Models) -> int:
    """Count the bytes of copies of trained U-Net weights in the precision that it computes in, if that is another."""
    half = unet_precision(models)
    trained = (p for p in models.unet.parameters() if p.requires_grad and p.dtype != half)
    return sum(half.itemsize * parameter.numel() for parameter in trained)


def _empty(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, device="meta", dtype=dtype, requires_grad=tensor.requires_grad)


def text_activation_bytes(encoder: TextEncoder, checkpointing: bool) -> int:
    """Count the bytes that autograd keeps for one prompt through a text encoder in float32; under autocast it is less.

    What does not depend on a parameter with `requires_grad` counts nothing.
    """
    tensors = (*encoder.named_parameters(), *encoder.named_buffers())
    empty = {name: torch.empty_like(t, device="meta", requires_grad=t.requires_grad) for name, t in tensors}
    ids, config = torch.zeros(1, LENGTH, dtype=torch.long, device="meta"), encoder.text_model.config
    at_work = encoder.checkpointing
    encoder.save_memory(False)
    forward = lambda: torch.func.functional_call(encoder, empty, (ids,))  # noqa: E731
    whole = _kept_bytes(forward, empty.values(), _unstored(config.num_attention_heads))
    encoder.save_memory(at_work)
    if not checkpointing:
        return whole
    layers = config.num_hidden_layers
    return 4 * LENGTH * config.hidden_size * layers + whole // layers  # each layer's input, and one layer again


def cast_bytes(encoder: TextEncoder) -> int:
    """Count the bytes of a text encoder's matrices in half precision: autograd keeps autocast's copies."""
    return sum(2 * layer.weight.numel() for layer in encoder.modules() if isinstance(layer, nn.Linear))


def _kept_bytes(forward: Callable[[], object], weights: Iterable[Tensor], left_out: Callable[[Tensor], bool]) -> int:
    """Count the bytes that autograd would keep of `forward()`, without `weights` and what is left out.

    They are counted when they would be kept, and let go: a training's card need not hold them.
    """
    known = {StorageWeakRef(weight.untyped_storage()) for weight in weights}
    sizes: dict[StorageWeakRef, int] = {}  # a weak reference keeps the address, so that no two storages share one

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (reference := StorageWeakRef(storage)) not in known and not left_out(tensor):
            sizes[reference] = storage.nbytes()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        forward()
    return sum(sizes.values())


def _inputs(models: Models, side: int, dtype: torch.dtype) -> dict:
    """Return the U-Net's arguments for one sample, without memory."""
    encoders = models.text_encoders
    parts = tuple(torch.zeros(1, 77, e.embedding.weight.shape[1], requires_grad=True, device="meta") for e in encoders)
    projection = encoders[-1].projection
    pooled = None if projection is None else torch.zeros(1, len(projection), device="meta")
    encoding = Encoding(parts=parts, pooled=pooled, mask=torch.zeros(1, LENGTH, 1, device="meta"))
    latents, timesteps = torch.zeros(1, 4, side, side, device="meta"), torch.zeros(1, device="meta")
    return models.unet_inputs(latents, timesteps, encoding, dtype)


def _unstored(heads: int | tuple[int, ...], recorded: bool = False) -> Callable[[Tensor], bool]:
    """Return a test for attention scores, which a fused kernel never stores."""
    heads = (heads,) if isinstance(heads, int) else heads

    def is_scores(tensor: Tensor) -> bool:
        if tensor.dim() < 3 or tensor.shape[-3] not in heads:
            return False
        return tensor.shape[-1] == tensor.shape[-2] or (tensor.shape[-1] == LENGTH and not recorded)

    return is_scores


def fit(
    models: Models, wanted: MemoryPlan, free: int, *, batch_size: int, resolution: int, **others
) -> tuple[MemoryPlan, int]:
    """Return the first plan, from `wanted` on, whose estimate fits into `free` bytes, and that estimate.

    Args:
        others: further arguments of `stage_bytes`.

    Raises:
        MemoryError: not even the last plan fits.
    """
    counted = cache(partial(sample_bytes, models, resolution))  # it takes a while, and splits do not change it
    for memory_plan in memory_plans(wanted, batch_size):
        sample = counted(memory_plan.gradient_checkpointing)
        need = stage_bytes(models, memory_plan, batch_size=batch_size, resolution=resolution, sample=sample, **others)
        if need <= free:
            return memory_plan, need
    raise MemoryError(
        f"Training at {resolution} px needs about {need / 2**30:.1f} GB even with one image at a time, and "
        f"{free / 2**30:.1f} GB are free: lower the resolution in Load References, or close other programs."
    )


@dataclass(kw_only=True)
class MemoryBudget:
    """Memory of a training's device, and the plan that fits into it.

    Attributes:
        memory_plan: the current plan; at first, and at the beginning of every stage, `wanted`.
        free: returns the device's free bytes; without it nothing is estimated.
        resolution: pixels on a side.
    """

    models: Models
    memory_plan: MemoryPlan
    free: Callable[[], int] | None
    resolution: int
    wanted: MemoryPlan = field(init=False)

    def __post_init__(self):
        self.wanted = self.memory_plan

    def make(self, stage: Stage) -> str:
        """Choose the first plan with which the stage fits; return it in words, "" without an estimate.

        An earlier stage's plan does not bind this one, which may need less.
        """
        self.memory_plan = self.wanted
        if not self.free:
            return ""
        freeze_all_but(stage, self.models)  # only what trains keeps activations
        self.memory_plan, need = fit(
            self.models, self.wanted, self.free(),
            trained=trained_values(stage), batch_size=stage.batch_size, resolution=self.resolution,
            optimizer=stage.optimization.optimizer,
        )  # fmt: skip
        return f"about {need / 2**30:.1f} GB of memory besides the models, {self.memory_plan.words(stage.batch_size)}"

    def shrink(self, stage: Stage, error: Exception) -> str:
        """Choose the next plan after memory ran out, and return it in words; raise any other error again."""
        if not is_out_of_memory(error):
            raise error
        known = memory_plans(self.wanted, stage.batch_size)
        smaller = known[known.index(self.memory_plan) + 1 :]
        if not smaller:
            raise MemoryError(TOO_LARGE) from None
        self.memory_plan = smaller[0]
        return f"memory ran out: continuing with {self.memory_plan.words(stage.batch_size)}"


def trained_values(stage: Stage) -> int:
    return sum(parameter.numel() for parameter in stage.parameters())


def memory_plans(wanted: MemoryPlan, batch_size: int) -> list[MemoryPlan]:
    """Return `wanted` and the plans to try next, the last with the least need.

    Halve down to 2, then use gradient checkpointing from the whole batch down to 1: single images take longer than
    pairs with gradient checkpointing.
    """
    twice = replace(wanted, gradient_checkpointing=True)
    return ([] if wanted == twice else list(_halves(wanted, batch_size, 2))) + list(_halves(twice, batch_size, 1))


def _halves(memory_plan: MemoryPlan, batch_size: int, least: int) -> Iterator[MemoryPlan]:
    yield memory_plan
    size = min(memory_plan.micro_batch_size or batch_size, batch_size)
    while size > least:
        size = -(-size // 2)
        yield replace(memory_plan, micro_batch_size=size)
