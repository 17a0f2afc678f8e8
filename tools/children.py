"""Child processes, the log and the words of dev.py. Standard library only, no shell."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".dev"
LOG = STATE / "dev.log"


def watch(command, comfyui):
    """Runs a command in the repository with its output shown; returns the exit status."""
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui)}
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=environment).returncode


def call(command, what):
    """Runs a command into the log; stops with the step, the reason, the log and a remedy where it fails."""
    status, output = logged(command)
    if status:
        stop(
            f"{what} failed: {reason(output)} The log is {LOG}. Try the same command again, it goes on where it "
            f"stopped; if it fails again, check the network and the free disk, or delete {STATE} to start afresh."
        )


def logged(command, **environment):
    """Runs a command into the log; returns its exit status and what it wrote.

    Args:
        environment: variables that are set for this command.
    """
    command = [str(part) for part in command]
    with open(LOG, "a+", encoding="utf-8", errors="replace") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        begin = log.tell()
        # Not in the repository: its folder nodes/ would come before other modules of that name.
        places = dict(cwd=STATE, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        status = subprocess.run(command, env={**os.environ, **environment}, **places).returncode
        log.seek(begin)
        return status, log.read()


def reason(output):
    """The last line that calls itself an error and the one that follows it, or else the last line, as a sentence."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    errors = [n for n, line in enumerate(lines) if line.lower().startswith("error")]
    said = " ".join(lines[errors[-1] :][:2]) if errors else lines[-1]
    return said.rstrip(".") + "."


def ask(python, script):
    """The last line that a one-line script prints in another Python, or None where it fails."""
    try:
        result = subprocess.run([str(python), "-c", script], capture_output=True, text=True, cwd=STATE)
    except OSError:
        return None
    return (result.stdout.strip().splitlines() or [""])[-1] if result.returncode == 0 else None


@contextmanager
def step(text):
    start = time.monotonic()
    print(f"  {text} ...", end=" ", flush=True)
    yield
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def stop(sentence):
    sys.exit("dev.py: " + sentence)
