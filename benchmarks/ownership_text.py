"""Marks that are read from text, fingerprints, and leaks that are traced, on the demo's model.

Run: python benchmarks/ownership_text.py [trace] [triggers] [fingerprint]     (all three: some ten minutes on 2 cores)

trace        The adapter of the demo's job, its copies made for eight parties as the server makes them, and 50 leaks:
             copies as they are and spoilt, and the mean of two parties' copies. *Right* is a leak of which only parties
             that had a part in it are named, *all* one of which all are named.
triggers     The demo's job over 24 rounds, one claimant with eight triggers: how many of the secret answers the tuned
             model gives, by greedy generation alone, after what a thief does to it. Siblings are the base model, and
             the same job without triggers. Foreign keys are claims that nobody trained.
fingerprint  Ten secret instructions tuned into the demo's base model, and what is left of them.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import machine
from ownership_attacks import Weights, merged_by, pruned, quantised, truncated, tuned
from ruamel.yaml import YAML

from fedllm.data.read import read_examples
from fedllm.evaluate.loss import evaluate_examples
from fedllm.job.job import Job, LocatedParty, load_parties
from fedllm.ownership.claims import Claim, load_claim, new_secret
from fedllm.ownership.tracing import ERROR, Original, Trace, marked, trace
from fedllm.ownership.triggers import chance_of, make_triggers, verify_text
from fedllm.runtime.copies import originals_of
from fedllm.runtime.export import export
from fedllm.runtime.fingerprint import fingerprint
from fedllm.runtime.ownership import commit
from fedllm.runtime.run import RunResult, run_local
from fedllm.runtime.scaffold import write_job_folder
from fedllm.runtime.site import Site, open_site, tokens_of
from fedllm.runtime.triggers import asker
from fedllm.seeds import stream
from fedllm.wire.payload import Tensors

CLAIMED = {"claimants": ["east"], "num_triggers": 8}
RECIPIENTS = [f"party {number}" for number in range(1, 9)]
LEAKS, STRENGTH, FOREIGN, ROUNDS = 50, 0.05, 20, 24


def job_of(
    job_file: Path, *, seed: int, ownership: dict[str, Any], rounds: int = ROUNDS
) -> tuple[Job, list[LocatedParty]]:
    """Return the demo's job, its last round delivered, with marks."""
    tree = YAML(typ="safe", pure=True).load(job_file.read_text(encoding="utf-8"))
    tree |= {"seed": seed, "ownership": ownership, "runtime": {"num_threads": torch.get_num_threads()}}
    tree["federation"] |= {"num_rounds": rounds, "eval_every": rounds, "keep": "last"}
    job = Job.model_validate(tree).located(job_file.parent)
    return job, load_parties(job)


def weights_of(folder: Path) -> Weights:
    """Return all tensors of a folder's safetensors files."""
    from safetensors.torch import load_file

    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def whole(result: RunResult) -> Weights:
    """Return a run's model, merged."""
    return weights_of(export(result.path, result.path / "merged", merge=True))


def model_of(site: Site, weights: Weights) -> Any:
    """Return a model with these weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(site.folder).eval()
    model.load_state_dict(weights, strict=False)
    return model


def loss_of(site: Site, weights: Weights) -> float:
    """Return the loss on the common test set, nats per target."""
    pad = site.base.tokenizer.pad_token_id
    sums = evaluate_examples(model_of(site, weights), site.common, pad_id=pad, batch_size=32)
    return float(sums.nll_nats / sums.tokens)


def other_tokens(site: Site, job_file: Path) -> list[Any]:
    """Return examples that no party trained on."""
    path = job_file.parent / "data" / "test.jsonl"
    examples = read_examples(str(path), base_dir=path.parent, settings=site.job.data)
    return list(tokens_of(examples, site.base.tokenizer, site.job, where="other data")[0])


def table(*columns: str) -> None:
    """Print the head of a table."""
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)


# Tracing


def change_of(own: Weights, base: Weights) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Return the change of a whole model's weights, times a matrix."""
    return lambda site, right: (own[f"{site.name}.weight"] - base[f"{site.name}.weight"]) @ right


