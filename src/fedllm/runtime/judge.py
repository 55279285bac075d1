"""Judge a model on a test set: loss, perplexity, and the texts that it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedllm.data.formats import Example
from fedllm.data.read import read_examples
from fedllm.data.tokens import TokenisedExample, prompt_ids, reference_text, tokenise_all
from fedllm.errors import ConfigError
from fedllm.evaluate.generation import generate_completions
from fedllm.evaluate.loss import evaluate_examples
from fedllm.evaluate.text_metrics import score_texts
from fedllm.job.job import Job
from fedllm.models.deliver import read_adapter
from fedllm.runs.folder import attach, run_identity
from fedllm.runs.plan_files import read_plan
from fedllm.runtime.delivery import need_adapter, own_adapters
from fedllm.runtime.site import Site, common_examples, data_settings, open_site
from fedllm.tasks import CLASSIFICATION
from fedllm.wire.payload import Tensors


@dataclass(frozen=True)
class TestSet:
    """Examples that no party trained on, as text and as tokens."""

    examples: tuple[Example, ...]
    tokens: Sequence[TokenisedExample]


def test_set(site: Site, examples: Sequence[Example]) -> TestSet:
    """Return a test set as tokens.

    Args:
        site: For the tokenizer and the job.
        examples: The examples.
    """
    tokens, _ = tokenise_all(examples, site.base.tokenizer, data_settings(site.job))
    return TestSet(tuple(examples), tokens)


def judge(site: Site, test: TestSet, tensors: Tensors | None) -> dict[str, Any]:
    """Return the scores of the base model with an adapter, or without one.

    Text scores are there where every example asks something (not for plain text, nor for labels).

    Args:
        site: The loaded base model.
        test: The test set.
        tensors: The adapter; None for the bare base model.
    """
    evaluate, tokenizer = site.job.evaluate, site.base.tokenizer
    if tensors is not None:
        site.model.write(tensors)
    with site.model.untuned() if tensors is None else nullcontext(site.model.model) as model:
        batch_size = evaluate.per_device_eval_batch_size
        sums = evaluate_examples(model, test.tokens, pad_id=tokenizer.pad_token_id, batch_size=batch_size)
        scores: dict[str, Any] = dict(sums.values())
        asks = site.job.task.name != CLASSIFICATION
        if asks and all(example.messages or example.prompt is not None for example in test.examples):
            settings = data_settings(site.job)
            prompts = [prompt_ids(example, tokenizer, settings) for example in test.examples]
            texts = generate_completions(
                model, tokenizer, prompts, max_new_tokens=evaluate.max_new_tokens, batch_size=2 * batch_size
            )
            scores |= asdict(score_texts(texts, [reference_text(example) for example in test.examples]))
            scores["samples"] = texts[:3]
    return scores


def final_tensors(path: Path, job: Job) -> Tensors:
    """Return the adapter that a finished run delivers; no tensors where each party has its own.

    Args:
        path: The run folder.
        job: Its job.

    Raises:
        ConfigError: `RUN_UNFINISHED`.
    """
    identity = run_identity(path)
    states = attach(path, run_id=identity["run_id"], job_digest=identity["job_digest"]).checkpoints()
    server = job.table_line().server(job.federation, seed=job.seed, common=False)
    for number in states.valid():
        if number == job.federation.num_rounds:
            tensors: Mapping[str, Any] = server.final(states.load(number))[0]
            return dict(tensors)
    raise ConfigError(
        "RUN_UNFINISHED", "the run has no final adapter", where=str(path), fix=f"`fedllm resume {path}` goes on with it"
    )


def final_models(path: Path, site: Site) -> list[tuple[str, str | None, Tensors]]:
    """Return what a finished run delivers, as (name, party, tensors): one adapter, or each party's own.

    Args:
        path: The run folder.
        site: The loaded base model of the run's job.

    Raises:
        ConfigError: `RUN_UNFINISHED`; also where the parties' own adapters are on other machines.
    """
    if tensors := final_tensors(path, site.job):
        return [("federated", None, tensors)]
    found = own_adapters(path, site.job)
    if not found:
        raise ConfigError(
            "RUN_UNFINISHED",
            "each party has an adapter of its own, and none of them is on this machine",
            where=str(path),
            fix="judge it at the party's site, where it is in parties/NAME/adapter of the run folder",
        )
    return [(f"{party}, federated", party, read_adapter(site.model, folder)) for party, folder in found.items()]


def evaluate_run(path: Path, *, data: Path | None = None) -> list[dict[str, Any]]:
    """Return the scores of the base model and of a run's adapter, or of each party's own, a row each.

    Args:
        path: The run folder.
        data: A test file; by default the job's common test set.

    Raises:
        ConfigError: `RUN_UNFINISHED`, or there is nothing to judge, or nothing to judge on.
    """
    job, parties = read_plan(path)
    final_tensors(path, job)
    need_adapter(path, job)
    if data is None and job.evaluate.test is None:
        raise ConfigError("MISSING_KEY", "the job names no common test set", where="--data", fix="name a test file")
    site = open_site(job, parties)
    models = final_models(path, site)
    examples = (
        common_examples(job) if data is None else read_examples(str(data), base_dir=Path.cwd(), settings=job.data)
    )
    test = test_set(site, examples)
    rows = [{"model": "base model", "kind": "base", "party": None, **judge(site, test, None)}]
    for name, party, tensors in models:
        rows.append({"model": name, "kind": "federated", "party": party, **judge(site, test, tensors)})
    return rows
