"""MoLoraModel: injects MOLoRA layers into a model, for `get_peft_model` and everything after it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from citi.adapters.adapter_file import AdapterError, Shapes, compare_shapes
from citi.adapters.config import MoLoraConfig
from citi.adapters.layer import MERGE_REFUSED, MoLoraLayer, MoLoraLinear, feature_sizes
from citi.adapters.original_modules import original_of, without_adapters, wrappers_of
from citi.adapters.shared_input import forget_results
from citi_kernels.layers.molora_linear import adapter_shapes

# Older ones leave out modules_to_save, and every tensor of some architectures, with a log line.
AUTO_MODEL_WANTS = {"transformers": "5.18", "peft": "0.20"}
_SAVED_PREFIX = "base_model.model."


class MoLoraModel(BaseTuner):
    """PEFT's tuner for the method `molora`.

    Refused, each with a message that says what to do: merging; a second injection under the same
    adapter name; a base model other than `base_fingerprint`; names of components that the model
    lacks; a component that one adapter adapts and another trains whole; `adapter_names` in a call;
    saved weights with missing, extra or mis-shaped tensors (where `from_pretrained` read them,
    before anything of the model is changed; in every `load_state_dict`, before any tensor is
    written).
    """

    prefix = "molora_"
    tuner_layer_cls = MoLoraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        _refuse_second_injection(model, adapter_name)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        self.register_load_state_dict_pre_hook(_check_state_dict)

    def _prepare_adapter_config(
        self, peft_config: MoLoraConfig, model_config: dict
    ) -> MoLoraConfig:
        if peft_config.target_modules is None:
            raise ValueError(
                "target_modules must name the components to adapt, got None; "
                "MoLoraConfig.from_plan(plan) takes them from a plan"
            )
        return peft_config

    def _prepare_model(self, peft_config: MoLoraConfig, model: nn.Module) -> None:
        """Called by PEFT before the first module is replaced, for every adapter."""
        names = [name for name, config in self.peft_config.items() if config is peft_config]
        _refuse_second_injection(model, names[-1])  # PEFT has put the new one last
        if peft_config.base_fingerprint:
            _check_base(model, peft_config.base_fingerprint)
        read = peft_config.take_file_shapes()
        if read is None:
            _refuse_partial_loader(peft_config)
        elif peft_config.target_modules != INCLUDE_LINEAR_LAYERS_SHORTHAND:
            _check_file(model, peft_config, *read)
        _refuse_absent_names(model, peft_config)
        _refuse_shared_components(model, peft_config)
        _refuse_quantised_to_train(model, peft_config)

    def _create_and_replace(
        self,
        peft_config: MoLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, MoLoraLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer) or feature_sizes(target) is None:
            raise TypeError(
                f"{current_key}: MOLoRA adapts linear layers, got {type(target).__name__}; take it "
                "out of target_modules"
            )
        layer = MoLoraLinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        _introduce(layer, parent)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_REFUSED)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by PEFT around every forward; it drops `adapter_names` after this."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: MOLoRA has no batches of mixed adapters; call set_adapter(name) "
                "and run the samples of each adapter by themselves"
            )
        try:
            yield
        finally:
            if not torch.compiler.is_compiling():
                forget_results()

    def unload(self) -> nn.Module:
        """The base model with every original module back in its place, still frozen.

        The trained copies of `modules_to_save` are dropped too (PEFT's own unload would leave them
        in the base model).
        """
        for parent, name, wrapper in wrappers_of(self.model):
            setattr(parent, name, original_of(wrapper))
        self.model.__dict__.pop("peft_config", None)
        return self.model


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """Loads a saved MOLoRA adapter whole, or raises and leaves the model as it was.

    `PeftModel.from_pretrained` and `PeftModel.load_adapter` (a new adapter name) make the same
    checks of the weights; here a broken `adapter_config.json` is named too, and missing weights.
    `AutoModelForCausalLM.from_pretrained(directory)` loads by transformers' rules, which report
    missing and extra tensors in the log only; versions that would always lose some are refused.

    Args:
        model: the base model, or a PeftModel that gets a further adapter.
        directory: what `save_pretrained` wrote.
        adapter_name: name of the adapter in the model; must be new.
        is_trainable: whether its tensors require gradients.

    Returns:
        the PeftModel, with the adapter active.

    Raises:
        AdapterError: damaged files, another base model, tensors that do not fit.
    """
    if not Path(directory).is_dir():
        raise AdapterError(f"{directory}: no such directory; wanted what save_pretrained wrote")
    config = MoLoraConfig.from_pretrained(str(directory))
    if config.take_file_shapes() is None:
        raise AdapterError(f"{directory}: no adapter_model.safetensors there; save it again")
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(
            model, str(directory), adapter_name=adapter_name, is_trainable=is_trainable
        )
    if adapter_name in model.peft_config:
        raise ValueError(f"adapter_name must be new, the model has {adapter_name!r} already")
    model.load_adapter(str(directory), adapter_name, is_trainable=is_trainable)
    model.set_adapter(adapter_name, inference_mode=not is_trainable)
    return model


def routing_names(model: nn.Module) -> dict[Hashable, str]:
    """Which component each key of `RoutingContext.gate_sums` belongs to.

    Returns:
        routing key -> full component name in the base model, for every active MOLoRA adapter; names
        of further adapters end in `[adapter]`.
    """
    names: dict[Hashable, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, MoLoraLayer):
            continue
        name = name.removeprefix(_SAVED_PREFIX)
        for adapter in module.active_adapters:
            if adapter in module.molora_A:
                key = module.routing_key(adapter)
                names[key] = name if key == id(module) else f"{name}[{adapter}]"
    return names


def _introduce(layer: MoLoraLinear, parent: nn.Module) -> None:
    """Makes a new layer one of the siblings among its parent's children."""
    for child in parent.children():
        if isinstance(child, MoLoraLinear):
            layer.siblings = child.siblings
            layer.siblings.observe_anew()
            return


