"""The PEFT method `molora`; importing this package registers it."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from citi.adapters.adapter_file import AdapterError
from citi.adapters.config import METHOD, MOLORA, MoLoraConfig
from citi.adapters.layer import MoLoraLayer, MoLoraLinear
from citi.adapters.model import MoLoraModel, load_adapter, routing_names
from citi.adapters.original_modules import without_adapters

__all__ = [
    "AdapterError",
    "MoLoraConfig",
    "MoLoraLayer",
    "MoLoraLinear",
    "MoLoraModel",
    "load_adapter",
    "routing_names",
    "without_adapters",
]

if MOLORA not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=METHOD, config_cls=MoLoraConfig, model_cls=MoLoraModel)
