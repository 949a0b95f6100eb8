"""python -m qwen_jax COMMAND, or qwen-jax COMMAND where it is installed: look into shards, check them, and pass them
on."""

import importlib
import sys
from collections.abc import Sequence

from qwen_jax.cli import FlagParser, log_to_terminal, run_script
from qwen_jax.commands import COMMANDS
from qwen_jax.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m qwen_jax COMMAND [--help] ...\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<10} {purpose}")
        print("\npython -m qwen_jax verify gs://your-bucket/activations\npython -m qwen_jax COMMAND --help")
        return 0 if argv else UsageError.exit_code
    if argv[0] not in COMMANDS:
        raise UsageError(f"there is no command {argv[0]!r}; commands are {', '.join(COMMANDS)}")
    log_to_terminal("%(levelname)s %(message)s")
    command = importlib.import_module(f"qwen_jax.commands.{argv[0]}")
    parser = FlagParser(
        prog=f"python -m qwen_jax {argv[0]}",
        description=command.__doc__,
        env_for_all=getattr(command, "ENV_FOR_ALL", False),
    )
    command.add_flags(parser)
    return command.run(parser.parse_args(argv[1:]))


def console() -> None:
    """qwen-jax."""
    run_script(main)


if __name__ == "__main__":
    console()
