"""Writes run folders that look like real ones, of any size, for the tests of the report and the model card."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedllm.seeds import stream

SEED = 7
START = datetime(2026, 11, 22, 9, 30, tzinfo=UTC)
JOB = "schema_version: 1\nname: adverts\nparties: [north, south, east]\n"
PARTIES = ("north", "south", "east")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metric_rows(parties: Sequence[str], num_rounds: int) -> list[dict[str, Any]]:
    """Return the rows of a run whose losses fall, with noise from a named stream."""
    draw = stream(SEED, "sample")
    rows: list[dict[str, Any]] = []

    def add(number: int, party: str | None, split: str | None, **values: float) -> None:
        head = {"round": number, "party": party, "split": split}
        rows.extend(head | {"name": name, "value": value} for name, value in values.items())

    for number in range(num_rounds + 1):
        level = 0.35 + 2.6 * 0.78**number + 0.004 * max(number - 9, 0)
        add(number, None, "common", loss_nats=level, perplexity_per_token=2.718**level)
        add(number, None, "held_out", loss_nats=level * 1.02, perplexity_per_byte=1 + level / 5)
        for place, party in enumerate(parties):
            shift = 1 + 0.1 * (place % 5) + float(draw.normal(0, 0.015))
            add(number, party, "held_out", loss_nats=level * shift)
            add(number, party, None, bytes_down=105_000 + 40 * place, bytes_up=104_000 + 1000 * (place % 7))
            if number:
                seconds = 1.7 + 0.4 * (place % 3) + float(draw.normal(0, 0.05))
                add(number, party, None, seconds_compute=seconds)
                steps = {"steps": 30, "examples": 480, "tokens": 17_000 + 500 * place}
                add(number, party, "train", loss_nats=level * shift * 0.9, learning_rate=0.005, **steps)
        wait = (2.1 * len(parties) if number else 0.2) + 0.6
        add(number, None, None, seconds_wait=wait, seconds_aggregate=0.04, seconds_write=0.03)
    return rows


def event_rows(num_rounds: int, *, party: str = "south") -> list[dict[str, Any]]:
    """Return the events of a run that lost a party once and was interrupted once."""
    rows: list[dict[str, Any]] = []

    def add(seconds: float, event: str, number: int | None = None, **more: str | None) -> None:
        time = (START + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")
        rows.append({"time": time, "event": event, "round": number, "party": None, "code": None, "detail": ""} | more)

    add(0, "run_started", detail="job adverts, digest 4f1c")
    for number in range(num_rounds + 1):
        late = 200 if number > 7 else 0
        add(10 * number + late, "round_started", number)
        if number == 5:
            add(10 * number + 8, "party_failed", 5, party=party, code="ROUND_TIMEOUT")
        if number == 7:
            add(10 * number + 3, "run_paused", code="INTERRUPTED", detail="It was interrupted. [INTERRUPTED]")
            add(10 * number + 203, "run_resumed")
            add(10 * number + 204, "rolled_back", 6, detail="round 7 is damaged; going on from 6")
        add(10 * number + 9 + late, "round_committed", number)
    add(10 * num_rounds + 212, "run_finished", detail="PARTIAL")
    return rows


def comparison(parties: Sequence[str]) -> dict[str, Any]:
    """Return a comparison of the paper's shape."""

    def row(model: str, kind: str, rouge: float, loss: float, party: str | None = None) -> dict[str, Any]:
        scores = {"rouge1": rouge + 3.2, "rouge2": rouge - 9.1, "rougeL": rouge, "bleu4": rouge - 14.3}
        losses = {
            "loss_nats": loss,
            "perplexity_per_token": 2.718281828**loss,
            "perplexity_per_byte": 1.1 + loss / 6,
        }
        return {"model": model, "kind": kind, "party": party, "examples": 240, **scores, **losses}

    alone = [
        row(f"{party} alone", "alone", 52.4 + 2 * (place % 5), 1.31 - 0.04 * (place % 5), party)
        for place, party in enumerate(parties)
    ]
    rows = [row("base model", "base", 31.2, 2.97), *alone, row("federated", "federated", 75.8, 0.452)]
    return {
        "rows": [*rows, row("pooled", "pooled", 80.9, 0.371)],
        "sentence": "The federated model recovers 80 % of the ROUGE-L gap between the mean single party (54.4) "
        "and pooling all data (80.9).",
        "bleu_signature": "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0",
        "rouge_tokenizer": "unicode-words/1",
    }


def config() -> dict[str, Any]:
    """Return effective settings with their origins."""
    chosen = {
        "name": "adverts",
        "seed": 7,
        "parties": ["north", "south", "east"],
        "federation.num_rounds": 12,
        "federation.strategy.server_momentum": 0.6,
        "model.model_name_or_path": "models/adverts-base",
        "train.local_steps": 30,
        "train.learning_rate": 0.005,
        "evaluate.test": "data/test.jsonl",
    }
    defaults = {
        "scenario": "FedHomoLLM",
        "peft.peft_type": "LORA",
        "peft.r": 8,
        "peft.lora_alpha": 16,
        "peft.target_modules": "all-linear",
        "train.optim": "adamw_torch",
        "train.bf16": False,
        "data.max_length": None,
    }
    values = [
        {"key": key, "value": value, "origin": f"job.yaml:{line}"}
        for line, (key, value) in enumerate(chosen.items(), start=2)
    ]
    values += [{"key": key, "value": value, "origin": "default"} for key, value in defaults.items()]
    values.append({"key": "train.per_device_train_batch_size", "value": 16, "origin": "flag"})
    return {"job_digest": "4f1c" * 16, "values": values}


def write_sample_run(run: Path, *, parties: Sequence[str] = PARTIES, num_rounds: int = 12) -> Path:
    """Write a whole run folder and return it.

    Args:
        run: The folder to make.
        parties: Names of the parties.
        num_rounds: Rounds after round 0.
    """
    run.mkdir(parents=True)
    (run / "job.yaml").write_text(JOB, encoding="utf-8")
    write_json(run / "config.json", config())
    write_json(run / "parties.json", [{"party": p, "train_examples": 600, "held_out_examples": 60} for p in parties])
    write_json(run / "comparison.json", comparison(parties))
    versions = {"fedllm": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2"}
    digests = {"job_digest": "4f1c" * 16, "base_digest": "a3" * 32, "tokenizer_digest": "7b" * 32}
    write_json(
        run / "provenance.json",
        digests
        | {
            "template_digest": "c0" * 32,
            "seed": SEED,
            "num_threads": 1,
            "versions": versions,
            "machine": {"platform": "Linux-6.1-x86_64", "processor": "x86_64", "cores": 2},
            "started": START.isoformat(),
            "scenario": "FedHomoLLM",
            "model_name_or_path": "models/adverts-base",
        },
    )
    write_json(
        run / "result.json",
        {
            "status": "PARTIAL",
            "reason": f"All {num_rounds} rounds were committed; {parties[1]} missed at least one.",
            "next": f"fedllm eval {run.name}",
            "rounds": num_rounds,
            "best_round": num_rounds - 2,
            "adapter_sha256": "9e" * 32,
        },
    )
    write_rows(run / "events.jsonl", event_rows(num_rounds, party=parties[1]))
    write_rows(run / "metrics.jsonl", metric_rows(parties, num_rounds))
    return run
