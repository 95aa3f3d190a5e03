"""Privacy budgets beside the mechanisms that they limit."""

from __future__ import annotations

from isthmus.recipe.sections import BoundarySection, NoiseSection, PrivacySection, SensitivitySection


def check_budgets(
    privacy: PrivacySection,
    sensitivity: SensitivitySection | None,
    boundary: BoundarySection,
    noise: NoiseSection | None,
) -> None:
    """Refuse a budget that no release could keep, at start rather than at the first frame."""
    of_records = ("forward", "gradient") if boundary.gradients else ("forward",)
    of_silo = of_records if noise is not None and noise.where == "silos" else (*of_records, "update")
    classes = sensitivity.classes if sensitivity else {}
    budgets = {
        "privacy.record_epsilon": (privacy.record_epsilon, of_records),
        "privacy.silo_epsilon": (privacy.silo_epsilon, of_silo),
        **{f"sensitivity.classes.{name}.epsilon": (one.epsilon, of_records) for name, one in classes.items()},
    }
    for key, (budget, paths) in budgets.items():
        for path in paths if budget is not None else ():
            if not getattr(boundary, path).bounded:
                raise ValueError(
                    f"{key}: what leaves by boundary.{path} has no clip or no noise, so no finite epsilon; "
                    f"give boundary.{path} both, or leave the budget out"
                )
