"""Dialects: how entries become frames, and frames become answers. Sans I/O."""
