"""A tool for veRL's `ToolAgentLoop`."""

# pyright: reportMissingImports=false
from __future__ import annotations

from verl.tools.function_tool import function_tool


@function_tool
def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: one
        b: two
    """
    return f"The sum is {a + b}."
