"""Marks of four parties in the demo's task: what they cost, what they prove, and what takes them away.

Run: python benchmarks/ownership.py                (about 20 minutes on 2 cores)
     python benchmarks/ownership.py --seeds 1      (a third of that)

The demo's base model and task over four parties, each with 32 bits in the product of LoRA's factors. The first table
compares runs with marks and without, and with a secure sum. The second one does to the merged model what a thief
would, and says what the *worst* claimant can still prove, after correction for the two ways to read each of the four
claims, and what the model's loss on the task has become. A claim needs p < 1e-6. The third one has the bits in the
norms' scales. The last one (--only trial) has a claimant that marks nothing: it tries the job in secret first, and
takes of 2,000 keys the one, with the bits, that fits best what comes out.
"""

from __future__ import annotations

import argparse
import math
import secrets
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import machine, write_records
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ownership_attacks import (
    Weights,
    folded,
    merged_by,
    overwritten,
    permuted,
    pruned,
    quantised,
    rounded,
    truncated,
    tuned,
    with_noise,
)
from ruamel.yaml import YAML

from fedllm.cli import quiet_dependencies
from fedllm.data.adverts import AdvertTask, common_test, party_examples
from fedllm.evaluate.loss import evaluate_examples
from fedllm.job.job import Job, LocatedParty, load_parties
from fedllm.ownership.claims import BOUND, DRAWN, Claim, load_claim, new_bits, new_secret
from fedllm.ownership.commitments import commit_to
from fedllm.ownership.directions import directed, share_of
from fedllm.ownership.keys import public_hex
from fedllm.ownership.log import FOLDER, OwnershipLog, commitment_entry, party_entry, read_log, share_entry
from fedllm.ownership.marks import mark_sites
from fedllm.ownership.statistics import corrected, p_value
from fedllm.ownership.suspect import READINGS, MergedSuspect
from fedllm.ownership.verify import mark_values
from fedllm.runtime.export import export
from fedllm.runtime.ownership import commit
from fedllm.runtime.run import RunResult, run_local
from fedllm.runtime.scaffold import write_job_folder
from fedllm.runtime.site import Site, open_site, tokens_of
from fedllm.seeds import stream

PARTIES = ("north", "east", "south", "west")
TASK = AdvertTask(seed=7, num_parties=4, train_per_product=240, shuffle_products=False)
OTHER = AdvertTask(seed=99, num_parties=1, train_per_product=100)
RANK, RANDOM_KEYS, TRIED_KEYS = 16, 1000, 2000
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]


class Memory:
    """Tensors by name, in the place of files."""

    def __init__(self, tensors: Weights) -> None:
        self._tensors = tensors

    def get(self, name: str) -> torch.Tensor | None:
        """Return a tensor, or None."""
        return self._tensors.get(name)


def job_folder(folder: Path) -> Path:
    """Return the demo's job folder for four parties, and its job file."""
    job_file = write_job_folder(folder)
    for party, records in party_examples(TASK).items():
        write_records(folder / "data" / party / "train.jsonl", records)
        text = (folder / "parties" / "north.yaml").read_text(encoding="utf-8").replace("north", party)
        (folder / "parties" / f"{party}.yaml").write_text(text, encoding="utf-8")
    write_records(folder / "data" / "test.jsonl", common_test(TASK))
    write_records(folder / "data" / "other.jsonl", party_examples(OTHER)["north"])
    return job_file


def job_of(job_file: Path, seed: int, changes: dict[str, Any]) -> tuple[Job, list[LocatedParty]]:
    """Return the job with changes, and its parties."""
    tree = YAML(typ="safe", pure=True).load(job_file.read_text(encoding="utf-8"))
    tree |= {"parties": list(PARTIES), "seed": seed}
    tree["federation"] |= {"eval_every": 12, "keep": "last"}
    tree["runtime"] = {"num_threads": torch.get_num_threads()}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    job = Job.model_validate(tree).located(job_file.parent)
    return job, load_parties(job)


MARKED = {"ownership.carrier": "product", "ownership.claimants": list(PARTIES)}
SUMS = {"privacy.secure_aggregation": {"enabled": True, "max_weight": 2000}}


