"""Runs a benchmark with a ComfyUI in the same process: for models that train on the host's own modules.

    python -m benchmarks.with_host COMFYUI fidelity --checkpoint transformer.safetensors --out DIR ...

The pack is loaded as ComfyUI loads it, as a package of another name; a benchmark's absolute imports mean its modules.
"""

import argparse
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = "personalize"


def load_host(comfyui: Path, cpu: bool = True) -> None:
    """Let ComfyUI's modules be importable and teach it the demo's models.

    Args:
        cpu: work on the processor in float32, whatever the machine has.
    """
    sys.path.insert(0, str(comfyui))
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = args.force_fp32 = cpu
    # As Train does: some kernels for generation have no gradient.
    importlib.import_module("comfy.model_management").in_training = True
    importlib.import_module("demo.architecture").register()


def load_pack() -> None:
    """Load the repository as a package, and give its trainers' modules their absolute names."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec and spec.loader
    sys.modules[PACK] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trainers = importlib.import_module(f"{PACK}.trainers")
    for found in pkgutil.walk_packages(trainers.__path__, trainers.__name__ + "."):
        importlib.import_module(found.name)
    loaded = {name: part for name, part in sys.modules.items() if name.startswith(trainers.__name__)}
    sys.modules |= {name.removeprefix(f"{PACK}."): part for name, part in loaded.items()}


def load_graph(checkpoint: Path):
    """MODEL, CLIP and VAE of a checkpoint.

    Raises:
        SystemExit: this is not running with a host.
    """
    if PACK not in sys.modules:
        raise SystemExit("This checkpoint needs ComfyUI: python -m benchmarks.with_host COMFYUI fidelity ...")
    import comfy.sd
    import torch

    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]


def flow_models(graph):
    """MODEL, CLIP and VAE as `FlowModels`."""
    given = of_pack("nodes.host.models").GraphModels.of(*graph)
    return of_pack("nodes.host.native").read_models(given, lambda sentence: None)


def of_pack(name: str):
    """A module of the pack as the host has loaded it."""
    return importlib.import_module(f"{PACK}.{name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("benchmark", help="fidelity, native, picking, stopping or counted_native")
    options, sys.argv[1:] = parser.parse_known_args()
    load_host(options.comfyui.resolve())
    load_pack()
    importlib.import_module(f"benchmarks.{options.benchmark}").main()


if __name__ == "__main__":
    main()
