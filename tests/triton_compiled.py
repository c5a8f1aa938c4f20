"""Triton's kernels compiled for GPUs that need not be there; for a process of its own."""

from __future__ import annotations

from typing import Any


class Compiled:
    """Compiles each launch in place of running it.

    Attributes:
        made: the kernels, in the order of their launches.
    """

    def __init__(self) -> None:
        import triton

        self.made: list[Any] = []

        def compiled(kernel: Any, grid: tuple[int, ...]) -> Any:
            return lambda *given, **named: self.made.append(
                kernel.run(*given, grid=grid, warmup=True, **named)
            )

        triton.JITFunction.__getitem__ = compiled

    def target(self, capability: int) -> None:
        """Compile for GPUs of that capability from here on."""
        import triton
        from triton.backends.compiler import GPUTarget

        class Driver:
            """As much of a GPU's as compiling asks for; each capability is a device of its own."""

            get_current_device = staticmethod(lambda: capability)
            get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
            get_current_stream = staticmethod(lambda _: 0)

        triton.runtime.driver.set_active(Driver())

    def check(self, capability: int, count: int) -> None:
        """The last so many kernels are code for that capability."""
        last = self.made[-count:]
        assert [kernel.metadata.target.arch for kernel in last] == [capability] * count
        assert all(kernel.asm["cubin"] for kernel in last)