def run_of(
    job_file: Path, name: str, seed: int, changes: dict[str, Any]
) -> tuple[RunResult, list[Claim], tuple[Job, list[LocatedParty]]]:
    """Return a finished run, with the claims that were committed to before it, as they are read."""
    job, parties = job_of(job_file, seed, changes)
    claims = [load_claim(path) for path, _ in commit(job, parties)] if job.ownership.enabled else []
    result = run_local(job, parties=parties, output=job_file.parent / f"{name}-{seed}")
    drawn = (directed(claim, read_log(result.path / FOLDER)) for claim in claims)
    return result, [claim for claim in drawn if claim], (job, parties)


def task_loss(result: RunResult) -> float:
    """Return the loss of the last round on the common test set."""
    found = [row for row in result.rows() if (row["name"], row["split"], row["party"]) == ("loss_nats", "common", None)]
    return float(max(found, key=lambda row: row["round"])["value"])


def weights_of(folder: Path) -> Weights:
    """Return all tensors of a model's folder."""
    from safetensors.torch import load_file

    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def merged_weights(result: RunResult) -> Weights:
    """Return all tensors of a run's model, merged."""
    return weights_of(export(result.path, result.path / "merged", merge=True))


def p_of(claim: Claim, own: Weights, base: Weights, *, flip: bool = False) -> float:
    """Return the p-value of the better of the ways to read a claim; with all bits flipped, as a control."""
    signs = torch.tensor(claim.signs()) * (-1 if flip else 1)
    suspect: Any = MergedSuspect(Memory(own), Memory(base))  # type: ignore[arg-type]
    found = [int((mark_values(claim, suspect, way) * signs > 0).sum()) for way in READINGS]
    return min(p_value(matches, len(signs)) for matches in found)


def worst(claims: list[Claim], own: Weights, base: Weights) -> float:
    """Return the largest p of the claimants, corrected for all ways to read all claims."""
    return max(corrected(p_of(claim, own, base), len(READINGS) * len(claims)) for claim in claims)


def random_key_p(claim: Claim, own: Weights, base: Weights) -> float:
    """Return the Kolmogorov-Smirnov p-value of random keys' p-values against the uniform distribution.

    Matches are whole numbers, so each p is spread evenly over the step that it stands for: that is exactly uniform
    where the key has no part in the model.
    """
    draw, suspect, found = stream(0, "benchmark", "keys"), MergedSuspect(Memory(own), Memory(base)), []  # type: ignore[arg-type]
    for _ in range(RANDOM_KEYS):
        key = claim.model_copy(update={"key_seed": secrets.token_hex(32)})
        matches = int((mark_values(key, suspect, READINGS[0]) * torch.tensor(claim.signs()) > 0).sum())
        above = p_value(matches + 1, len(claim.bits))
        found.append(above + draw.random() * (p_value(matches, len(claim.bits)) - above))
    return kolmogorov(found)


def kolmogorov(values: list[float]) -> float:
    """Return the chance that uniform draws are as far from uniform as these: Kolmogorov's limit, Stephens' term."""
    count, ordered = len(values), sorted(values)
    distance = max(max((i + 1) / count - value, value - i / count) for i, value in enumerate(ordered))
    scaled = (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count)) * distance
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * scaled**2) for k in range(1, 101)))


