"""Attacks on a round's adapter update and on the final adapters. ``make bench-updates``.

The aggregator inverts the update of one more round of the private run, and, to see what its attacks can do, that of one
plain gradient step on one row. The outsider asks of the final model which rows it was trained on.
"""

from __future__ import annotations

from benchmarks.common.results import DEVICE, Results
from benchmarks.common.rows import Values
from benchmarks.privacy.runs import private_run, recipe_of, undefended
from isthmus.audit.attack import AttackPlan, AttackResult, run_attacks
from isthmus.audit.target import Target
from isthmus.model.device import find_device

RANK = 64
"""Of the control's adapter: exact search sees as many directions at most."""
ASKED, OWN, REFERENCES = 100, 400, 0


def main() -> None:
    results, run = Results("updates", "make bench-updates", find_device(DEVICE)), private_run()
    ways = {"one row, one step, not noised": Target(recipe_of(one_step)), "private recipe": Target(run.recipe(), run)}
    for name, source in ways.items():
        for found in by(source, "aggregator", "dager"):
            bound = 0.1 if name == "private recipe" else None
            figures = found.figures
            results.add(
                f"{name}: ROUGE-L of texts out of an update, {found.attack}",
                figures["rougeL"].value,
                "share",
                at_most=bound,
            )
            results.add(
                f"{name}: ROUGE-L of texts out of an update, {found.attack}, upper", figures["rougeL"].high, "share"
            )
    for found in by(ways["private recipe"], "outsider", "membership"):
        results.add(f"membership in the final model, AUC, {found.tokens}", found.figures["auc"].value, "0.5 to 1")
        results.add(
            f"membership in the final model, TPR at 1 % FPR, {found.tokens}",
            found.figures["tpr_at_1_fpr"].value,
            "share",
        )
    print(f"written: {results.write()}")


def one_step(values: Values) -> None:
    """Plain split learning's first step on a single row, its adapter wide enough for exact search."""
    undefended(values, cut=(1, 1))
    values["lora"]["rank"] = RANK
    values["train"] |= {
        "rounds": 1,
        "steps": 1,
        "batch": 1,
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "evaluate": False,
    }


def by(source: Target, adversary: str, *attacks: str) -> list[AttackResult]:
    order = AttackPlan((adversary,), attacks, "east", "west", ASKED, OWN, references=REFERENCES, device=DEVICE)
    return run_attacks(source, order, lambda told: print(f"  {told}", flush=True))


if __name__ == "__main__":
    main()