def _refuse_second_injection(model: nn.Module, adapter_name: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MoLoraLayer) and adapter_name in module.molora_settings:
            raise ValueError(
                f"the model carries a MOLoRA adapter named {adapter_name!r} already (at {name}); "
                "give the new one another name (add_adapter), delete the old one (delete_adapter), "
                "or take all of them off (model = model.unload())"
            )


def _refuse_absent_names(model: nn.Module, config: MoLoraConfig) -> None:
    """PEFT goes on when one name of a list matches nothing; it would train without effect.

    PEFT itself adds short names of heads to modules_to_save, so only dotted ones are held there.
    """
    names = [name for name, _ in model.named_modules()]
    dotted = [name for name in config.modules_to_save or () if "." in name]
    targets = config.target_modules if isinstance(config.target_modules, set) else ()
    for field, wanted in (("target_modules", targets), ("modules_to_save", dotted)):
        absent = sorted(
            w for w in wanted if not any(f".{name}".endswith(f".{w}") for name in names)
        )
        if absent:
            raise ValueError(
                f"{field}: {absent} not found in the base model; give names as "
                "model.named_modules() has them, or their endings"
            )


def _refuse_shared_components(model: nn.Module, config: MoLoraConfig) -> None:
    """One wrapper inside the other would save the older adapter under names that do not load."""
    saved = tuple(config.modules_to_save or ())
    shared = []
    for name, module in model.named_modules():
        if isinstance(module, MoLoraLayer):
            shared += [name] if name.endswith(saved) else []
        elif isinstance(module, AuxiliaryTrainingWrapper):
            shared += [name] if check_target_module_exists(config, name) else []
    if shared:
        raise ValueError(
            "target_modules and modules_to_save must not share a component with those of an "
            f"adapter that the model has already, got {shared}; load the two adapters into two "
            "copies of the base model, or leave these components out of one"
        )


def _refuse_quantised_to_train(model: nn.Module, config: MoLoraConfig) -> None:
    """Quantised weights have no gradient; PEFT would say so half-way through its injection."""
    saved = tuple(config.modules_to_save or ())
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not (saved and name.endswith(saved) and torch.is_tensor(weight)):
            continue
        if not weight.is_floating_point() or is_traceable_wrapper_subclass(weight.data):
            raise ValueError(
                f"modules_to_save: {name} is quantised, so it cannot be trained whole; make the "
                "plan with unimportant=0, or load the base unquantised"
            )