def marks_table(job_file: Path, seeds: range) -> None:
    """Print what marks cost and prove; the change has its standard error over the seeds, each beside its own twin."""
    print("| run | loss on the task | change | bits read | worst p | random keys: KS p | flipped bits: least p |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    base = weights_of(job_file.parent / "base")
    plain = [task_loss(run_of(job_file, "plain", seed, {})[0]) for seed in seeds]
    print(f"| no marks, {_seeds_text(seeds)} | {_losses_text(plain)} | | | | | |", flush=True)
    for name, changes, chosen in (("product", MARKED, seeds), ("product, secure sum", MARKED | SUMS, seeds[:1])):
        losses, reads = [], []
        for seed in chosen:
            result, claims, _ = run_of(job_file, name.replace(", ", "-").replace(" ", "-"), seed, changes)
            losses.append(task_loss(result))
            own = merged_weights(result)
            reads.append((worst(claims, own, base), _bits(claims, own, base)))
        ks, flipped = random_key_p(claims[0], own, base), min(p_of(one, own, base, flip=True) for one in claims)
        twins = [loss / alone - 1 for loss, alone in zip(losses, plain, strict=False)]
        change = f"{statistics.fmean(twins):+.1%}"
        if len(twins) > 1:
            change += f" ± {statistics.stdev(twins) / math.sqrt(len(twins)):.1%}"
        bits, p = min(bits for _, bits in reads), max(p for p, _ in reads)
        cells = f"{_losses_text(losses)} | {change} | {bits} of 128 | {p:.1e} | {ks:.2f} | {flipped:.2f}"
        print(f"| {name}, {_seeds_text(chosen)} | {cells} |", flush=True)


def _seeds_text(seeds: range) -> str:
    return f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"


def _losses_text(losses: list[float]) -> str:
    each = " ".join(f"{loss:.4f}" for loss in losses)
    return f"{statistics.fmean(losses):.4f} ({each})" if len(losses) > 1 else each


def _bits(claims: list[Claim], own: Weights, base: Weights) -> int:
    suspect: Any = MergedSuspect(Memory(own), Memory(base))  # type: ignore[arg-type]
    return sum(int((mark_values(one, suspect, READINGS[0]) * torch.tensor(one.signs()) > 0).sum()) for one in claims)


def attacks(
    site: Site, own: Weights, base: Weights, names: list[str], other: list[Any]
) -> Iterator[tuple[str, Weights]]:
    """Yield what a thief does, and what the model's weights are then; each kind goes on until the mark is gone."""
    yield "nothing", own
    for share in (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98):
        yield f"pruning {share:.0%} of the delta", pruned(own, base, names, share)
    yield "bfloat16", rounded(own)
    for bits in (8, 4, 3, 2):
        yield f"int{bits}", quantised(own, names, bits)
    for share in (0.5, 0.25, 0.1, 0.02):
        yield f"merging with the base at {share:g}", merged_by(own, base, share)
    for rank in (RANK // 2, RANK // 4, RANK // 8, 1):
        yield f"rank of the delta cut to {rank}", truncated(own, base, names, rank)
    for epochs in (1, 4, 16):
        yield f"tuning on other data, {epochs} epoch{'s' * (epochs > 1)}", tuned(site, own, other, epochs=epochs)
    yield "folding norms' scales into the linear layers", folded(own, base, seed=0)
    for times in (1, 10, 100):
        yield f"a thief's own mark, {times} x the margin, with 1 epoch", overwritten(site, own, other, times=times)
    for times in (1, 2, 4, 8):
        yield f"noise as large as {times} x the delta", with_noise(own, base, names, times)
    yield "neurons of the MLPs put in another order", permuted(own)


def robustness_table(job_file: Path) -> None:
    """Print what is left of the marks, and of the task, after each attack."""
    result, claims, (job, parties) = run_of(job_file, "attacked", 0, MARKED)
    site = open_site(job, parties)
    own, base = (
        weights_of(folder) for folder in (export(result.path, result.path / "merged", merge=True), site.folder)
    )
    names = [f"{found.name}.weight" for found in claims[0].sites]
    other = _tokens(site, job_file.parent / "data" / "other.jsonl")
    print("\n| attack | worst claimant's p | loss on the task |\n| --- | --- | --- |")
    for name, weights in attacks(site, own, base, names, other):
        print(f"| {name} | {worst(claims, weights, base):.1e} | {loss_of(site, weights):.3f} |", flush=True)
    print(f"| the base model | {worst(claims, base, base):.1e} | {loss_of(site, base):.3f} |")


def norms_table(job_file: Path) -> None:
    """Print what folding does to bits in norms' scales."""
    changes = {"ownership.carrier": "norms", "ownership.claimants": list(PARTIES), "peft.modules_to_save": NORMS}
    result, claims, (job, parties) = run_of(job_file, "norms", 0, changes)
    site = open_site(job, parties)
    own, base = (
        weights_of(folder) for folder in (export(result.path, result.path / "merged", merge=True), site.folder)
    )
    print("\n| bits in norms' scales | worst claimant's p | loss on the task |\n| --- | --- | --- |")
    for name, weights in (("nothing", own), ("folding into the linear layers", folded(own, base, seed=0))):
        print(f"| {name} | {worst(claims, weights, base):.1e} | {loss_of(site, weights):.3f} |", flush=True)


def trial_table(job_file: Path) -> None:
    """Print what a key proves that was chosen after a trial run, in a model that nobody marked."""
    result, _, (job, parties) = run_of(job_file, "trial", 0, {"federation.num_rounds": 2})
    site = open_site(job, parties)
    suspect: Any = MergedSuspect(Memory(merged_weights(result)), Memory(weights_of(site.folder)))  # type: ignore[arg-type]
    keys = {party: Ed25519PrivateKey.generate() for party in PARTIES}
    # In its own software the thief plays the others' parts too, with keys that it makes.
    made = {party: keys[party] if party == "north" else Ed25519PrivateKey.generate() for party in PARTIES}
    print("\n| where bits are follows from | bits in the trial run | bits in the run | p |\n| --- | --- | --- | --- |")
    for form, text in ((DRAWN, "the key (form own-v1)"), (BOUND, "the key and the log (form own-v2)")):
        draft = Claim(
            form=form,
            party="north",
            job_digest=job.digest,
            base_digest="0" * 64,
            carrier="product",
            sites=mark_sites(site.model, "product"),
            key_seed=new_secret(),
            bits=new_bits(32),
            threshold=1e-6,
            salt=new_secret(),
        )
        trial = log_of(draft, made)
        fits = max((_fit(draft, new_secret(), trial, suspect) for _ in range(TRIED_KEYS)), key=lambda found: found[0])
        in_trial, in_run = (_agreeing(fits[1], log, suspect) for log in (trial, log_of(fits[1], keys)))
        print(f"| {text} | {in_trial} of 32 | {in_run} of 32 | {p_value(in_run, 32):.1e} |", flush=True)


def log_of(claim: Claim, keys: dict[str, Ed25519PrivateKey]) -> OwnershipLog:
    """Return the log of these parties, in which one has committed to a claim, with all shares."""
    entries = [party_entry(party, public_hex(key)) for party, key in keys.items()]
    log = OwnershipLog((*entries, commitment_entry(commit_to(claim, keys[claim.party]))))
    return log.with_entries(*(share_entry(party, share_of(key, log.first_root())) for party, key in keys.items()))


def _fit(draft: Claim, key_seed: str, log: OwnershipLog, suspect: Any) -> tuple[float, Claim]:
    claim = draft.model_copy(update={"key_seed": key_seed})
    values = _values(claim, log, suspect)
    bits = "".join("1" if value > 0 else "0" for value in values.tolist())
    return float(values.abs().min() / values.std()), claim.model_copy(update={"bits": bits})


def _agreeing(claim: Claim, log: OwnershipLog, suspect: Any) -> int:
    return int((_values(claim, log, suspect) * torch.tensor(claim.signs()) > 0).sum())


def _values(claim: Claim, log: OwnershipLog, suspect: Any) -> torch.Tensor:
    # The control is what the form own-v1 was, which no log bears out any more: its key alone says where bits are.
    known = claim if claim.form == DRAWN else directed(claim, log)
    assert known is not None
    return mark_values(known, suspect, READINGS[0])


def _tokens(site: Site, path: Path) -> list[Any]:
    from fedllm.data.read import read_examples

    examples = read_examples(str(path), base_dir=path.parent, settings=site.job.data)
    return list(tokens_of(examples, site.base.tokenizer, site.job, where="other data")[0])


def loss_of(site: Site, weights: Weights) -> float:
    """Return a whole model's loss on the common test set, in nats per target."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(site.folder).eval()
    model.load_state_dict(weights, strict=False)
    sums = evaluate_examples(model, site.common, pad_id=site.base.tokenizer.pad_token_id, batch_size=32)
    return float(sums.nll_nats / sums.tokens)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs with marks and without, each")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of these seeds")
    parser.add_argument("--only", choices=("marks", "attacks", "norms", "trial"), help="one of the tables")
    arguments = parser.parse_args()
    quiet_dependencies()
    first = arguments.first_seed
    tables: dict[str, Callable[[Path], None]] = {
        "marks": lambda job_file: marks_table(job_file, range(first, first + arguments.seeds)),
        "attacks": robustness_table,
        "norms": norms_table,
        "trial": trial_table,
    }
    print(f"{machine()}\n")
    for name, table in tables.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                table(job_folder(Path(folder) / "job"))


if __name__ == "__main__":
    main()
