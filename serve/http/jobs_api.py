"""`/v1/jobs`: images that are asked for now and fetched later."""

import hashlib
from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.responses import Response

from ddm.errors import ConfigError, require
from serve.engine.job_queue import Error, Job, Jobs, Place
from serve.engine.models import Models
from serve.http.middleware import key_of, shown
from serve.http.responses import MissingError, failure
from serve.http.samples_api import RESULT_TYPES, check_combination, encoder, params_of
from serve.http.schemas import (
    IMAGE_ERRORS,
    JobError,
    JobList,
    JobRecord,
    JobRequest,
    errors,
    secured_by,
)
from serve.http.webhooks import check_webhook, deliver

_NAME = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "the same key again gives the same job, not a second one",
    "schema": {"type": "string", "minLength": 1, "maxLength": 128},
}


class NoResultError(Exception):
    """A job has no result, and will have none or not yet."""


def add_jobs(app: FastAPI, models: Models) -> Jobs:
    """Add these paths to the application; `stop` what is returned at the end."""
    secured = secured_by(models.settings.serve)
    config, secret = models.settings.serve.jobs, models.settings.webhook_secret()

    def explain(error: Exception) -> Error:
        if isinstance(error, ConfigError):
            return Error("invalid_value", str(error))
        detail = failure(error, config.deadline_s)[1]["error"]
        return Error(detail["type"], detail["message"])

    async def on_end(job: Job) -> None:
        if job.webhook is not None and secret is not None:
            body = record(job).model_dump_json().encode()
            await deliver(job.webhook, secret, job.id, body)

    jobs = Jobs(config, models.metrics, explain, on_end)
    if not models.settings.serve.is_one_service:
        return jobs  # the next request might reach another service, which does not know the job

    def record(job: Job) -> JobRecord:
        return records([job])[0]

    def records(some: Sequence[Job]) -> list[JobRecord]:
        return [_record(job, place) for job, place in zip(some, jobs.places(some), strict=True)]

    def _record(job: Job, place: Place) -> JobRecord:
        estimate_s = place.estimate_s
        return JobRecord(
            id=job.id,
            model=job.model,
            status=job.status,
            n=job.n,
            images=job.images if job.admitted is None else len(job.admitted.request.images),
            nfe_left=round(job.cost),
            position=place.position,
            estimate_s=None if estimate_s is None else round(estimate_s, 3),
            created=job.created_s,
            started=job.started_s,
            ended=job.ended_s,
            expires=None if job.ended_s is None else job.ended_s + config.keep_s,
            error=job.error and JobError(type=job.error.kind, message=job.error.message),
        )

    @app.post(
        "/v1/jobs",
        status_code=202,
        responses={200: {"model": JobRecord, "description": "submitted before"}, **IMAGE_ERRORS},
        dependencies=secured,
        openapi_extra={"parameters": [_NAME]},
    )
    async def submit(request: Request, body: JobRequest, response: Response) -> JobRecord:
        """Ask for images, and fetch them later."""
        require(not body.stream, "stream", "be false in a job", body.stream)
        check_combination(body)
        if body.webhook is not None:
            check_webhook(body.webhook, config.webhook_hosts)
        service = await models.get(body.model)
        params = await params_of(service, body, request)
        # From here on nothing waits, so that no other request of this name comes between.
        name = _name(request, body)
        if name is not None:
            before = jobs.known(key_of(request.scope), name)
            if before is not None:
                response.status_code = 200
                return record(before)
        jobs.require_room()
        encode = encoder(service, body)
        admitted = service.admit(params)
        job = Job(params.key, service, admitted, encode, service.name, name, body.webhook)
        jobs.submit(job)
        response.headers["location"] = f"jobs/{job.id}"
        return record(job)

    @app.get("/v1/jobs", responses=errors(401), dependencies=secured)
    async def listed(request: Request) -> JobList:
        """The jobs of this key."""
        return JobList(data=records(jobs.of(key_of(request.scope))))

    @app.get("/v1/jobs/{job_id}", responses=errors(401, 404, 422), dependencies=secured)
    async def status(request: Request, job_id: str) -> JobRecord:
        """What has become of a job."""
        return record(_find(jobs, request, job_id))

    @app.get(
        "/v1/jobs/{job_id}/result",
        response_class=Response,
        responses={
            200: {"content": {kind: {} for kind in RESULT_TYPES}},
            **errors(401, 404, 409, 422),
        },
        dependencies=secured,
    )
    async def result(request: Request, job_id: str) -> Response:
        """The images of a job that is done, as often as asked for."""
        job = _find(jobs, request, job_id)
        if job.answer is None:
            raise NoResultError(f"the job is {job.status}, and has no result")
        content, media_type, headers = job.answer
        return Response(content, media_type=media_type, headers=headers)

    @app.delete("/v1/jobs/{job_id}", responses=errors(401, 404, 422), dependencies=secured)
    async def cancel(request: Request, job_id: str) -> JobRecord:
        """Cancel a job, which frees its experts; drop one that has ended, with its result."""
        job = _find(jobs, request, job_id)
        jobs.cancel(job)
        return record(job)

    return jobs


def _find(jobs: Jobs, request: Request, job_id: str) -> Job:
    """A job of the key that asks. Raises `MissingError`."""
    job = jobs.find(key_of(request.scope), job_id)
    if job is None:
        raise MissingError(f"there is no job {shown(job_id)}, or not any more")
    return job


def _name(request: Request, body: JobRequest) -> tuple[str, str] | None:
    """The header Idempotency-Key and a digest of the body. Raises `ConfigError`."""
    name = request.headers.get("idempotency-key")
    if name is None:
        return None
    fits = 0 < len(name) <= 128
    require(fits, "Idempotency-Key", "have 1 to 128 characters", shown(name))
    return name, hashlib.sha256(body.model_dump_json().encode()).hexdigest()
