"""The command ``isthmus``."""

from __future__ import annotations

import errno
import os
import sys

import typer

# isort: off
from isthmus.cli import init, runs, roles, joining, answers, serving, measures  # noqa: F401  # each adds its commands

# isort: on
from isthmus.cli.app import app
from isthmus.cli.log import prepare_log
from isthmus.cli.terminal import check_arguments, encoding_error, flush_output, prepare_output
from isthmus.engines.lifetime import Stopped, end_with_engine, stoppable
from isthmus.engines.threads import share_cores
from isthmus.errors import IsthmusError


def main() -> None:
    """Run the command. Errors of isthmus are printed without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    prepare_output()
    prepare_log()
    share_cores()
    end_with_engine()
    sys.exit(flush_output(_exit_code()))


def _exit_code() -> int:
    try:
        with stoppable():
            return app(check_arguments(sys.argv[1:]), standalone_mode=False) or 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr, flush=True)
        return 1
    except UnicodeEncodeError as error:
        print(f"error: {encoding_error(error)}", file=sys.stderr, flush=True)
        return 1
    except IsthmusError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except (Stopped, typer.Abort) as stop:
        print(str(stop) or "stopped", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "show"):
            error.show()
            return 2
        raise
