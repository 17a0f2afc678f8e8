"""Personalization of Stable Diffusion without ComfyUI: training and evaluation, on one device or several.

Commands:
    python -m trainers train METHOD --images DIR --class-word dog --checkpoint FILE --out DIR
        train a method on a folder of images
    python -m trainers rerun RUN --checkpoint FILE --out DIR
        train a run again, with the same settings and images
    python -m trainers evaluate RUN --checkpoint FILE --out DIR
        generate images with a trained run, and score them
    python -m trainers generate RUN --checkpoint FILE --prompts FILE --out DIR
        generate images with a trained run, a folder for each prompt
    python -m trainers dreambench --data DIR --checkpoint FILE --out DIR
        train and evaluate all subjects of a data set by the DreamBooth protocol

    python -m trainers COMMAND --help                     flags of a command
    python -m trainers train METHOD --help                settings of a method, with its presets' defaults
    torchrun --nproc-per-node 2 -m trainers train ...     on two cards (or accelerate launch)
"""

import sys
from collections.abc import Sequence

from .cli import evaluate, generate, train
from .cli.dreambench import command as dreambench

COMMANDS = {
    "train": train.main,
    "rerun": train.rerun_main,
    "evaluate": evaluate.main,
    "generate": generate.main,
    "dreambench": dreambench.main,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; without arguments those of the process. Errors end the process with one sentence."""
    name, *rest = (sys.argv[1:] if arguments is None else [*arguments]) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return
    if name not in COMMANDS:
        sys.exit(f"error: The command {name!r} does not exist: use one of {', '.join(COMMANDS)}.")
    try:
        COMMANDS[name](rest)
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command resumes from the last checkpoint")
    except (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