def _check_base(model: nn.Module, wanted: dict[str, Any]) -> None:
    """Raises unless the base model has every part of the wanted fingerprint that it can tell."""
    from citi.fingerprint import model_fingerprint

    try:
        with without_adapters(model):
            got = model_fingerprint(model)
    except ValueError as error:
        raise AdapterError(
            f"base_fingerprint cannot be compared: {error}. To load without this check clear "
            "base_fingerprint in the adapter's configuration"
        ) from error
    other = [
        f"{key} (wanted {wanted[key]}, got {got[key]})"
        for key in sorted(wanted.keys() & got.keys())
        if wanted[key] != got[key]
    ]
    if other:
        raise AdapterError(
            f"the adapter belongs to another base model, by {', '.join(other)}; load it into the "
            "model that its plan was made for, or clear base_fingerprint in its configuration"
        )


def _refuse_partial_loader(config: MoLoraConfig) -> None:
    """Raises where transformers would place some tensors of a saved adapter and log the rest.

    Configurations that PEFT read have their file's shapes beside them; a saved one without is being
    loaded by `AutoModelForCausalLM.from_pretrained(directory)`.
    """
    is_load = config.weights_sha256 is not None and config.inference_mode
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    old = [
        f"{name} {versions[name]} (wants >= {wanted})"
        for name, wanted in AUTO_MODEL_WANTS.items()
        if Version(versions[name]) < Version(wanted)
    ]
    if is_load and old:
        raise AdapterError(
            f"{' and '.join(old)} would load a part of this adapter only; load the base model and "
            "then the adapter, PeftModel.from_pretrained(base, directory), or upgrade"
        )


def _check_file(model: nn.Module, config: MoLoraConfig, path: str, saved: Shapes) -> None:
    """Raises unless a file holds exactly the tensors that this model and configuration want."""
    with without_adapters(model):
        expected = _expected_shapes(model, config)
        embeddings = _embedding_names(model)
    found = {}
    for name, shape in saved.items():
        name = name.removeprefix(_SAVED_PREFIX)
        if name in expected or name.rpartition(".")[0] not in embeddings:
            found[name] = shape
    compare_shapes(path, expected, found)


def _expected_shapes(model: nn.Module, config: MoLoraConfig) -> Shapes:
    """Names, as saved but without PEFT's prefix, and shapes of all tensors of an adapter."""
    expected: dict[str, tuple[int, ...]] = {}
    saved = tuple(config.modules_to_save or ())
    for name, module in model.named_modules():
        shapes: Shapes = {}
        if name.endswith(saved):
            shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        elif name and check_target_module_exists(config, name):
            sizes = feature_sizes(module)
            shapes = {} if sizes is None else adapter_shapes(config.settings(), *sizes)
        expected |= {f"{name}.{key}": shape for key, shape in shapes.items()}
    return expected


def _embedding_names(model: nn.Module) -> set[str]:
    """Names of the embeddings, which PEFT saves along after the vocabulary was resized."""
    if not hasattr(model, "get_input_embeddings"):
        return set()
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        name for name, module in model.named_modules() if any(module is e for e in embeddings if e)
    }


def _check_state_dict(
    tuner: MoLoraModel, state_dict: dict[str, Tensor], prefix: str, *unused: Any
) -> None:
    """Before any tensor is written: an adapter that is loaded at all is loaded whole."""
    own = {prefix + name: tuple(p.shape) for name, p in tuner.named_parameters()}
    given = {name: tuple(t.shape) for name, t in state_dict.items() if name.startswith(prefix)}
    touched = {_adapter_of(name) for name in given} - {None}
    whole = {name for name in (*own, *given) if _adapter_of(name) in touched}
    checked = whole | {name for name in given if ".modules_to_save." in name}
    compare_shapes(
        "state_dict",
        {name: shape for name, shape in own.items() if name in checked},
        {name: shape for name, shape in given.items() if name in checked},
    )


def _adapter_of(name: str) -> str | None:
    """`default` of `….molora_A.default`; "" of `….molora_A`; None for any other tensor."""
    parts = name.split(".")
    if parts[-1] in MoLoraLayer.adapter_layer_names:
        return ""
    in_layer = len(parts) > 1 and parts[-2] in MoLoraLayer.adapter_layer_names
    return parts[-1] if in_layer else None
