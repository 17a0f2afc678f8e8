"""What a training step counts at a family's real shape: FLOPs, operations, casts, bytes, waits. Nothing is measured.

    python -m benchmarks.counted [--family sd15 --method attndreambooth-3 --precision bfloat16 --batch 8 --size 512]

One forward and backward of the product's own step on PyTorch's meta device, which has shapes and no memory, so any
computer counts what a card would be asked to do. Operations are PyTorch's, each one kernel or a few; bytes are read and
written by all of them, without caches and fusion; attention runs unfused. A wait is a value that the processor reads
from the device. TextBoost is counted without knowledge preservation. Autocast does not act on the meta device, so the
text encoders' casts are missing.
"""

import argparse
import contextlib
from collections import Counter
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import SHAPES, random_models
from trainers.data.concept import Concept
from trainers.data.context import Context
from trainers.device import SingleDevice
from trainers.recipes import attndreambooth, dreambooth_lora, textboost, textboost_2026
from trainers.training import loop
from trainers.training.objective import Objective
from trainers.training.stage import freeze_all_but

SMALL = {"steps": 1, "views": 1}
METHODS = {
    "textboost": (replace(textboost.BENCHMARK, knowledge_weight=0.0, clamp_norms=False, **SMALL), 1),
    "textboost-2026++": (replace(textboost_2026.PLUS, clamp_norms=False, **SMALL), 1),
    "dreambooth-lora": (replace(dreambooth_lora.FULL, **SMALL), 1),
    **{f"attndreambooth-{n}": (replace(attndreambooth.PAPER, views=1), n) for n in (1, 2, 3)},
    "attndreambooth-lora-3": (replace(attndreambooth.PAPER, views=1, fine_tuning="lora"), 3),
}
VIEWS = (
    "view",
    "t",
    "transpose",
    "expand",
    "permute",
    "slice",
    "select",
    "detach",
    "alias",
    "unsqueeze",
    "squeeze",
    "split",
)


class Counting(TorchDispatchMode):
    """Counts operations by name, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::").strip("_")
        tensors = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, torch.Tensor) and t.is_meta]
        if tensors and name not in VIEWS and not name.endswith("view"):
            self.operations[name] += 1
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return found


class Meta(SingleDevice):
    """A device that does nothing."""

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


def counted(family: str, method: str, dtype: torch.dtype, batch: int, size: int) -> tuple[Counting, int, int]:
    """Operations and bytes, floating point operations, and trained values of one step of `batch` images."""
    device, generator = torch.device("meta"), torch.Generator().manual_seed(0)
    models = random_models(SHAPES[family], device, dtype)
    models.encode_images = lambda pixels: (torch.zeros(len(pixels), 4, size // 8, size // 8), None)
    recipe, number = METHODS[method]
    names = [name for name in vars(recipe) if name.startswith("batch_size")]
    recipe = replace(recipe, **dict.fromkeys(names, batch))
    concept = Concept(images=(torch.rand(3, size, size),), resolution=size)
    if method in ("attndreambooth-2", "attndreambooth-3"):  # what trains whole is copied to the CPU, if there is any
        trained = {n: p for n, p in models.unet.named_parameters() if number == 3 or ".attn2." in n}
        models.base_weights = dict.fromkeys(trained, torch.empty(0))
        for parameter in trained.values():
            parameter.data = parameter.data.float()
    stages = recipe.stages(models, concept, generator, Context())
    *_, stage = (next(stages) for _ in range(number))
    freeze_all_but(stage, models)
    objective = Objective(models, {name: loss for name, (_, loss) in stage.losses.items()})
    place = Meta(device=device)
    inputs = loop.draw(stage, place, generator, loop.known_prompts(models, place)).map(lambda t: t.to(device))
    with FlopCounterMode(display=False) as flops, Counting() as counting:
        loop.run_pass(stage, objective, place, 0, inputs)
    stages.close()
    return counting, flops.get_total_flops(), sum(p.numel() for p in stage.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=SHAPES, default="sd15")
    parser.add_argument("--method", choices=METHODS, default="textboost")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=512)
    args = parser.parse_args()
    counting, flops, trained = counted(args.family, args.method, getattr(torch, args.precision), args.batch, args.size)
    print(f"{args.method}, {args.family}, {args.batch} x {args.size} px, {args.precision}: counted for one step")
    print(f"  trained values {trained:18,}\n  TFLOP {flops / 1e12:27.2f}")
    print(f"  operations {counting.operations.total():22,}\n  GB read and written {counting.bytes / 1e9:13.1f}")
    print(f"  casts {counting.operations['to_copy']:27,}\n  waits {counting.operations['local_scalar_dense']:27,}")
    for name, count in counting.operations.most_common(12):
        print(f"    {name:32} {count:6,}")


if __name__ == "__main__":
    main()
