"""The fronts of `python -m qwen_jax COMMAND`: flags in, library calls, lines out.

A command is a module with a docstring (its first line is its description), `add_flags(parser)` and `run(args)`,
which returns the exit code; with `ENV_FOR_ALL = True` its flags have variables. Modules are imported when
their command is asked for.
"""

COMMANDS = {
    "doctor": "whether a worker would run on this machine",
    "inspect": "what is in a shard or a run, or in one sample, token by token",
    "verify": "whether everything is there, once, as recorded; --repair makes bad shards again",
    "plan": "what a run would write and take, before it is started",
    "certify": "how close stored samples are to a float32 run; --self: whether the devices keep the promises",
    "export": "shards as safetensors, NumPy arrays or Hugging Face datasets",
    "plot": "one picture of a run",
    "launch": "start every worker: launch_all_workers.sh",
    "workers": "progress of every worker: check_all_workers.sh",
    "stats": "mean, variance and norms by layer, merged over shards and workers",
}
"""Each command's module in this package, and what it is for."""
