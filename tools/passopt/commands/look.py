"""Commands that only look: list, print, plan."""

from __future__ import annotations

import argparse
import dataclasses
import json

from passopt.ir.errors import UsageError
from passopt.passes.framework.catalog import catalog
from passopt.passes.pipeline.named import PIPELINES


def list(options: argparse.Namespace) -> int:
    """Passes and pipelines, read from their source without importing them."""
    entries = catalog().values()
    if options.json:
        passes = [dataclasses.asdict(entry) for entry in entries]
        pipelines = [{"name": name, **dataclasses.asdict(item)} for name, item in PIPELINES.items()]
        print(json.dumps({"passes": passes, "pipelines": pipelines}, indent=2))
        return 0
    print("passes")
    for entry in entries:
        settings = ",".join(f"{name}={default}".lower() for name, _, default in entry.options)
        accuracy = f"  ({entry.accuracy})" if entry.accuracy else ""
        print(f"  {entry.name}{f'{{{settings}}}' if settings else ''}{accuracy}\n      {entry.summary}")
    print("pipelines")
    for name, item in PIPELINES.items():
        settings = ",".join(f"{key}={value}" for key, value in item.options.items())
        print(f"  {name}{f'{{{settings}}}' if settings else ''} = {', '.join(item.steps)}\n      {item.summary}")
    return 0


def print_(options: argparse.Namespace) -> int:
    """Canonical text on stdout."""
    from passopt.ir.serialization.model_files import load_model
    from passopt.ir.serialization.text import print_model

    model = load_model(options.model)
    if options.provenance:
        from passopt.commands.provenance import provenance_json, provenance_text, rows_of

        rows = rows_of(model)
        print(provenance_json(rows) if options.json else provenance_text(rows, fold=not options.no_fold))
        return 0
    if options.json:
        raise UsageError("--json is for print --provenance; the canonical text has one form")
    print(print_model(model, fold=not options.no_fold, canonical=options.canonical), end="")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Legal degrees and blockers; nothing is changed."""
    from passopt.ir.graph.decoder import degree_of
    from passopt.ir.serialization.model_files import load_model
    from passopt.passes.pipeline.runner import run_passes
    from passopt.passes.pipeline.text import resolve
    from passopt.passes.sharding.legal_degrees import make_plan

    model = load_model(options.model)
    if degree_of(model) > 1:
        raise UsageError(f"{options.model}: is sharded already, degree {degree_of(model)}; plan the unsplit model")
    run_passes(model, resolve("fold-norm-head,inject-norm-head-bias").passes)
    found = make_plan(model)
    degrees = [2, 3, 4, 5, 6, 8, 10, 16, 20, 32]
    if options.json:
        body = {**dataclasses.asdict(found), "legal_degrees": found.legal_degrees}
        body["blockers"] = {
            str(degree): [dataclasses.asdict(item) for item in found.blockers(degree)] for degree in degrees
        }
        print(json.dumps(body, indent=2))
        return 0
    print(f"legal degrees: {', '.join(map(str, found.legal_degrees)) or 'none without padding'}")
    print(f"collectives: {found.all_reduces} AllReduce, {found.all_gathers} AllGather")
    print(f"sharded: {len(found.sharded)} tensors; replicated: {len(found.replicated)}")
    for group in found.groups:
        print(f"  {group.units:7d} units  {group.tensors:4d} tensors such as {group.example}")
    print("degree  blocked by")
    for degree in degrees:
        blockers = found.blockers(degree)
        reason = ", ".join(f"{item.units} units of {item.example}" for item in blockers) or "nothing"
        print(f"{degree:6d}  {reason}")
    return 0
