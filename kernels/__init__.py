"""Triton kernels, installed as ``pybackdoor.kernels``; one file per op, without policy."""
