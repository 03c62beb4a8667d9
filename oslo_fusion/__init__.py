"""oslo_fusion: one call makes a Hugging Face model train, infer and generate faster, and says exactly what it changed.

model = oslo_fusion.initialize(model, {"kernel_fusion": {"enable": True}})
print(oslo_fusion.report(model))
"""

from oslo_fusion.config import FusionConfig
from oslo_fusion.engine import initialize, plan, report, restore
from oslo_fusion.errors import ConfigError, ExtensionError, OsloFusionError, PlanError, RefusalError
from oslo_fusion.plan import FusionPlan
from oslo_fusion.report import FusionReport

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "ExtensionError",
    "FusionConfig",
    "FusionPlan",
    "FusionReport",
    "OsloFusionError",
    "PlanError",
    "RefusalError",
    "initialize",
    "plan",
    "report",
    "restore",
]
