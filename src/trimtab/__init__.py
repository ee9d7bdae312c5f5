"""trimtab: fine-tune a pretrained model by training a few small tensors beside its frozen weights.

LoRA, DoRA and MoRA, in any mix over the layers of one model; merged back, inference costs nothing extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Name -> module that defines it. Read at first use, so that `trimtab --help` and the reports never import torch.
_PUBLIC = {
    "AdapterError": "errors",
    "AttachReport": "surgery.attach_report",
    "CombinationReport": "surgery.conversion_report",
    "ConfigError": "errors",
    "ConversionReport": "surgery.conversion_report",
    "DataError": "errors",
    "Interrupted": "errors",
    "MergeReport": "surgery.merge",
    "ModelError": "errors",
    "Plan": "surgery.plan",
    "PlanError": "errors",
    "Rule": "surgery.plan",
    "RunError": "errors",
    "SurgeryError": "errors",
    "TrimtabError": "errors",
    "TrimtabWarning": "errors",
    "WeightChange": "ops.decomposition",
    "active_adapter": "surgery.names",
    "adapters": "adapters",
    "attach": "surgery.attach",
    "combine": "surgery.combine",
    "convert_to_lora": "surgery.convert",
    "decompose": "ops.decomposition",
    "delete_adapter": "surgery.names",
    "detach": "surgery.attach",
    "disable_adapter": "surgery.contexts",
    "effective_weight": "surgery.attach",
    "for_inference": "surgery.contexts",
    "load_adapter": "adapters.store",
    "merge": "surgery.merge",
    "per_row": "surgery.per_row",
    "reference": "surgery.contexts",
    "save_adapter": "adapters.store",
    "set_adapter": "surgery.names",
    "speed_up": "integrations.speed_up",
    "trainable_parameters": "surgery.attach",
    "weight_change": "ops.decomposition",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trimtab' has no attribute '{name}'")
    import importlib

    if _PUBLIC[name].startswith(("surgery", "adapters")):
        # Registers there what other libraries are told of an adapted model.
        importlib.import_module("trimtab.integrations")
    module = importlib.import_module(f"trimtab.{_PUBLIC[name]}")
    value = module if _PUBLIC[name] == name else getattr(module, name)  # the package ``adapters`` can be called
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:  # what the lazy names are, for type checkers and editors; `as` says that they are for others
    from trimtab.adapters.store import load_adapter as load_adapter, save_adapter as save_adapter
    from trimtab.errors import (
        AdapterError as AdapterError,
        ConfigError as ConfigError,
        DataError as DataError,
        Interrupted as Interrupted,
        ModelError as ModelError,
        PlanError as PlanError,
        RunError as RunError,
        SurgeryError as SurgeryError,
        TrimtabError as TrimtabError,
        TrimtabWarning as TrimtabWarning,
    )
    from trimtab.integrations.speed_up import speed_up as speed_up
    from trimtab.ops.decomposition import (
        WeightChange as WeightChange,
        decompose as decompose,
        weight_change as weight_change,
    )
    from trimtab.surgery.attach import (
        attach as attach,
        detach as detach,
        effective_weight as effective_weight,
        trainable_parameters as trainable_parameters,
    )
    from trimtab.surgery.attach_report import AttachReport as AttachReport
    from trimtab.surgery.combine import combine as combine
    from trimtab.surgery.contexts import (
        disable_adapter as disable_adapter,
        for_inference as for_inference,
        reference as reference,
    )
    from trimtab.surgery.conversion_report import (
        CombinationReport as CombinationReport,
        ConversionReport as ConversionReport,
    )
    from trimtab.surgery.convert import convert_to_lora as convert_to_lora
    from trimtab.surgery.merge import MergeReport as MergeReport, merge as merge
    from trimtab.surgery.names import (
        active_adapter as active_adapter,
        delete_adapter as delete_adapter,
        set_adapter as set_adapter,
    )
    from trimtab.surgery.per_row import per_row as per_row
    from trimtab.surgery.plan import Plan as Plan, Rule as Rule
