"""Forward and backward of a step as one CUDA graph: thousands of kernels, launched at once.

A step of a common shape takes longer to launch than to compute. A graph holds the addresses that it was captured with,
so inputs are copied to where the captured ones lie, and gradients and terms appear where the captured ones did. These
tensors are made before the capture: one that is made in it and outlives it makes CUDA's asynchronous allocator, which
ComfyUI uses, complain at each of its frees.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .step_inputs import StepInputs

Pass = Callable[[StepInputs], dict[str, Tensor]]
WARM_UP = 3  # passes before the capture, as PyTorch's notes advise


class GraphedPass:
    """`run`, which computes loss terms and gradients, replayed from its second call on.

    Inputs of another shape than the captured ones, and everything where no graph could be captured, run as they are.

    Args:
        parameters: those that receive a gradient; they must stay the same tensors between two calls.
        capture: `(run, inputs) -> replay`, where `run` reads `inputs` whenever `replay()` is called.
        notice: receives one sentence that says why there is no graph.
    """

    def __init__(
        self,
        run: Pass,
        parameters: Sequence[torch.nn.Parameter],
        notice: Callable[[str], None],
        capture: Callable[[Callable[[], None], Callable[[], None]], Callable[[], None]] | None = None,
    ):
        self.run, self.parameters, self.notice = run, parameters, notice
        self.capture = capture or captured
        self.calls = 0
        self.replay: Callable[[], None] | None = None

    def __call__(self, inputs: StepInputs) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == 2:
            self._try_to_capture(inputs)
        if self.replay is None or _shapes(inputs) != self.shapes:
            return self.run(inputs)
        for place, tensor in zip(self.inputs.tensors(), inputs.tensors(), strict=True):
            place.copy_(tensor, non_blocking=True)
        self.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.terms

    def _try_to_capture(self, inputs: StepInputs) -> None:
        self.inputs, self.shapes = inputs.map(torch.clone), _shapes(inputs)
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.terms: dict[str, Tensor] = {}
        try:
            self.replay = self.capture(self._pass, self._without_gradients)
        except Exception as error:  # whatever a driver, an allocator or a library says: it works without
            why = str(error).partition("\n")[0][:120]
            self.notice(f"steps are launched kernel by kernel, because no CUDA graph could be captured: {why}")
        self._without_gradients()

    def _pass(self) -> None:
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient.zero_()
        for name, term in self.run(self.inputs).items():
            if name not in self.terms:  # in the first pass, before the capture
                self.terms[name] = torch.empty_like(term)
            self.terms[name].copy_(term)

    def _without_gradients(self) -> None:
        """Drop gradients, so that a pass writes them and does not add to them."""
        for parameter in self.parameters:
            parameter.grad = None


def captured(run: Callable[[], None], clear: Callable[[], None]) -> Callable[[], None]:
    """Capture `run` on the current card as a CUDA graph, and return the function that replays it.

    Raises:
        MemoryError: the graph, which keeps its activations, and a pass next to it do not fit.
        RuntimeError: something in `run` waits for the card or depends on what it computes.
    """
    torch.cuda.empty_cache()
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        need = _peak(run, clear)
        if 2 * need > torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated():
            raise MemoryError(f"it would keep {need / 2**30:.1f} GB for itself")
        for _ in range(WARM_UP - 1):
            run()
            clear()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Another thread of this process may use the card meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _peak(run: Callable[[], None], clear: Callable[[], None]) -> int:
    """Measure the peak memory of a pass in bytes."""
    clear()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    clear()
    return torch.cuda.max_memory_allocated() - before


@functools.cache
def _stream(card: int) -> torch.cuda.Stream:
    """Return the one stream for all captures on a card: libraries keep a workspace for every stream."""
    return torch.cuda.Stream(card)


def _shapes(inputs: StepInputs) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in inputs.tensors()]
