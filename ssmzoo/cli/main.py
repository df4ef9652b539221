"""The console script `ssmzoo`. Every command is a file beside this one: `add_parser(subparsers)` and `run(args)`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback

from ssmzoo import __version__
from ssmzoo.cli import completion, lm_eval
from ssmzoo.terminal import plain_output
from ssmzoo.threads import wait_asleep

COMMANDS = tuple(
    "list info backends doctor verify generate restore probe bench runs ckpt weights predict score embed "
    "quantise new completion demo".split()
)


class Parser(argparse.ArgumentParser):
    """argparse with our exit status and the nearest command in its message."""

    def error(self, message: str):
        print(f"error: {message} (`{self.prog} --help` shows the usage)", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ssmzoo", description="Mamba and the other selective state-space models: look, check, use.")
    parser.add_argument("--version", action="version", version=f"ssmzoo {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name in ("train", "eval"):
        same = subparsers.add_parser(name, help=f"same as python {name}.py", add_help=False)
        same.add_argument("overrides", nargs="*", help="model=NAME, key=value; for the completion of shells")
    for name in COMMANDS:
        try:
            module = importlib.import_module(f"ssmzoo.cli.{name}_" if name == "list" else f"ssmzoo.cli.{name}")
        except ModuleNotFoundError as error:
            if error.name and error.name.startswith("ssmzoo.cli."):
                continue
            raise
        module.add_parser(subparsers).set_defaults(run=module.run)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments of a command; `key=value` behind an option belongs to the command's overrides like those before it."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        overrides = [r for r in rest if "=" in r and not r.startswith("-")]
        if not hasattr(args, "overrides") or len(overrides) < len(rest):
            wrong = next(r for r in rest if r not in overrides or not hasattr(args, "overrides"))
            parser.prog = f"ssmzoo {args.command}"
            parser.error(f"{args.command} takes no argument {wrong!r}")
        args.overrides += overrides
    return args


def main(argv: list[str] | None = None) -> None:
    with plain_output():
        _main(argv)


def _main(argv: list[str] | None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next
        completion.complete(build_parser())
    if argv[:1] != ["bench"]:  # which measures torch and us as programs find them
        wait_asleep()
    if argv[:1] in (["train"], ["eval"]) and lm_eval.FLAG not in argv:
        from ssmzoo.cli import train as entry

        sys.argv = [f"ssmzoo {argv[0]}", *argv[1:]]
        return entry.train() if argv[0] == "train" else entry.evaluate()
    harness = argv[:1] == ["eval"]
    args = argparse.Namespace(traceback=False) if harness else parse(argv)
    try:
        sys.exit((lm_eval.run(argv[1:], Parser) if harness else args.run(args)) or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, PermissionError, KeyError) as error:
        if args.traceback:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if args.traceback:
            traceback.print_exc()
        print(f"error: {type(error).__name__}: {error} (--traceback shows where)", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
