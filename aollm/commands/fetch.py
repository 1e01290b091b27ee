"""What is shown while a model is downloaded, before a command opens it. Without a terminal, only where it begins and ends."""

from __future__ import annotations

from time import perf_counter

from ..meter import amount
from ..reference import find
from ..settings import RuntimeConfig
from ..terminal import Row, Terminal, spinner

SLOWEST_S = 1.0


async def fetched(terminal: Terminal, config: RuntimeConfig) -> RuntimeConfig:
    """The same settings, with their model on this machine: opening them downloads nothing more. Raises `ModelError`."""
    arrival = Arrival(terminal, config.model_reference)
    terminal.status(lambda: [arrival.live()])
    try:
        folder = await find(config.model_reference, config.models_dir, config.force_download, arrival.tell)
    finally:
        terminal.status(None)
    if arrival.begun is not None or config.verbose:
        terminal.say([(f"{config.model_reference} is in {folder}", "dim")])
    return config.model_copy(update={"force_download": False})


class Arrival:
    """How much of a model is there. `tell` is called by other threads, `live` by the one that paints."""

    def __init__(self, terminal: Terminal, reference: str) -> None:
        self.begun: float | None = None
        self._terminal, self._reference = terminal, reference
        self._done = self._total = self._before = 0
        self._name = ""

    def tell(self, done: int, total: int, name: str) -> None:
        """`done` of `total` bytes are there; `name` is the file under way."""
        if self.begun is None:
            self._before = done
            self.begun = perf_counter()
            self._terminal.say([(f"downloading {self._reference}, {amount(total)}", "dim")])
        self._done, self._total, self._name = done, total, name

    def live(self) -> Row:
        """The state of this moment."""
        parts = [f"looking for {self._reference}"]
        if self.begun is not None:
            share = self._done / self._total if self._total else 1.0
            parts = [f"downloading {share:4.0%}", f"{amount(self._done)} of {amount(self._total)}"]
            passed_s = perf_counter() - self.begun
            speed = (self._done - self._before) / passed_s if passed_s > SLOWEST_S else 0.0
            if speed > 0:
                left_s = (self._total - self._done) / speed
                parts += [f"{amount(speed)}/s", f"{left_s / 60:.0f} min left" if left_s >= 90 else f"{left_s:.0f} s left"]
            parts.append(self._name)
        return [(f"{spinner()} ", "cyan"), (" · ".join(parts), "dim")]

    def __repr__(self) -> str:
        return f"<Arrival of {self._reference}, {self._done} of {self._total} bytes>"
