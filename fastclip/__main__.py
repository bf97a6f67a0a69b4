"""The command `python -m fastclip`: `run` a script patched, `check` this machine, print `info`."""

import argparse
import sys
from collections.abc import Sequence

_NORM_DTYPE = "--norm-dtype"
_RUN = """\
Run an unchanged training script with torch's clip_grad_norm_, clip_grad_value_, get_total_norm and
clip_grads_with_norm_ replaced by fastclip's. Arguments after the script are passed to the script. Processes that it
starts by multiprocessing are patched too; commands that it starts by subprocess are not.

Under a launcher, let the launcher start fastclip:
  torchrun --nproc-per-node 2 -m fastclip run train.py --lr 0.1
  accelerate launch -m fastclip run train.py --lr 0.1
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of fastclip's commands.

    Args:
        argv: The command and its arguments; by default those of the process.

    Returns:
        The exit status: 0, the status of `check`, or 2 if `run` found nothing to run.

    Raises:
        SystemExit: The arguments are wrong (status 2, after a message), or ask for help (status 0). Exceptions of the
            script pass through, too.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["check"]:
        from fastclip.switching import check

        return check.main(arguments[1:])
    # The parser gets only the arguments up to the script: it must not interpret those of the script.
    known = _length_up_to_script(arguments)
    options = _parser().parse_args(arguments[:known])
    if options.command == "run":
        from fastclip.switching import running

        return running.run(
            options.target,
            arguments[known:],
            as_module=options.module,
            verbose=options.verbose,
            norm_dtype=options.norm_dtype,
        )
    import fastclip

    sys.stdout.write(f"{fastclip.info()}\n")
    return 0


def _length_up_to_script(arguments: list[str]) -> int:
    if arguments[:1] == ["run"]:
        for index, argument in enumerate(arguments[1:], start=1):
            if not argument.startswith("-") and arguments[index - 1] != _NORM_DTYPE:
                return index + 1
    return len(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastclip", description="Faster gradient clipping for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    run = commands.add_parser(
        "run",
        help="run a script with torch's clipping functions replaced",
        usage=f"%(prog)s [-h] [-v] [{_NORM_DTYPE} DTYPE] (script | -m module) [argument ...]",
        description=_RUN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run.add_argument("-m", "--module", action="store_true", help="what follows is a module's name, not a path")
    run.add_argument(
        "-v", "--verbose", action="store_true", help="at exit, say on stderr how many calls went through fastclip"
    )
    run.add_argument(
        _NORM_DTYPE,
        choices=["float32", "float64", "bfloat16", "float16"],
        help="the dtype of norms that are returned; by default torch's, which is the gradients' own",
    )
    run.add_argument("target", metavar="script", help="path of the script (with -m: name of the module)")
    commands.add_parser("check", help="check fastclip against torch on this machine", add_help=False)
    commands.add_parser("info", help="print what fastclip uses on this machine")
    return parser


if __name__ == "__main__":
    sys.exit(main())
