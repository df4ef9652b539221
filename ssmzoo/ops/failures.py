"""Kernels that cannot be compiled or launched on the machine at hand: found out at their first call."""

from __future__ import annotations


def launch_failure(error: BaseException) -> str | None:
    """The reason in one line when Triton could not compile or launch a kernel: too old a card, a broken assembler, more
    shared memory than there is. None for any other error, and for those of Triton's interpreter."""
    kind = type(error)
    if kind.__name__ == "InterpreterError" or not (
        kind.__module__.partition(".")[0] == "triton" or "Triton Error" in str(error)
    ):
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"Triton cannot run its kernel here ({kind.__name__}: {lines[-1][:150] if lines else 'no message'})"
