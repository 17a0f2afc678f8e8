"""Training and evaluation without ComfyUI, on one device or several.

Commands:
    python -m trainers train METHOD --images DIR --class-word dog --checkpoint FILE --out DIR
        learn a subject
    python -m trainers rerun RUN --checkpoint FILE --out DIR
        train a run of the graph again, with the same settings and images
    python -m trainers evaluate RUN --checkpoint FILE --out DIR
        generate prompts with what a run learned, and score them
    python -m trainers dreambench --data DIR --checkpoint FILE --out DIR
        the DreamBooth protocol over all subjects of a data set

    python -m trainers COMMAND --help                     flags of a command
    python -m trainers train METHOD --help                settings of a method, with the defaults of its presets
    torchrun --nproc-per-node 2 -m trainers train ...     on two cards (or accelerate launch)
"""

import sys
from collections.abc import Sequence

from .cli import evaluate, train
from .cli.dreambench import command as dreambench

COMMANDS = {
    "train": train.main,
    "rerun": train.rerun_main,
    "evaluate": evaluate.main,
    "dreambench": dreambench.main,
}


def main(arguments: Sequence[str] | None = None) -> None:
    name, *rest = (sys.argv[1:] if arguments is None else [*arguments]) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return
    if name not in COMMANDS:
        sys.exit(f"error: There is no command {name!r}: use one of {', '.join(COMMANDS)}.")
    try:
        COMMANDS[name](rest)
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command resumes from the last checkpoint")
    except (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