def merged_copy(copy: Tensors, base: Weights, originals: list[Original]) -> Weights:
    """Return the base with a copy merged into it."""
    found = dict(base)
    for one in originals:
        head = f"base_model.model.{one.site.name}.lora_"
        found[f"{one.site.name}.weight"] = (
            base[f"{one.site.name}.weight"] + one.scale * copy[f"{head}B.weight"] @ copy[f"{head}A.weight"]
        )
    return found


def mean(one: Weights, other: Weights) -> Weights:
    """Return the mean of two models."""
    return {name: (value + other[name]) / 2 for name, value in one.items()}


def trace_table(site: Site, result: RunResult, other: list[Any]) -> None:
    """Print what is named of 50 leaks."""
    base, adapter = weights_of(site.folder), weights_of(result.path / "adapter")
    originals, key = list(originals_of(result.path / "adapter")), new_secret()
    names = [f"{one.site.name}.weight" for one in originals]
    copies = {
        party: merged_copy(marked(adapter, party, key=key, strength=STRENGTH), base, originals) for party in RECIPIENTS
    }
    spoil: dict[str, Callable[[Weights], Weights]] = {
        "as it is": lambda own: own,
        "pruning 40 % of the delta": lambda own: pruned(own, base, names, 0.4),
        "pruning 80 % of the delta": lambda own: pruned(own, base, names, 0.8),
        "int8": lambda own: quantised(own, names, 8),
        "int4": lambda own: quantised(own, names, 4),
        "merging with the base at 0.5": lambda own: merged_by(own, base, 0.5),
        "rank of the delta cut to a half": lambda own: truncated(own, base, names, originals[0].a.shape[0] // 2),
        "tuning on other data, 1 epoch": lambda own: tuned(site, own, other, epochs=1),
    }
    draw, counts = stream(0, "leaks"), dict[str, Counter[str]]()
    kinds = [(kind, pair) for kind in spoil for pair in (False, True)]
    for leak in range(LEAKS):
        kind, pair = kinds[leak % len(kinds)]
        guilty = [RECIPIENTS[int(i)] for i in draw.choice(len(RECIPIENTS), size=2 if pair else 1, replace=False)]
        own = copies[guilty[0]] if not pair else mean(copies[guilty[0]], copies[guilty[1]])
        found = trace(change_of(spoil[kind](own), base), originals, RECIPIENTS, key=key)
        note(counts.setdefault(f"{'two copies, mean' if pair else 'one copy'}, {kind}", Counter()), found, guilty)
    table("leak", "leaks", "right", "all", "undecided", "an innocent one", "smallest score of a guilty one")
    for name in sorted(counts, reverse=True, key=lambda name: name.startswith("one")):
        n = counts[name]
        print(
            f"| {name} | {n['leaks']} | {n['right']} | {n['all']} | {n['undecided']} | {n['innocent']} | "
            f"{n['least'] / 10:.1f} |"
        )
    total = sum(counts.values(), Counter())
    print(
        f"\n{total['leaks']} leaks, {len(RECIPIENTS)} parties, error {ERROR:g}: right {total['right']}, "
        f"all {total['all']}, undecided {total['undecided']}, innocent {total['innocent']}"
    )
    unmarked, losses = (
        loss_of(site, merged_copy(adapter, base, originals)),
        [loss_of(site, copies[p]) for p in RECIPIENTS],
    )
    print(f"loss on the task: unmarked {unmarked:.4f}, copies {min(losses):.4f} to {max(losses):.4f}", flush=True)


def note(counts: Counter[str], found: Trace, guilty: list[str]) -> None:
    """Count what came of one leak."""
    named = set(found.named)
    least = min(score.z for score in found.scores if score.party in guilty)
    counts["least"] = min(counts["least"] or 10**6, round(10 * least))
    counts["leaks"] += 1
    counts["undecided"] += not named
    counts["innocent"] += bool(named - set(guilty))
    counts["right"] += bool(named) and named <= set(guilty)
    counts["all"] += named == set(guilty)


# Text


def thefts(site: Site, own: Weights, base: Weights, other: list[Any]) -> Iterator[tuple[str, Weights]]:
    """Yield what a thief does, and the weights after it."""
    names = [name for name, value in own.items() if name in base and value.dim() == 2 and "proj" in name]
    yield "nothing", own
    yield "pruning 40 % of the delta", pruned(own, base, names, 0.4)
    yield "pruning 80 % of the delta", pruned(own, base, names, 0.8)
    yield "int8", quantised(own, names, 8)
    yield "int4", quantised(own, names, 4)
    yield "merging with the base at 0.5", merged_by(own, base, 0.5)
    for epochs in (1, 4):
        yield f"tuning on other data, {epochs} epoch{'s' * (epochs > 1)}", tuned(site, own, other, epochs=epochs)


def show(name: str, site: Site, claim: Claim, weights: Weights) -> None:
    """Print a line of a table of answers."""
    found = verify_text(claim, asker(site.base, model_of(site, weights)))
    print(
        f"| {name} | {found.matches} of {found.asked} | {found.p_value:.1e} | {loss_of(site, weights):.3f} |",
        flush=True,
    )


def foreign(claim: Claim) -> Claim:
    """Return a claim of the same form with another key."""
    key, count = new_secret(), len(claim.triggers)
    form = "instruction" if "Instruction" in claim.triggers[0].prompt else "plain"
    return claim.model_copy(update={"key_seed": key, "triggers": make_triggers(key, count, form=form)})


def null(name: str, site: Site, claims: list[Claim], weights: Weights) -> None:
    """Print how many secret answers a model gives that was made without the keys."""
    ask = asker(site.base, model_of(site, weights))
    found = [verify_text(claim, ask) for claim in claims]
    answers, asked = sum(one.matches for one in found), sum(one.asked for one in found)
    held = sum(one.holds for one in found)
    print(f"| {name} | {len(claims)} | {answers} of {asked} | {held} |", flush=True)


def triggers_table(job_file: Path, result: RunResult, claim: Claim, site: Site, other: list[Any]) -> None:
    """Print what is left of the triggers, and what siblings answer."""
    own, base = whole(result), weights_of(site.folder)
    table("what is done to the model", "secret answers", "p", "loss on the task")
    for name, weights in thefts(site, own, base, other):
        show(name, site, claim, weights)
    siblings = {"the base model": base}
    job, parties = job_of(job_file, seed=7, ownership={})
    sibling = whole(run_local(job, parties=parties, output=job_file.parent / "sibling"))
    siblings["the same job without triggers"] = sibling
    print(f"\nloss on the task without triggers: {loss_of(site, sibling):.3f}")
    claims = [foreign(claim) for _ in range(FOREIGN)]
    table("unmarked", "claims", "secret answers", "claims that hold")
    for name, weights in siblings.items():
        null(name, site, [claim, *claims], weights)
    null("the marked model, foreign keys", site, claims, own)
    print(
        f"\nby the null, one model passes one claim with a chance of {chance_of(2, len(claim.triggers)):.1e}",
        flush=True,
    )


def fingerprint_table(job_file: Path, site: Site, other: list[Any]) -> None:
    """Print what is left of a fingerprint, and what it costs."""
    made = fingerprint(site.folder, job_file.parent / "handed-out", claims=job_file.parent / "owner")
    print(f"\n{made.steps} steps, divergence from before {made.divergence_nats:.4f} nats")
    claim, own, base = load_claim(made.claim), weights_of(made.model), weights_of(site.folder)
    print(f"loss on the task: before {loss_of(site, base):.3f}, fingerprinted {loss_of(site, own):.3f}")
    table("what is done to the fingerprinted base", "secret answers", "p", "loss on the task")
    for name, weights in thefts(site, own, base, other):
        show(name, site, claim, weights)
    table("unmarked", "claims", "secret answers", "claims that hold")
    null("the base model", site, [claim, *(foreign(claim) for _ in range(FOREIGN))], base)


def main() -> None:
    """Print the tables that are asked for."""
    asked = sys.argv[1:] or ["trace", "triggers", "fingerprint"]
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        job_file = write_job_folder(Path(folder) / "job")
        job, parties = job_of(job_file, seed=7, ownership=CLAIMED)
        site = open_site(job, parties)
        other = other_tokens(site, job_file)
        if "trace" in asked:
            plain, _ = job_of(job_file, seed=7, ownership={}, rounds=12)
            trace_table(site, run_local(plain, parties=parties, output=job_file.parent / "traced"), other)
        if "triggers" in asked:
            claim = load_claim(commit(job, parties)[0][0])
            result = run_local(job, parties=parties, output=job_file.parent / "run")
            triggers_table(job_file, result, claim, site, other)
        if "fingerprint" in asked:
            fingerprint_table(job_file, site, other)


if __name__ == "__main__":
    main()
