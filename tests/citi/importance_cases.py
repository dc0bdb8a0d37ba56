"""What the tests of importance share: unpadded sequences, their batches, and the true scores."""

from __future__ import annotations

import copy

import torch
from torch import nn

from citi.components import find_components
from tiny import MIXTURE_OF_EXPERTS, tiny_model


def fp64_model(architecture):
    """Grouped GEMM of experts knows no fp64."""
    overrides = {"experts_implementation": "eager"} if architecture in MIXTURE_OF_EXPERTS else {}
    return tiny_model(architecture, dtype=torch.float64, **overrides)


def sequences(seed=0, lengths=(9, 14, 5), answers=((6, 9), (3, 8), (0, 5))):
    """Unpadded (ids, labels); the last one is all answer, its first token included."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length, (start, end) in zip(lengths, answers, strict=True):
        ids = torch.randint(3, 300, (length,), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[start:end] = ids[start:end]
        made.append((ids, labels))
    return made


def padded(parts, *, side="right", width=16):
    """One batch; padding holds real-looking tokens and labels, so that counting it would show."""
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in parts:
        fill = torch.full((width - len(ids),), 7)
        order = (lambda t, f: [f, t]) if side == "left" else (lambda t, f: [t, f])
        rows["input_ids"].append(torch.cat(order(ids, fill)))
        rows["labels"].append(torch.cat(order(labels, fill)))
        rows["attention_mask"].append(
            torch.cat(order(torch.ones_like(ids), torch.zeros_like(fill)))
        )
    return {key: torch.stack(value) for key, value in rows.items()}


def single(part):
    ids, labels = part
    return {"input_ids": ids[None], "labels": labels[None]}


def packed(parts, padding=0):
    positions = [torch.arange(len(ids)) for ids, _ in parts]
    ids, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.cat(positions)}
    batch["attention_mask"] = torch.ones_like(ids)
    return {key: nn.functional.pad(value, (0, padding))[None] for key, value in batch.items()}


def true_scores(model, batches, estimator):
    """From real gradients: of per-token outputs for token, of the weights for the others.

    `batches` are lists of unpadded sequences; the losses are the model's own.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    components, _ = find_components(model)
    modules = {c.name: model.get_submodule(c.name) for c in components}
    totals = dict.fromkeys(modules, 0.0)
    outputs = {}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda m, args, y, name=name: (y.retain_grad(), outputs.update({name: y}))[1]
        )
    for batch in batches:
        num_answers = sum(int((labels[1:] != -100).sum()) for _, labels in batch)
        model.zero_grad()
        for part in batch:
            loss = model(**single(part)).loss
            share = int((part[1][1:] != -100).sum()) / num_answers
            (loss if estimator == "token" else loss * share).backward()
            if estimator == "token":
                for name, module in modules.items():
                    bias = 0 if module.bias is None else module.bias
                    dots = ((outputs[name] - bias) * outputs[name].grad).sum(-1)
                    totals[name] += dots.abs().sum().item()
        for name, module in modules.items() if estimator != "token" else ():
            product = module.weight * module.weight.grad
            whole = product.sum().abs() if estimator == "batch" else product.abs().sum()
            totals[name] += whole.item()
    if estimator == "token":
        parts = [part for batch in batches for part in batch]
        num_answers = sum(int((labels[1:] != -100).sum()) for _, labels in parts)
        others = sum(len(ids) - 1 for ids, _ in parts)
        for c in components:
            totals[c.name] /= num_answers if c.layer == 2 else others
    return totals


def assert_same(got, wanted, rtol):
    assert list(got) == list(wanted)
    scale = max(wanted.values())
    for name, value in wanted.items():
        assert abs(got[name] - value) <= rtol * max(value, 0.01 * scale), (name, got[name], value)
