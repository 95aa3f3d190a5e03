"""An example of each command, which its help shows, and what its exit code says."""

from __future__ import annotations

import typer

COMMAND_EXAMPLES = {
    "init": "init --model model --silo north=north.csv --silo south=south.csv",
    "run": "run recipe.toml --run-dir runs/first",
    "trunk": "trunk recipe.toml --with-root --address 0.0.0.0:50051",
    "root": "root recipe.toml --run-dir runs/root",
    "edge": "edge recipe.toml west --run-dir runs/west",
    "silo": "silo recipe.toml north --run-dir runs/north",
    "certificates": "certificates recipe.toml",
    "generate": 'generate runs/first "The patient reports" --max-new-tokens 40',
    "batch": "batch runs/first questions.csv answers.jsonl",
    "draft": "draft runs/first --prompts 200",
    "privacy": "privacy runs/first --json",
    "data": "data recipe.toml --silo north --examples 2",
    "evaluate": "evaluate runs/first --data unseen.csv --out answers.jsonl",
    "export": "export runs/first adapter",
    "attack": "attack runs/first --victim north --rows 20",
    "cut": 'cut recipe.toml --cuts "1,1 2,2" --rtt 20 --write',
    "check": "check model --cut 2,2",
    "demo": "demo --quick",
}
"""By command, without the program's name."""
EXIT_CODES = "Exit codes: 0 done, 1 an error (its remedy is printed), 2 wrong arguments, 130 stopped."


def show_examples(app: typer.Typer) -> None:
    """Let the help of each command end with its example.

    Raises:
        KeyError: a command has none.
    """
    for command in app.registered_commands:
        assert command.callback is not None
        command.epilog = f"Example: isthmus {COMMAND_EXAMPLES[command.name or command.callback.__name__]}"
