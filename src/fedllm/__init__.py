"""Federated tuning of large language models. The command line uses the same names:

job = Job.from_yaml("job.yaml")
result = run_local(job)
result.rows()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedllm.job.job import Job, load_parties
    from fedllm.models.deliver import load_adapter
    from fedllm.runtime.audit import Audit, audit_adapter, audit_job, audit_run
    from fedllm.runtime.compare import Comparison, compare
    from fedllm.runtime.run import RunResult, Watch, resume, run_local
    from fedllm.train.hf_trainer import HFTrainer

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "Comparison",
    "HFTrainer",
    "Job",
    "RunResult",
    "Watch",
    "__version__",
    "audit_adapter",
    "audit_job",
    "audit_run",
    "compare",
    "load_adapter",
    "load_parties",
    "resume",
    "run_local",
]

# Loaded at first use: `import fedllm` and `fedllm --help` must not wait for torch.
_WHERE = {
    "Audit": "fedllm.runtime.audit",
    "Comparison": "fedllm.runtime.compare",
    "HFTrainer": "fedllm.train.hf_trainer",
    "Job": "fedllm.job.job",
    "RunResult": "fedllm.runtime.run",
    "Watch": "fedllm.runtime.run",
    "audit_adapter": "fedllm.runtime.audit",
    "audit_job": "fedllm.runtime.audit",
    "audit_run": "fedllm.runtime.audit",
    "compare": "fedllm.runtime.compare",
    "load_adapter": "fedllm.models.deliver",
    "load_parties": "fedllm.job.job",
    "resume": "fedllm.runtime.run",
    "run_local": "fedllm.runtime.run",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fedllm' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
