"""The tables of a recipe: one file for each TOML table, a folder for a table with subtables."""

from isthmus.recipe.sections.boundary.boundary import BoundarySection
from isthmus.recipe.sections.boundary.codec import Codec, CodecSection
from isthmus.recipe.sections.boundary.defence import DefenceSection
from isthmus.recipe.sections.boundary.release import ReleaseSection
from isthmus.recipe.sections.edge import EdgeSection
from isthmus.recipe.sections.federation.asynchronous import AsynchronousSection
from isthmus.recipe.sections.federation.clip import ClipSection
from isthmus.recipe.sections.federation.compression import CompressionSection
from isthmus.recipe.sections.federation.fairness import FairnessSection
from isthmus.recipe.sections.federation.federation import FederationSection
from isthmus.recipe.sections.federation.noise import NoiseSection
from isthmus.recipe.sections.federation.optimizer import OptimizerSection
from isthmus.recipe.sections.federation.robust import RobustSection
from isthmus.recipe.sections.federation.secure import SecureSection
from isthmus.recipe.sections.federation.weights import WeightsSection
from isthmus.recipe.sections.lora import LoraSection
from isthmus.recipe.sections.model import ModelSection
from isthmus.recipe.sections.partition import PartitionSection
from isthmus.recipe.sections.privacy import PrivacySection
from isthmus.recipe.sections.root import RootSection
from isthmus.recipe.sections.sensitivity import SensitivityClass, SensitivitySection
from isthmus.recipe.sections.silo import SiloSection
from isthmus.recipe.sections.task import TaskSection
from isthmus.recipe.sections.train import TrainSection
from isthmus.recipe.sections.trunk import TrunkSection
from isthmus.recipe.sections.wire import WireSection

__all__ = [
    "AsynchronousSection",
    "BoundarySection",
    "ClipSection",
    "Codec",
    "CodecSection",
    "CompressionSection",
    "DefenceSection",
    "EdgeSection",
    "FairnessSection",
    "FederationSection",
    "LoraSection",
    "ModelSection",
    "NoiseSection",
    "OptimizerSection",
    "PartitionSection",
    "PrivacySection",
    "ReleaseSection",
    "RobustSection",
    "RootSection",
    "SecureSection",
    "SensitivityClass",
    "SensitivitySection",
    "SiloSection",
    "TaskSection",
    "TrainSection",
    "TrunkSection",
    "WeightsSection",
    "WireSection",
]
