"""MoLoraConfig: the settings of a MOLoRA adapter, and its entry in PEFT's table of methods."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from citi.adapters.adapter_file import (
    WEIGHTS_FILE,
    Shapes,
    file_sha256,
    read_adapter_config,
    read_adapter_shapes,
)
from citi_kernels.layers.molora_linear import MoLoRASettings

METHOD = "molora"


def extend_peft_type() -> PeftType:
    """`PeftType.MOLORA`, added to PEFT's closed enum the first time."""
    name = METHOD.upper()
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    return member


MOLORA = extend_peft_type()


@dataclass
class MoLoraConfig(PeftConfig):
    """Settings of a MOLoRA adapter (arXiv 2409.13202); defaults are the authors'.

    Attributes:
        r: rank of each expert.
        num_experts: experts per component.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: dropout on the experts' input; the router and the base see all of it.
        top_k: experts kept per token; None keeps all, as in the paper.
        renormalize: with `top_k`, divide the kept gates by their sum.
        target_modules: the important components. Full dotted names (`from_plan` gives those),
            name endings, a regular expression, or "all-linear".
        exclude_modules: as for PEFT's LoRA.
        modules_to_save: the unimportant components, full dotted names: trained whole in the third
            stage and saved with the adapter.
        base_fingerprint: `citi.model_fingerprint` of the base model; another model is refused.
        weights_sha256: hash of the saved weights; written by `PeftModel.save_pretrained`.

    Adapter tensors are fp32 whatever the dtype of the base (`autocast_adapter_dtype` has no say).
    """

    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    num_experts: int = field(default=4, metadata={"help": "Experts per component."})
    lora_alpha: float = field(default=2, metadata={"help": "Scaling is lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the experts' input."})
    top_k: int | None = field(default=None, metadata={"help": "Experts kept per token."})
    renormalize: bool = field(default=False, metadata={"help": "Divide kept gates by their sum."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Components that get an adapter."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Components that do not."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Components trained whole and saved with the adapter."}
    )
    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "Fingerprint of the base model."}
    )
    weights_sha256: str | None = field(
        default=None, metadata={"help": "Hash of the saved weights."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOLORA
        self.settings()
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, set):
            both = sorted(self.target_modules & set(self.modules_to_save or ()))
            if both:
                raise ValueError(
                    f"target_modules and modules_to_save must not share a component, got {both} in "
                    "both; from_plan() lets MOLoRA win"
                )

    def settings(self) -> MoLoRASettings:
        """The settings of each adapted layer.

        Raises:
            ValueError: a value out of range, named as here.
        """
        try:
            return MoLoRASettings(
                num_experts=self.num_experts,
                r=self.r,
                alpha=self.lora_alpha,
                dropout=self.lora_dropout,
                top_k=self.top_k,
                renormalize=self.renormalize,
            )
        except ValueError as error:
            text = str(error)
            renamed = "lora_" + text if text.startswith(("alpha", "dropout")) else text
            raise ValueError(renamed) from None

    @classmethod
    def from_plan(cls, plan: Any, **settings: Any) -> MoLoraConfig:
        """The adapter that a plan asks for.

        Args:
            plan: a `citi.Plan`: `important` and `unimportant` component names, and the
                `fingerprint` of the model they belong to. MOLoRA wins where both name a component.
            settings: any field of this class; `task_type` is "CAUSAL_LM" unless given.

        Raises:
            ValueError: the plan has no important component.
        """
        important = list(plan.important)
        if not important:
            raise ValueError(
                "plan must have an important component, got none; make one with a larger share: "
                "make_plan(scores, important=0.2)"
            )
        taken = set(important)
        unimportant = [name for name in plan.unimportant if name not in taken]
        given = {
            "task_type": "CAUSAL_LM",
            "target_modules": important,
            "modules_to_save": unimportant or None,
            "base_fingerprint": dict(plan.fingerprint) if plan.fingerprint else None,
            **settings,
        }
        return cls(**given)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> MoLoraConfig:
        """As `PeftConfig.from_pretrained`, with the files of the directory, or hub copy, checked.

        The shapes found in the weights are held until the adapter is injected, so that weights that
        do not fit are refused while the model is still untouched.

        Raises:
            AdapterError: a file is damaged or has unknown keys.
        """
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        if not directory.is_dir():
            download, _, _ = cls._split_kwargs(kwargs)
            directory = _hub_copy(pretrained_model_name_or_path, subfolder, download)
        shapes = None
        if directory is not None:
            saved = read_adapter_config(directory, {each.name for each in fields(cls)})
            if (directory / WEIGHTS_FILE).is_file():
                shapes = read_adapter_shapes(directory, saved.get("weights_sha256"))
        config = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        config._file_shapes = None if shapes is None else (str(directory / WEIGHTS_FILE), shapes)
        return config

    def take_file_shapes(self) -> tuple[str, Shapes] | None:
        """Path and tensor shapes of the weights this was read beside; None the second time."""
        return self.__dict__.pop("_file_shapes", None)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes the settings; called by `PeftModel.save_pretrained` after it wrote the weights.

        Raises:
            ValueError: the weights were pickled (`safe_serialization=False`).
        """
        weights = Path(save_directory) / WEIGHTS_FILE
        pickled = weights.with_suffix(".bin")
        if pickled.is_file():
            raise ValueError(
                f"{pickled}: MOLoRA adapters are saved as safetensors only; remove this file and "
                "save without safe_serialization=False"
            )
        # Only PeftModel passes this keyword. Other callers may write the weights later.
        weights_are_written = "auto_mapping_dict" in kwargs and weights.is_file()
        self.weights_sha256 = file_sha256(weights) if weights_are_written else None
        super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields, sets as sorted lists, so that equal settings give equal files."""
        return {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in super().to_dict().items()
        }


def _hub_copy(repository: str, subfolder: str | None, download: dict[str, Any]) -> Path | None:
    """The local copy of a hub adapter's files; None without them, as PEFT itself will say.

    PEFT asks for the same files, and finds them there.
    """
    found = None
    for name in (CONFIG_NAME, WEIGHTS_FILE):
        try:
            found = hf_hub_download(repository, name, subfolder=subfolder, **download)
        except (OSError, ValueError):  # not there, no network, or no name of a repository
            break
    return None if found is None else Path(found).parent
