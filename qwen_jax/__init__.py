"""Per-layer hidden states of Qwen2.5, by independent pre-emptible workers."""

__version__ = "0.2.0"
