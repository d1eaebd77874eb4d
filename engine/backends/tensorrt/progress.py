"""The builder's progress as bars on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt


@contextmanager
def build_progress(trt: Any) -> Iterator[tensorrt.IProgressMonitor]:
    """Show the phases of a build, nested as TensorRT nests them, as long as it runs.

    Nothing is shown when standard error is no terminal. Ctrl-C ends the build at its next step.

    Yields
    ------
    monitor
        For ``IBuilderConfig.progress_monitor``.

    Raises
    ------
    KeyboardInterrupt
        When the user pressed Ctrl-C.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}", markup=False),  # names of layers
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Called by TensorRT's own threads; an exception in it would end the process."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._tasks: dict[str, Any] = {}
            self._depths: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            depth = self._depths.get(parent_phase, -1) + 1 if parent_phase else 0
            self._depths[phase_name] = depth
            self._tasks[phase_name] = bars.add_task("  " * depth + phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                bars.update(self._tasks[phase_name], completed=step + 1)
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            bars.remove_task(self._tasks.pop(phase_name))

    monitor = Monitor()
    with bars:
        yield monitor
    if monitor.interrupted:
        raise KeyboardInterrupt
