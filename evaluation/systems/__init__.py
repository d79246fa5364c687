"""The ways to run a model that evaluations compare, all with one protocol, `System`. Light to import: no torch."""

from mesart.evaluation.systems.bundle import BundleSystem
from mesart.evaluation.systems.model import BundleModel, CheckpointModel, Model, Source, open_model, prefix_ids
from mesart.evaluation.systems.opened import SYSTEMS, OpenSystems, Subject, open_systems
from mesart.evaluation.systems.plain import MesaReference, PlainModel, stretched
from mesart.evaluation.systems.system import System

__all__ = [
    "SYSTEMS",
    "BundleModel",
    "BundleSystem",
    "CheckpointModel",
    "MesaReference",
    "Model",
    "OpenSystems",
    "PlainModel",
    "Source",
    "Subject",
    "System",
    "open_model",
    "open_systems",
    "prefix_ids",
    "stretched",
]
