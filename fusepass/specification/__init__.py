"""Attention as data: its modifiers, their meanings and derivatives, and what a kernel declares to compute."""
