"""What the tests of importance share: unpadded sequences, their batches, and the true scores."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

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


def true_entries(model, batches, estimator, shapes):
    """(P, Q) scores from real gradients: of per-token outputs for token, of weights for the others.

    `batches` are lists of unpadded sequences; the losses are the model's own.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    components, _ = find_components(model)
    modules = {c.name: model.get_submodule(c.name) for c in components}
    totals = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    seen = {}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda m, args, y, name=name: (y.retain_grad(), seen.update({name: (args[0], y)}))[1]
        )
    for batch in batches:
        num_answers = sum(int((labels[1:] != -100).sum()) for _, labels in batch)
        model.zero_grad()
        for part in batch:
            loss = model(**single(part)).loss
            share = int((part[1][1:] != -100).sum()) / num_answers
            (loss if estimator == "token" else loss * share).backward()
            for name in modules if estimator == "token" else ():
                x, g = seen[name][0].flatten(0, -2), seen[name][1].grad.flatten(0, -2)
                totals[name] += _of_tokens(modules[name], x, g, shapes[name])
        for name, module in modules.items() if estimator != "token" else ():
            product = _by_out_features(module, module.weight * module.weight.grad)
            product = product if estimator == "batch" else product.abs()
            totals[name] += _in_segments(product, shapes[name]).sum((1, 3)).abs()
    if estimator == "token":
        parts = [part for batch in batches for part in batch]
        num_answers = sum(int((labels[1:] != -100).sum()) for _, labels in parts)
        others = sum(len(ids) - 1 for ids, _ in parts)
        for c in components:
            totals[c.name] /= num_answers if c.layer == 2 else others
    return totals


def true_scores(model, batches, estimator):
    """The same of whole components: name -> score."""
    components, _ = find_components(model)
    entries = true_entries(model, batches, estimator, {c.name: (1, 1) for c in components})
    return {name: entry.item() for name, entry in entries.items()}


def _by_out_features(module, matrix):
    return matrix.detach().double().T if isinstance(module, Conv1D) else matrix.detach().double()


def _in_segments(matrix, shape):
    rows, columns = shape
    return matrix.reshape(rows, matrix.shape[0] // rows, columns, matrix.shape[1] // columns)


def _of_tokens(module, x, g, shape):
    weight = _in_segments(_by_out_features(module, module.weight), shape)
    x = x.detach().double().reshape(len(x), shape[1], -1)
    g = g.detach().double().reshape(len(g), shape[0], -1)
    return torch.einsum("pnqk,tqk,tpn->tpq", weight, x, g).abs().sum(0)


def assert_same(got, wanted, rtol):
    assert list(got) == list(wanted)
    scale = max(wanted.values())
    for name, value in wanted.items():
        assert abs(got[name] - value) <= rtol * max(value, 0.01 * scale), (name, got[name], value)
