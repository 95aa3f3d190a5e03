"""The recipe: one TOML file that fixes a whole federation.

``Recipe.read`` refuses, at start, every unknown key (naming the nearest known one), wrong type and impossible
combination. A recipe is frozen: what a run did can be read off the copy in its run directory.
"""

from isthmus.recipe.noise import ClipSection, NoiseSection
from isthmus.recipe.privacy import PrivacySection, ReleaseSection
from isthmus.recipe.recipe import Recipe
from isthmus.recipe.sections import (
    BoundarySection,
    Codec,
    CodecSection,
    DefenceSection,
    FederationSection,
    LoraSection,
    ModelSection,
    RootSection,
    SiloSection,
    TaskSection,
    TrunkSection,
    WireSection,
)
from isthmus.recipe.sensitivity import SensitivityClass, SensitivitySection
from isthmus.recipe.strategy import FairnessSection, OptimizerSection, WeightsSection
from isthmus.recipe.train import TrainSection

__all__ = [
    "BoundarySection",
    "ClipSection",
    "Codec",
    "CodecSection",
    "DefenceSection",
    "FairnessSection",
    "FederationSection",
    "LoraSection",
    "ModelSection",
    "NoiseSection",
    "OptimizerSection",
    "PrivacySection",
    "Recipe",
    "ReleaseSection",
    "RootSection",
    "SensitivityClass",
    "SensitivitySection",
    "SiloSection",
    "TaskSection",
    "TrainSection",
    "TrunkSection",
    "WeightsSection",
    "WireSection",
]
