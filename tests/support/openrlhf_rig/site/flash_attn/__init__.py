"""Enough of flash-attn for OpenRLHF to be imported."""

__version__ = "2.8.3"
