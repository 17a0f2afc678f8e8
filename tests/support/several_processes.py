"""What each process of `torchrun` runs in test_distributed.py: short trainings of small models. No test in here.

torchrun --nproc-per-node 2 tests/support/several_processes.py OUT NAME ... [--kill STEP]
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, where conftest.py lies

from conftest import load_pack

load_pack()

from personalize.tests.support import small  # noqa: E402
from personalize.trainers.data.concept import Concept  # noqa: E402
from personalize.trainers.recipes.attndreambooth import AttnDreamBooth  # noqa: E402
from personalize.trainers.recipes.custom_diffusion import CustomDiffusion  # noqa: E402
from personalize.trainers.recipes.textboost import TextBoost  # noqa: E402
from personalize.trainers.runs import train as training  # noqa: E402
from personalize.trainers.runs.run import Run  # noqa: E402
from personalize.trainers.runs.shared_folder import SharedFolder  # noqa: E402
from personalize.trainers.stopping.dvar import DVAR  # noqa: E402
from personalize.trainers.stopping.monitor import FixedSteps  # noqa: E402
from personalize.trainers.training.distributed import ManyDevices, processes  # noqa: E402

SHORT = {"views": 8, "max_grad_norm": 0.1}
STAGES = {f"batch_size_{stage}": 3 for stage in (1, 2)} | {f"steps_{stage}": 2 for stage in (1, 2)}
# The second measures on the device, and what it likes best decides what is returned.
STOPPER = (
    FixedSteps(steps=2, stop_training=False),
    DVAR(batch_size=2, accumulation=1, window=2, stop_training=False, keep="best"),
)
RECIPES = {
    "textboost": TextBoost(steps=4, batch_size=4, captions=small.CAPTIONS, **SHORT),
    "uneven": TextBoost(steps=2, batch_size=3, knowledge_weight=0.0, **SHORT),
    "attndreambooth": AttnDreamBooth(run_stages="1+2", variance_weight_1=1.0, **STAGES, **SHORT),
    "custom diffusion": CustomDiffusion(steps=2, batch_size=2, class_images=2, class_image_steps=1, **SHORT),
    "too small": TextBoost(steps=2, batch_size=1, knowledge_weight=0.0, **SHORT),
}


def run_of(name):
    picture = torch.rand(3, 48, 32, generator=torch.Generator().manual_seed(5))
    masks = (torch.ones(1, 48, 32).tril(),) * 2 if name == "textboost" else None
    concept = Concept(images=(picture, picture.flip(1)), masks=masks, resolution=32)
    return Run(concept=concept, recipe=RECIPES[name], stopper=STOPPER, seed=3)


def train(name, folder, **options):
    return training.train(run_of(name), small.models(), folder, checkpoint_every=1, **options)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--kill", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)

    def on_step(report):
        if report.step == given.kill and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    with processes(torch.device("cpu")) as device:
        for name in given.names:
            folder = SharedFolder(given.out / name)
            many = ManyDevices(device=device)
            try:
                train(name, folder, device=many, callbacks=training.Callbacks(on_step=on_step))
            except ValueError as error:
                print(f"{name}: {error}", flush=True)


if __name__ == "__main__":
    main()
