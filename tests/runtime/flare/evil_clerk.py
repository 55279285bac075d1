"""A coordinator that is up to no good: it hands the sites jobs that honest software would never make."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.fuel.utils.zip_utils import zip_directory_to_bytes
from nvflare.lighter.utils import load_private_key_file, sign_folders
from nvflare.private.fed.server.job_meta_validator import JobMetaValidator


class EvilClerk(FLComponent):
    """Submits every job folder under `SITE/evil`, signed by the coordinator's key unless it is called unsigned."""

    def __init__(self, site: str, admin: str) -> None:
        super().__init__()
        self._jobs, self._admin = Path(site) / "evil", Path(admin)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.SYSTEM_START:
            threading.Thread(target=self._work, args=(fl_ctx.get_engine(),), daemon=True).start()

    def _work(self, engine: Any) -> None:
        sent: dict[str, str] = {}
        while True:
            time.sleep(0.2)
            here = {client.name for client in engine.get_clients()}
            with engine.new_context() as fl_ctx:
                for folder in sorted(path for path in self._jobs.iterdir() if path.is_dir()):
                    party = folder.name.rsplit("-", 1)[-1]
                    if folder.name not in sent and party in here:
                        sent[folder.name] = self._submit(folder, engine, fl_ctx)
                for name, job_id in sent.items():
                    self._note(name, engine.job_def_manager.get_job(job_id, fl_ctx))

    def _submit(self, folder: Path, engine: Any, fl_ctx: FLContext) -> str:
        if not folder.name.startswith("unsigned"):
            key = load_private_key_file(str(self._admin / "key.pem"))
            sign_folders(str(folder), key, str(self._admin / "kit" / "cert.pem"))
        data = zip_directory_to_bytes(str(self._jobs), folder.name)
        _, _, meta = JobMetaValidator().validate(folder.name, data)
        meta |= {
            JobMetaKey.JOB_FOLDER_NAME.value: folder.name,
            JobMetaKey.SUBMITTER_NAME.value: "admin",
            JobMetaKey.SUBMITTER_ORG.value: "fedllm",
            JobMetaKey.SUBMITTER_ROLE.value: "project_admin",
        }
        return str(engine.job_def_manager.create(meta, data, fl_ctx)[JobMetaKey.JOB_ID.value])

    def _note(self, name: str, job: Any) -> None:
        status = str(job.meta.get(JobMetaKey.STATUS.value)) if job else "?"
        if status.startswith("FINISHED"):
            detail = job.meta.get(JobMetaKey.JOB_DEPLOY_DETAIL.value)
            (self._jobs / f"{name}.txt").write_text(f"{status} {detail}")
